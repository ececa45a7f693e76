"""Whether something is an input that a tower can take: the same checks, in the same words, for every family."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


def check_pictures(
    x: Tensor, *, size: tuple[int, int], dtype: torch.dtype, device: torch.device, channels: int = 3
) -> None:
    """Raise `InputError` unless `x` is pictures `[batch channel height width]` as the tower's weights take them."""
    height, width = size
    expected = f"[batch {channels} {height} {width}] of {dtype}"
    if not isinstance(x, Tensor):
        raise InputError(
            f"expected pictures as a tensor {expected}, got {type(x).__name__}: use clip.preprocess(image)[None]"
        )
    if x.dim() == 3 and tuple(x.shape) == (channels, height, width):
        raise InputError(f"expected pictures {expected}, got one picture {list(x.shape)}: add a batch axis, x[None]")
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, height, width):
        raise InputError(
            f"expected pictures {expected}, got {list(x.shape)}: clip.preprocess resizes a picture "
            "and gives it three channels"
        )
    if x.shape[0] == 0:
        raise InputError(f"expected pictures {expected}, got an empty batch")
    if x.dtype != dtype:
        hint = "use clip.preprocess" if not x.is_floating_point() else f"use x.to({dtype})"
        raise InputError(f"expected pictures {expected}, got {x.dtype}: {hint}")
    if x.device != device:
        raise InputError(f"the pictures are on {x.device}, the tower is on {device}: use x.to('{device}')")


def check_tokens(x: Tensor, *, n_ctx: int, vocab_size: int, device: torch.device) -> None:
    """Raise `InputError` unless `x` is token ids `[batch n_ctx]` of this vocabulary."""
    if not isinstance(x, Tensor):
        raise InputError(
            f"expected token ids as a tensor [batch {n_ctx}], got {type(x).__name__}: use clip.tokenize(texts)"
        )
    if x.dim() != 2 or x.shape[1] != n_ctx or x.shape[0] == 0:
        raise InputError(f"expected token ids [batch {n_ctx}], got {list(x.shape)}: use clip.tokenize(texts)")
    if x.dtype not in (torch.int64, torch.int32):
        raise InputError(f"expected token ids of an integer type, got {x.dtype}: use clip.tokenize(texts)")
    if x.device != device:
        raise InputError(f"the token ids are on {x.device}, the tower is on {device}: use x.to('{device}')")
    if not x.is_meta and not torch.compiler.is_compiling() and (x.min() < 0 or x.max() >= vocab_size):
        raise InputError(
            f"token ids must be in [0, {vocab_size}), got {int(x.min())} to {int(x.max())}: "
            "were they made by another model's tokenizer?"
        )


def check_patch_dropout(native: torch.nn.Module, dropout: torch.nn.Module) -> None:
    """Raise `InputError` where patches would be dropped."""
    if native.training and not isinstance(dropout, torch.nn.Identity):
        raise InputError(
            "patch dropout drops tokens in training mode, so hooks would see another number of tokens "
            "at every call: call tower.eval() first"
        )
