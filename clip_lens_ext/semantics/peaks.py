"""Codes pooled over tokens, and the top samples of every latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clip_lens_ext.saes.codes import SparseCodes


class Peaks(NamedTuple):
    """The (sample, latent) pairs of a batch with a positive activation, sorted by sample; each column is `[pair]`.

    A sample's activation of a latent is its greatest over the SAE's tokens, and `position` the first token of the
    tower's sequence that reaches it.
    """

    sample: Tensor
    latent: Tensor
    activation: Tensor
    position: Tensor


def peaks(codes: SparseCodes, keep: Tensor | None = None) -> Peaks:
    """The greatest activation of each latent on each sample, on the CPU.

    Args:
        codes: of one batch.
        keep: which latents, booleans `[d_sae]`; None: all.
    """
    positions = codes.position.to(codes.token.device)[codes.sample, codes.token]
    chosen = codes.value > 0
    if keep is not None:
        chosen &= keep.to(chosen.device)[codes.latent]
    keys, pair = torch.unique(codes.sample[chosen] * codes.d_sae + codes.latent[chosen], return_inverse=True)
    value, positions = codes.value[chosen].float(), positions[chosen]
    activation = value.new_zeros(len(keys)).scatter_reduce_(0, pair, value, "amax")
    at_peak = value == activation[pair]
    position = positions.new_full((len(keys),), torch.iinfo(positions.dtype).max)
    position.scatter_reduce_(0, pair[at_peak], positions[at_peak], "amin")
    return Peaks((keys // codes.d_sae).cpu(), (keys % codes.d_sae).cpu(), activation.cpu(), position.cpu())


class TopSamples:
    """The running top `k` of every latent, `[d_sae k]` on the CPU.

    Attributes:
        sample, activation, position: greatest activation first; -1, 0 and -1 where there is no sample.
    """

    def __init__(self, d_sae: int, k: int) -> None:
        self.k = k
        self.sample = torch.full((d_sae, k), -1)
        self.activation = torch.zeros(d_sae, k)
        self.position = torch.full((d_sae, k), -1)

    def update(self, found: Peaks, *, first: int) -> None:
        """Take in a batch whose first sample has number `first`."""
        sample, latent, activation, position = found
        if len(sample) == 0:
            return
        # Greatest first within each latent; both sorts are stable, so equal ones stay in the order of samples.
        order = activation.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        sample, latent, activation, position = (column[order] for column in (sample, latent, activation, position))
        rows, row, count = latent.unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(latent)) - (count.cumsum(0) - count)[row]
        kept = place < self.k
        row, place = row[kept], place[kept]
        width = int(place.max()) + 1
        new_sample, new_position = (torch.full((len(rows), width), -1) for _ in range(2))
        new_activation = torch.zeros(len(rows), width)
        new_sample[row, place] = sample[kept] + first
        new_activation[row, place] = activation[kept]
        new_position[row, place] = position[kept]
        self.activation[rows], self.sample[rows], self.position[rows] = greatest(
            torch.cat([self.activation[rows], new_activation], dim=1),
            torch.cat([self.sample[rows], new_sample], dim=1),
            torch.cat([self.position[rows], new_position], dim=1),
            self.k,
        )

    def merge(self, other: TopSamples, *, first: int) -> None:
        """Take in the top samples of another pass, whose first sample has number `first` here."""
        shifted = torch.where(other.sample >= 0, other.sample + first, -1)
        self.activation, self.sample, self.position = greatest(
            torch.cat([self.activation, other.activation], dim=1),
            torch.cat([self.sample, shifted], dim=1),
            torch.cat([self.position, other.position], dim=1),
            self.k,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs."""
        return {"sample": self.sample, "activation": self.activation, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what another one of the same sizes was."""
        self.sample, self.activation, self.position = (
            state[name].clone() for name in ("sample", "activation", "position")
        )


def greatest(activation: Tensor, sample: Tensor, position: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` greatest of each row; equal ones in the order in which they stand. Padding has activation 0."""
    order = activation.argsort(dim=1, descending=True, stable=True)[:, :k]
    return activation.gather(1, order), sample.gather(1, order), position.gather(1, order)
