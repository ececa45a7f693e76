"""Watermarks and borders that lie over a picture."""

from __future__ import annotations

import functools
from typing import Final

import torch
from jaxtyping import Float

from clip_lens_ext.errors import InputError, near

__all__ = ["BORDERS", "OVERLAYS", "WATERMARKS", "overlay_layer"]

WATERMARKS: Final = ("lattice", "rays", "stamp")
BORDERS: Final = ("corners", "film", "frame")
OVERLAYS: Final = WATERMARKS + BORDERS

_WHITE, _BLACK = (1.0, 1.0, 1.0), (0.05, 0.05, 0.05)


@functools.cache
def overlay_layer(name: str, size: int) -> Float[torch.Tensor, "4 row column"]:
    """An overlay: its colour, and how much of the picture below it hides.

    Args:
        name: One of `OVERLAYS`.
        size: Pixels per side of the picture.

    Returns:
        RGB and opacity, each in [0, 1], `[4 size size]`.

    Raises:
        InputError: If no overlay has this name.

    Example:
        >>> from clip_lens_ext.planted.overlays import overlay_layer
        >>> frame = overlay_layer("frame", 48)
        >>> float(frame[3, 0, 0]), float(frame[3, 24, 24])
        (1.0, 0.0)
    """
    if name not in OVERLAYS:
        raise InputError(f"no overlay is called {name!r}{near(name, OVERLAYS)}; there are {', '.join(OVERLAYS)}")
    fine = 4 * size
    axis = (torch.arange(fine) + 0.5) / 4
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    edge = torch.minimum(torch.minimum(x, y), size - torch.maximum(x, y))
    radius = torch.hypot(x - (size - 10), y - (size - 10))
    bars = torch.minimum((x - (size - 10)).abs(), (y - (size - 10)).abs())
    turn = torch.atan2(size - y, x)
    nothing = torch.zeros_like(x, dtype=torch.bool)
    hidden, opacity, colour, second, second_colour = {
        "lattice": (((x + y) % 12 < 1.8) | ((x - y) % 12 < 1.8), 0.55, _WHITE, nothing, _WHITE),
        "rays": ((turn * 16 / torch.pi) % 1 < 0.36, 0.4, (1.0, 0.95, 0.6), nothing, _WHITE),
        "stamp": (
            ((radius < 8) & (radius > 6)) | ((radius < 6) & (bars < 1)),
            0.85, (0.75, 0.05, 0.3), nothing, _WHITE,
        ),
        "frame": (edge < 3, 1.0, (0.93, 0.87, 0.72), edge > 2, (0.45, 0.3, 0.15)),
        "film": (
            torch.minimum(y, size - y) < 5, 1.0, _BLACK,
            ((torch.minimum(y, size - y) - 2.5).abs() < 1.2) & (x % 6 > 2) & (x % 6 < 5), _WHITE,
        ),
        "corners": (
            torch.minimum(x, size - x) + torch.minimum(y, size - y) < 9, 1.0, (0.1, 0.4, 0.45), nothing, _WHITE,
        ),
    }[name]  # fmt: skip
    layer = torch.empty(4, fine, fine)
    layer[3] = hidden.float() * opacity
    for channel in range(3):
        layer[channel] = torch.where(second, second_colour[channel], colour[channel])
    return torch.nn.functional.avg_pool2d(layer[None], 4)[0]
