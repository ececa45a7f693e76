"""Split a space into signal and shared noise, by one of several candidate definitions.

arXiv 2605.14893 states that the latent space of CLIP splits into multi-modal signal and a noise subspace shared by both
modalities, found from the spectra of covariances. Which covariance and which cut is not known here, so the rules of
this folder are candidates: none is claimed to be that paper's.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, is_dataclass
from typing import Any

import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import versions
from clip_lens_ext.spectrum.cuts import Cut, find_cut
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pairs import PairCovariance, StreamingPairCovariance
from clip_lens_ext.spectrum.rules import Found, Rule, find_rule
from clip_lens_ext.spectrum.sources import Centre, Question, Rows, Source, ask
from clip_lens_ext.spectrum.spectra import eigen_spectrum
from clip_lens_ext.spectrum.subspaces import dimension_by_chance, overlap, overlap_by_chance, signed

_FEW = 10  # rows to a dimension, under which noise eigenvalues of one variance still differ by a factor of 3.7


def split_noise(
    image: Rows,
    text: Rows | None = None,
    *,
    rule: str | Rule = "intersection",
    cut: str | int | Cut | None = None,
    control: Rows | tuple[Rows, ...] | None = None,
    pairs: PairCovariance | StreamingPairCovariance | None = None,
    centre: Centre = "each",
    min_cosine: float = 0.99,
    progress: bool = True,
) -> NoiseSplit:
    """The noise subspace of images and texts in one space, or of one tower alone.

    Args:
        image: float rows `[n d]`, a `Covariance` or a `StreamingCovariance`: of image embeddings, or of any hook.
        text: the same of text embeddings, in the same space; None: one tower alone, whatever it is.
        rule: a name of `RULES`: `"intersection"`, `"pooled"`, `"max_rayleigh"`, `"cross_covariance"`, `"generalised"`,
            `"spectral_gap"`; or a `Rule`.
        cut: a name of `CUTS`, a `Cut` with settings of your own, or a number of noise directions; None: the rule's.
        control: for `"generalised"`: rows or covariances under inputs that mean nothing, a pair for two modalities.
        pairs: for `"cross_covariance"` where there are no rows: the covariances of matched pairs.
        centre: what is taken off the rows: `"each"` modality's own mean, the `"pooled"` mean of both, or `"none"`.
        min_cosine: of principal vectors which two noise spaces share.
        progress: draw a bar where permutations take long.

    Returns:
        `NoiseSplit`, float64 on the CPU. Rows are taken as they are: divide embeddings by their length first if the
        cosine is what matters (`collect_covariance(..., unit_length=True)`).

    Raises:
        InputError: no such rule or cut, rows of unequal length or with NaN, nothing varies, the cut says nothing about
            what the rule gives, or something that the rule needs is missing; the message says what to collect.

    Warns:
        UserWarning: there are fewer rows than dimensions, or fewer than ten to a dimension.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> scale = torch.tensor([5.0] * 6 + [0.1] * 2)                  # six directions of signal, two of noise
        >>> image, text = torch.randn(2, 4000, 8, generator=generator) * scale
        >>> split = split_noise(image, text)
        >>> split.rank, split.n_by_chance, round(split.overlap_by_chance, 2)
        (2, 0, 0.25)
        >>> bool(split.basis[6:].square().sum() > 1.99)                  # the last two axes
        True

    Reference:
        Grzywaczewski, Pludowski, Biecek (2026), Your CLIP has 164 dimensions of noise, arXiv 2605.14893, for the idea.
    """
    definition = find_rule(rule)
    chosen = find_cut(definition.cut if cut is None else cut)
    question = ask(image, text, control, pairs, centre=centre, min_cosine=min_cosine, progress=progress)
    weak = _weaknesses(question)
    for sentence in weak:
        warnings.warn(sentence, stacklevel=2)
    found = definition.find(question, chosen)
    _check(found, definition.name, question.d)
    settings: dict[str, Any] = {"centre": centre, "min_cosine": min_cosine}
    if is_dataclass(chosen) and not isinstance(chosen, type):
        settings |= asdict(chosen)
    return NoiseSplit(
        basis=signed(found.basis),
        eigenvalues=torch.stack([spectrum.values for spectrum in found.spectra]),
        labels=tuple(spectrum.label for spectrum in found.spectra),
        threshold=tuple(float(cutoff.threshold) for cutoff in found.cutoffs),
        n_noise=tuple(int(cutoff.n_noise) for cutoff in found.cutoffs),
        modalities=tuple(source.label for source in question.sources),
        n=tuple(source.count for source in question.sources),
        means=torch.stack([source.mean for source in question.sources]),
        rule=definition.name,
        cut=_called(chosen, definition.cut if cut is None else cut),
        settings=settings,
        **_against_chance(question, found),
        **_origin(question.sources),
        warnings=(*weak, *_oddities(found, question.d)),
    )


def _check(found: Found, rule: str, d: int) -> None:
    """A rule of one's own is held to what the result says of it."""
    if not isinstance(found, Found) or not found.spectra or len(found.spectra) != len(found.cutoffs):
        raise InputError(f"the rule {rule!r} must give a Found with one cutoff for each of one or more spectra")
    basis = found.basis
    shaped = basis.dim() == 2 and len(basis) == d and basis.dtype == torch.float64
    if not shaped or not torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-8):
        raise InputError(f"the rule {rule!r} must give an orthonormal float64 basis [{d} rank], got "
                         f"{basis.dtype} {list(basis.shape)}")  # fmt: skip


def _called(cut: Cut, given: Any) -> str:
    return given if isinstance(given, str) else str(getattr(cut, "__name__", type(cut).__name__))


def _weaknesses(question: Question) -> tuple[str, ...]:
    found = []
    for source in (*question.sources, *question.controls):
        if source.n < source.d:
            found.append(
                f"{source.label}: {source.count} rows do not fill {source.d} dimensions; the "
                f"{source.d - int(source.n)} directions without variance are missing rows and not noise: collect more."
            )
        elif source.count < _FEW * source.d:
            found.append(
                f"{source.label}: {source.count} rows are {source.count / source.d:.1f} to a dimension, so "
                f"eigenvalues of equal noise are spread widely; {_FEW * source.d} or more are better."
            )
    return tuple(found)


def _oddities(found: Found, d: int) -> tuple[str, ...]:
    if found.basis.shape[1] == d:
        return ("Every direction is noise by this rule and cut: nothing would be left.",)
    return ("No direction is noise by this rule and cut.",) if found.basis.shape[1] == 0 else ()


def _against_chance(question: Question, found: Found) -> dict[str, Any]:
    """What the noise of both modalities has in common, and what two random subspaces would have."""
    spaces = found.spaces
    if not spaces:  # a rule that is shared by construction: what each modality varies in least, of the same dimension
        rank = found.basis.shape[1]
        spaces = tuple(eigen_spectrum(one.label, one.matrix, one.n).noise(rank) for one in question.sources)
    dimensions = tuple(space.shape[1] for space in spaces)
    if len(spaces) < 2:
        return {"space_dimensions": dimensions, "n_by_chance": None, "overlap": None, "overlap_by_chance": None}
    a, b = dimensions
    return {
        "space_dimensions": dimensions, "n_by_chance": dimension_by_chance(a, b, question.d),
        "overlap": overlap(*spaces), "overlap_by_chance": overlap_by_chance(a, b, question.d),
    }  # fmt: skip


def _origin(sources: tuple[Source, ...]) -> dict[str, Any]:
    """Where the rows are from, as far as all of them agree."""
    found: dict[str, Any] = {}
    for name in ("hook_name", "token_scope", "tower"):
        values = {getattr(source.origin, name) for source in sources}
        found[name] = values.pop() if len(values) == 1 else None
    origins = {source.label: source.origin.provenance for source in sources if source.origin.provenance}
    return {**found, "provenance": {**origins, "versions": versions()}}
