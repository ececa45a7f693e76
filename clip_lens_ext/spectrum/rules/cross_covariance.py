"""Cross-covariance: what does not vary together over matched pairs."""

from __future__ import annotations

import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cut
from clip_lens_ext.spectrum.rules.rule import Found, check_two
from clip_lens_ext.spectrum.sources import Question
from clip_lens_ext.spectrum.spectra import Spectrum, check_varies
from clip_lens_ext.spectrum.subspaces import complement, shared_subspace, signed


def cross_covariance(question: Question, cut: Cut) -> Found:
    """Cut the singular values of `C = X'T / n` over pairs; noise is what is orthogonal to the signal on both sides.

    With `U_r`, `V_r` the singular vectors above the cut, the noise of the images is the complement of `U_r`, that of
    the texts the complement of `V_r`; shared are their principal vectors with a cosine of at least `min_cosine`.
    """
    check_two(question, "cross_covariance")
    if question.cross is None:
        raise InputError(
            "the rule 'cross_covariance' needs pairs, row i of image and of text being one: pass rows [n d] of equal "
            "number, or pairs= from StreamingPairCovariance(d, d) that took in both batch by batch"
        )
    u, values, vh = torch.linalg.svd(question.cross)
    image, text = question.sources

    def null(generator: torch.Generator, n_signal: int) -> float:
        assert image.rows is not None
        assert text.rows is not None
        order = torch.randperm(image.count, generator=generator)
        mixed = image.rows.T @ text.rows[order] / image.n
        left, right = u[:, :n_signal], vh[:n_signal].T
        mixed = mixed - left @ (left.T @ mixed)
        return float(torch.linalg.matrix_norm(mixed - (mixed @ right) @ right.T, ord=2))

    known = image.rows is not None and text.rows is not None and image.count == text.count
    spectrum = Spectrum("cross", values, signed(u), "cross", question.n_cross, null=null if known else None,
                        progress=question.progress)  # fmt: skip
    check_varies(spectrum)
    cutoff = cut(spectrum)
    rank = spectrum.d - cutoff.n_noise
    spaces = complement(u[:, :rank]), complement(vh[:rank].T)
    basis = shared_subspace(*spaces, min_cosine=question.min_cosine)
    return Found(basis, (spectrum,), (cutoff,), spaces)
