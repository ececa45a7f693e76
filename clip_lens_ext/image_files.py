"""Image files: which they are in a folder, and one of them as an RGB picture or the reason why it cannot be read."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from clip_lens_ext.errors import InputError

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif",
    ".tiff", ".webp",
})
# fmt: on

# What PIL raises for a damaged file; SyntaxError is its word for a broken PNG chunk.
DAMAGED = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out of a pass: its name, and why."""

    name: str
    reason: str


class UnreadableError(Exception):
    """One sample cannot be read; its argument is the reason."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB, turned the way its EXIF orientation says.

    Args:
        path: an image file in a format that PIL reads.

    Returns:
        A loaded PIL image of mode "RGB".

    Raises:
        InputError: the file is missing, empty, truncated, not an image, or far too large (a decompression bomb).

    Example:
        >>> read_image("no-such-file.jpg")
        Traceback (most recent call last):
        clip_lens_ext.errors.InputError: cannot read the image 'no-such-file.jpg': no such file
    """
    try:
        return read_picture(Path(path))
    except UnreadableError as error:
        raise InputError(f"cannot read the image {str(path)!r}: {reason(error)}") from error


def read_picture(source: Path | io.BytesIO) -> Image.Image:
    """A file or its bytes as RGB; `UnreadableError` says why not."""
    if isinstance(source, Path):
        if not source.is_file():
            raise UnreadableError("it is a folder" if source.is_dir() else "no such file")
        if source.stat().st_size == 0:
            raise UnreadableError("the file is empty")
    try:
        with Image.open(source) as image:
            return as_rgb(image)
    except (*DAMAGED, ValueError) as error:
        raise UnreadableError(reason(error)) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as RGB, turned the way its EXIF orientation says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # convert("RGB") clips 16 bits at 255, so nearly every pixel would come out white.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode in ("I", "F"):
        raise UnreadableError(f"a picture of mode {image.mode!r} does not say which values are black and white")
    return image.convert("RGB")


def reason(error: BaseException) -> str:
    """Why an image could not be read, in words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown kind"
    return str(error) or type(error).__name__


def image_files(folder: Path, *, recursive: bool) -> list[Path]:
    """The image files of a folder, by their suffix, in the order of their paths; hidden ones are left out."""
    files: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        # A link that leads back up would be walked for ever; hidden folders hold caches and thumbnails.
        folders[:] = [] if real in seen or not recursive else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            shown = (name for name in names if not name.startswith("."))
            files += [Path(root, name) for name in shown if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        seen.add(real)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())
