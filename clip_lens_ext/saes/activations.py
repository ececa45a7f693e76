"""Activations of images at one hook in bounded memory, and training batches that are a function of their number."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.data import ImageBatch, ImageBatches
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.positions import TokenScope, select_tokens
from clip_lens_ext.towers.tower import HookedTower


class ActivationRows:
    """The activations of every readable sample at one hook: `n_tokens` rows a sample, of width `d`.

    Making one passes over the data once. Rows that fit into the memory limit are kept; otherwise the pass only reads
    the samples, and `take` runs the tower again for those that are asked for.

    Args:
        tower: the tower; it is only run, without gradients.
        images: the samples.
        hook_name: a hook that gives `[batch token d]` or `[batch d]`.
        token_scope: which tokens; "all" at a hook without a token axis means "pooled".
        memory_limit: bytes that the kept rows may take; 0 keeps none.
        progress: draw a bar.

    Attributes:
        indexes: the position in the data of each readable sample.
        fingerprint: of the data, as `ImageBatches.fingerprint`.
        n_skipped: samples that could not be read.
        stored: `[sample token d]` on the CPU, or None where they did not fit.

    Raises:
        InputError: no sample can be read, an activation is NaN or infinite (it names the image), or hook and scope do
            not go together.
    """

    def __init__(
        self,
        tower: HookedTower,
        images: ImageBatches,
        *,
        hook_name: str,
        token_scope: TokenScope,
        memory_limit: int,
        progress: bool,
    ) -> None:
        self.tower, self.images, self.hook_name, self.token_scope = tower, images, hook_name, token_scope
        self.indexes: list[int] = []
        self.stored: Tensor | None = None
        self.n_tokens = self.d = 0
        n_expected = images.n_samples
        with tqdm(total=n_expected, desc=f"activations at {hook_name}", unit="image", disable=not progress) as bar:
            for batch in images:
                if not self.indexes:
                    rows = self.rows(batch)
                    self.n_tokens, self.d = rows.shape[1:]
                    size = rows[0].numel() * rows.element_size()
                    if (n_expected or len(rows)) * size <= memory_limit:
                        self.stored = torch.empty((n_expected or 1024, *rows.shape[1:]), dtype=rows.dtype)
                elif self.stored is not None:
                    rows = self.rows(batch)
                if self.stored is not None:
                    self._store(rows, memory_limit)
                self.indexes += batch.indexes
                bar.update(len(batch.names))
                if images.skipped:
                    bar.set_postfix(skipped=len(images.skipped))
        self.stored = None if self.stored is None else self.stored[: len(self.indexes)]
        self.fingerprint = str(images.fingerprint)
        self.n_skipped = len(images.skipped)
        if images.skipped:
            named = "; ".join(f"{skip.name}: {skip.reason}" for skip in images.skipped[:5])
            warnings.warn(f"{self.n_skipped} samples could not be read and are left out ({named})", stacklevel=4)

    @property
    def n_samples(self) -> int:
        """Number of readable samples."""
        return len(self.indexes)

    @torch.no_grad()
    def rows(self, batch: ImageBatch) -> Tensor:
        """The activations of a batch, `[sample token d]` on the CPU."""
        cfg = self.tower.cfg
        x = batch.pixels.to(cfg.device)
        x = x.to(cfg.dtype) if x.is_floating_point() else x
        with torch.no_grad():  # where gradients are on, run_to keeps to the kernels that a gradient needs
            activation = self.tower.run_to(x, self.hook_name)
        if activation.ndim not in (2, 3):
            raise InputError(
                f"{self.hook_name} gives {list(activation.shape)}: an SAE is trained where the tower gives "
                "[batch token d] or [batch d]"
            )
        if activation.ndim == 2 and self.token_scope == "all":
            self.token_scope = "pooled"
        eot = self.tower.eot_positions(x) if self.token_scope == "eot" else None
        rows = select_tokens(activation, self.token_scope, eot, n_prefix=self.tower.n_prefix)
        rows = rows.reshape(len(x), -1, activation.shape[-1])
        finite = torch.isfinite(rows).flatten(1).all(1)
        if not finite.all():
            name = batch.names[int(finite.int().argmin())]
            raise InputError(f"the activation of image {name!r} at {self.hook_name} is NaN or infinite")
        return rows.cpu()

    def _store(self, rows: Tensor, memory_limit: int) -> None:
        assert self.stored is not None
        end = len(self.indexes) + len(rows)
        if end * rows[0].numel() * rows.element_size() > memory_limit:
            self.stored = None
            return
        if end > len(self.stored):
            grown = torch.empty((2 * end, *rows.shape[1:]), dtype=rows.dtype)
            grown[: len(self.indexes)] = self.stored[: len(self.indexes)]
            self.stored = grown
        self.stored[len(self.indexes) : end] = rows

    def take(self, samples: Sequence[int]) -> Tensor:
        """The activations `[sample token d]` of some readable samples, in this order; runs the tower if none are kept.

        Raises:
            InputError: a sample that was readable at first is not any more, or the data have one order only.
        """
        if self.stored is not None:
            return self.stored[torch.as_tensor(samples, dtype=torch.long)]
        chosen = self.images.select([self.indexes[sample] for sample in samples])
        rows = torch.cat([self.rows(batch) for batch in chosen])
        if len(rows) != len(samples):
            raise InputError(f"the data changed: {chosen.skipped[0].name!r} could be read before, and now it cannot")
        return rows


class ShuffledRows:
    """Batches of activation rows without end, each a function of seed and number alone, so that resuming is exact.

    Every epoch goes through all samples in a new order, in chunks of `buffer_images` samples whose rows are shuffled
    together; rows that are kept in memory make one chunk. A batch may span two chunks or two epochs.

    Args:
        activations: the rows.
        samples: which of its samples to draw from.
        batch_size: rows in a batch.
        seed: of all orders.
        buffer_images: samples in a chunk.
    """

    def __init__(
        self, activations: ActivationRows, samples: Sequence[int], *, batch_size: int, seed: int, buffer_images: int
    ) -> None:
        self.activations, self.samples = activations, torch.as_tensor(samples, dtype=torch.long)
        self.batch_size, self.seed = batch_size, seed
        self.n_rows = len(samples) * activations.n_tokens
        in_memory = activations.stored is not None
        self._chunk_rows = self.n_rows if in_memory else min(buffer_images, len(samples)) * activations.n_tokens
        self._chunk: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def batch(self, number: int) -> Tensor:
        """Batch `number` (from 0), `[batch_size d]`."""
        position, missing, parts = number * self.batch_size, self.batch_size, []
        while missing:
            epoch, row = divmod(position, self.n_rows)
            chunk, offset = divmod(row, self._chunk_rows)
            rows, order = self.chunk(epoch, chunk)
            parts.append(rows[order[offset : offset + missing]])
            position += len(parts[-1])
            missing -= len(parts[-1])
        return torch.cat(parts)

    def chunk(self, epoch: int, chunk: int) -> tuple[Tensor, Tensor]:
        """Rows `[row d]` and the order in which chunk `chunk` of an epoch goes through them."""
        if self._chunk is None or self._chunk[0] != (epoch, chunk):
            self._chunk = None  # frees the old rows before new ones are made
            self._chunk = ((epoch, chunk), *self._make_chunk(epoch, chunk))
        return self._chunk[1], self._chunk[2]

    def _make_chunk(self, epoch: int, chunk: int) -> tuple[Tensor, Tensor]:
        n_tokens = self.activations.n_tokens
        shuffle = generator(self.seed, "rows", epoch, chunk)
        if self.activations.stored is not None:
            ids = (self.samples[:, None] * n_tokens + torch.arange(n_tokens)).flatten()
            return self.activations.stored.flatten(0, 1), ids[torch.randperm(len(ids), generator=shuffle)]
        order = self.samples[torch.randperm(len(self.samples), generator=generator(self.seed, "samples", epoch))]
        n_images = self._chunk_rows // n_tokens
        rows = self.activations.take(order[chunk * n_images : (chunk + 1) * n_images].tolist()).flatten(0, 1)
        return rows, torch.randperm(len(rows), generator=shuffle)

    def statistics(self, slice_rows: int = 16384) -> tuple[Tensor, float]:
        """Mean row `[d]` (float64) and mean norm of the rows of the first chunk; all of them if they are in memory."""
        rows, order = self.chunk(0, 0)
        total, norms = torch.zeros(rows.shape[-1], dtype=torch.float64), 0.0
        for part in order.sort().values.split(slice_rows):
            taken = rows[part].double()
            total += taken.sum(0)
            norms += float(taken.norm(dim=-1).sum())
        return total / len(order), norms / len(order)


def split_samples(n_samples: int, held_out: float, *, seed: int, at_least: int = 1) -> tuple[list[int], list[int]]:
    """Split samples into those to train on and those held out, in a way that depends on the seed alone.

    Args:
        n_samples: how many there are.
        held_out: share to hold out, in 0..1.
        seed: of the choice.
        at_least: fewest samples to hold out.

    Returns:
        Positions to train on and positions held out, both sorted; none is in both.

    Raises:
        InputError: too few samples for one to train on and `at_least` to hold out.

    Example:
        >>> train, held_out = split_samples(10, 0.2, seed=0)
        >>> len(train), len(held_out), sorted(train + held_out) == list(range(10))
        (8, 2, True)
    """
    n_held_out = max(at_least, round(n_samples * held_out))
    if n_samples - n_held_out < 1:
        raise InputError(
            f"{n_samples} readable images are too few: {n_held_out} would be held out, and none left to train on"
        )
    order = torch.randperm(n_samples, generator=generator(seed, "split")).tolist()
    return sorted(order[n_held_out:]), sorted(order[:n_held_out])


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A random generator of its own for each seed and purpose, so that no two draws share a stream."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
