"""clipscope: `{layer}_resid/*.pt` with `k`, `n_features`, `d_in` and `model_state_dict.{pre_b, enc, dec}`.

`z = topk((x - pre_b) enc)` with the signs kept and no encoder bias; `x_hat = z dec + pre_b`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.saes.formats.probe import probe, read
from clip_lens_ext.saes.formats.record import Record, need, only, translate

_NAMES = ("model_state_dict.pre_b", "model_state_dict.enc", "model_state_dict.dec")


def matches(path: Path) -> bool:
    """Whether `path` is a file with clipscope's three tensors."""
    found = probe(path)
    return found is not None and found.has(*_NAMES)


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = Path(path)
    tensors, plain = read(path)
    pre_b, enc, dec = need(tensors, path, *_NAMES)
    only(tensors, path, *_NAMES)
    metadata: dict[str, Any] = {"token_scope": "all"}
    layer = re.fullmatch(r"(\d+)_resid", path.parent.name)
    if layer:
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    record = Record(
        enc, dec, None, pre_b, "topk", plain.get("k"), keep_sign=True, subtract_b_dec=True, metadata=metadata
    )
    return translate(record, path, format="clipscope", device=device, cfg_overrides=cfg_overrides)
