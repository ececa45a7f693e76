"""Pooled covariance: what varies little in the mean of both modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_lens_ext.spectrum.cuts.cut import Cut
from clip_lens_ext.spectrum.rules.rule import Found
from clip_lens_ext.spectrum.sources import Question
from clip_lens_ext.spectrum.spectra import Spectrum, check_varies, eigen_spectrum, greatest_eigenvalue


def pooled(question: Question, cut: Cut) -> Found:
    """Cut the spectrum of `S = (S_image + S_text) / 2`; the noise is shared by construction.

    Either modality weighs the same, whatever its number of rows. The cut is told `4 n_i n_t / (n_i + n_t)` rows, which
    is the number of rows of one covariance with the same scatter of its noise, if both have noise of one variance.
    """
    spectrum = pooled_spectrum(question)
    cutoff = cut(spectrum)
    return Found(spectrum.noise(cutoff.n_noise), (spectrum,), (cutoff,))


def pooled_spectrum(question: Question) -> Spectrum:
    """The spectrum of the mean of the covariances."""
    sources = question.sources
    matrix = torch.stack([source.matrix for source in sources]).mean(dim=0)
    n = len(sources) ** 2 / sum(1 / source.n for source in sources)

    def null(generator: torch.Generator, n_signal: int) -> float:
        mixed: list[Tensor] = [source.permuted(generator, found.vectors[:, :n_signal]) for source in sources]
        return greatest_eigenvalue(torch.stack(mixed).mean(dim=0))

    known = all(source.rows is not None for source in sources)
    label = "pooled" if len(sources) > 1 else sources[0].label
    found = eigen_spectrum(label, matrix, n, null=null if known else None, progress=question.progress)
    check_varies(found)
    return found
