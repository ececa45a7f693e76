"""Checks that every family runs on what it read, before an SAE is built from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from torch import Tensor

from clip_lens_ext.errors import LoadError, near

# Where open_clip and Hugging Face keep the towers of a whole CLIP model; SAE families have none of these.
_CLIP_PREFIXES = ("visual.", "vision_model.", "text_model.", "transformer.resblocks.", "clip.", "model.visual.")

# SAELens scales inputs by these statistics at training time only; a file that still asks for one lacks the numbers.
_UNFOLDED = ("expected_average_only_in", "covariance_whitening")


def is_clip_checkpoint(keys: Iterable[str]) -> bool:
    """Whether these weight names are those of a CLIP model rather than of an SAE."""
    return any(key.startswith(_CLIP_PREFIXES) for key in keys)


def reject_clip_checkpoint(keys: Iterable[str], path: Path) -> None:
    """Raise a `LoadError` if these are the weights of a CLIP model."""
    keys = list(keys)
    if is_clip_checkpoint(keys):
        shown = next(key for key in keys if key.startswith(_CLIP_PREFIXES))
        raise LoadError(f"{str(path)!r} holds a CLIP model, not an SAE (it has {shown!r}): load it with load_clip")


def verify_architecture(architecture: object, path: Path) -> None:
    """Raise a `LoadError` that lists the known architectures, unless SAELens can run this one."""
    if architecture in SAE_CLASS_REGISTRY:
        return
    if architecture in SAE_TRAINING_CLASS_REGISTRY:
        raise LoadError(
            f"{str(path)!r} is a training checkpoint of architecture {architecture!r}, which SAELens exports as "
            "another one: save it with save_inference_model first"
        )
    known = ", ".join(SAE_CLASS_REGISTRY)
    raise LoadError(
        f"{str(path)!r}: unknown SAE architecture {architecture!r}: known are {known}"
        f"{near(str(architecture), SAE_CLASS_REGISTRY)}"
    )


def verify_config(cfg_dict: Mapping[str, Any], path: Path) -> None:
    """Check the fields that size an SAE and say how it works.

    Raises:
        LoadError: an unknown architecture, a size that is no positive integer, a TopK SAE whose k is missing or out
            of range, or an input scaling whose statistics are not part of the file.
    """
    architecture = cfg_dict.get("architecture")
    verify_architecture(architecture, path)
    for field in ("d_in", "d_sae"):
        if not _is_count(cfg_dict.get(field)):
            raise LoadError(f"{str(path)!r}: {field} must be a positive integer, not {cfg_dict.get(field)!r}")
    if architecture in ("topk", "abstopk"):
        k = cfg_dict.get("k")
        if k is None:
            # SAELens would go on with its default of 100.
            raise LoadError(f"{str(path)!r} does not say how many latents its TopK keeps: pass k=")
        if not _is_count(k) or k > cfg_dict["d_sae"]:
            raise LoadError(f"{str(path)!r}: k must be an integer in 1..{cfg_dict['d_sae']}, not {k!r}")
    if cfg_dict.get("normalize_activations") in _UNFOLDED:
        raise LoadError(
            f"{str(path)!r} was trained on inputs scaled by a statistic that is not part of the file "
            f"(normalize_activations = {cfg_dict['normalize_activations']!r}); as it is, every activation would be "
            "wrong: fold the statistic into the weights where it was trained, and save again"
        )


def verify_weights(cfg_dict: dict[str, Any], state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Check names, shapes and values of the weights against what the configuration asks for.

    Raises:
        LoadError: a CLIP checkpoint, missing or extra names, a shape that disagrees with d_in or d_sae, or a NaN.
    """
    reject_clip_checkpoint(state_dict, path)
    try:
        sae = SAE.from_dict({**cfg_dict, "device": "meta"})
    except (TypeError, ValueError) as error:
        raise LoadError(f"{str(path)!r}: SAELens refuses the configuration: {error}") from error
    expected, found = sae.state_dict(), dict(state_dict)
    sae.process_state_dict_for_loading(found)  # renames the weights of older versions
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = ["lack " + ", ".join(missing)] * bool(missing) + ["hold also " + ", ".join(extra)] * bool(extra)
        differ = " and ".join(parts)
        raise LoadError(f"the weights in {str(path)!r} are not those of {_described(cfg_dict)}: they {differ}")
    for name, weight in found.items():
        if weight.shape != expected[name].shape:
            raise LoadError(
                f"{name} in {str(path)!r} is {list(weight.shape)}, but {_described(cfg_dict)} needs "
                f"{list(expected[name].shape)}"
            )
        # An infinite threshold is a latent that was switched off on purpose.
        bad = torch.isnan(weight) if name == "threshold" else ~torch.isfinite(weight)
        if bad.any():
            raise LoadError(f"{name} in {str(path)!r} holds {int(bad.sum())} NaN or infinite values")


def file_sha256(path: Path) -> str:
    """Sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _described(cfg_dict: Mapping[str, Any]) -> str:
    return f"a {cfg_dict['architecture']} SAE with d_in {cfg_dict['d_in']} and d_sae {cfg_dict['d_sae']}"
