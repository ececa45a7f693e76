"""What a rule gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts.cut import Cutoff
from clip_lens_ext.spectrum.sources import Question
from clip_lens_ext.spectrum.spectra import Spectrum


@dataclass(frozen=True, eq=False)
class Found:
    """The noise subspace by one rule.

    Attributes:
        basis: orthonormal columns, float64 `[d rank]`.
        spectra: what was cut.
        cutoffs: where, one for each spectrum.
        spaces: the noise space of each modality by itself, where the rule has made them; else none.
    """

    basis: Tensor
    spectra: tuple[Spectrum, ...]
    cutoffs: tuple[Cutoff, ...]
    spaces: tuple[Tensor, ...] = ()


def check_two(question: Question, rule: str) -> None:
    """Raise `InputError` where a rule needs two modalities and there is one."""
    if len(question.sources) < 2:
        raise InputError(f"the rule {rule!r} compares two modalities: pass text= as well; 'pooled', 'intersection', "
                         "'max_rayleigh', 'generalised' and 'spectral_gap' take one tower alone")  # fmt: skip
