"""dictionary_learning, and sae-for-vlm, which has an older copy of it: `ae.pt` or `ae_{step}.pt`, and `config.json`.

| dict_class | function |
|---|---|
| AutoEncoder | `relu((x - bias) E + b)`, `z D + bias`; decoder columns are normalised on load, and the encoder is not |
| AutoEncoderNew | `relu(x E + b)`, nothing subtracted |
| AutoEncoderTopK | `topk(relu((x - b_dec) E + b))` |
| BatchTopKSAE, Matryoshka | at inference `relu((x - b_dec) E + b)` where that is greater than `threshold` |
| GatedAutoEncoder | SAELens' gated one |
| JumpReluAutoEncoder | `relu(x E + b)` where `x E + b > threshold`; `b_dec` subtracted where the config says so |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import Probe, probe, read, read_json
from clip_lens_ext.saes.formats.record import Record, need, only, translate, unit_rows

_TOPK = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
_PLAIN = ("encoder.weight", "encoder.bias", "decoder.weight", "bias")
_GATED = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
_MATRIX = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted([*path.glob("ae.pt"), *path.glob("ae_*.pt"), *path.glob("checkpoints/ae_*.pt")])
    # Of several steps the last one, by number and not by name; `ae.pt` is what a finished training leaves.
    return max(found, key=_step) if found else path


def _step(file: Path) -> int:
    number = re.search(r"ae_(\d+)", file.stem)
    return int(number[1]) if number else 1 << 60


def _config(file: Path) -> dict[str, Any]:
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            found = read_json(folder / "config.json")
            trainer = found.get("trainer")
            return trainer if isinstance(trainer, dict) else {}
    return {}


def matches(path: Path) -> bool:
    """Whether `path` is, or holds, a state dict of one of the library's classes."""
    file = _file(path)
    found = probe(file)
    # SAELens' own JumpReLU has the names of this one, in safetensors.
    if file.suffix == ".safetensors":
        return False
    return found is not None and found.header is None and _kind(found, _config_or_none(file)) is not None


def _config_or_none(file: Path) -> dict[str, Any]:
    try:
        return _config(file)
    except LoadError:
        return {}


def _kind(found: Probe, config: dict[str, Any]) -> str | None:
    if found.has(*_TOPK):
        # The older BatchTopK has a threshold buffer too; only the name of its class tells it from TopK.
        return "threshold" if _is_batch(config) else "topk" if found.has("k") else None
    if found.has(*_GATED):
        return "gated"
    if found.has(*_PLAIN):
        return "relu"
    if found.has(*_MATRIX):
        if found.has("group_sizes") or found.has("k"):
            return "threshold"
        return "jumprelu" if "dict_class" in config or set(found.shapes) == set(_MATRIX) else None
    if found.has("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"):
        return "new"
    return None


def _is_batch(config: dict[str, Any]) -> bool:
    name = str(config.get("dict_class", "")).lower()
    return "batch" in name or "matryoshka" in name or "matroyshka" in name


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = _file(Path(path))
    tensors, _ = read(path)
    config = _config(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    kind = _kind(Probe(path, shapes), config)
    if kind is None:
        raise LoadError(
            f"{str(path)!r} is of none of dictionary_learning's classes: it has {', '.join(sorted(shapes)[:8])}"
        )
    record = _record(kind, tensors, config, path)
    record.metadata |= _metadata(path, config)
    return translate(record, path, format=_format(path), device=device, cfg_overrides=cfg_overrides)


def _record(kind: str, tensors: dict[str, Tensor], config: dict[str, Any], path: Path) -> Record:
    if kind == "gated":
        enc, dec, b_dec, r_mag, gate, mag = need(tensors, path, *_GATED)
        only(tensors, path, *_GATED, "encoder.bias")
        return Record(
            enc.T, dec.T, None, b_dec, "gated", gate={"b_gate": gate, "r_mag": r_mag, "b_mag": mag}, subtract_b_dec=True
        )
    if kind == "new":
        names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
        enc, b_enc, dec, b_dec = need(tensors, path, *names)
        only(tensors, path, *names)
        return Record(enc.T, dec.T, b_enc, b_dec)
    if kind == "relu":
        enc, b_enc, dec, bias = need(tensors, path, *_PLAIN)
        only(tensors, path, *_PLAIN)
        return Record(enc.T, unit_rows(dec.T), b_enc, bias, subtract_b_dec=True)
    if kind == "jumprelu" or (kind == "threshold" and "W_enc" in tensors):
        enc, b_enc, dec, b_dec, threshold = need(tensors, path, *_MATRIX)
        only(tensors, path, *_MATRIX, "k", "group_sizes", "group_weights")
        subtract = kind == "threshold" or bool(config.get("apply_b_dec_to_input", False))
        return Record(enc, dec, b_enc, b_dec, "threshold", threshold=threshold, subtract_b_dec=subtract)
    enc, b_enc, dec, b_dec = need(tensors, path, *_TOPK)
    only(tensors, path, *_TOPK, "k", "threshold", "group_sizes")
    if kind == "threshold":
        (threshold,) = need(tensors, path, "threshold")
        return Record(enc.T, dec.T, b_enc, b_dec, "threshold", threshold=float(threshold), subtract_b_dec=True)
    return Record(enc.T, dec.T, b_enc, b_dec, "topk", int(tensors["k"]), subtract_b_dec=True)


def _format(path: Path) -> str:
    return "sae_for_vlm" if any(part.startswith("trainer_") for part in path.parts) else "dictionary_learning"


def _metadata(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.get("lm_name"):
        found["model_name"] = config["lm_name"]
    where = re.search(r"post_mlp_residual_(\d+)", str(path))
    if where:
        found["hook_name"] = f"blocks.{where[1]}.hook_resid_post"
    elif "post_projection" in str(path):
        found["hook_name"] = "hook_embedding"
    return found
