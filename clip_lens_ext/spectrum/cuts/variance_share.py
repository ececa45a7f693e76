"""Noise is what carries a small share of the variance."""

from __future__ import annotations

from dataclasses import dataclass

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff, split_after
from clip_lens_ext.spectrum.spectra import Spectrum


@dataclass(frozen=True)
class VarianceShare:
    """As many of the last directions as carry at most `share` of the sum of all values.

    Args:
        share: in 0..1.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"a share of the variance is in 0..1, got {self.share}")

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        from_below = spectrum.values.flip(0).cumsum(0)
        n_noise = int((from_below <= self.share * from_below[-1]).sum())
        return split_after(spectrum.values, spectrum.d - n_noise)
