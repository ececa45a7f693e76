"""Training batches of activation rows that are a function of their number, and the split into training and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.activations import ActivationRows


class ShuffledRows:
    """Batches of activation rows without end, each a function of seed and number alone, so that resuming is exact.

    Every epoch goes through all samples in a new order, in chunks of `buffer_images` samples whose rows are shuffled
    together; rows that are kept in memory make one chunk. A batch may span two chunks or two epochs.

    Every hook gets the rows of the same tokens.

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
        self._chunk: tuple[tuple[int, int], dict[str, Tensor], Tensor] | None = None

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number` (from 0), `[batch_size d]` for each hook."""
        position, missing = number * self.batch_size, self.batch_size
        parts: dict[str, list[Tensor]] = {name: [] for name in self.activations.hook_names}
        while missing:
            epoch, row = divmod(position, self.n_rows)
            chunk, offset = divmod(row, self._chunk_rows)
            rows, order = self.chunk(epoch, chunk)
            taken = order[offset : offset + missing]
            for name, part in parts.items():
                part.append(rows[name][taken])
            position += len(taken)
            missing -= len(taken)
        return {name: torch.cat(part) for name, part in parts.items()}

    def chunk(self, epoch: int, chunk: int) -> tuple[dict[str, Tensor], Tensor]:
        """Rows `[row d]` of each hook, and the order in which chunk `chunk` of an epoch goes through them."""
        if self._chunk is None or self._chunk[0] != (epoch, chunk):
            self._chunk = None  # frees the old rows before new ones are made
            self._chunk = ((epoch, chunk), *self._make_chunk(epoch, chunk))
        return self._chunk[1], self._chunk[2]

    def _make_chunk(self, epoch: int, chunk: int) -> tuple[dict[str, Tensor], Tensor]:
        n_tokens = self.activations.n_tokens
        shuffle = generator(self.seed, "rows", epoch, chunk)
        if self.activations.stored is not None:
            ids = (self.samples[:, None] * n_tokens + torch.arange(n_tokens)).flatten()
            rows = {name: kept.flatten(0, 1) for name, kept in self.activations.stored.items()}
            return rows, ids[torch.randperm(len(ids), generator=shuffle)]
        order = self.samples[torch.randperm(len(self.samples), generator=generator(self.seed, "samples", epoch))]
        n_images = self._chunk_rows // n_tokens
        chosen = order[chunk * n_images : (chunk + 1) * n_images]
        rows = {name: taken.flatten(0, 1) for name, taken in self.activations.take(chosen.tolist()).items()}
        return rows, torch.randperm(len(chosen) * n_tokens, generator=shuffle)

    def statistics(
        self, hook_name: str, transform: Callable[[Tensor], Tensor], slice_rows: int = 16384
    ) -> tuple[Tensor, float]:
        """Mean row `[d]` and mean norm of the rows of the first chunk; all of them if they are in memory.

        Args:
            hook_name: which hook.
            transform: what is done to the rows, `[row d]` in float64, before they are averaged.
            slice_rows: rows at a time.
        """
        rows, order = self.chunk(0, 0)
        total, norms = torch.zeros(self.activations.d[hook_name], dtype=torch.float64), 0.0
        for part in order.sort().values.split(slice_rows):
            taken = transform(rows[hook_name][part].double())
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
