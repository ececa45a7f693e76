"""Which models work: every model config of open_clip, built without weights on torch's meta device, and its hooks.

`python -m benchmarks.models` writes the table of docs/models.md.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import _build_text_tower, _build_vision_tower
from torch import nn
from tqdm.auto import tqdm

from benchmarks.page import table, write_section
from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.towers import HookedTower, TowerConfig

PAGE = Path(__file__).parent.parent / "docs" / "models.md"


@dataclass(frozen=True)
class Row:
    """One tower of one model.

    Attributes:
        model: open_clip's name.
        tower: vision or text.
        native: the class whose blocks are read.
        cfg: what the tower says of itself, or None.
        why_not: where it was not built or not read.
    """

    model: str
    tower: str
    native: str
    cfg: TowerConfig | None
    why_not: str = ""


def coverage(models: list[str] | None = None, *, progress: bool = True) -> Iterator[Row]:
    """Every tower of every model; towers with the same settings are built once.

    Args:
        models: open_clip's names; None means all.
        progress: show a bar.
    """
    built: dict[str, tuple[str, TowerConfig | None, str]] = {}
    for model in tqdm(models or open_clip.list_models(), desc="models", disable=not progress):
        config: Any = open_clip.get_model_config(model)
        for tower in ("vision", "text"):
            parts = (config["embed_dim"], config[f"{tower}_cfg"], bool(config.get("quick_gelu", False)))
            key = json.dumps([tower, *parts], sort_keys=True)
            if key not in built:
                built[key] = _build(tower, *parts)
            yield Row(model, tower, *built[key])


def _build(tower: str, embed_dim: int, settings: dict[str, Any], quick_gelu: bool) -> tuple[str, TowerConfig | None, str]:
    if settings.get("hf_model_name"):
        # Its sizes are in a file on the hub; the classes are held against their own forward in the tests.
        return f"HFTextEncoder ({settings['hf_model_name']})", None, "sizes are fetched from the hub"
    make = {"vision": _build_vision_tower, "text": _build_text_tower}[tower]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        native: nn.Module = make(embed_dim, dict(settings), quick_gelu).eval()
    body = getattr(native, "trunk", native)
    assert not isinstance(native, HFTextEncoder)
    try:
        return type(body).__name__, HookedTower(native).cfg, ""
    except UnsupportedModelError as error:
        return type(body).__name__, None, str(error)


def _described(cfg: TowerConfig | None) -> str:
    if cfg is None:
        return "residual"
    return "every hook" if cfg.hooks == "full" else "residual"


def main() -> None:
    """Build all, group, print, and write the table."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    rows = list(coverage())
    for row in rows:
        native = row.native.split(" (")[0]
        native = f"timm {native}" if row.cfg is not None and _is_timm(row) else native
        pooling = "its own head" if row.cfg is None or row.cfg.pooling == "the native head" else row.cfg.pooling
        groups.setdefault((row.tower, native, _described(row.cfg), pooling), []).append(row.model)
    lines = [
        [tower, native, hooks, pooling, str(len(models)), ", ".join(f"`{model}`" for model in models)]
        for (tower, native, hooks, pooling), models in sorted(groups.items(), key=lambda item: (item[0][0] == "text", -len(item[1])))
    ]
    unread = [row for row in rows if row.cfg is None and not row.native.startswith("HFTextEncoder")]
    text = f"""
`python -m benchmarks.models` (open_clip {open_clip.__version__}, {len({row.model for row in rows})} models, built without
weights; {len(unread)} towers could not be read)

{table(["tower", "native class", "hooks", "pooling", "models", "names"], lines)}
"""
    print(text)
    write_section("models", text, PAGE)


def _is_timm(row: Row) -> bool:
    return "timm_model_name" in open_clip.get_model_config(row.model)["vision_cfg"] and row.tower == "vision"


if __name__ == "__main__":
    main()
