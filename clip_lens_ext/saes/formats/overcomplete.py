"""overcomplete: a state dict with `dictionary._weights` and a linear encoder, with a batch norm or without.

The dictionary's rows are normalised when they are used, and nothing is added to the reconstruction. What follows the
encoder is an attribute that no file has: `k=` for TopK, `settings={"threshold": t}` for BatchTopK (kept at `t` and
above), or `settings={"activation": "relu"}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import probe, read
from clip_lens_ext.saes.formats.record import Record, need, only, translate, unit_rows

_DICTIONARY = "dictionary._weights"
_LINEAR = ("encoder.final_block.0.weight", "encoder.final_block.0.bias")
_NORM = tuple(f"encoder.final_block.1.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
_EPS = 1e-5


def matches(path: Path) -> bool:
    """Whether `path` is a file with the library's dictionary."""
    found = probe(path)
    return found is not None and found.has(_DICTIONARY)


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = Path(path)
    tensors, _ = read(path)
    overrides = dict(cfg_overrides or {})
    settings = overrides.pop("settings", None) or {}
    if any(name.startswith("encoder.mlp_blocks.") for name in tensors):
        raise LoadError(f"{str(path)!r}: an encoder of several layers is no SAE of W_enc and b_enc")
    dictionary, weight, bias = need(tensors, path, _DICTIONARY, *_LINEAR)
    only(
        tensors,
        path,
        _DICTIONARY,
        *_LINEAR,
        *_NORM,
        "encoder.final_block.1.num_batches_tracked",
        "dictionary.multiplier",
    )
    if _NORM[0] in tensors:
        weight, bias = _fold(weight, bias, *need(tensors, path, *_NORM))
    rows = unit_rows(dictionary)
    if "dictionary.multiplier" in tensors:
        rows = rows * tensors["dictionary.multiplier"].exp()
    record = Record(weight.T, rows, bias, None)
    if overrides.get("k") is not None:
        record.activation = "topk"
    elif "threshold" in settings:
        record.activation, record.threshold, record.inclusive = "threshold", float(settings["threshold"]), True
    elif settings.get("activation") != "relu":
        raise LoadError(
            f"{str(path)!r} does not say what follows its encoder: pass k= for TopK, settings={{'threshold': t}} for "
            "BatchTopK, or settings={'activation': 'relu'}"
        )
    return translate(record, path, format="overcomplete", device=device, cfg_overrides=overrides)


def _fold(
    weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """A linear layer and the batch norm after it, in evaluation mode, as one linear layer; in float64."""
    scale = gain.double() / (variance.double() + _EPS).sqrt()
    folded = (bias.double() - mean.double()) * scale + shift.double()
    return (weight.double() * scale[:, None]).to(weight.dtype), folded.to(bias.dtype)
