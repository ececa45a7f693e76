"""Pictures cropped to a part and brought back to their size: what an intervention on the surroundings needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError


def crop_pictures(pictures: Tensor, *, x: float | Tensor = 0.5, y: float | Tensor = 0.5, size: float = 0.5) -> Tensor:
    """New pictures that show a part of the old ones, enlarged to their size.

    The part has the proportions of the picture, so nothing is stretched; what it leaves out is gone: what a prediction
    loses by a crop around its object, it had from the surroundings. As an edit: `Intervention("crop", "crop", pixels,
    functools.partial(crop_pictures, size=0.6))`.

    Args:
        pictures: bytes or floats `[batch 3 height width]`.
        x, y: the middle of the part, as fractions of width and height: one for all pictures, or one for each
            `[batch]`. The part is moved inwards where it would stick out.
        size: of the part, as a fraction of width and height; 1 leaves the pictures as they are.

    Returns:
        Pictures of the same dtype and shape, interpolated bilinearly.

    Raises:
        InputError: no pictures, a fraction outside of its range, or as many middles as there are no pictures.

    Example:
        >>> picture = torch.zeros(1, 3, 4, 4)
        >>> picture[..., 2:, 2:] = 1.0
        >>> crop_pictures(picture, x=1.0, y=1.0, size=0.5).unique()
        tensor([1.])
    """
    if (
        pictures.dim() != 4
        or pictures.shape[1] != 3
        or not (pictures.is_floating_point() or pictures.dtype == torch.uint8)
    ):
        raise InputError(
            f"expected pictures [batch 3 height width], bytes or floats, got {pictures.dtype} {list(pictures.shape)}"
        )
    if not 0 < size <= 1:
        raise InputError(f"size is a fraction of the picture above 0, got {size}")
    middle = [_middles(value, len(pictures), name) for value, name in ((x, "x"), (y, "y"))]
    # In grid_sample's coordinates the picture is [-1, 1], and the part is `size` of it around its middle.
    half = torch.full((len(pictures),), float(size), dtype=torch.float64)
    shift = [(2 * value - 1).clamp(min=size - 1, max=1 - size) for value in middle]
    zero = torch.zeros_like(half)
    rows = torch.stack([torch.stack([half, zero, shift[0]], dim=1), torch.stack([zero, half, shift[1]], dim=1)], dim=1)
    values = pictures if pictures.is_floating_point() else pictures.float()
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    grid = F.affine_grid(rows.to(pictures.device, dtype), list(pictures.shape), align_corners=False)
    for axis, (middle_of, n) in enumerate(zip(shift, (pictures.shape[3], pictures.shape[2]), strict=True)):
        # Up to half a pixel from its edge: between the last pixel inside and the first outside it would see both.
        reach = max(size - 1 / n, 0.0)
        low, high = ((middle_of + sign * reach)[:, None, None].to(grid) for sign in (-1, 1))
        grid[..., axis] = grid[..., axis].clamp(min=low, max=high)
    found = F.grid_sample(values.to(dtype), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8) if pictures.dtype == torch.uint8 else found.to(pictures.dtype)


def _middles(value: float | Tensor, n: int, name: str) -> Tensor:
    found = torch.as_tensor(value, dtype=torch.float64).cpu()
    if found.shape not in (torch.Size([]), torch.Size([n])) or not bool(((found >= 0) & (found <= 1)).all()):
        raise InputError(f"{name} is a fraction of the picture, one for all or one for each of {n}, got {value}")
    return found.expand(n)
