"""A CLIP with untrained sparse heads, to begin from; and the dense CLIP under one."""

from __future__ import annotations

import copy
import math

from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.families.headed import HeadedCLIP
from clip_lens_ext.towers.from_sparse import put_together
from clip_lens_ext.towers.sparse_head import Activation, SparseHead

__all__ = ["FIRST_SCALE", "LARGEST_SCALE", "Activation", "SparseHead", "add_sparse_heads", "dense_clip", "headed"]

LARGEST_SCALE = 100.0  # CLIP's own bound on the factor on the cosines
FIRST_SCALE = 1 / 0.07  # and what CLIP's training begins with


def add_sparse_heads(
    clip: HookedCLIP,
    d_code: int,
    *,
    activation: Activation = "relu",
    k: int | None = None,
    logit_scale: float = FIRST_SCALE,
    seed: int = 0,
) -> HookedCLIP:
    """A CLIP with untrained sparse heads behind both towers; `hook_embedding` is the code.

    The dense projection stays below the head. Whether the paper's widened projection replaces it or reads it is not
    stated; its parameter count fits reading it, and only so can codes be had from cached embeddings.

    Args:
        clip: the dense model, which is copied.
        d_code: numbers in a code.
        activation, k: as in `SparseHead`.
        logit_scale: the factor on the cosines to begin with; CLIP's own by default.
        seed: of the weights; the two heads differ.

    Returns:
        `HookedCLIP` of a `HeadedCLIP`: train it with `train_sparse_clip`.

    Raises:
        InputError: the model has one tower, or what `SparseHead` raises.
        UnsupportedModelError: a tower is not taken apart into blocks.

    Example:
        >>> import torch
        >>> import clip_lens_ext as cle
        >>> sparse = add_sparse_heads(cle.planted_clip(), 512)
        >>> sparse.embed_images(torch.zeros(2, 3, 48, 48)).shape, sparse.vision.cfg.d_embed
        (torch.Size([2, 512]), 512)
    """
    if not 0 < logit_scale <= LARGEST_SCALE:
        raise InputError(f"logit_scale is a factor in (0, {LARGEST_SCALE:g}], got {logit_scale}")
    if clip.text is None:
        raise InputError(f"{clip.model_name} is a vision tower alone, and a Sparse CLIP has a code of texts too")
    widths = clip.vision.cfg.d_embed, clip.text.cfg.d_embed
    image_head, text_head = (
        SparseHead(width, d_code, activation=activation, k=k, seed=2 * seed + number).to(
            clip.vision.cfg.device, clip.vision.cfg.dtype
        )
        for number, width in enumerate(widths)
    )
    dense = HookedCLIP(
        copy.deepcopy(clip.native), preprocess=clip.preprocess, tokenizer=clip.tokenizer, model_name=clip.model_name
    )
    return put_together(dense, image_head, text_head, math.log(logit_scale))



def dense_clip(clip: HookedCLIP) -> HookedCLIP:
    """The dense CLIP under the heads of a Sparse CLIP, on the same weights.

    Raises:
        InputError: the model has no heads.

    Example:
        >>> import clip_lens_ext as cle
        >>> dense_clip(add_sparse_heads(cle.planted_clip(), 512)).vision.cfg.d_embed
        128
    """
    native = headed(clip)
    return HookedCLIP(
        native.dense, preprocess=clip.preprocess, tokenizer=clip.tokenizer,
        model_name=native.dense_name,
    )  # fmt: skip


def headed(clip: HookedCLIP) -> HeadedCLIP:
    """The native model of a Sparse CLIP.

    Raises:
        InputError: the model has no `SparseHead` behind its towers; it says how to make one that has.
    """
    native = clip.native
    if not isinstance(native, HeadedCLIP) or not isinstance(native.image_head, SparseHead):
        raise InputError(f"{clip.model_name}, a {type(native).__name__}, has no sparse heads: make one that has by "
                         "add_sparse_heads(clip, d_code), or load one")  # fmt: skip
    return native
