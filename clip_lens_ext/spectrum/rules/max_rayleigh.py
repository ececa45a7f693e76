"""Max-Rayleigh: directions whose variance is small in the louder of the two modalities."""

from __future__ import annotations

import torch

from clip_lens_ext.spectrum.cuts.cut import Cut, Cutoff
from clip_lens_ext.spectrum.cuts.fixed import Fixed
from clip_lens_ext.spectrum.rules.intersection import spectrum_of
from clip_lens_ext.spectrum.rules.rule import Found
from clip_lens_ext.spectrum.sources import Question
from clip_lens_ext.spectrum.spectra import eigen_spectrum


def max_rayleigh(question: Question, cut: Cut) -> Found:
    """Directions `u` with `max_m u'S_m u / t_m <= 1`, `t_m` where the cut falls in the spectrum of modality `m`.

    The directions are the eigenvectors of `sum_m S_m / t_m`, so a modality with a larger scale, or more rows, does not
    drown the other. With a given number `k` they are the `k` with the least maximum, in units of the mean variances.
    The spectra are those of either modality; the last is that of the maxima, in units of the thresholds.
    """
    spectra = tuple(spectrum_of(source, question.progress) for source in question.sources)
    cutoffs = tuple(cut(spectrum) for spectrum in spectra)
    # A modality without noise, or with nothing else, gives no level to measure with: its mean variance does. Levels
    # that depend on a given number would make the noise of fewer dimensions no part of that of more.
    fixed = isinstance(cut, Fixed)
    levels = [
        # With fewer rows than dimensions the threshold may be zero: what has no variance at all, up to rounding.
        max(cutoff.threshold, 1e-12 * float(spectrum.values[0]))
        if 0 < cutoff.n_noise < spectrum.d and not fixed
        else float(spectrum.values.mean())
        for spectrum, cutoff in zip(spectra, cutoffs, strict=True)
    ]
    scaled = [source.matrix / level for source, level in zip(question.sources, levels, strict=True)]
    directions = eigen_spectrum("sum", torch.stack(scaled).sum(dim=0), 1).vectors
    quotients = torch.stack([((matrix @ directions) * directions).sum(dim=0) for matrix in scaled])
    worst, order = quotients.amax(dim=0).sort(descending=True, stable=True)
    if isinstance(cut, Fixed):
        n_noise = cut.k
    elif any(cutoff.n_noise == 0 for cutoff in cutoffs):
        n_noise = 0
    else:
        within = torch.stack([
            torch.full_like(one, True, dtype=torch.bool) if cutoff.n_noise == spectrum.d else one <= 1
            for one, cutoff, spectrum in zip(quotients[:, order], cutoffs, spectra, strict=True)
        ]).all(dim=0)  # fmt: skip
        # Those within stand last: put them there where a modality that is all noise has moved them.
        order = torch.cat([order[~within], order[within]])
        worst, n_noise = quotients.amax(dim=0)[order], int(within.sum())
    basis = directions[:, order[len(order) - n_noise :]]
    threshold = 1.0 if not isinstance(cut, Fixed) else float(worst[-n_noise]) if n_noise else 0.0
    maxima = type(spectra[0])("max", worst, directions[:, order], "covariance", min(s.n for s in spectra))
    return Found(basis, (*spectra, maxima), (*cutoffs, Cutoff(n_noise, threshold)))
