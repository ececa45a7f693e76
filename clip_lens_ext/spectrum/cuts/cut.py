"""What a cut is, and the refusal of a spectrum that it says nothing about."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.spectra import Kind, Spectrum


class Cutoff(NamedTuple):
    """How many of the last directions are noise, and the value at which they begin, in the units of the spectrum."""

    n_noise: int
    threshold: float


class Cut(Protocol):
    """A rule by which a spectrum is cut; a frozen dataclass, so that its settings can be recorded."""

    def __call__(self, spectrum: Spectrum, /) -> Cutoff:
        """Cut one spectrum."""
        ...


def up_to(values: Tensor, threshold: float) -> Cutoff:
    """Noise is what has at most this value."""
    return Cutoff(int((values <= threshold).sum()), threshold)


def split_after(values: Tensor, n_signal: int) -> Cutoff:
    """Noise is what comes after so many directions; the threshold is the geometric mean of the two beside the cut."""
    if n_signal <= 0:
        return Cutoff(len(values), float("inf"))
    if n_signal >= len(values):
        return Cutoff(0, 0.0)
    return Cutoff(len(values) - n_signal, float((values[n_signal - 1] * values[n_signal]).sqrt()))


def check_kind(spectrum: Spectrum, name: str, known: tuple[Kind, ...]) -> None:
    """Raise `InputError` where a cut has no meaning for a spectrum of this kind."""
    if spectrum.kind not in known:
        shown = {"covariance": "eigenvalues of a covariance", "cross": "singular values of a cross-covariance",
                 "ratio": "ratios of variances"}  # fmt: skip
        raise InputError(
            f"the cut {name!r} is a law of {' or '.join(shown[kind] for kind in known)}, and this rule gives "
            f"{shown[spectrum.kind]}: use 'permutation', 'knee', 'gap', 'variance_share' or a number"
        )
