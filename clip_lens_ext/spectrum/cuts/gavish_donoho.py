"""The optimal hard threshold for singular values."""

from __future__ import annotations

from dataclasses import dataclass

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff, check_kind, up_to
from clip_lens_ext.spectrum.random_matrices import gavish_donoho_factor, marchenko_pastur_median
from clip_lens_ext.spectrum.spectra import Spectrum


@dataclass(frozen=True)
class GavishDonoho:
    """Noise are the directions whose singular value lies below `omega(beta)` times the median one.

    The singular values are those of the centred rows, `sqrt(n value)`; `beta` is the shorter side over the longer. The
    threshold is given in the units of the spectrum, `tau^2 / n`. It is the one at which a truncated SVD has the least
    error, and lies above the edge of the noise; with the median it needs a noise that fills half of the directions.

    Args:
        variance: of the noise in each direction, where it is known: then `tau = lambda*(beta) sqrt(variance n)`.

    Reference:
        Gavish and Donoho (2014), arXiv 1305.5870.
    """

    variance: float | None = None

    def __post_init__(self) -> None:
        if self.variance is not None and not self.variance > 0:
            raise InputError(f"a variance is positive, got {self.variance}")

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        check_kind(spectrum, "gavish_donoho", ("covariance",))
        filled, longer = spectrum.n_filled, max(spectrum.d, spectrum.n)
        ratio = min(spectrum.d, spectrum.n) / longer
        factor = gavish_donoho_factor(ratio) ** 2
        if self.variance is None:
            return up_to(spectrum.values, factor * float(spectrum.values[:filled].quantile(0.5)))
        return up_to(spectrum.values, factor * marchenko_pastur_median(ratio) * self.variance * longer / spectrum.n)
