"""clip-topk-sae: a hub mixin's `config.json` and `model.safetensors`, or `clip_sae_checkpoint.pt`; on embeddings.

`z = topk(x W_enc + b_enc)` with the signs kept and nothing subtracted; decoder rows are normalised when they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.saes.formats.probe import probe, read, read_json
from clip_lens_ext.saes.formats.record import Record, need, only, translate, unit_rows


def _file(path: Path) -> Path:
    if path.is_dir():
        return next(
            (path / name for name in ("model.safetensors", "clip_sae_checkpoint.pt") if (path / name).is_file()), path
        )
    return path


def _prefix(names: Any) -> str:
    return next(
        (prefix for prefix in ("", "model_state_dict.", "state_dict.", "model.") if f"{prefix}feature_counts" in names),
        "",
    )


def matches(path: Path) -> bool:
    """Whether `path` is, or holds, weights that count their features."""
    found = probe(_file(path))
    return found is not None and found.has(
        *(f"{_prefix(found.shapes)}{name}" for name in ("W_enc", "W_dec", "feature_counts"))
    )


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = _file(Path(path))
    tensors, plain = read(path)
    prefix = _prefix(tensors)
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    enc, b_enc, dec = need(tensors, path, "W_enc", "b_enc", "W_dec")
    only(tensors, path, "W_enc", "b_enc", "W_dec", "b_dec", "feature_counts", "total_samples")
    config = read_json(path.parent / "config.json") if (path.parent / "config.json").is_file() else plain
    k = next((config[name] for name in ("k", "top_k", "topk", "config.k", "cfg.k") if name in config), None)
    metadata = {"hook_name": "hook_embedding", "token_scope": "pooled"}
    record = Record(enc, unit_rows(dec), b_enc, tensors.get("b_dec"), "topk", k, keep_sign=True, metadata=metadata)
    return translate(record, path, format="clip_topk_sae", device=device, cfg_overrides=cfg_overrides)
