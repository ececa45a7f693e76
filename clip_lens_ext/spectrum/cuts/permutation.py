"""Noise is what rows without structure give as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff, up_to
from clip_lens_ext.spectrum.spectra import Null, Spectrum


@dataclass(frozen=True)
class Permutation:
    """Noise are the values up to the `1 - alpha` quantile of the greatest value of permuted rows (parallel analysis).

    For a cross-covariance the pairs are permuted. Permuted pairs keep the variance of the signal, and weak signals
    would hide behind strong ones; so what was found is taken out of the rows, the rest is permuted again, and so on
    until nothing more is found (deflation).

    For a covariance each coordinate is permuted by itself, so the answer depends on the axes: a rotation of the rows
    can change it. What is taken out of the rows leaves less variance to every coordinate, noise then stands out of the
    rest, and deflation would find signal without end: there is none, and weak signals do hide.

    Args:
        n_permutations: draws.
        alpha: chance with which noise may be taken for signal.
        seed: of the draws.
        deflate: whether a cross-covariance is deflated; False is the first parallel analyses' way.

    Reference:
        Horn (1965), A rationale and test for the number of factors in factor analysis; Dobriban and Owen (2019),
        Deterministic parallel analysis, for the deflation.
    """

    n_permutations: int = 20
    alpha: float = 0.05
    seed: int = 0
    deflate: bool = True

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
        n_signal, threshold = 0, torch.inf
        with tqdm(
            desc=f"permutations, {spectrum.label}", unit="draw", leave=False, disable=not spectrum.progress
        ) as bar:
            while True:
                lower = self._quantile(spectrum, spectrum.null, n_signal, bar)
                # What is taken out leaves less to permute: the threshold never rises again.
                threshold = min(threshold, lower)
                found = int((spectrum.values > threshold).sum())
                if found <= n_signal or not self.deflate or spectrum.kind != "cross":
                    return up_to(spectrum.values, threshold)
                n_signal = found

    def _quantile(self, spectrum: Spectrum, null: Null, n_signal: int, bar: tqdm[Any]) -> float:
        """Of the greatest value of permuted rows without the directions found so far."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = []
        for _ in range(self.n_permutations):
            draws.append(null(generator, n_signal))
            bar.update()
        return float(torch.tensor(draws, dtype=torch.float64).quantile(1 - self.alpha, interpolation="higher"))
