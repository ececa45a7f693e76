"""Where samples come from: a tensor, files, a list, a data set or a loader, by position or in the order they give."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from clip_lens_ext.errors import InputError
from clip_lens_ext.image_files import IMAGE_SUFFIXES, image_files

IMAGE_KEYS = ("image", "pixel_values", "img")
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class ImageSource:
    """Samples by position (`n` and `read`), or in the one order that `stream` gives them."""

    name: Callable[[int], str] = str
    n: int | None = None
    read: Callable[[int], Any] | None = None
    stream: Callable[[], Iterator[Any]] | None = None
    shuffled: bool = False
    """Whether each pass gives the samples in another order."""


def image_source(data: Any, *, recursive: bool, can_preprocess: bool) -> ImageSource:
    """The source of whatever `image_batches` takes.

    Raises:
        InputError: a missing path, a folder without images, a wrong shape or dtype, files without preprocessing, or
            something that holds no images.
    """
    if isinstance(data, Tensor):
        return _tensor_source(data)
    if isinstance(data, str | os.PathLike | Image.Image):
        data = [data]
    if isinstance(data, list | tuple):
        return _list_source(list(data), recursive=recursive, can_preprocess=can_preprocess)
    if isinstance(data, DataLoader):
        return _loader_source(data)
    if isinstance(data, Mapping):
        raise InputError(f"a mapping with the keys {sorted(map(str, data))}: pass one split of it")
    columns = getattr(data, "column_names", None)
    if columns is not None and not any(key in columns for key in IMAGE_KEYS):
        raise InputError(f"the data set has the columns {list(columns)}: one of {IMAGE_KEYS} is needed")
    # IterableDataset inherits a __getitem__ that only raises.
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        return ImageSource(n=len(data), read=data.__getitem__)
    if isinstance(data, Iterable):
        if iter(data) is data:
            raise InputError("an iterator can be read only once: pass a list, a Dataset or a DataLoader")
        return ImageSource(stream=lambda: iter(data))
    raise InputError(f"cannot read images from a {type(data).__name__}: see image_batches for what is accepted")


def _tensor_source(data: Tensor) -> ImageSource:
    ids = data.ndim == 2 and not data.is_floating_point() and data.dtype is not torch.bool
    pixels = data.ndim == 4 and data.shape[1] == 3 and data.is_floating_point()
    if not ids and not pixels:
        raise InputError(
            f"a tensor {data.dtype} {list(data.shape)}: floats [sample 3 height width] or token ids [sample n_ctx] are "
            "needed"
        )
    for start in range(0, len(data) if pixels else 0, 64):  # in slices: no mask as large as the data
        finite = torch.isfinite(data[start : start + 64]).flatten(1).all(1)
        if not finite.all():
            raise InputError(f"sample {start + int(finite.int().argmin())} holds NaN or infinite values")
    return ImageSource(n=len(data), read=data.__getitem__)


def _list_source(items: list[Any], *, recursive: bool, can_preprocess: bool) -> ImageSource:
    samples: list[Any] = []
    names: list[str] = []
    for item in items:
        if isinstance(item, str | os.PathLike):
            path = Path(item)
            if not path.exists():
                raise InputError(f"no such file or folder: {str(path)!r}")
            found = image_files(path, recursive=recursive) if path.is_dir() else [path]
            if not found:
                suffixes = " ".join(sorted(IMAGE_SUFFIXES))
                raise InputError(f"no image in the folder {str(path)!r} (looked for {suffixes})")
            samples += found
            # A single folder names its images from itself; several could hold the same names.
            alone = len(items) == 1 and path.is_dir()
            names += [file.relative_to(path).as_posix() if alone else str(file) for file in found]
        else:
            samples.append(item)
            names.append(str(getattr(item, "filename", "") or len(names)))
    if not can_preprocess and any(isinstance(sample, Path | Image.Image) for sample in samples):
        raise InputError("images need preprocess= (for example clip.preprocess) to become tensors")
    return ImageSource(name=names.__getitem__, n=len(samples), read=samples.__getitem__)


def _loader_source(loader: DataLoader[Any]) -> ImageSource:
    def stream() -> Iterator[Any]:
        for batch in loader:
            if isinstance(batch, Mapping):
                batch = next((batch[key] for key in IMAGE_KEYS if key in batch), batch)
            elif isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
                batch = batch[0]
            is_batch = batch.ndim in (2, 4) if isinstance(batch, Tensor) else isinstance(batch, list | tuple)
            yield from batch if is_batch else [batch]

    plain = type(loader.sampler) is SequentialSampler and type(loader.batch_sampler) is BatchSampler
    whole = not loader.drop_last and loader.collate_fn is default_collate and hasattr(loader.dataset, "__len__")
    if plain and whole:
        # Asked for another order it is the data set that is read; in its own order, the loader with its workers.
        return ImageSource(n=len(loader.dataset), read=loader.dataset.__getitem__, stream=stream)  # type: ignore[arg-type]
    # The sampler of a batch_sampler of one's own is in that one, and the loader's is a plain one that nobody asks.
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return ImageSource(stream=stream, shuffled=any(isinstance(one, _RANDOM) for one in samplers))
