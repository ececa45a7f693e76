"""Objects as small sprites, and their placing on many pictures at once."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int

from clip_lens_ext.planted.shapes import silhouette

__all__ = ["COLOURS", "TEXTURES", "place", "sprite"]

COLOURS: Final[dict[str, tuple[float, float, float]]] = {
    "red": (0.86, 0.13, 0.15),
    "green": (0.13, 0.63, 0.22),
    "blue": (0.16, 0.32, 0.88),
    "yellow": (0.98, 0.85, 0.12),
    "purple": (0.55, 0.20, 0.72),
    "orange": (0.98, 0.50, 0.06),
    "white": (0.97, 0.97, 0.97),
    "black": (0.10, 0.10, 0.12),
}
TEXTURES: Final = ("halved", "plain", "ringed", "spotted", "striped", "checked")


def _second_tone(texture: str, size: int) -> Float[np.ndarray, "row column"]:
    """Where the filling has its second tone, as weights in [0, 1], `[size size]`."""
    fine = 4 * size
    axis = (np.arange(fine) + 0.5) / fine * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    cell = 0.45
    pattern = {
        "plain": np.zeros_like(x, dtype=bool),
        "halved": y > 0,
        "striped": (x + y) % cell < cell / 2,
        "ringed": np.hypot(x, y) % cell < cell / 2,
        "spotted": np.hypot((x + 0.1) % cell - cell / 2, (y + 0.1) % cell - cell / 2) < 0.15,
        "checked": ((x // cell + y // cell) % 2).astype(bool),
    }[texture]
    return pattern.astype(np.float32).reshape(size, 4, size, 4).mean(axis=(1, 3), dtype=np.float32)


def sprite(shape: str, texture: str, size: int) -> Float[torch.Tensor, "3 row column"]:
    """An object without colour.

    Args:
        shape: A name of `shapes.SHAPE_NAMES`.
        texture: A name of `TEXTURES`.
        size: Pixels per side.

    Returns:
        Coverage, weight of the second tone and weight of the outline, each in [0, 1], float32, `[3 size size]`.

    Example:
        >>> from clip_lens_ext.planted.sprites import sprite
        >>> sprite("drop", "striped", 32).amax(dim=(1, 2))
        tensor([1., 1., 1.])
    """
    inside = torch.from_numpy(silhouette(shape, 4 * size))[None, None]
    reach = size // 8
    core = -torch.nn.functional.max_pool2d(-inside, 2 * reach + 1, stride=1, padding=reach)
    coverage, core = (torch.nn.functional.avg_pool2d(layer, 4)[0, 0] for layer in (inside, core))
    return torch.stack([coverage, torch.from_numpy(_second_tone(texture, size)), (coverage - core).clamp(0, 1)])


def place(
    canvas: Float[torch.Tensor, "batch 3 row column"],
    sprites: Float[torch.Tensor, "batch 3 size size"],
    colours: Float[torch.Tensor, "batch 3"],
    centres: Float[torch.Tensor, "batch 2"],
    sizes: Float[torch.Tensor, " batch"],
    angles: Float[torch.Tensor, " batch"],
) -> tuple[Float[torch.Tensor, "batch 3 row column"], Int[torch.Tensor, "batch 4"]]:
    """Paints one object on each picture.

    Args:
        canvas: Pictures in [0, 1].
        sprites: What to paint, as from `sprite`.
        colours: RGB in [0, 1].
        centres: Column and row of each object's middle, in pixels.
        sizes: Side of each sprite, in pixels.
        angles: Turn of each object, in radians.

    Returns:
        The pictures with the objects, and the box of the pixels that are covered by a tenth at least: left, top,
        right, bottom in pixels, the last two exclusive.
    """
    height, width = canvas.shape[-2:]
    cos, sin, scale = torch.cos(angles), torch.sin(angles), 2 / sizes
    x = (torch.arange(width) + 0.5)[None, None, :] - centres[:, 0, None, None]
    y = (torch.arange(height) + 0.5)[None, :, None] - centres[:, 1, None, None]
    cos, sin, scale = (value[:, None, None] for value in (cos, sin, scale))
    grid = torch.stack([(cos * x + sin * y) * scale, (cos * y - sin * x) * scale], dim=-1)
    drawn = torch.nn.functional.grid_sample(sprites, grid, align_corners=False)
    coverage, second, outline = drawn.split(1, dim=1)
    base = colours[:, :, None, None]
    # A dark colour gets a lighter second tone and a light colour a darker one: both stay visible.
    light = (base.mean(dim=1, keepdim=True) > 0.45).float()
    fill = torch.lerp(base, base * (0.45 * light) + (1 - light) * (0.5 + 0.5 * base), second)
    fill = torch.lerp(fill, base * 0.25, outline)
    return torch.lerp(canvas, fill, coverage), _boxes(coverage[:, 0] >= 0.1)


def _boxes(covered: torch.Tensor) -> Int[torch.Tensor, "batch 4"]:
    columns, rows = covered.any(dim=1).int(), covered.any(dim=2).int()
    width, height = columns.shape[1], rows.shape[1]
    left, top = columns.argmax(dim=1), rows.argmax(dim=1)
    right, bottom = width - columns.flip(1).argmax(dim=1), height - rows.flip(1).argmax(dim=1)
    return torch.stack([left, top, right, bottom], dim=1)
