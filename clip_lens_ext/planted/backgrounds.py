"""The named backgrounds of the planted world: muted patterns in two tones."""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, Int

__all__ = ["BACKGROUNDS", "N_BACKGROUND_DRAWS", "paint_backgrounds"]

BACKGROUNDS: Final = ("plain", "stripes", "dots", "checks", "waves", "grid", "haze", "sand")
N_BACKGROUND_DRAWS: Final = 8
"""Uniform numbers that one background takes."""


def _pattern(
    name: str, x: torch.Tensor, y: torch.Tensor, draws: Float[torch.Tensor, "batch draw"]
) -> Float[torch.Tensor, "batch row column"]:
    """Weights in [0, 1] of the second tone; x and y are pixel positions that a random shift was added to."""
    cell = (7 + 4 * draws[:, 0])[:, None, None]
    u, v = x / cell, y / cell
    soft = 3.0
    if name == "plain":
        return torch.zeros_like(u + v)
    if name == "stripes":
        upright = (draws[:, 1] < 0.5)[:, None, None]
        return torch.sigmoid(4 * torch.sin(2 * torch.pi * torch.where(upright, u + 0 * v, v + 0 * u)))
    if name == "dots":
        distance = torch.hypot((u % 1) - 0.5, (v % 1) - 0.5)
        return ((0.3 - distance) * cell).add(0.5).clamp(0, 1)
    if name == "checks":
        return torch.sigmoid(4 * soft * torch.sin(torch.pi * u) * torch.sin(torch.pi * v))
    if name == "waves":
        return torch.sigmoid(4 * torch.sin(2 * torch.pi * (v + 0.3 * torch.sin(torch.pi * u))))
    if name == "grid":
        lines = torch.minimum((u % 1) * cell, (v % 1) * cell)
        return (1.5 - lines).clamp(0, 1)
    if name == "haze":
        slow = torch.sin(x / 5 + 6 * draws[:, 1, None, None]) + torch.sin(y / 4.5 + x / 12)
        return 0.5 + 0.25 * slow
    # Sand: a hash of the pixel's position, so that it repeats nowhere.
    grains = torch.sin((x / 2).floor() * 12.9898 + (y / 2).floor() * 78.233) * 43758.5453
    return grains - grains.floor()


def paint_backgrounds(
    kinds: Int[torch.Tensor, " batch"], draws: Float[torch.Tensor, "batch draw"], size: int
) -> Float[torch.Tensor, "batch 3 row column"]:
    """Square pictures of nothing but background.

    Args:
        kinds: Index into `BACKGROUNDS` for each picture.
        draws: Uniform numbers in [0, 1) for scale, shift and tones, `[batch 8]`.
        size: Pixels per side.

    Returns:
        Pictures in [0, 1], `[batch 3 size size]`.

    Example:
        >>> import torch
        >>> from clip_lens_ext.planted.backgrounds import paint_backgrounds
        >>> paint_backgrounds(torch.tensor([0, 3]), torch.rand(2, 8), 48).shape
        torch.Size([2, 3, 48, 48])
    """
    axis = torch.arange(size, dtype=torch.float32)
    x = axis[None, None, :] + (40 * draws[:, 2])[:, None, None]
    y = axis[None, :, None] + (40 * draws[:, 3])[:, None, None]
    weights = torch.empty(len(kinds), size, size)
    for index, name in enumerate(BACKGROUNDS):
        chosen = kinds == index
        if chosen.any():
            weights[chosen] = _pattern(name, x[chosen], y[chosen], draws[chosen])
    # Greyish tones of middle brightness: no object colour, white and black included, drowns in them.
    grey = 0.38 + 0.32 * draws[:, 4]
    tint = 0.12 * (draws[:, 5:8] - 0.5)
    first = grey[:, None] + tint
    contrast = torch.where(grey < 0.54, 0.16, -0.16)[:, None]
    tones = torch.stack([first, first + contrast], dim=1)[..., None, None]
    return torch.lerp(tones[:, 0], tones[:, 1], weights[:, None])
