"""Ways in which a weight file can be wrong."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def damage(path: Path, fault: str) -> None:
    """Break a weight file in place: `"truncated"`, `"not a number"`, `"another shape"` or `"extra"`."""
    raw = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(raw[: int(0.6 * len(raw))])
        return
    if path.suffix == ".safetensors":
        save_file(_changed(load_file(path), fault), path)
        return
    header = b""
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    elif raw[:1] == b"{":
        line = raw.index(b"\n") + 1
        header, raw = raw[:line], raw[line:]
    # Stand-ins for pickled configurations stay what they are: only the tensors change.
    from clip_lens_ext.saes.formats.unpickle import load_torch

    found = load_torch(path, data=raw)
    buffer = io.BytesIO()
    torch.save(_plain(_changed(found, fault)), buffer)
    out = header + buffer.getvalue()
    path.write_bytes(gzip.compress(out) if path.suffix == ".gz" else out)


def _plain(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _plain(value) for name, value in found.items()}
    return (
        found if isinstance(found, Tensor | int | float | str | bool | list | tuple | type(None)) else dict(vars(found))
    )


def _changed(found: Any, fault: str) -> Any:
    """The mapping that holds the weights, changed; others inside it as they are."""
    inner = next(
        (name for name in ("state_dict", "model_state_dict", "model") if isinstance(found.get(name), dict)), None
    )
    if inner is not None:
        return {**found, inner: _changed(found[inner], fault)}
    names = [
        name
        for name, value in found.items()
        if isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point()
    ]
    if fault == "extra":
        return {**found, "stray": torch.zeros(3)}
    if fault == "not a number":
        value = found[names[0]].clone()
        value.view(-1)[1] = torch.nan
        return {**found, names[0]: value}
    return {**found, names[0]: found[names[0]][..., :-1, :].contiguous()}
