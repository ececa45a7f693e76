"""Transcoders in SAELens' words: what Prisma and sparsify have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import __version__ as sae_lens_version
from sae_lens.util import str_to_dtype
from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.clip_transcoder import ARCHITECTURE
from clip_lens_ext.saes.formats.record import OWN_OVERRIDES
from clip_lens_ext.saes.formats.verify import file_sha256, verify_config, verify_weights


@dataclass
class TranscoderRecord:
    """A transcoder as its family describes it; see `ClipTranscoder`.

    Attributes:
        W_enc, W_dec: `[d_in d_sae]` and `[d_sae d_out]`.
        b_enc, b_dec: `[d_sae]` and `[d_out]`.
        b_in, W_skip: `[d_in]` and `[d_out d_in]`; None for none.
        k: of TopK; None for relu.
        layer_norm: the input is normalised, and the output un-normalised with the input's statistics.
        metadata: `hook_name` and `hook_name_out`, and what else the family says.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    b_in: Tensor | None = None
    W_skip: Tensor | None = None
    k: int | None = None
    layer_norm: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


def translate_transcoder(
    record: TranscoderRecord, path: Path, *, format: str, device: str, cfg_overrides: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of a `ClipTranscoder`, checked.

    Raises:
        LoadError: shapes that do not fit each other, a NaN, or a setting that a transcoder does not have.
    """
    overrides = dict(cfg_overrides or {})
    for name in (*OWN_OVERRIDES, "settings"):
        if name in overrides:
            raise LoadError(f"{str(path)!r} is a transcoder, and {name}= is for SAEs of one hook")
    if record.W_enc.dim() != 2 or record.W_dec.dim() != 2:
        raise LoadError(
            f"{str(path)!r}: the encoder is {list(record.W_enc.shape)} and the decoder {list(record.W_dec.shape)}; "
            "they have to be [d_in d_sae] and [d_sae d_out]"
        )
    (d_in, d_sae), d_out = record.W_enc.shape, record.W_dec.shape[1]
    k = overrides.pop("k", record.k)
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURE, "d_in": d_in, "d_out": d_out, "d_sae": d_sae, "dtype": "float32",
        "device": device, "apply_b_dec_to_input": False, "activation": "relu" if k is None else "topk", "k": k or 0,
        "normalize_activations": "layer_norm" if record.layer_norm else "none",
        **overrides,
    }  # fmt: skip
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae):
        raise LoadError(f"{str(path)!r}: k must be an integer in 1..{d_sae}, not {k!r}")
    if record.layer_norm and d_in != d_out:
        raise LoadError(f"{str(path)!r}: a layer norm of {d_in} numbers cannot be undone on {d_out}")
    state = {
        "W_enc": record.W_enc.contiguous(), "W_dec": record.W_dec.contiguous(), "b_enc": record.b_enc,
        "b_dec": record.b_dec,
        "b_in": record.W_enc.new_zeros(d_in) if record.b_in is None else record.b_in,
        "W_skip": record.W_enc.new_zeros(d_out, d_in) if record.W_skip is None else record.W_skip,
    }  # fmt: skip
    for name, value in state.items():
        if not value.is_floating_point():
            raise LoadError(f"{name} in {str(path)!r} is {value.dtype}; weights are floating-point numbers")
        state[name] = value.detach().to(device, str_to_dtype(cfg["dtype"]))
    verify_config(cfg, path)
    verify_weights(cfg, state, path)
    cfg["metadata"] = {
        **record.metadata, "format": format, "sha256": file_sha256(path), "sae_lens_version": sae_lens_version,
    }  # fmt: skip
    return cfg, state
