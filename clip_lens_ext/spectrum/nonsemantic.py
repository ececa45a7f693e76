"""Inputs that mean nothing: the same pixels and the same words, in an order that says nothing.

What a model makes of them is the control of the rule `"generalised"`: variance that needs no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


def shuffled_pixels(images: Tensor, *, seed: int = 0) -> Tensor:
    """Each picture with its pixels in a random order; the colours of a pixel stay together.

    Args:
        images: `[n 3 height width]`.
        seed: of the orders; each picture has its own.

    Raises:
        InputError: another shape.

    Example:
        >>> picture = torch.arange(12.0).reshape(1, 3, 2, 2)
        >>> mixed = shuffled_pixels(picture)
        >>> torch.equal(mixed.flatten(2).sort().values, picture.flatten(2).sort().values), torch.equal(mixed, picture)
        (True, False)
    """
    if images.dim() != 4:
        raise InputError(f"pictures [n 3 height width] are needed, got {list(images.shape)}")
    generator = torch.Generator().manual_seed(seed)
    n, _, height, width = images.shape
    order = torch.stack([torch.randperm(height * width, generator=generator) for _ in range(n)]).to(images.device)
    return images.flatten(2).gather(2, order[:, None].expand(-1, images.shape[1], -1)).reshape(images.shape)


def shuffled_words(texts: Sequence[str], *, seed: int = 0) -> list[str]:
    """As many strings of as many words, each word drawn by itself from those of all texts.

    Args:
        texts: captions or prompts.
        seed: of the draws.

    Raises:
        InputError: no text, or no word in any.

    Example:
        >>> mixed = shuffled_words(["a red crane", "two bats"])
        >>> [len(text.split()) for text in mixed]
        [3, 2]
    """
    words = [word for text in texts for word in text.split()]
    if isinstance(texts, str) or not words:
        raise InputError("a list of texts with words is needed")
    generator = torch.Generator().manual_seed(seed)
    drawn = iter(torch.randint(len(words), (len(words),), generator=generator).tolist())
    return [" ".join(words[next(drawn)] for _ in text.split()) for text in texts]
