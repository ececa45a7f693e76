"""PatchSAE, HugoFry and ConceptScope: one pickle with `cfg` or `config` and `state_dict`; all tokens of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.saes.formats.pickled import WEIGHTS, fields_of, hook_of, weights_of
from clip_lens_ext.saes.formats.probe import probe, read
from clip_lens_ext.saes.formats.record import Record, need, only, translate


def matches(path: Path) -> bool:
    """Whether `path` is a file with such a configuration and weights."""
    found = probe(path)
    if found is None or found.header is not None or not found.has("state_dict.W_enc", "state_dict.W_dec"):
        return False
    fields = fields_of(found.plain)
    return bool(fields) and "hook_point_layer" not in fields


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = Path(path)
    tensors, plain = read(path)
    weights = weights_of(tensors)
    enc, b_enc, dec, b_dec = need(weights, path, *WEIGHTS)
    only(weights, path, *WEIGHTS, "r_mag", "b_mag")
    fields = fields_of(plain)
    metadata = {"tower": "vision", "token_scope": "cls" if fields.get("class_token") else "all", **hook_of(fields)}
    record = Record(enc, dec, b_enc, b_dec, subtract_b_dec=True, metadata=metadata)
    return translate(record, path, format="patchsae", device=device, cfg_overrides=cfg_overrides)
