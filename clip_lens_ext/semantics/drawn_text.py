"""Text drawn on pictures, and text taken off them: what an intervention on typography needs."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clip_lens_ext.errors import InputError


def draw_word(
    pictures: Tensor,
    word: str,
    *,
    x: float = 0.5,
    y: float = 0.85,
    height: float = 0.2,
    dark: bool = True,
    letters: bool = True,
) -> Tensor:
    """New pictures with a word on a plate, in the font that comes with PIL.

    The plate has the size of the word, so that with `letters=False` the same plate without the word is a control.

    Args:
        pictures: bytes `[batch 3 height width]`, before any preprocessing.
        word: what to write, on one line.
        x, y: the middle of the plate, as fractions of width and height; it is moved inwards where it would stick out.
        height: of the letters, as a fraction of the picture's height; less where the word would be too wide.
        dark: dark letters on a light plate, or the reverse.
        letters: False draws the plate alone.

    Returns:
        Bytes of the same shape; the pictures that were passed in stay as they are.

    Raises:
        InputError: no bytes, no word, a character that the font does not have, or a fraction outside of its range.

    Example:
        >>> grey = torch.full((2, 3, 48, 64), 128, dtype=torch.uint8)
        >>> written, plate = draw_word(grey, "crane"), draw_word(grey, "crane", letters=False)
        >>> bool((written != grey).any()), torch.equal(written, plate)
        (True, False)
    """
    _check_bytes(pictures)
    if not word.strip() or "\n" in word:
        raise InputError(f"a word is one line with something in it, got {word!r}")
    if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < height <= 1):
        raise InputError(f"x, y and height are fractions of the picture, got {x}, {y} and {height}")
    missing = _missing(word)
    if missing:
        raise InputError(f"the font that comes with PIL has no {missing!r}, and would draw a box for it, as for any "
                         "character that it lacks: write the word on the pictures with a font of your own")  # fmt: skip
    rows, columns = pictures.shape[2:]
    size = height * rows
    while True:
        font = ImageFont.load_default(size=max(size, 1))
        left, top, right, bottom = (round(edge) for edge in font.getbbox(word))
        margin = max(1, round(size / 8))
        plate = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin), 255 if dark else 0)
        if (plate.width <= columns and plate.height <= rows) or size <= 1:
            break
        size *= 0.9
    if letters:
        ImageDraw.Draw(plate).text((margin - left, margin - top), word, fill=0 if dark else 255, font=font)
    grey = torch.tensor(list(plate.tobytes()), dtype=torch.uint8).view(plate.height, plate.width)
    grey = grey[:rows, :columns]
    first_row = _inside(y, rows, len(grey))
    first_column = _inside(x, columns, grey.shape[1])
    written = pictures.clone()
    written[:, :, first_row : first_row + len(grey), first_column : first_column + grey.shape[1]] = grey
    return written


def mask_boxes(pictures: Tensor, boxes: Tensor) -> Tensor:
    """New pictures with a box of each filled with the mean colour of the pixels around it.

    Args:
        pictures: bytes or floats `[batch 3 height width]`.
        boxes: left, top, right, bottom in pixels, the last two exclusive, `[batch 4]`; -1 four times for no box.

    Returns:
        Pictures of the same dtype and shape.

    Raises:
        InputError: shapes that do not fit, or a box that does not lie in its picture.

    Example:
        >>> picture = torch.zeros(1, 3, 4, 4)
        >>> picture[0, :, 1, 1] = 9.0
        >>> mask_boxes(picture, torch.tensor([[1, 1, 2, 2]])).max()
        tensor(0.)
    """
    if pictures.dim() != 4 or pictures.shape[1] != 3 or tuple(boxes.shape) != (len(pictures), 4):
        raise InputError(
            f"expected pictures [batch 3 height width] and boxes [batch 4], got {list(pictures.shape)} and "
            f"{list(boxes.shape)}"
        )
    rows, columns = pictures.shape[2:]
    masked = pictures.clone()
    for picture, box in zip(masked, boxes.tolist(), strict=True):
        left, top, right, bottom = map(int, box)
        if left == top == right == bottom == -1:
            continue
        if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
            raise InputError(f"the box {box} does not lie in a picture of {columns} x {rows} pixels")
        around = torch.zeros(rows, columns, dtype=torch.bool)
        around[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
        around[top:bottom, left:right] = False
        # A box as large as the picture has nothing around it.
        source = picture[:, around] if bool(around.any()) else picture.flatten(1)
        picture[:, top:bottom, left:right] = source.double().mean(dim=1).to(picture.dtype)[:, None, None]
    return masked


def _missing(word: str) -> str | None:
    """The first character that the font draws as it draws a code point that no font has."""
    font = ImageFont.load_default(size=24)

    def drawn(text: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(text)
        return mask.size, bytes(mask)

    box = drawn("\U0010ffff")
    return next((letter for letter in word if not letter.isspace() and drawn(letter) == box), None)


def _inside(middle: float, room: int, length: int) -> int:
    return min(max(round(middle * room - length / 2), 0), room - length)


def _check_bytes(pictures: Tensor) -> None:
    if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[1] != 3:
        raise InputError(f"pictures are bytes [batch 3 height width], got {pictures.dtype} {list(pictures.shape)}")
