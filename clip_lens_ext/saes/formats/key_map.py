"""Any other file of tensors: `format="key_map"` with the names of its weights, and how they are used.

    load_sae(path, format="key_map", hook_name=..., settings={
        "W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias",
        "activation": "relu", "subtract_b_dec": False})

Weights may lie either way round; that of two equal sizes is an error, unless `"transposed"` says it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import read
from clip_lens_ext.saes.formats.record import Record, need, translate

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_SETTINGS = (
    *_NAMES, "activation", "k", "keep_sign", "inclusive", "threshold", "subtract_b_dec", "layer_norm", "soft_cap",
    "transposed",
)  # fmt: skip


def matches(path: Path) -> bool:
    """Never: this format is asked for by name."""
    return False


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = Path(path)
    overrides = dict(cfg_overrides or {})
    settings = overrides.pop("settings", None) or {}
    unknown = sorted(set(settings) - set(_SETTINGS))
    lacking = [name for name in ("W_enc", "W_dec", "activation", "subtract_b_dec") if name not in settings]
    if unknown or lacking:
        raise LoadError(
            f"settings= of format 'key_map' lacks {', '.join(lacking) or 'nothing'} and does not know "
            f"{', '.join(unknown) or 'nothing'}; it takes {', '.join(_SETTINGS)}"
        )
    tensors, _ = read(path)
    found = {name: need(tensors, path, settings[name])[0] for name in _NAMES if settings.get(name)}
    enc, dec = _oriented(found["W_enc"], found["W_dec"], found.get("b_enc"), settings, path)
    record = Record(
        enc, dec, found.get("b_enc"), found.get("b_dec"), settings["activation"], settings.get("k"),
        keep_sign=bool(settings.get("keep_sign")), inclusive=bool(settings.get("inclusive")),
        threshold=settings.get("threshold"), subtract_b_dec=bool(settings["subtract_b_dec"]),
        layer_norm=bool(settings.get("layer_norm")), soft_cap=float(settings.get("soft_cap") or 0),
    )  # fmt: skip
    if record.activation not in ("relu", "topk", "threshold"):
        raise LoadError(f"activation {record.activation!r} is not known; relu, topk and threshold are")
    return translate(record, path, format="key_map", device=device, cfg_overrides=overrides)


def _oriented(
    enc: Tensor, dec: Tensor, b_enc: Tensor | None, settings: dict[str, Any], path: Path
) -> tuple[Tensor, Tensor]:
    if enc.dim() != 2 or dec.dim() != 2 or sorted(enc.shape) != sorted(dec.shape):
        raise LoadError(
            f"{str(path)!r}: W_enc is {list(enc.shape)}, W_dec is {list(dec.shape)}: no encoder and decoder"
        )
    if "transposed" in settings:
        return (enc.T, dec.T) if settings["transposed"] else (enc, dec)
    d_sae = max(enc.shape) if b_enc is None else len(b_enc)
    if enc.shape[0] == enc.shape[1]:
        raise LoadError(
            f"{str(path)!r}: W_enc is square, so its shape does not say which way it lies: say 'transposed'"
        )
    return enc if enc.shape[1] == d_sae else enc.T, dec if dec.shape[0] == d_sae else dec.T
