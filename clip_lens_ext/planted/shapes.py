"""The silhouettes of the planted world: each a region of the square [-1, 1] x [-1, 1], y downwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Bool, Float

from clip_lens_ext.errors import InputError, near

__all__ = ["SHAPE_NAMES", "silhouette"]

Grid = Float[np.ndarray, "row column"]
Mask = Bool[np.ndarray, "row column"]
Region = Callable[[Grid, Grid], Mask]


def _disc(cx: float, cy: float, r: float, ry: float | None = None) -> Region:
    return lambda x, y: ((x - cx) / r) ** 2 + ((y - cy) / (ry or r)) ** 2 <= 1


def _box(x0: float, y0: float, x1: float, y1: float) -> Region:
    return lambda x, y: (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)


def _polygon(*points: tuple[float, float]) -> Region:
    def inside(x: Grid, y: Grid) -> Mask:
        odd = np.zeros(x.shape, dtype=bool)
        for (xa, ya), (xb, yb) in zip(points, points[1:] + points[:1], strict=True):
            if ya == yb:
                continue
            crosses = (ya > y) != (yb > y)
            odd ^= crosses & (x < (xb - xa) * (y - ya) / (yb - ya) + xa)
        return odd

    return inside


def _star(n_points: int, outer: float, inner: float) -> Region:
    angles = np.arange(2 * n_points) * np.pi / n_points - np.pi / 2
    radii = np.where(np.arange(2 * n_points) % 2 == 0, outer, inner)
    return _polygon(*((float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)))


def _any(*regions: Region) -> Region:
    return lambda x, y: np.logical_or.reduce([region(x, y) for region in regions])


def _less(region: Region, *holes: Region) -> Region:
    return lambda x, y: region(x, y) & ~_any(*holes)(x, y)


def _both(*regions: Region) -> Region:
    return lambda x, y: np.logical_and.reduce([region(x, y) for region in regions])


def _line(xa: float, ya: float, xb: float, yb: float, width: float) -> Region:
    def near(x: Grid, y: Grid) -> Mask:
        dx, dy = xb - xa, yb - ya
        along = np.clip(((x - xa) * dx + (y - ya) * dy) / (dx * dx + dy * dy), 0, 1)
        return (x - xa - along * dx) ** 2 + (y - ya - along * dy) ** 2 <= (width / 2) ** 2

    return near


def _heart(x: Grid, y: Grid) -> Mask:
    x, y = x * 1.2, 0.15 - y * 1.15
    return (x**2 + y**2 - 1 + 0.25) ** 3 - x**2 * y**3 * 1.4 <= 0


def _gear(x: Grid, y: Grid) -> Mask:
    radius = np.hypot(x, y)
    return (radius <= np.where(np.cos(8 * np.arctan2(y, x)) > 0, 0.95, 0.68)) & (radius >= 0.3)


_SHAPES: Final[dict[str, Region]] = {
    "arrow": _polygon((-0.95, -0.28), (0.1, -0.28), (0.1, -0.8), (0.98, 0), (0.1, 0.8), (0.1, 0.28), (-0.95, 0.28)),
    "axe": _any(
        _line(-0.55, 0.9, 0.35, -0.85, 0.24), _polygon((-0.1, -0.75), (0.75, -0.95), (0.95, 0.2), (0.2, -0.05))
    ),
    "bell": _any(
        _both(_disc(0, -0.1, 0.62, 0.85), _box(-1, -1, 1, 0.3)), _box(-0.85, 0.3, 0.85, 0.55), _disc(0, 0.72, 0.2)
    ),
    "boat": _any(
        _polygon((-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85)),
        _polygon((-0.08, -0.95), (-0.08, 0.2), (-0.8, 0.2)),
        _polygon((0.08, -0.7), (0.75, 0.2), (0.08, 0.2)),
    ),
    "bolt": _polygon(
        (0.2, -0.98), (-0.65, 0.15), (-0.1, 0.15), (-0.3, 0.98), (0.65, -0.25), (0.1, -0.25), (0.5, -0.98)
    ),
    "bone": _any(
        _box(-0.6, -0.18, 0.6, 0.18),
        *(_disc(cx, cy, 0.3) for cx in (-0.67, 0.67) for cy in (-0.26, 0.26)),
    ),
    "bow": _any(
        _polygon((-0.95, -0.85), (0, -0.06), (0, 0.06), (-0.95, 0.85)),
        _polygon((0.95, -0.85), (0, -0.06), (0, 0.06), (0.95, 0.85)),
        _disc(0, 0, 0.2),
    ),
    "cloud": _any(
        _disc(-0.5, 0.2, 0.42), _disc(0.05, -0.15, 0.55), _disc(0.55, 0.22, 0.4), _box(-0.5, 0.2, 0.55, 0.62)
    ),
    "comb": _any(
        _box(-0.95, -0.6, 0.95, -0.2), *(_box(x, -0.3, x + 0.2, 0.65) for x in (-0.95, -0.575, -0.2, 0.175, 0.55))
    ),
    "cross": _any(_box(-0.28, -0.92, 0.28, 0.92), _box(-0.92, -0.28, 0.92, 0.28)),
    "crown": _polygon((-0.9, 0.7), (-0.95, -0.6), (-0.45, 0.05), (0, -0.85), (0.45, 0.05), (0.95, -0.6), (0.9, 0.7)),
    "cup": _any(
        _polygon((-0.85, -0.7), (0.45, -0.7), (0.3, 0.8), (-0.7, 0.8)),
        _less(_disc(0.5, -0.08, 0.45), _disc(0.5, -0.08, 0.24)),
    ),
    "drop": _any(_disc(0, 0.35, 0.58), _polygon((0, -0.98), (0.54, 0.15), (-0.54, 0.15))),
    "fish": _any(_disc(-0.2, 0, 0.72, 0.48), _polygon((0.3, 0), (0.95, -0.6), (0.95, 0.6))),
    "flag": _any(_box(-0.75, -0.95, -0.53, 0.98), _polygon((-0.6, -0.9), (0.9, -0.45), (-0.6, 0.1))),
    "fork": _any(
        _box(-0.13, 0, 0.13, 0.98),
        _box(-0.6, -0.25, 0.6, 0.05),
        *(_box(x, -0.95, x + 0.24, -0.2) for x in (-0.6, -0.12, 0.36)),
    ),
    "gear": _gear,
    "glass": _any(
        _polygon((-0.75, -0.9), (0.75, -0.9), (0.1, 0.15), (-0.1, 0.15)),
        _box(-0.1, 0, 0.1, 0.8),
        _box(-0.5, 0.75, 0.5, 0.95),
    ),
    "hat": _any(_box(-0.95, 0.35, 0.95, 0.65), _polygon((-0.5, 0.4), (-0.42, -0.75), (0.42, -0.75), (0.5, 0.4))),
    "heart": _heart,
    "hoop": _less(_disc(0, 0, 0.92), _disc(0, 0, 0.58)),
    "house": _any(
        _polygon((-0.98, -0.05), (0, -0.95), (0.98, -0.05)),
        _less(_box(-0.7, -0.1, 0.7, 0.9), _box(-0.18, 0.35, 0.18, 0.95)),
    ),
    "key": _any(
        _less(_disc(-0.52, 0, 0.44), _disc(-0.52, 0, 0.19)),
        _box(-0.15, -0.13, 0.98, 0.13),
        _box(0.42, 0, 0.6, 0.45),
        _box(0.76, 0, 0.94, 0.45),
    ),
    "kite": _any(
        _polygon((0.1, -0.98), (0.7, -0.35), (0.1, 0.45), (-0.5, -0.35)),
        _line(0.1, 0.4, -0.4, 0.92, 0.2),
        _line(-0.4, 0.6, -0.1, 0.95, 0.16),
    ),
    "lamp": _any(
        _polygon((-0.4, -0.9), (0.4, -0.9), (0.85, 0.05), (-0.85, 0.05)),
        _box(-0.1, 0, 0.1, 0.75),
        _disc(0, 0.82, 0.5, 0.15),
    ),
    "leaf": _any(_both(_disc(-0.42, -0.1, 0.95), _disc(0.42, -0.1, 0.95)), _line(0, 0.6, 0.15, 0.95, 0.16)),
    "mill": _any(
        *(
            _polygon((0, 0), (sx * 0.25 + ax, sy * 0.25 + ay), (ax, ay))
            for sx, sy, ax, ay in (
                (0.9, 3, 0.1, -0.95),
                (-3, 0.9, 0.95, 0.1),
                (-0.9, -3, -0.1, 0.95),
                (3, -0.9, -0.95, -0.1),
            )
        ),
        _disc(0, 0, 0.18),
    ),
    "moon": _less(_disc(-0.05, 0, 0.92), _disc(0.38, -0.12, 0.74)),
    "duck": _any(
        _disc(-0.1, 0.4, 0.72, 0.45),
        _disc(0.42, -0.35, 0.36),
        _polygon((0.65, -0.55), (0.98, -0.3), (0.65, -0.15)),
        _polygon((-0.95, -0.15), (-0.3, 0.2), (-0.6, 0.6)),
    ),
    "sock": _any(
        _box(-0.6, -0.95, 0.05, 0.5), _disc(-0.2, 0.5, 0.42), _disc(0.45, 0.62, 0.42, 0.3), _box(-0.2, 0.4, 0.45, 0.92)
    ),
    "spade": _any(
        _disc(-0.4, 0.15, 0.42),
        _disc(0.4, 0.15, 0.42),
        _polygon((0, -0.95), (0.76, -0.02), (-0.76, -0.02)),
        _polygon((0, 0), (0.35, 0.95), (-0.35, 0.95)),
    ),
    "star": _star(5, 0.98, 0.4),
    "stool": _any(
        _box(-0.85, -0.6, 0.85, -0.25),
        _line(-0.6, -0.3, -0.75, 0.85, 0.22),
        _line(0.6, -0.3, 0.75, 0.85, 0.22),
        _box(-0.65, 0.2, 0.65, 0.36),
    ),
    "sword": _any(
        _polygon((0, -0.98), (0.17, -0.7), (0.17, 0.4), (-0.17, 0.4), (-0.17, -0.7)),
        _box(-0.6, 0.35, 0.6, 0.55),
        _box(-0.12, 0.5, 0.12, 0.98),
    ),
    "tree": _any(
        _polygon((0, -0.98), (0.5, -0.3), (-0.5, -0.3)),
        _polygon((0, -0.6), (0.7, 0.2), (-0.7, 0.2)),
        _polygon((0, -0.2), (0.9, 0.65), (-0.9, 0.65)),
        _box(-0.15, 0.6, 0.15, 0.95),
    ),
    "tulip": _any(
        _polygon(
            (-0.55, -0.9), (-0.25, -0.45), (0, -0.95), (0.25, -0.45), (0.55, -0.9), (0.5, -0.1), (0, 0.15), (-0.5, -0.1)
        ),
        _box(-0.08, 0.1, 0.08, 0.95),
        _polygon((0.05, 0.8), (0.7, 0.1), (0.45, 0.8)),
    ),
}

SHAPE_NAMES: Final[tuple[str, ...]] = tuple(_SHAPES)


def silhouette(name: str, size: int, *, supersample: int = 4) -> Float[np.ndarray, "row column"]:
    """Coverage of each pixel by a shape, anti-aliased by supersampling.

    Args:
        name: One of `SHAPE_NAMES`.
        size: Pixels per side; they tile [-1.1, 1.1] x [-1.1, 1.1], so that no shape touches the edge.
        supersample: Sample points per pixel and axis.

    Returns:
        Fractions in [0, 1], float32, `[size size]`.

    Raises:
        InputError: If there is no such shape.

    Example:
        >>> from clip_lens_ext.planted.shapes import silhouette
        >>> hoop = silhouette("hoop", 33)
        >>> hoop.shape, float(hoop[16, 16]), float(hoop[16, 5])
        ((33, 33), 0.0, 1.0)
    """
    if name not in _SHAPES:
        raise InputError(f"no shape is called {name!r}{near(name, _SHAPES)}; there are {', '.join(_SHAPES)}")
    fine = size * supersample
    axis = ((np.arange(fine) + 0.5) / fine * 2 - 1) * 1.1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = _SHAPES[name](x, y).astype(np.float32)
    return inside.reshape(size, supersample, size, supersample).mean(axis=(1, 3), dtype=np.float32)
