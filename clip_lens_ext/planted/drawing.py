"""Draws planned pictures, and words and overlays on given ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from clip_lens_ext.planted.backgrounds import paint_backgrounds
from clip_lens_ext.planted.font import word_mask
from clip_lens_ext.planted.overlays import OVERLAYS, overlay_layer
from clip_lens_ext.planted.plan import NONE, Plan
from clip_lens_ext.planted.roles import PlantedClass
from clip_lens_ext.planted.sprites import COLOURS, place, sprite

__all__ = ["MARGIN", "SIZE", "draw_pictures", "lay_overlay", "write_word"]

SIZE: Final = 48
"""Pixels per side of a picture."""
MARGIN: Final = 5
"""Pixels at the edge that no drawn word enters, so that no border hides one."""

_SPRITE_SIZE: Final = 32
_COMPANION_SPRITE_SIZE: Final = 16
_NOISE: Final = 12.0
_PLATE: Final = 1

Images = UInt8[torch.Tensor, "batch 3 row column"]


@functools.cache
def _sprites(looks: tuple[tuple[str, str], ...], size: int) -> Float[torch.Tensor, "object 3 size size"]:
    return torch.stack([sprite(shape, texture, size) for shape, texture in looks])


def _palette() -> Float[torch.Tensor, "colour 3"]:
    return torch.tensor(list(COLOURS.values()))


def draw_pictures(
    plan: Plan, classes: Sequence[PlantedClass], noise: np.random.Generator
) -> tuple[Images, Int[torch.Tensor, "batch 2 4"], Int[torch.Tensor, "batch 4"]]:
    """Draws what was planned.

    Args:
        plan: What the pictures show.
        classes: The classes of the world.
        noise: Where the pixels' noise comes from.

    Returns:
        The pictures; the boxes of object and companion; the boxes of the drawn words. A box is left, top, right,
        bottom in pixels, the last two exclusive, and -1 four times where there is nothing.
    """
    canvas = paint_backgrounds(
        torch.from_numpy(plan.backgrounds), torch.from_numpy(plan.background_draws).float(), SIZE
    )
    boxes = torch.full((len(plan), 2, 4), NONE)
    draws = {name: torch.from_numpy(np.ascontiguousarray(column)).float() for name, column in plan.draws.items()}
    looks = tuple((entry.object, entry.texture) for entry in classes)
    for slot, (labels, sprite_size) in enumerate(
        ((plan.companions, _COMPANION_SPRITE_SIZE), (np.where(plan.absent, NONE, plan.labels), _SPRITE_SIZE))
    ):
        rows = torch.from_numpy(np.flatnonzero(labels != NONE))
        if not len(rows):
            continue
        here = {name: column[rows] for name, column in draws.items()}
        which = 1 - slot
        centres, sizes, angles = _companion_place(here) if slot == 0 else _object_place(here)
        colours = _palette()[torch.from_numpy(plan.colours[:, which])[rows]]
        painted = _sprites(looks, sprite_size)[torch.from_numpy(labels)[rows]]
        canvas[rows], boxes[rows, which] = place(canvas[rows], painted, colours, centres, sizes, angles)
    grain = np.frombuffer(noise.bytes(canvas.numel()), np.uint8).reshape(canvas.shape)
    light = (draws["brightness"] - 0.5) * 0.16
    canvas = canvas + light[:, None, None, None]
    canvas = canvas * 255 + (torch.from_numpy(grain.astype(np.float32)) - 127.5) * (_NOISE / 127.5)
    images = canvas.round().clamp(0, 255).to(torch.uint8)
    word_boxes = torch.full((len(plan), 4), NONE)
    for i, word in enumerate(plan.words):
        if word is not None:
            x, y, dark = float(draws["word_x"][i]), float(draws["word_y"][i]), bool(draws["word_dark"][i] < 0.5)
            word_boxes[i] = write_word(images[i], word, x, y, dark)
    for index, name in enumerate(OVERLAYS):
        rows = torch.from_numpy(np.flatnonzero(plan.overlays == index))
        if len(rows):
            images[rows] = lay_overlay(images[rows], name)
    return images, boxes, word_boxes


def _object_place(draws: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = 26 + 11 * draws["size"]
    centres = SIZE / 2 + 8 * (torch.stack([draws["x"], draws["y"]], dim=1) - 0.5)
    return centres, sizes, math.radians(30) * (draws["angle"] - 0.5)


def _companion_place(draws: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    corner = (draws["companion_corner"] * 4).long()
    centres = torch.stack([corner % 2, corner // 2], dim=1) * (SIZE - 18.0) + 9
    centres = centres + 4 * (draws["companion_shift"][:, None] - 0.5)
    return centres, 12 + 3 * draws["companion_size"], math.radians(40) * (draws["companion_angle"] - 0.5)


def write_word(image: UInt8[torch.Tensor, "3 row column"], word: str, x: float, y: float, dark: bool) -> torch.Tensor:
    """Writes a word on one picture, in place, on a plate of the opposite brightness.

    Args:
        image: The picture that is changed.
        word: Letters a to z, at most five.
        x: Where the plate lies between the left (0) and the right margin (1).
        y: Where it lies in the upper (0 to 0.5) or the lower third (0.5 to 1).
        dark: Dark letters on a light plate; otherwise light ones on a dark plate.

    Returns:
        The box of the plate: left, top, right, bottom, the last two exclusive.

    Raises:
        InputError: If a character is not a letter.
    """
    ink = torch.from_numpy(np.pad(word_mask(word), _PLATE))
    height, width = ink.shape
    size = image.shape[-1]
    left = max(MARGIN - 1, 0) + round(x * (size - 2 * (MARGIN - 1) - width))
    third = size / 3 - MARGIN - height * 2 / 3
    offset = (y % 0.5) * 2 * third
    top = round(MARGIN + offset) if y < 0.5 else round(size - MARGIN - height - offset)
    letters, plate = (25, 235) if dark else (240, 20)
    image[:, top : top + height, left : left + width] = torch.where(ink, letters, plate).to(torch.uint8)
    return torch.tensor([left, top, left + width, top + height])


def lay_overlay(images: Images, name: str) -> Images:
    """New pictures with an overlay over them, `[batch 3 row column]`.

    Args:
        images: Square pictures.
        name: One of `OVERLAYS`.
    """
    layer = overlay_layer(name, images.shape[-1])
    covered = torch.lerp(images.float(), 255 * layer[:3], layer[3])
    return covered.round().to(torch.uint8)
