"""Noise is what rows without structure give as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff, up_to
from clip_lens_ext.spectrum.spectra import Spectrum


@dataclass(frozen=True)
class Permutation:
    """Noise are the values up to the `1 - alpha` quantile of the greatest value of permuted rows (parallel analysis).

    For a covariance each coordinate is permuted by itself, so the answer depends on the axes: a rotation of the rows
    can change it. For a cross-covariance the pairs are permuted, and no axis matters. Permuted rows keep the variance
    of the signal, so weak signals hide behind strong ones.

    Args:
        n_permutations: draws.
        alpha: chance with which noise may be taken for signal.
        seed: of the draws.

    Reference:
        Horn (1965), A rationale and test for the number of factors in factor analysis.
    """

    n_permutations: int = 20
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.n_permutations, bool) or not isinstance(self.n_permutations, int) or self.n_permutations < 1:
            raise InputError(f"n_permutations is a positive integer, got {self.n_permutations!r}")
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha is a probability in (0, 1), got {self.alpha}")

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        if spectrum.null is None:
            kept = "'marchenko_pastur', " if spectrum.kind != "cross" else ""
            raise InputError(
                f"the cut 'permutation' needs the rows themselves, and of {spectrum.label} there is a covariance or a "
                f"ratio alone: pass rows [n d], or another cut ({kept}'knee', 'gap', 'variance_share', a number)"
            )
        generator = torch.Generator().manual_seed(self.seed)
        draws = [
            spectrum.null(generator)
            for _ in tqdm(range(self.n_permutations), desc=f"permutations, {spectrum.label}", leave=False,
                          disable=not spectrum.progress)
        ]  # fmt: skip
        found = torch.tensor(draws, dtype=torch.float64).quantile(1 - self.alpha, interpolation="higher")
        return up_to(spectrum.values, float(found))
