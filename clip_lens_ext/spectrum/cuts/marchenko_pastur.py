"""Noise is what an eigenvalue of pure noise could be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff, check_kind, up_to
from clip_lens_ext.spectrum.random_matrices import (
    greatest_noise_eigenvalue,
    marchenko_pastur_edges,
    marchenko_pastur_median,
    wachter_edges,
)
from clip_lens_ext.spectrum.spectra import Spectrum

Edge = Literal["upper", "lower"]
Level = Literal["tail", "median"]


@dataclass(frozen=True)
class MarchenkoPastur:
    """Noise are the directions below an edge of the Marchenko-Pastur law, `s^2 (1 -+ sqrt(d/n))^2`.

    Of ratios of variances it is the upper edge of Wachter's law, beyond which the two variances cannot be equal.

    Args:
        edge: `"upper"`: noise is what is not above the bulk; `"lower"`: what is below it, less than noise has.
        level: how `s^2` is found. `"tail"`: the greatest `k` for which the `k` last values could be pure noise, their
            mean its variance; the share of noise does not matter. `"median"`: the median value over the median of
            the law; noise must fill well over half of the directions.
        variance: `s^2`, where it is known; `level` is then not used.
        alpha: the chance with which the greatest eigenvalue of pure noise may lie above the upper edge, which is raised
            for it (Tracy and Widom); None: the edge itself, above which about every sixth lies.

    Reference:
        Marchenko and Pastur (1967); for `"tail"` Kritchman and Nadler (2009), Non-parametric detection of the number of
        signals.
    """

    edge: Edge = "upper"
    level: Level = "tail"
    variance: float | None = None
    alpha: float | None = 0.01

    def __post_init__(self) -> None:
        if self.edge not in get_args(Edge) or self.level not in get_args(Level):
            raise InputError(f"edge is one of {get_args(Edge)} and level one of {get_args(Level)}, "
                             f"got {self.edge!r} and {self.level!r}")  # fmt: skip
        if self.variance is not None and not self.variance > 0:
            raise InputError(f"a variance is positive, got {self.variance}")
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise InputError(f"alpha is a probability in (0, 1), or None; got {self.alpha}")
        if self.edge == "lower" and self.level == "tail" and self.variance is None:
            raise InputError("the lower edge needs level='median' or variance=: the tail is what lies below it")

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        check_kind(spectrum, "marchenko_pastur", ("covariance", "ratio"))
        if spectrum.kind == "ratio":
            return self._ratio(spectrum)
        if self.variance is None and self.level == "tail":
            return self._tail(spectrum)
        variance = self._median(spectrum) if self.variance is None else self.variance
        if self.edge == "lower":
            if spectrum.n <= spectrum.d:
                raise InputError(f"there is no lower edge: {int(spectrum.n)} free rows in {spectrum.d} dimensions "
                                 "leave values of zero; collect more rows")  # fmt: skip
            return up_to(spectrum.values, marchenko_pastur_edges(spectrum.d / spectrum.n, variance=variance)[0])
        return up_to(spectrum.values, self._upper(spectrum.d, spectrum.n, variance))

    def _upper(self, d: float, n: float, variance: float) -> float:
        if self.alpha is None:
            return marchenko_pastur_edges(d / n, variance=variance)[1]
        return greatest_noise_eigenvalue(d, n, variance=variance, alpha=self.alpha)

    def _tail(self, spectrum: Spectrum) -> Cutoff:
        """The greatest `k` for which the `k` last values lie within the edge of noise with their mean."""
        values, d = spectrum.values, spectrum.d
        means = values.flip(0).cumsum(0) / torch.arange(1, d + 1, dtype=values.dtype)
        for k in range(d, 0, -1):
            # What the d - k greater values have taken of the noise's variance lies in their own directions.
            edge = self._upper(k, spectrum.n, float(means[k - 1]))
            if float(values[d - k]) <= edge:
                return Cutoff(k, edge)
        return Cutoff(0, 0.0)

    @staticmethod
    def _median(spectrum: Spectrum) -> float:
        ratio = spectrum.d / spectrum.n
        middle = float(spectrum.values[: spectrum.n_filled].quantile(0.5))
        # With fewer rows than dimensions the law of the rows' own products holds, with the sides exchanged.
        return middle / (marchenko_pastur_median(ratio) if ratio <= 1 else ratio * marchenko_pastur_median(1 / ratio))

    def _ratio(self, spectrum: Spectrum) -> Cutoff:
        if self.edge == "lower" or self.variance is not None:
            raise InputError("of ratios of variances there is the upper edge alone, and it has no variance")
        if spectrum.n_control <= spectrum.d:
            raise InputError(
                f"the control has {int(spectrum.n_control) + 1} rows in {spectrum.d} dimensions: this cut needs more "
                "rows than dimensions; collect more, or use 'knee', 'gap' or a number"
            )
        # The values are real over control, the law is of control over real: its lower edge is their upper one.
        low = wachter_edges(spectrum.d / spectrum.n_control, spectrum.d / spectrum.n)[0]
        return up_to(spectrum.values, 1 / low)
