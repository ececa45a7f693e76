"""Spectral gap: what comes after the greatest fall in the tail of the pooled spectrum."""

from __future__ import annotations

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cut
from clip_lens_ext.spectrum.cuts.gap import Gap
from clip_lens_ext.spectrum.rules.pooled import pooled
from clip_lens_ext.spectrum.rules.rule import Found
from clip_lens_ext.spectrum.sources import Question


def spectral_gap(question: Question, cut: Cut) -> Found:
    """The pooled covariance, cut at the greatest fall of the logarithm of its eigenvalues."""
    if not isinstance(cut, Gap):
        raise InputError("the rule 'spectral_gap' is its own cut: leave cut= out, pass Gap(tail=...), or use 'pooled'")
    return pooled(question, cut)
