"""Noise begins where the falling curve of the values turns flat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clip_lens_ext.spectrum.cuts.cut import Cutoff, split_after
from clip_lens_ext.spectrum.spectra import Spectrum


@dataclass(frozen=True)
class Knee:
    """The point of `(i, log value_i)` that lies farthest below the line from the first to the last is the first noise.

    Values of zero, where there are fewer rows than dimensions, are noise and no part of the curve. There is no noise
    where no point lies below the line.

    Reference:
        Satopää et al. (2011), Finding a "kneedle" in a haystack.
    """

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        curve = spectrum.values[: spectrum.n_filled]
        curve = curve[curve > 0].log()
        if len(curve) < 3:
            return split_after(spectrum.values, len(curve))
        line = curve[0] + (curve[-1] - curve[0]) * torch.linspace(0, 1, len(curve), dtype=curve.dtype)
        below = line - curve
        # Both ends lie on the line up to rounding, which is no knee.
        if float(below.max()) <= 1e-9 * float(curve.abs().max().clamp(min=1)):
            return split_after(spectrum.values, len(curve))
        return split_after(spectrum.values, int(below.argmax()))
