"""The batches of a training: rows of embeddings that were made once, or pictures and token ids for the towers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from clip_lens_ext.data import ImageBatches, Skipped
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint, tensors_sha256
from clip_lens_ext.sparse_clip.paired_captions import PairedCaptions
from clip_lens_ext.sparse_clip.pairs import EmbeddedPairs
from clip_lens_ext.sparse_clip.processes import Processes
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.families.headed import HeadedCLIP


class Share(NamedTuple):
    """One process' share of a batch: pictures, and the number in [0, 1) that chooses a caption of each."""

    pictures: Tensor
    draws: Tensor


class TrainingData(Protocol):
    """Pairs that a training goes over again and again."""

    @property
    def n(self) -> int:
        """Pairs."""

    @property
    def fingerprint(self) -> str:
        """Of all of them."""

    @property
    def skipped(self) -> Sequence[Skipped]:
        """What could not be read."""

    def batches(self, shares: Iterable[Share]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and texts of each share in turn, as `encode` takes them; shares are asked for as they are needed."""

    def encode(self, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes of images and texts, with gradients, `[pair d_code]`."""


class HeadData:
    """Embeddings, for the heads alone."""

    def __init__(self, pairs: EmbeddedPairs, native: HeadedCLIP, device: torch.device) -> None:
        dtype = next(native.image_head.parameters()).dtype
        self._images, self._texts = (rows.to(device, dtype) for rows in (pairs.images, pairs.texts))
        self._captions, self._native = pairs.pairing, native
        self.n, self.fingerprint, self.skipped = pairs.n, pairs.sha256(), pairs.skipped

    def batches(self, shares: Iterable[Share]) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeddings of each share."""
        for pictures, draws in shares:
            texts = self._captions.draw(pictures, draws)
            yield self._images[pictures.to(self._images.device)], self._texts[texts.to(self._texts.device)]

    def encode(self, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """By the heads."""
        return self._native.image_head(part[0]), self._native.text_head(part[1])


class TowerData:
    """Pictures and captions, for towers and heads.

    All pictures are opened once before the training: those that cannot be read are left out, so that a batch is as
    large in every process and in every run.
    """

    def __init__(
        self, clip: HookedCLIP, native: HeadedCLIP, batches: ImageBatches, captions: PairedCaptions, n_workers: int,
        processes: Processes, progress: bool,
    ) -> None:  # fmt: skip
        self._native, self._device, self._dtype = native, clip.vision.cfg.device, clip.vision.cfg.dtype
        self._source, self._n_workers = batches, n_workers
        if batches.n_samples is None:
            raise InputError("towers are trained on pictures in another order in each epoch, and these can be read in "
                             "one order only: pass a folder, a list, a tensor or a Dataset")  # fmt: skip
        if batches.n_samples != captions.n:
            raise InputError(f"{batches.n_samples} pictures, and captions of {captions.n}")
        own = list(range(batches.n_samples))[processes.rank :: processes.n]
        found: dict[int, str] = {}
        opened = batches.select(own)
        with tqdm(total=len(own), desc="opening all pictures", disable=not progress, unit="image", delay=3) as bar:
            for batch in opened:
                found |= {i: fingerprint(pixels) for i, pixels in zip(batch.indexes, batch.pixels, strict=True)}
                bar.update(len(batch.indexes))
        # Of each picture on its own, so that it does not depend on how many processes looked at them.
        prints = dict(sorted(entry for part in processes.gathered(found) for entry in part.items()))
        self._places = torch.tensor(list(prints))
        self.n = len(self._places)
        self.skipped = tuple(skip for part in processes.gathered(opened.skipped) for skip in part)
        self._captions = captions.select(self._places)
        self._tokens = torch.cat(
            [clip.tokenize(captions.texts[at : at + 4096]).cpu() for at in range(0, len(captions.texts), 4096)]
        )
        self.fingerprint = tensors_sha256(
            {"tokens": self._tokens, "entries": self._captions.entries, "first": self._captions.first},
            about=" ".join(prints.values()),
        )

    def batches(self, shares: Iterable[Share]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and token ids of each share, read ahead by `n_workers` processes."""
        read, shown = tee(shares)  # which holds those alone that are read ahead
        rows = (self._places[share.pictures].tolist() for share in read)
        loader = DataLoader(_Pictures(self._source), batch_sampler=rows, num_workers=self._n_workers)
        for share, pixels in zip(shown, loader, strict=True):
            tokens = self._tokens[self._captions.draw(share.pictures, share.draws)]
            yield pixels.to(self._device, self._dtype), tokens.to(self._device)

    def encode(self, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """By towers and heads."""
        return self._native.encode_image(part[0]), self._native.encode_text(part[1])


class _Pictures(Dataset[Any]):
    def __init__(self, source: ImageBatches) -> None:
        self._source = source

    def __getitem__(self, index: int) -> Tensor:
        (batch,) = self._source.select([index])
        return batch.pixels[0]
