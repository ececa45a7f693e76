"""Prisma: `config.json` beside `weights.pt`, or one `n_images_*.pt` with the configuration pickled in it.

`z = act((norm(x) - b_dec) W_enc + b_enc)`, `x_hat = unnorm(z W_dec + b_dec)`: relu, topk with relu, or gated; a layer
norm or none. A transcoder gives `unnorm(z W_dec + b_dec_out + x W_skip^T)`, for the hook `hook_name_out` of its
metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.pickled import (
    fields_of,
    hook_of,
    is_transcoder,
    prisma_record,
    prisma_transcoder_record,
    weights_of,
)
from clip_lens_ext.saes.formats.probe import probe, read, read_json
from clip_lens_ext.saes.formats.record import translate
from clip_lens_ext.saes.formats.transcoder import translate_transcoder

_FIELDS = ("hook_point_layer", "layer_subtype")


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    named = [path / "weights.pt", *sorted(path.glob("n_images_*.pt"))]
    return next((file for file in named if file.is_file()), path)


def _fields(file: Path, plain: dict[str, Any]) -> dict[str, Any]:
    beside = file.parent / "config.json"
    return read_json(beside) if beside.is_file() else fields_of(plain)


def matches(path: Path) -> bool:
    """Whether `path` is, or holds, weights with Prisma's configuration."""
    file = _file(path)
    found = probe(file)
    if found is None or found.header is not None or not any(name.endswith("W_enc") for name in found.shapes):
        return False
    try:
        fields = _fields(file, found.plain)
    except LoadError:
        return False
    return all(name in fields for name in _FIELDS)


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = _file(Path(path))
    tensors, plain = read(path)
    fields = _fields(path, plain)
    if not fields:
        raise LoadError(f"{str(path)!r} has no configuration of Prisma, in it or beside it")
    weights = weights_of(tensors)
    if is_transcoder(weights, fields):
        transcoder = prisma_transcoder_record(weights, fields, path)
        return translate_transcoder(transcoder, path, format="prisma", device=device, cfg_overrides=cfg_overrides)
    record = prisma_record(weights, fields, path)
    record.metadata |= {"tower": "vision", **hook_of(fields)}
    return translate(record, path, format="prisma", device=device, cfg_overrides=cfg_overrides)
