"""How well an SAE gives activations back: explained variance, cosine, L0 and dead latents, in one streaming pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


@dataclass(frozen=True)
class ReconstructionQuality:
    """What `Reconstruction` measured.

    Attributes:
        explained_variance: `1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2`, at most 1, negative where the mean alone
            would do better; NaN where the activations do not vary.
        cosine: mean cosine of `x` and `x_hat`, 0 for a row that is zero.
        l0: mean number of latents that are active in a row.
        dead_latents: share, in 0..1, of latents that are active in none of the rows; on few rows a latent that is
            only rare counts as dead.
        n_rows: how many rows were seen.
    """

    explained_variance: float
    cosine: float
    l0: float
    dead_latents: float
    n_rows: int


@dataclass(eq=False)
class Reconstruction:
    """A mergeable accumulator over rows of activations and their reconstructions, with float64 state.

    In whatever batches, order or shards the rows come, the result differs by rounding alone.

    Args:
        d_sae: number of latents.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> seen = Reconstruction(d_sae=3)
        >>> seen.update(x, x + torch.tensor([0.0, 0.5]), codes=torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 1.0]]))
        >>> seen.result().explained_variance, seen.result().l0
        (0.75, 1.5)
    """

    d_sae: int
    n_rows: int = field(default=0, init=False)
    mean: Tensor | None = field(default=None, init=False)
    variation: float = field(default=0.0, init=False)
    error: float = field(default=0.0, init=False)
    cosine: float = field(default=0.0, init=False)
    n_active: int = field(default=0, init=False)
    fired: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.fired = torch.zeros(self.d_sae, dtype=torch.bool)

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, codes: Tensor) -> None:
        """Take in rows.

        Args:
            x: activations `[row d]`.
            x_hat: their reconstructions `[row d]`.
            codes: latent activations `[row d_sae]`; a latent is active where its code is not zero.

        Raises:
            InputError: the shapes do not fit each other or `d_sae`.
        """
        if x.ndim != 2 or x.shape != x_hat.shape or codes.shape != (len(x), self.d_sae):
            raise InputError(
                f"x {list(x.shape)}, x_hat {list(x_hat.shape)} and codes {list(codes.shape)} must be [row d], [row d] "
                f"and [row {self.d_sae}]"
            )
        if len(x) == 0:
            return
        x, x_hat, active = x.double(), x_hat.double(), codes != 0
        mean = x.mean(0)
        self._join(len(x), mean.cpu(), float((x - mean).square().sum()))
        self.error += float((x - x_hat).square().sum())
        self.cosine += float(torch.nn.functional.cosine_similarity(x, x_hat, dim=1).sum())
        self.n_active += int(active.sum())
        self.fired |= active.any(0).cpu()

    def merge(self, other: Reconstruction) -> Reconstruction:
        """Take in what another accumulator has seen; returns itself."""
        if other.d_sae != self.d_sae:
            raise InputError(f"cannot merge reconstructions of {other.d_sae} latents into those of {self.d_sae}")
        if other.mean is not None:
            self._join(other.n_rows, other.mean, other.variation)
        self.error += other.error
        self.cosine += other.cosine
        self.n_active += other.n_active
        self.fired = self.fired | other.fired
        return self

    def _join(self, n_rows: int, mean: Tensor, variation: float) -> None:
        # Sums around the mean, joined by Chan's formula: sums of raw squares would cancel where the mean is far
        # larger than the spread, as it is in a residual stream.
        total = self.n_rows + n_rows
        if self.mean is None:
            self.mean = torch.zeros_like(mean)
        shift = mean - self.mean
        self.variation += variation + float(shift.square().sum()) * self.n_rows * n_rows / total
        self.mean = self.mean + shift * (n_rows / total)
        self.n_rows = total

    def result(self) -> ReconstructionQuality:
        """The measures over all rows so far.

        Raises:
            InputError: there was no row.
        """
        if self.n_rows == 0:
            raise InputError("no rows to measure a reconstruction on")
        return ReconstructionQuality(
            explained_variance=1 - self.error / self.variation if self.variation > 0 else float("nan"),
            cosine=self.cosine / self.n_rows,
            l0=self.n_active / self.n_rows,
            dead_latents=float((~self.fired).double().mean()),
            n_rows=self.n_rows,
        )
