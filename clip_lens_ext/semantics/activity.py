"""How often and how strongly each latent is active, counted over samples in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError

_STATE = ("n_active", "total", "least", "greatest", "n_samples")


@dataclass(frozen=True, eq=False)
class LatentActivity:
    """Statistics of every latent over the samples of a pass; a sample counts with its greatest activation.

    A sample is active where that is positive. Only active samples are in the sum and the two ends.

    Attributes:
        n_active: samples on which the latent is active, `[d_sae]`.
        total: sum of their activations, in the SAE's units, float64 `[d_sae]`.
        least, greatest: the ends of their range, `[d_sae]`; 0 where there are none.
        n_samples: readable samples of the pass.
    """

    n_active: Tensor
    total: Tensor
    least: Tensor
    greatest: Tensor
    n_samples: int

    @property
    def frequency(self) -> Tensor:
        """Share of the samples on which each latent is active, float64 `[d_sae]`."""
        return self.n_active.double() / self.n_samples

    @property
    def mean(self) -> Tensor:
        """Mean activation over the active samples, float64 `[d_sae]`; NaN where there are none."""
        return self.total / self.n_active

    @property
    def n_silent(self) -> int:
        """Latents that no sample activates."""
        return int((self.n_active == 0).sum())

    def merge(self, other: LatentActivity) -> LatentActivity:
        """The statistics of both passes.

        Raises:
            InputError: the two are of different numbers of latents.
        """
        if len(self.n_active) != len(other.n_active):
            raise InputError(f"statistics of {len(self.n_active)} and of {len(other.n_active)} latents do not merge")
        # Zero stands for "no sample": it must not win against a least activation.
        least = torch.where(self.n_active == 0, other.least, torch.minimum(self.least, other.least))
        least = torch.where(other.n_active == 0, self.least, least)
        return LatentActivity(
            self.n_active + other.n_active,
            self.total + other.total,
            least,
            torch.maximum(self.greatest, other.greatest),
            self.n_samples + other.n_samples,
        )


class ActivityCount:
    """The running statistics of every latent, `[d_sae]` each, as a mergeable accumulator.

    Args:
        d_sae: number of latents.

    Example:
        >>> count = ActivityCount(d_sae=3)
        >>> count.update(torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 4.0]), n_samples=2)
        >>> count.result().mean
        tensor([1., nan, 3.], dtype=torch.float64)
    """

    def __init__(self, d_sae: int) -> None:
        self._n_active = torch.zeros(d_sae, dtype=torch.int64)
        self._total = torch.zeros(d_sae, dtype=torch.float64)
        self._least = torch.full((d_sae,), torch.inf)
        self._greatest = torch.zeros(d_sae)
        self._n_samples = 0

    def update(self, latent: Tensor, activation: Tensor, *, n_samples: int) -> None:
        """Take in a batch.

        Args:
            latent: of each active pair of sample and latent, `[pair]`; each pair once.
            activation: its positive activation, `[pair]`.
            n_samples: samples of the batch, those without an active latent included.
        """
        activation = activation.float()
        self._n_active += torch.bincount(latent, minlength=len(self._n_active))
        self._total.index_add_(0, latent, activation.double())
        self._least.scatter_reduce_(0, latent, activation, "amin")
        self._greatest.scatter_reduce_(0, latent, activation, "amax")
        self._n_samples += n_samples

    def merge(self, other: ActivityCount) -> ActivityCount:
        """Take in the samples of another count; returns this one.

        Raises:
            InputError: the two count different numbers of latents.
        """
        merged = self.result().merge(other.result())
        self._n_active, self._total, self._greatest = merged.n_active, merged.total, merged.greatest
        self._least = torch.where(merged.n_active > 0, merged.least, torch.inf)
        self._n_samples = merged.n_samples
        return self

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another one of the same size was."""
        for name in _STATE:
            value = state[name]
            setattr(self, f"_{name}", value.clone() if isinstance(value, Tensor) else value)

    def result(self) -> LatentActivity:
        """The statistics so far."""
        least = torch.where(self._n_active > 0, self._least, 0.0)
        return LatentActivity(
            self._n_active.clone(), self._total.clone(), least, self._greatest.clone(), self._n_samples
        )
