"""One record for all families, and its translation into SAELens' words: the class that says the same function."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.util import str_to_dtype
from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.clip_sae import ARCHITECTURE
from clip_lens_ext.saes.formats.verify import file_sha256, verify_config, verify_weights

OWN_OVERRIDES = ("subtract_b_dec", "input_stats")


@dataclass
class Record:
    """An SAE as its family describes it.

    Attributes:
        W_enc, W_dec: `[d_in d_sae]` and `[d_sae d_in]`.
        b_enc, b_dec: None for none.
        activation: `"relu"`, `"topk"`, `"threshold"` or `"gated"`.
        k: of TopK.
        keep_sign: TopK and thresholds keep negative values.
        inclusive: a value at its threshold is kept.
        threshold: a number, or one for each latent.
        gate: `b_gate`, `r_mag`, `b_mag` of a gated SAE.
        subtract_b_dec: from the input, before the encoder.
        layer_norm: the input is normalised as Prisma and SAELens do it.
        input_mean, input_scale: what is subtracted and what is multiplied then; None and 1 for none.
        soft_cap: 0 for none.
        metadata: `hook_name`, `token_scope`, `model_name`, `tower`, and notes, where the family says so.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    activation: Literal["relu", "topk", "threshold", "gated"] = "relu"
    k: int | None = None
    keep_sign: bool = False
    inclusive: bool = False
    threshold: Tensor | float | None = None
    gate: dict[str, Tensor] = field(default_factory=dict)
    subtract_b_dec: bool = False
    layer_norm: bool = False
    input_mean: Tensor | None = None
    input_scale: float = 1.0
    soft_cap: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)


def translate(
    record: Record, path: Path, *, format: str, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of SAELens' class for a record, checked.

    Args:
        record: the SAE.
        path: the weight file.
        format: the family's name.
        device: where the weights go.
        cfg_overrides: fields of SAELens' config that win, and `subtract_b_dec`, `input_stats` of `load_sae`.

    Raises:
        LoadError: shapes that do not fit each other, a NaN, or a setting out of range.
    """
    overrides = dict(cfg_overrides or {})
    if "settings" in overrides:
        raise LoadError(f"the SAE format {format!r} takes no settings=: its files say what there is to say")
    _apply_own(record, overrides, path)
    d_in, d_sae = _sizes(record, path)
    if overrides.get("k") is not None:
        record.k = overrides.pop("k")
    architecture = _architecture(record)
    cfg: dict[str, Any] = {
        "architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": device,
        "apply_b_dec_to_input": record.subtract_b_dec,
        "normalize_activations": "layer_norm" if record.layer_norm else "none",
    }  # fmt: skip
    if architecture == "topk" or record.activation == "topk":
        cfg["k"] = record.k
        if record.k is None:
            raise LoadError(f"{str(path)!r} does not say how many latents its TopK keeps: pass k=")
        if isinstance(record.k, bool) or not isinstance(record.k, int) or not 1 <= record.k <= d_sae:
            raise LoadError(f"{str(path)!r}: k must be an integer in 1..{d_sae}, not {record.k!r}")
    if architecture == ARCHITECTURE:
        cfg |= {"activation": record.activation, "keep_sign": record.keep_sign, "inclusive": record.inclusive,
                "soft_cap": record.soft_cap}  # fmt: skip
    cfg |= overrides
    dtype = str_to_dtype(cfg["dtype"])
    state = {}
    for name, value in _state(record, architecture, d_in, d_sae).items():
        if not value.is_floating_point():
            raise LoadError(f"{name} in {str(path)!r} is {value.dtype}; weights are floating-point numbers")
        state[name] = value.detach().to(device, dtype)
    verify_config(cfg, path)
    verify_weights(cfg, state, path)
    cfg["metadata"] = {
        **record.metadata, "format": format, "sha256": file_sha256(path), "sae_lens_version": sae_lens_version,
    }  # fmt: skip
    return cfg, state


def _architecture(record: Record) -> str:
    if record.activation == "gated":
        return "gated"
    own = record.input_mean is not None or record.input_scale != 1.0 or record.soft_cap or record.keep_sign
    if own or record.inclusive:
        return ARCHITECTURE
    return {"relu": "standard", "topk": "topk", "threshold": "jumprelu"}[record.activation]


def _state(record: Record, architecture: str, d_in: int, d_sae: int) -> dict[str, Tensor]:
    like = record.W_enc
    b_enc = like.new_zeros(d_sae) if record.b_enc is None else record.b_enc
    b_dec = like.new_zeros(d_in) if record.b_dec is None else record.b_dec
    state = {"W_enc": record.W_enc.contiguous(), "W_dec": record.W_dec.contiguous(), "b_dec": b_dec}
    if architecture == "gated":
        return {**state, **record.gate}
    state["b_enc"] = b_enc
    if architecture in ("jumprelu", ARCHITECTURE):
        threshold = 0.0 if record.threshold is None else record.threshold
        state["threshold"] = torch.as_tensor(threshold, dtype=like.dtype).expand(d_sae).clone()
    if architecture == ARCHITECTURE:
        state["input_mean"] = like.new_zeros(d_in) if record.input_mean is None else record.input_mean
        state["input_scale"] = like.new_full((1,), float(record.input_scale))
    return state


def _sizes(record: Record, path: Path) -> tuple[int, int]:
    if record.W_enc.dim() != 2 or record.W_dec.dim() != 2 or record.W_enc.shape != record.W_dec.shape[::-1]:
        raise LoadError(
            f"{str(path)!r}: the encoder is {list(record.W_enc.shape)} and the decoder {list(record.W_dec.shape)}; "
            "they have to be [d_in d_sae] and [d_sae d_in]"
        )
    d_in, d_sae = record.W_enc.shape
    vectors = {"encoder bias": (record.b_enc, d_sae), "decoder bias": (record.b_dec, d_in),
               "input mean": (record.input_mean, d_in)}  # fmt: skip
    for name, (value, size) in vectors.items():
        if value is not None and tuple(value.shape) != (size,):
            raise LoadError(f"{str(path)!r}: the {name} is {list(value.shape)}, and not [{size}]")
    if record.input_scale <= 0 or record.input_scale != record.input_scale:
        raise LoadError(f"{str(path)!r}: the input scale is {record.input_scale}, and not a positive number")
    return d_in, d_sae


def _apply_own(record: Record, overrides: dict[str, Any], path: Path) -> None:
    subtract = overrides.pop("subtract_b_dec", None)
    if subtract is not None:
        # What the user has said is no longer open, and no check may overrule it.
        if record.metadata.get("ambiguous") == ["subtract_b_dec"]:
            del record.metadata["ambiguous"]
        if subtract != record.subtract_b_dec:
            record.metadata["overrides"] = {
                **record.metadata.get("overrides", {}),
                "subtract_b_dec": {"file": record.subtract_b_dec, "keyword": bool(subtract)},
            }
        record.subtract_b_dec = bool(subtract)
    stats = overrides.pop("input_stats", None)
    if stats is not None:
        mean, scale = stats
        record.input_mean = None if mean is None else torch.as_tensor(mean, dtype=record.W_enc.dtype)
        record.input_scale = float(scale)
        record.metadata["input_stats"] = "keyword"


def need(tensors: dict[str, Tensor], path: Path, *names: str) -> tuple[Tensor, ...]:
    """Some tensors of a file, by name.

    Raises:
        LoadError: one is missing.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise LoadError(f"{str(path)!r} lacks {', '.join(missing)}; it has {', '.join(sorted(tensors)[:8])}")
    return tuple(tensors[name] for name in names)


def only(tensors: dict[str, Tensor], path: Path, *names: str) -> None:
    """Raise `LoadError` where a file has tensors that nobody has asked for."""
    extra = sorted(set(tensors) - set(names))
    if extra:
        raise LoadError(f"{str(path)!r} also holds {', '.join(extra[:5])}, which this format does not have")


def unit_rows(weight: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays."""
    return weight / weight.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
