"""saev: one `.pt` whose first line is JSON, and torch's bytes after it; patches of a vision tower.

| header | `b_dec` subtracted before the encoder |
|---|---|
| without `schema` | yes: all of them were written before saev stopped to |
| `schema` 1, with the activation in `cls` or `n_reinit_samples` in `cfg` | not known: yes, unless told otherwise |
| `schema` 1 otherwise, 2 to 5 | no |

Files of the second kind were written before and after saev stopped to. TopK keeps the signs; BatchTopK has a threshold
at inference, and where that is not positive keeps what is positive. Files of the first two kinds may have been trained
on shifted and scaled activations, and do not say by how much: `input_stats=`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import probe, read
from clip_lens_ext.saes.formats.record import Record, need, only, translate

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_THRESHOLD = "activation.threshold"
_SCHEMAS = (None, 1, 2, 3, 4, 5)


def matches(path: Path) -> bool:
    """Whether `path` is a file that begins with saev's line of JSON."""
    found = probe(path)
    header = None if found is None else found.header
    return header is not None and ("schema" in header or "d_vit" in header or "exp_factor" in header)


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = Path(path)
    tensors, plain = read(path)
    header = plain.get("header")
    if not isinstance(header, dict):
        raise LoadError(f"{str(path)!r} does not begin with saev's line of JSON")
    enc, b_enc, dec, b_dec = need(tensors, path, *_NAMES)
    only(tensors, path, *_NAMES, _THRESHOLD)
    schema = header.get("schema")
    if schema not in _SCHEMAS:
        raise LoadError(f"{str(path)!r}: schema {schema!r} of saev is not known; 1 to 5 are")
    kind, k = _activation(header, path)
    subtract, ambiguous = _subtracts(header)
    metadata: dict[str, Any] = {"token_scope": "patches", "tower": "vision", "saev_schema": schema}
    if ambiguous:
        metadata["ambiguous"] = ["subtract_b_dec"]
    record = Record(enc, dec, b_enc, b_dec, subtract_b_dec=subtract, metadata=metadata)
    if kind == "TopK":
        record.activation, record.k, record.keep_sign = "topk", k, True
    elif kind == "BatchTopK":
        (threshold,) = need(tensors, path, _THRESHOLD)
        record.activation, record.threshold = "threshold", float(threshold)
    return translate(record, path, format="saev", device=device, cfg_overrides=cfg_overrides)


def _activation(header: dict[str, Any], path: Path) -> tuple[str, int | None]:
    if "schema" not in header:
        return "Relu", None
    cfg = header.get("cfg")
    if not isinstance(cfg, dict):
        raise LoadError(f"{str(path)!r}: the header has no cfg")
    kind, params = header.get("cls"), cfg
    if header["schema"] != 1 or kind not in ("Relu", "TopK", "BatchTopK"):
        stated = cfg.get("activation", {"cls": "Relu"})
        if not isinstance(stated, dict):
            raise LoadError(f"{str(path)!r}: the activation in the header is {stated!r}")
        kind, params = stated.get("cls"), {**stated, **(stated.get("params") or {})}
    if kind not in ("Relu", "TopK", "BatchTopK"):
        raise LoadError(f"{str(path)!r}: saev's activation {kind!r} is not known; Relu, TopK and BatchTopK are")
    default = 32 if header["schema"] == 1 and header.get("cls") == kind else None  # what saev's own loader takes
    return str(kind), params.get("top_k", default)


def _subtracts(header: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the bias is subtracted, and whether that is a guess."""
    if "schema" not in header:
        return True, False
    if header["schema"] != 1:
        return False, False
    old = header.get("cls") in ("Relu", "TopK", "BatchTopK") or "n_reinit_samples" in header.get("cfg", {})
    return old, old
