"""SAEs in: find out what lies at a path, read it, check it, and say where it belongs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.util import dtype_to_str
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_lens_ext.errors import LoadError, near
from clip_lens_ext.saes.check import check_sae, with_bias_flipped
from clip_lens_ext.saes.formats import formats
from clip_lens_ext.saes.formats.probe import TORCH, flatten, split_header
from clip_lens_ext.saes.formats.unpickle import load_torch
from clip_lens_ext.saes.formats.verify import reject_clip_checkpoint
from clip_lens_ext.saes.from_hub import fetch, is_hub_name
from clip_lens_ext.towers.positions import TOKEN_SCOPES
from clip_lens_ext.towers.tower import HookedTower

TOWERS = ("vision", "text")

# Hooks that give one vector a sample: [batch d] instead of [batch token d].
POOLED_HOOKS = ("hook_pooled", "hook_embedding")


def load_sae(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    hook_name: str | None = None,
    tower: str | None = None,
    token_scope: str | None = None,
    model_name: str | None = None,
    k: int | None = None,
    subtract_b_dec: bool | None = None,
    input_stats: tuple[Tensor | None, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    check: tuple[HookedTower, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> SAE[Any]:
    """Load a sparse autoencoder from disk, checked, with what is known about it in `cfg.metadata`.

    What the file does not say is a keyword. A keyword that contradicts the file wins, and the metadata say so:
    `overrides` maps its name to `{"file": ..., "keyword": ...}`.

    Args:
        source: a folder with an SAE, or one of its files; or a hub repository with the folder in it,
            `"hf-hub:org/name/folder"`, from the local cache or fetched (without `hf-hub:` where no such path exists).
        format: the family that wrote it, a name in `formats`; found out from the files by default.
        hook_name: the hook at which it was trained, in TransformerLens' words.
        tower: "vision" (where neither the file nor the keyword says) or "text".
        token_scope: the positions on which it was trained: "cls", "patches", "all", "pooled" (a hook without a token
            axis) or "eot". Where neither says: "pooled" at `hook_pooled` and `hook_embedding`, else "all", as SAELens
            applies an SAE to every position.
        model_name: the model whose activations it was trained on.
        k: latents that a TopK SAE keeps, 1..d_sae.
        subtract_b_dec: whether the decoder's bias is subtracted from the input, where the file leaves it open (saev of
            2025) or says it wrongly.
        input_stats: `(mean [d_in] or None, scale)` of the activations that it was trained on, `(x - mean) * scale`,
            where the family keeps them elsewhere.
        settings: what a family keeps out of its files, by name; docs/sae_formats.md says what each takes.
        check: `(tower, pictures)`: `check_sae` is run, its result stands in `cfg.metadata.check`, and a suspicious one
            is a warning. Where the file leaves open whether `b_dec` is subtracted, what explains more is taken.
        device: where the weights go; the CPU by default.
        dtype: their dtype; as the file says by default.

    Returns:
        A `sae_lens.SAE` in evaluation mode. `cfg.metadata` has `model_name`, `tower`, `hook_name`, `token_scope`,
        `format`, `sha256` (of the weights file), and `overrides` where a keyword won over the file. A TopK SAE that
        scales its codes by decoder norms has these folded into the weights, so that `z @ W_dec + b_dec` is the
        reconstruction whichever way it was trained; neither codes nor reconstructions change.

    Raises:
        LoadError: a missing path, files of no known family, a truncated or corrupt file, an unknown architecture or
            format, weights that do not fit the configuration or hold a NaN, a whole CLIP model, an unknown hook, or a
            keyword of a wrong kind. Nothing in a file is ever run, and nothing half-loaded is handed out.

    Example:
        >>> import tempfile
        >>> from sae_lens import TopKSAE, TopKSAEConfig
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)).save_model(folder.name)
        >>> sae = load_sae(folder.name, hook_name="blocks.1.hook_resid_post", model_name="ViT-B-32")
        >>> sae.cfg.metadata.token_scope, sae.cfg.metadata.tower, sae.cfg.k
        ('all', 'vision', 2)
        >>> folder.cleanup()
    """
    path = fetch(str(source)) if is_hub_name(str(source)) else Path(source)
    name = _format_name(path, format)
    family = formats[name]
    said = {"model_name": model_name, "tower": tower, "hook_name": hook_name, "token_scope": token_scope}

    def converter(
        path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        asked = {"k": k, "subtract_b_dec": subtract_b_dec, "input_stats": input_stats, "settings": settings}
        overrides = {**(cfg_overrides or {}), **{name: value for name, value in asked.items() if value is not None}}
        try:
            cfg_dict, state_dict = family.convert(path, device, overrides or None)
        except LoadError:
            raise
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            # Tensors of a wrong kind or shape, in the middle of a family's own arithmetic.
            raise LoadError(f"{str(path)!r} does not hold what the format {name} says: {error}") from error
        file_metadata = dict(cfg_dict.get("metadata") or {})
        metadata = {"format": name, **file_metadata, **_complete(file_metadata, said, Path(path))}
        return {**cfg_dict, "metadata": metadata}, state_dict

    if k is not None:
        _check_k(k, path)
    sae = SAE.load_from_disk(
        path, device=str(device or "cpu"), dtype=None if dtype is None else dtype_to_str(dtype), converter=converter
    )
    if k is not None and "topk" not in (sae.cfg.architecture(), getattr(sae.cfg, "activation", None)):
        raise LoadError(f"k= is for TopK SAEs: the SAE in {str(path)!r} is a {sae.cfg.architecture()} one")
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # Codes keep their values, and z @ W_dec alone becomes the reconstruction.
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    sae = sae.eval()
    return sae if check is None else _checked(sae, *check)


def _checked(sae: SAE[Any], tower: HookedTower, images: Any) -> SAE[Any]:
    """The SAE in the reading that explains more, where its file leaves one open, with what was measured."""
    found = check_sae(tower, images, sae, progress=False)
    metadata = sae.cfg.metadata
    if "subtract_b_dec" in (metadata.ambiguous or ()):
        other = with_bias_flipped(sae)
        flipped = check_sae(tower, images, other, progress=False)
        before, after = found.quality.explained_variance, flipped.quality.explained_variance
        if after > before:
            sae, found = other, flipped
        chosen = {"subtract_b_dec": sae.cfg.apply_b_dec_to_input, "explained_variance": max(before, after),
                  "otherwise": min(before, after)}  # fmt: skip
        sae.cfg.metadata.chosen_by_reconstruction = chosen
    sae.cfg.metadata.check = found.to_dict()
    if found.verdict != "fits":
        warnings.warn(str(found), stacklevel=3)
    return sae


def _format_name(path: Path, format: str | None) -> str:
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LoadError(f"no such file or folder: {str(path)!r}{near(path.name, siblings)}")
    if format is not None:
        formats[format]
        return format
    found = formats.detect(path)
    if found is not None:
        return found
    folder = path if path.is_dir() else path.parent
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        if file.suffix == ".safetensors":
            _reject_clip_file(file)
        elif file.suffix in TORCH:
            tensors, _ = flatten(load_torch(file, data=split_header(file)[1], meta=True))
            reject_clip_checkpoint([name.removeprefix("state_dict.") for name in tensors], file)
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    listed = ", ".join(entries[:12]) + (f" and {len(entries) - 12} more" if len(entries) > 12 else "")
    raise LoadError(
        f"no known SAE format at {str(path)!r}: {str(folder)!r} holds {listed or 'nothing'}; the formats are "
        f"{', '.join(formats)} (sae_lens: cfg.json beside sae_weights.safetensors)"
    )


def _reject_clip_file(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error
    reject_clip_checkpoint(keys, path)


def _complete(file: Mapping[str, Any], said: Mapping[str, str | None], path: Path) -> dict[str, Any]:
    """What file and keywords say together, with the defaults for what neither says."""
    known: dict[str, Any] = {}
    overrides = dict(file.get("overrides") or {})
    for field, keyword in said.items():
        known[field] = file.get(field) if keyword is None else keyword
        if keyword is not None and file.get(field) not in (None, keyword):
            overrides[field] = {"file": file[field], "keyword": keyword}
    if not known["hook_name"]:
        raise LoadError(f"{str(path)!r} does not say at which hook the SAE was trained: pass hook_name=")
    known["tower"] = known["tower"] or "vision"
    pooled = known["hook_name"] in POOLED_HOOKS
    known["token_scope"] = known["token_scope"] or ("pooled" if pooled else "all")
    for field, choices in (("tower", TOWERS), ("token_scope", TOKEN_SCOPES)):
        if known[field] not in choices:
            raise LoadError(f"{field} must be one of {', '.join(choices)}, not {known[field]!r}")
    if pooled != (known["token_scope"] == "pooled"):
        has = "has no token axis" if pooled else "has a token axis"
        raise LoadError(f"{known['hook_name']} {has}, which token_scope {known['token_scope']!r} does not fit")
    return {**known, **({"overrides": overrides} if overrides else {})}


def _check_k(k: object, path: Path) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise LoadError(f"k must be a positive integer, not {k!r} (for the SAE in {str(path)!r})")
