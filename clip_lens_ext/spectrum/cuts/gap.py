"""Noise begins after the greatest fall of the values in the tail."""

from __future__ import annotations

from dataclasses import dataclass

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff, split_after
from clip_lens_ext.spectrum.spectra import Spectrum


@dataclass(frozen=True)
class Gap:
    """The greatest fall `log value_i - log value_{i+1}` among the last `tail` of the directions.

    Values of zero, where there are fewer rows than dimensions, are noise and no part of the curve.

    Args:
        tail: share of the directions in which the fall is looked for, from the end; the first values of almost any
            spectrum fall steeply.
    """

    tail: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.tail <= 1:
            raise InputError(f"tail is a share of the directions in (0, 1], got {self.tail}")

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        curve = spectrum.values[: spectrum.n_filled]
        curve = curve[curve > 0].log()
        first = min(int((1 - self.tail) * len(curve)), len(curve) - 2)
        if first < 0:
            return split_after(spectrum.values, len(curve))
        falls = curve[first:-1] - curve[first + 1 :]
        return split_after(spectrum.values, first + 1 + int(falls.argmax()))
