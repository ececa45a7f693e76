"""Torch files with a pickled configuration beside the weights: Prisma, and PatchSAE, HugoFry and ConceptScope.

| family | configuration | function |
|---|---|---|
| Prisma | `config.json` beside the weights, or pickled in the file | `act((norm(x) - b_dec) W_enc + b_enc)` |
| its transcoder | the same, with `b_dec_out` and perhaps `W_skip` | the same, decoded for another hook |
| PatchSAE and its kin | pickled under `cfg` or `config` | `relu((x - b_dec) W_enc + b_enc)` |

Prisma's `act` is relu, topk with relu, or gated; its `norm` is a layer norm or nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.record import Record, need, only
from clip_lens_ext.saes.formats.transcoder import TranscoderRecord

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The SAE's own tensors, without the name of the mapping that holds them."""
    for prefix in ("state_dict.", "model_state_dict.", "sae.", ""):
        if f"{prefix}W_enc" in tensors:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return tensors


def fields_of(plain: dict[str, Any]) -> dict[str, Any]:
    """The configuration's fields, without the name of the mapping that holds them."""
    for prefix in ("cfg.", "config."):
        found = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def prisma_record(tensors: dict[str, Tensor], fields: dict[str, Any], path: Path) -> Record:
    """Prisma's function, from what its JSON says; what the JSON does not say is off, whatever Prisma's defaults are."""
    kind = fields.get("architecture") or "standard"
    common: dict[str, Any] = {"subtract_b_dec": True, "layer_norm": _layer_norm(fields, path)}
    if kind == "gated":
        names = ("W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag")
        enc, dec, b_dec, gate, r_mag, mag = need(tensors, path, *names)
        only(tensors, path, *names, "b_enc")
        return Record(enc, dec, None, b_dec, "gated", gate={"b_gate": gate, "r_mag": r_mag, "b_mag": mag}, **common)
    enc, b_enc, dec, b_dec = need(tensors, path, *WEIGHTS)
    only(tensors, path, *WEIGHTS, "scaling_factor", "b_gate", "r_mag", "b_mag")
    activation, k = _activation(fields, path)
    return Record(enc, dec, b_enc, b_dec, activation, k, **common)


def is_transcoder(tensors: dict[str, Tensor], fields: dict[str, Any]) -> bool:
    """Whether these are the weights of Prisma's transcoder, whatever the configuration calls it."""
    return "b_dec_out" in tensors or "W_skip" in tensors or bool(fields.get("is_transcoder"))


def prisma_transcoder_record(tensors: dict[str, Tensor], fields: dict[str, Any], path: Path) -> TranscoderRecord:
    """Prisma's transcoder, with a skip connection where its weights have one."""
    names = (*WEIGHTS, "b_dec_out")
    enc, b_enc, dec, b_in, b_dec = need(tensors, path, *names)
    only(tensors, path, *names, "W_skip")
    activation, k = _activation(fields, path)
    if activation == "topk" and k is None:
        raise LoadError(f"{str(path)!r} does not say how many latents its TopK keeps: pass k=")
    metadata: dict[str, Any] = {"tower": "vision", **hook_of(fields)}
    layer = fields.get("out_hook_point_layer")
    if isinstance(layer, int) and layer >= 0 and fields.get("layer_out_subtype"):
        metadata["hook_name_out"] = f"blocks.{layer}.{fields['layer_out_subtype']}"
    return TranscoderRecord(enc, dec, b_enc, b_dec, b_in, tensors.get("W_skip"), k, _layer_norm(fields, path), metadata)


def _layer_norm(fields: dict[str, Any], path: Path) -> bool:
    found = fields.get("normalize_activations")
    if found not in (None, "none", "layer_norm"):
        raise LoadError(f"{str(path)!r}: normalize_activations {found!r} of Prisma is not read")
    return found == "layer_norm"


def _activation(fields: dict[str, Any], path: Path) -> tuple[Any, int | None]:
    activation: Any = fields.get("activation_fn_str") or "relu"
    if activation not in ("relu", "topk"):
        raise LoadError(f"{str(path)!r}: activation {activation!r} of Prisma is not read; relu and topk are")
    k = (fields.get("activation_fn_kwargs") or {}).get("k", fields.get("activation_fn_kwargs.k"))
    return activation, k if activation == "topk" else None


def hook_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Hook, tokens and model, as far as the fields say."""
    found: dict[str, Any] = {}
    layer = fields.get("hook_point_layer", fields.get("block_layer"))
    layers = list(layer) if isinstance(layer, list | tuple) else [layer]
    if len(layers) == 1 and isinstance(layers[0], int) and layers[0] >= 0:
        found["hook_name"] = f"blocks.{layers[0]}.{fields.get('layer_subtype') or 'hook_resid_post'}"
    elif len(layers) == 1 and isinstance(layers[0], int):
        found["layer_from_the_end"] = layers[0]
    if fields.get("cls_token_only"):
        found["token_scope"] = "cls"
    elif fields.get("use_patches_only"):
        found["token_scope"] = "patches"
    if isinstance(fields.get("model_name"), str):
        found["model_name"] = fields["model_name"]
    return found
