"""attributing-clip: a Lightning `.ckpt` with weight-normalised encoder and decoder, in torch's old or new spelling.

`W = v g / |v|`, the norm over the axes that `g` does not have; `z = topk(x W_enc + b)` with the signs kept, no bias
before the encoder and none in the decoder. Its configuration is in another file: `k` is 64 where nothing is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import probe, read
from clip_lens_ext.saes.formats.record import Record, need, only, translate

K = 64
_SPELLINGS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


def _names(prefix: str, spelling: tuple[str, str]) -> tuple[str, ...]:
    g, v = spelling
    return (f"{prefix}encoder.0.{g}", f"{prefix}encoder.0.{v}", f"{prefix}encoder.0.bias",
            f"{prefix}decoder.{g}", f"{prefix}decoder.{v}")  # fmt: skip


def _layout(has: Any) -> tuple[str, ...] | None:
    for prefix in ("state_dict.", "state_dict.model.", "state_dict.sae.", ""):
        for spelling in _SPELLINGS:
            names = _names(prefix, spelling)
            if all(name in has for name in names):
                return names
    return None


def matches(path: Path) -> bool:
    """Whether `path` is a file with weight-normalised encoder and decoder."""
    found = probe(path)
    return found is not None and _layout(found.shapes) is not None


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = Path(path)
    tensors, _ = read(path)
    names = _layout(tensors)
    if names is None:
        raise LoadError(f"{str(path)!r} has no weight-normalised encoder and decoder")
    enc_g, enc_v, bias, dec_g, dec_v = need(tensors, path, *names)
    only(
        {name: value for name, value in tensors.items() if name.startswith(("state_dict.", "encoder", "decoder"))},
        path,
        *names,
    )
    overrides = {"k": K, **(cfg_overrides or {})}
    record = Record(
        _weight(enc_g, enc_v, path).T, _weight(dec_g, dec_v, path).T, bias, None, "topk", keep_sign=True,
        metadata={} if "k" in (cfg_overrides or {}) else {"assumed": {"k": K}},
    )  # fmt: skip
    return translate(record, path, format="attributing_clip", device=device, cfg_overrides=overrides)


def _weight(g: Tensor, v: Tensor, path: Path) -> Tensor:
    """`v g / |v|`, with the norm over every axis along which `g` is one number."""
    if g.dim() != 2 or v.dim() != 2 or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True)):
        raise LoadError(f"{str(path)!r}: a weight norm of {list(g.shape)} does not fit a weight of {list(v.shape)}")
    axes = [axis for axis in range(2) if g.shape[axis] == 1]
    return v * (g / v.norm(dim=axes, keepdim=True))
