"""DN-CBM: `sparse_autoencoder_final.pt`, weights with an axis of components; on un-normalised image embeddings.

`z = relu((x - tied_bias) W_enc + b_enc)`, `x_hat = z W_dec + tied_bias`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import probe, read
from clip_lens_ext.saes.formats.record import Record, need, only, translate

_NAMES = ("tied_bias", "encoder._weight", "encoder._bias", "decoder._weight")
_COPIES = ("pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")


def matches(path: Path) -> bool:
    """Whether `path` is a file with the library's five tensors."""
    found = probe(path)
    return found is not None and found.has(*_NAMES, _COPIES[0])


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = Path(path)
    tensors, _ = read(path)
    bias, enc, b_enc, dec = need(tensors, path, *_NAMES)
    only(tensors, path, *_NAMES, *_COPIES)
    for name, value in {"tied_bias": bias, "encoder._weight": enc, "decoder._weight": dec}.items():
        if value.shape[0] != 1:
            raise LoadError(f"{name} in {str(path)!r} has {value.shape[0]} components; one is read")
    if (enc.dim(), dec.dim(), bias.dim(), b_enc.dim()) != (3, 3, 2, 2):
        raise LoadError(f"{str(path)!r}: weights [1 d_sae d_in] and biases [1 d] are read, found {list(enc.shape)}")
    metadata = {"hook_name": "hook_embedding", "token_scope": "pooled", "tower": "vision"}
    record = Record(enc[0].T, dec[0].T, b_enc[0], bias[0], subtract_b_dec=True, metadata=metadata)
    return translate(record, path, format="dn_cbm", device=device, cfg_overrides=cfg_overrides)
