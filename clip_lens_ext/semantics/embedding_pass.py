"""Reference samples embedded batch by batch: each one once, and what is done is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_lens_ext.data import ImageBatch, ImageBatches
from clip_lens_ext.errors import InputError
from clip_lens_ext.image_files import Skipped


class EmbeddedBatch(NamedTuple):
    """The embeddings of the wanted samples of one batch, and which tower made them."""

    rows: Tensor
    """Numbers of the samples among the wanted ones, `[sample]`."""
    vectors: Tensor
    """`[sample d_embed]`."""
    tower: str


class EmbeddingAccumulator:
    """The embeddings so far, `[wanted d_embed]`.

    Attributes:
        done: which samples are there, `[wanted]`.
        vectors: zeros where a sample is not there yet; None before the first one.
        tower: `"vision"` or `"text"`; empty before the first sample.
    """

    def __init__(self, n: int) -> None:
        self.done = torch.zeros(n, dtype=torch.bool)
        self.vectors: Tensor | None = None
        self.tower = ""

    def update(self, batch: EmbeddedBatch, /) -> None:
        """Take in a batch."""
        if len(batch.rows) == 0:
            return
        if self.vectors is None:
            self.vectors = batch.vectors.new_zeros(len(self.done), batch.vectors.shape[1])
        self.vectors[batch.rows] = batch.vectors
        self.done[batch.rows] = True
        self.tower = batch.tower

    def merge(self, other: EmbeddingAccumulator, /) -> EmbeddingAccumulator:
        """Take in one of other samples of the same data, and return itself."""
        if other.vectors is not None:
            rows = other.done.nonzero().flatten()
            self.update(EmbeddedBatch(rows, other.vectors[rows], other.tower))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        vectors = torch.zeros(0, 0) if self.vectors is None else self.vectors
        return {"done": self.done, "vectors": vectors, "tower": self.tower}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what another one of the same samples was."""
        self.done, self.tower = state["done"].clone(), state["tower"]
        self.vectors = state["vectors"].clone() if self.done.any() else None

    def result(self) -> EmbeddingAccumulator:
        """Itself: `embed_references` makes `ReferenceEmbeddings` of it."""
        return self


class WantedBatches:
    """The batches that hold samples at some positions; those of data that are a stream up to the last of them.

    Args:
        batches: all data.
        indexes: positions, ascending.

    Raises:
        InputError: a position lies outside of the data.
    """

    def __init__(self, batches: ImageBatches, indexes: list[int]) -> None:
        n = batches.n_samples
        if n is not None and indexes[-1] >= n:
            raise InputError(
                f"the references were collected from at least {indexes[-1] + 1} samples, and these images are {n}"
            )
        self._last = indexes[-1]
        try:
            self._batches = batches.select(indexes)
        except InputError:  # a stream
            self._batches = batches

    @property
    def n_samples(self) -> int | None:
        """How many samples are read, where the data say so."""
        return self._batches.n_samples

    @property
    def skipped(self) -> list[Skipped]:
        """What could not be read so far."""
        return self._batches.skipped

    @property
    def fingerprint(self) -> str | None:
        """Of what was read, after a whole pass."""
        return self._batches.fingerprint

    def __iter__(self) -> Iterator[ImageBatch]:
        for batch in self._batches:
            yield batch
            if batch.indexes[-1] >= self._last:
                return
