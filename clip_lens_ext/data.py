"""Images in: tensors, folders, files, data sets -> batches; what cannot be read is skipped, counted and named.

Nothing is printed and no progress is drawn here: `ImageBatches.skipped` says what was left out of the last pass, and
the caller decides how to say so.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.image_files import (
    DAMAGED,
    IMAGE_SUFFIXES,
    Skipped,
    UnreadableError,
    as_rgb,
    read_image,
    read_picture,
    reason,
)
from clip_lens_ext.image_sources import IMAGE_KEYS, ImageSource, image_source

# fmt: off
__all__ = ["IMAGE_KEYS", "IMAGE_SUFFIXES", "ImageBatch", "ImageBatches", "Preprocess", "Skipped", "image_batches",
           "read_image"]
# fmt: on

Preprocess = Callable[[Image.Image], Tensor]



@dataclass(frozen=True, eq=False)
class ImageBatch:
    """A batch of samples with their names.

    Attributes:
        pixels: `[batch 3 height width]` floats, or `[batch n_ctx]` token ids.
        names: one name for each row: a path, or the position of the sample in the data.
        indexes: the position of each row in the data, counting samples that were skipped.
    """

    pixels: Tensor
    names: list[str]
    indexes: list[int]


class ImageBatches:
    """Batches of preprocessed samples that can be iterated again and again; made by `image_batches`.

    Attributes:
        skipped: what the current or last pass could not read, in order.
        n_read: how many samples the current or last pass has given.
        fingerprint: sha256 over shape, dtype and bytes of every sample of the last whole pass, in order; it does not
            depend on the batch size. None before the end of a first pass.
    """

    def __init__(
        self, source: ImageSource, preprocess: Preprocess | None, batch_size: int, strict: bool, order: list[int] | None
    ) -> None:
        self._source, self._preprocess, self._strict, self._order = source, preprocess, strict, order
        self.batch_size = batch_size
        self.skipped: list[Skipped] = []
        self.n_read = 0
        self.fingerprint: str | None = None

    @property
    def n_samples(self) -> int | None:
        """Number of samples, the unreadable ones included; None where the data does not say."""
        return self._source.n if self._order is None else len(self._order)

    def __len__(self) -> int:
        if self.n_samples is None:
            raise TypeError("the data does not say how many samples it has")
        return self.n_samples

    def keeping_order(self, why: str) -> ImageBatches:
        """These batches, if sample i is the same one in each pass.

        Args:
            why: what goes wrong otherwise, for the error.

        Raises:
            InputError: a `DataLoader` that draws its order at random.
        """
        if self._source.shuffled:
            raise InputError(f"this DataLoader gives its samples in another order each time, and {why}: pass its "
                             "data set, or a loader with shuffle=False")  # fmt: skip
        return self

    def select(self, indexes: Sequence[int]) -> ImageBatches:
        """The samples at these positions, in this order, as batches of their own.

        Args:
            indexes: positions in the data, as in `ImageBatch.indexes`.

        Returns:
            `ImageBatches` over those samples; `ImageBatch.indexes` still counts in the whole data.

        Raises:
            InputError: the data can only be read in its own order, or a position lies outside of it.
        """
        if self._source.read is None or self._source.n is None:
            raise InputError("these data can be read in one order only; pass a folder, a list, a tensor or a Dataset")
        if any(not 0 <= index < self._source.n for index in indexes):
            raise InputError(f"positions must lie in 0..{self._source.n - 1}")
        return ImageBatches(self._source, self._preprocess, self.batch_size, self._strict, order=list(indexes))

    def _samples(self) -> Iterator[tuple[int, Callable[[], Any]]]:
        read = self._source.read
        if read is not None and (self._order is not None or self._source.stream is None):
            for index in self._order if self._order is not None else range(self._source.n or 0):
                yield index, partial(read, index)
        elif self._source.stream is not None:
            for index, item in enumerate(self._source.stream()):
                yield index, partial(_itself, item)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.skipped, self.n_read, self.fingerprint = [], 0, None
        digest = hashlib.sha256()
        rows: list[Tensor] = []
        names: list[str] = []
        indexes: list[int] = []
        first: tuple[str, Tensor] | None = None
        for index, read in self._samples():
            name = self._source.name(index)
            try:
                pixels = _as_pixels(read(), self._preprocess, name)
                if pixels.is_floating_point() and not torch.isfinite(pixels).all():
                    raise UnreadableError("it holds NaN or infinite values")
            except (UnreadableError, *DAMAGED) as error:
                if self._strict:
                    raise InputError(f"cannot read the image {name!r}: {reason(error)}") from error
                self.skipped.append(Skipped(name, reason(error)))
                continue
            first = first or (name, pixels)
            if pixels.shape != first[1].shape or pixels.dtype != first[1].dtype:
                raise InputError(
                    f"sample {name!r} is {_kind(pixels)}, but {first[0]!r} is {_kind(first[1])}: "
                    "a batch needs one size and dtype; resize in preprocess"
                )
            digest.update(_kind(pixels).encode())
            digest.update(pixels.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            rows.append(pixels)
            names.append(name)
            indexes.append(index)
            self.n_read += 1
            if len(rows) == self.batch_size:
                yield ImageBatch(torch.stack(rows), names, indexes)
                rows, names, indexes = [], [], []
        if rows:
            yield ImageBatch(torch.stack(rows), names, indexes)
        if self.n_read == 0:
            shown = "; ".join(f"{skip.name}: {skip.reason}" for skip in self.skipped[:3])
            raise InputError(f"no sample could be read, {len(self.skipped)} skipped" + (f" ({shown})" if shown else ""))
        self.fingerprint = digest.hexdigest()


def image_batches(
    data: Any,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    recursive: bool = True,
    strict: bool = False,
) -> ImageBatches:
    """Turn whatever holds images into batches for a tower.

    Args:
        data: a float tensor `[sample 3 height width]` (already preprocessed) or token ids `[sample n_ctx]`; a folder
            of images; an image file; a list of files, folders, PIL images or tensors; a `torch.utils.data` Dataset or
            DataLoader; a Hugging Face `datasets.Dataset`. Items may be a tensor, a PIL image, a tuple that begins
            with one, or a dict with "image" or "pixel_values". Already made `ImageBatches` come back as they are.
        preprocess: PIL RGB image -> float tensor `[3 height width]`; needed for files and PIL images. Tensors are
            taken as they are.
        batch_size: samples in a batch; the last may be smaller.
        recursive: look into the folders of a folder.
        strict: raise at the first sample that cannot be read, instead of skipping it.

    Returns:
        `ImageBatches`, to be iterated any number of times. A folder is read in sorted order.

    Raises:
        InputError: a missing path, a folder without images, empty data, a wrong shape, dtype or channel count, a NaN
            or infinite value in a tensor, files without `preprocess`; and, while iterating, when no sample could be
            read, sizes differ, or (with `strict`) one sample cannot be read.

    Example:
        >>> import torch
        >>> batches = image_batches(torch.zeros(5, 3, 8, 8), batch_size=2)
        >>> len(batches), [tuple(batch.pixels.shape) for batch in batches]
        (5, [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)])
        >>> batches.skipped
        []
    """
    if isinstance(data, ImageBatches):
        return data
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a positive integer, not {batch_size!r}")
    source = image_source(data, recursive=recursive, can_preprocess=preprocess is not None)
    if source.n == 0:
        raise InputError(f"no samples in this {type(data).__name__}")
    return ImageBatches(source, preprocess, batch_size, strict, order=None)


def _itself(item: Any) -> Any:
    return item


def _kind(pixels: Tensor) -> str:
    return f"{pixels.dtype} {list(pixels.shape)}"


def _as_pixels(item: Any, preprocess: Preprocess | None, name: str) -> Tensor:
    """One item of any accepted kind as a tensor `[3 height width]` or `[n_ctx]`."""
    if isinstance(item, Mapping):
        key = next((key for key in IMAGE_KEYS if key in item), None)
        if key is None:
            raise InputError(f"sample {name!r} has the keys {sorted(map(str, item))}: one of {IMAGE_KEYS} is needed")
        item = item[key]
        if isinstance(item, Mapping) and item.get("bytes"):  # an undecoded column of Hugging Face datasets
            item = read_picture(io.BytesIO(item["bytes"]))
    elif isinstance(item, tuple | list) and len(item) > 0:
        item = item[0]
    if isinstance(item, str | os.PathLike):
        item = read_picture(Path(item))
    if isinstance(item, Image.Image):
        if preprocess is None:
            raise InputError(f"sample {name!r} is a PIL image: pass preprocess= (for example clip.preprocess)")
        item = preprocess(as_rgb(item))
    if not isinstance(item, Tensor):
        raise InputError(f"sample {name!r} is a {type(item).__name__}: a tensor, a PIL image or a path is needed")
    if item.ndim == 1 and not item.is_floating_point() and item.dtype is not torch.bool:
        return item
    if item.ndim != 3 or item.shape[0] != 3 or not item.is_floating_point():
        raise InputError(
            f"sample {name!r} is {_kind(item)}: floats [3 height width] (preprocessed) or token ids [n_ctx] are needed"
        )
    return item
