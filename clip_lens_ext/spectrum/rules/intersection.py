"""Low-variance intersection: what is noise in each modality by itself, and lies in the same directions."""

from __future__ import annotations

import torch

from clip_lens_ext.spectrum.cuts.cut import Cut
from clip_lens_ext.spectrum.rules.rule import Found
from clip_lens_ext.spectrum.sources import Question, Source
from clip_lens_ext.spectrum.spectra import Spectrum, check_varies, eigen_spectrum, greatest_eigenvalue
from clip_lens_ext.spectrum.subspaces import shared_subspace


def intersection(question: Question, cut: Cut) -> Found:
    """Cut the spectrum of each covariance, and keep the directions whose principal angles are small.

    `noise_m = {eigenvectors of S_m below the cut}`; shared are the principal vectors of the two with a cosine of at
    least `min_cosine`. Of one tower alone it is the noise of that tower.
    """
    spectra = tuple(spectrum_of(source, question.progress) for source in question.sources)
    cutoffs = tuple(cut(spectrum) for spectrum in spectra)
    spaces = tuple(spectrum.noise(cutoff.n_noise) for spectrum, cutoff in zip(spectra, cutoffs, strict=True))
    basis = spaces[0] if len(spaces) == 1 else shared_subspace(*spaces, min_cosine=question.min_cosine)
    return Found(basis, spectra, cutoffs, spaces)


def spectrum_of(source: Source, progress: bool) -> Spectrum:
    """The spectrum of one modality, with its permuted rows where they are known."""

    def null(generator: torch.Generator, n_signal: int) -> float:
        return greatest_eigenvalue(source.permuted(generator, found.vectors[:, :n_signal]))

    known = source.rows is not None
    found = eigen_spectrum(source.label, source.matrix, source.n, null=null if known else None, progress=progress)
    check_varies(found)
    return found
