"""A number of noise directions that is given."""

from __future__ import annotations

from dataclasses import dataclass

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff, split_after
from clip_lens_ext.spectrum.spectra import Spectrum


@dataclass(frozen=True)
class Fixed:
    """The `k` last directions are noise. `split_noise(..., cut=k)` is the same.

    Args:
        k: how many.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise InputError(f"a cut that is a number says how many directions are noise, 0 or more; got {self.k!r}")

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        if self.k > spectrum.d:
            raise InputError(f"{self.k} noise directions were asked for, and there are {spectrum.d} in all")
        return split_after(spectrum.values, spectrum.d - self.k)
