"""Generalised eigenproblem: what varies as much under inputs that mean nothing."""

from __future__ import annotations

import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cut
from clip_lens_ext.spectrum.rules.rule import Found
from clip_lens_ext.spectrum.sources import Question, Source
from clip_lens_ext.spectrum.spectra import Spectrum
from clip_lens_ext.spectrum.subspaces import shared_subspace, signed


def generalised(question: Question, cut: Cut) -> Found:
    """Solve `S_control v = l S v` in each modality; noise is where the ratio `1 / l` of real to control is small.

    The noise of a modality is the span of its last `v`; shared are principal vectors with a cosine of at least
    `min_cosine`. The values are `v'S v / v'S_control v`, near 1 where a direction varies as much without meaning.
    """
    if not question.controls:
        raise InputError(
            "the rule 'generalised' needs control=: embeddings of inputs that mean nothing, as shuffled pixels and "
            "random tokens, as rows or from collect_covariance; a pair (image control, text control) for two modalities"
        )
    spectra = tuple(
        _ratios(source, control, question.progress)
        for source, control in zip(question.sources, question.controls, strict=True)
    )
    cutoffs = tuple(cut(spectrum) for spectrum in spectra)
    # Generalised eigenvectors are orthogonal in S alone.
    spaces = tuple(
        torch.linalg.qr(spectrum.noise(cutoff.n_noise)).Q for spectrum, cutoff in zip(spectra, cutoffs, strict=True)
    )
    basis = spaces[0] if len(spaces) == 1 else shared_subspace(*spaces, min_cosine=question.min_cosine)
    return Found(basis, spectra, cutoffs, spaces)


def _ratios(source: Source, control: Source, progress: bool) -> Spectrum:
    values, vectors = torch.linalg.eigh(source.matrix)
    if float(values[0]) <= 1e-10 * float(values[-1]):
        raise InputError(
            f"the {source.label} rows do not vary in every direction ({source.count} rows in {source.d} dimensions, "
            "least over greatest variance below 1e-10), so no ratio of variances can be taken: collect more rows, or "
            "take another rule"
        )
    whiten = vectors / values.sqrt()
    found, inner = torch.linalg.eigh(whiten.T @ control.matrix @ whiten)
    if float(found[-1]) <= 0:
        raise InputError(f"the {control.label} rows are all equal: there is no variance to compare with")
    # Directions that the control does not reach at all would have an infinite ratio.
    ratios = 1 / found.clamp(min=float(found[-1]) * 1e-12)
    directions = whiten @ inner
    return Spectrum(source.label, ratios, signed(directions / directions.norm(dim=0)), "ratio", source.n,
                    n_control=control.n, progress=progress)  # fmt: skip
