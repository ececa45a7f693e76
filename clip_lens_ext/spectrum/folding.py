"""Pruning written into the last weights of a copy of the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pruning import check_split
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.families.views import FlattenedText, HuggingFaceText, HuggingFaceVision
from clip_lens_ext.towers.tower import HookedTower


@torch.no_grad()
def fold_pruning(clip: HookedCLIP, split: NoiseSplit) -> HookedCLIP:
    """A copy of the model whose projections give embeddings without noise: `W' = W (I - U U')`.

    The copy has the shapes of the model and needs no hook; its embeddings are those under `prune(clip, split)`, up to
    rounding.

    Args:
        clip: the model, which stays as it is. Hooks and SAEs of its towers are not copied.
        split: what is noise in the embedding.

    Returns:
        `HookedCLIP` of a deep copy, named `"... without k noise dimensions"`.

    Raises:
        UnsupportedModelError: a tower does not end in a linear map; use `prune`.
        InputError: the split is of another hook or width, or all of it is noise.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, rows = cle.planted_clip(), torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
        >>> split = cle.split_noise(rows, cut=5)
        >>> folded, pictures = cle.fold_pruning(clip, split), torch.randn(2, 3, 48, 48)
        >>> with cle.prune(clip, split):
        ...     torch.allclose(folded.embed_images(pictures), clip.embed_images(pictures), atol=1e-4)
        True
    """
    check_split(split)
    if split.hook_name not in (None, "hook_embedding"):
        raise InputError(f"the split is of {split.hook_name}, and a LayerNorm follows: only noise of the embedding "
                         "can be folded into weights; use prune(clip, split)")  # fmt: skip
    folded = HookedCLIP(
        copy.deepcopy(clip.native), preprocess=clip.preprocess, tokenizer=clip.tokenizer,
        model_name=f"{clip.model_name} without {split.rank} noise dimensions",
    )  # fmt: skip
    for tower in (folded.vision, folded.text):
        if tower is not None:
            if tower.cfg.d_embed != split.d:
                raise InputError(f"the split is of {split.d} dimensions, the {tower.cfg.tower} tower's embedding has "
                                 f"{tower.cfg.d_embed}")  # fmt: skip
            _fold(tower, split)
    return folded


def _fold(tower: HookedTower, split: NoiseSplit) -> None:
    projection = projection_of(tower.native)
    if isinstance(projection, nn.Linear):  # rows of a Linear's weight are outputs
        projection.weight.copy_(_without(projection.weight.T, split).T)
        if projection.bias is not None:
            projection.bias.copy_(_without(projection.bias, split))
    elif isinstance(projection, Tensor):
        projection.copy_(_without(projection, split))
    else:
        raise UnsupportedModelError(
            f"the {tower.cfg.tower} tower ({tower.cfg.family}) does not end in a linear map{_why(tower.native)}, so "
            "there is no weight to fold the pruning into: use prune(clip, split)"
        )


def _without(rows: Tensor, split: NoiseSplit) -> Tensor:
    return split.remove(rows.double()).to(rows.dtype)


def projection_of(native: Any) -> nn.Linear | Tensor | None:
    """What the embedding comes out of last, if it is linear: a matrix `[d_in d_embed]` or a `Linear`."""
    if isinstance(native, FlattenedText):
        return native.model.text_projection
    if isinstance(native, HuggingFaceVision):
        return getattr(native.model, "visual_projection", None)
    if isinstance(native, HuggingFaceText):
        own = getattr(native.model, "text_projection", None)
        return own if own is not None else _linear(getattr(native.model.text_model, "head", None))
    if isinstance(native, TimmModel):
        return _last(native.head) if len(native.head) else _timm_head(native.trunk)
    if isinstance(native, HFTextEncoder):
        return _last(native.proj)
    if isinstance(native, ModifiedResNet):
        return _linear(getattr(native.attnpool, "c_proj", None))
    for name in ("proj", "text_projection", "visual_projection", "head"):  # a tower alone, of open_clip or Hugging Face
        found = getattr(native, name, None)
        if isinstance(found, nn.Linear | nn.Parameter):
            return found
    return None


def _last(head: nn.Module) -> nn.Linear | None:
    """The last module that does anything, if it is a `Linear`."""
    parts = [part for part in (head.children() if len(list(head.children())) else [head])
             if not isinstance(part, nn.Identity | nn.Dropout)]  # fmt: skip
    if not parts:
        return None
    last: Any = parts[-1]
    return _linear(getattr(last, "fc2", last))  # timm's Mlp ends in it


def _timm_head(trunk: Any) -> nn.Linear | None:
    head = getattr(trunk, "head", None)
    return _linear(head if isinstance(head, nn.Linear) else getattr(head, "fc", None))


def _linear(module: Any) -> nn.Linear | None:
    return module if isinstance(module, nn.Linear) else None


def _why(native: Any) -> str:
    if isinstance(native, HuggingFaceVision) or (
        isinstance(native, TimmModel) and getattr(native.trunk, "attn_pool", None)
    ):
        return ": its attention pooling adds an MLP to what it reads"
    return ""
