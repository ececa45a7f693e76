"""What a rule is asked about: the moments of each modality, about the centre that was chosen, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.covariance import StreamingCovariance
from clip_lens_ext.spectrum.covariance_result import Covariance
from clip_lens_ext.spectrum.pairs import PairCovariance, StreamingPairCovariance

Rows = Tensor | Covariance | StreamingCovariance
Centre = Literal["each", "pooled", "none"]


@dataclass(frozen=True, eq=False)
class Source:
    """One modality.

    Attributes:
        label: `"image"`, `"text"`, or `"... control"`.
        matrix: second moment about `centre`, float64 `[d d]`.
        mean: of the rows, float64 `[d]`.
        centre: what was taken off, `[d]`.
        n: rows that vary freely: one less than rows where the centre is their own mean.
        count: rows.
        rows: the rows less their centre, float64 `[count d]`, where they are known.
        origin: the `Covariance` that was passed in or made.
    """

    label: str
    matrix: Tensor
    mean: Tensor
    centre: Tensor
    n: float
    count: int
    rows: Tensor | None
    origin: Covariance

    @property
    def d(self) -> int:
        """Width of the space."""
        return len(self.mean)

    def permuted(self, generator: torch.Generator, without: Tensor) -> Tensor:
        """The moment of the rows less some orthonormal directions, each coordinate permuted by itself, `[d d]`."""
        assert self.rows is not None  # asked only where there are rows
        rows = self.rows - (self.rows @ without) @ without.T
        mixed = torch.stack([column[torch.randperm(self.count, generator=generator)] for column in rows.T], dim=1)
        return mixed.T @ mixed / self.n


@dataclass(frozen=True, eq=False)
class Question:
    """What a rule is asked.

    Attributes:
        sources: image and text, or one of a single tower.
        controls: the same modalities under non-semantic inputs, or none.
        cross: cross-covariance `[d d]` of paired rows about the same centres, or None.
        n_cross: pairs that vary freely.
        min_cosine: of principal vectors that two noise spaces share.
        progress: whether what takes long draws a bar.
    """

    sources: tuple[Source, ...]
    controls: tuple[Source, ...]
    cross: Tensor | None
    n_cross: float
    min_cosine: float
    progress: bool

    @property
    def d(self) -> int:
        """Width of the space."""
        return self.sources[0].d


def ask(
    image: Rows,
    text: Rows | None,
    control: Rows | tuple[Rows, ...] | None,
    pairs: PairCovariance | StreamingPairCovariance | None,
    *,
    centre: Centre,
    min_cosine: float,
    progress: bool,
) -> Question:
    """Check everything that was passed to `split_noise`, and bring it into one form."""
    if centre not in get_args(Centre):
        raise InputError(f"centre is one of {', '.join(get_args(Centre))}, got {centre!r}")
    if text is None and centre == "pooled":
        raise InputError("centre='pooled' is the mean of two modalities, and there is one: use 'each' or 'none'")
    if not 0 < min_cosine <= 1:
        raise InputError(f"min_cosine is a cosine in (0, 1], got {min_cosine}")
    given = (image,) if text is None else (image, text)
    origins = [_moments(rows, label) for rows, label in zip(given, ("image", "text"), strict=False)]
    labels = ("image", "text") if text is not None else ("text",) if origins[0].tower == "text" else ("image",)
    widths = {origin.d for origin in origins}
    if len(widths) > 1:
        raise InputError(f"image rows have length {origins[0].d} and text rows {origins[1].d}: a shared subspace needs "
                         "one space; residual streams of two towers are split each by itself")  # fmt: skip
    middle = torch.stack([origin.mean for origin in origins]).mean(dim=0)
    sources = tuple(
        _source(label, rows, origin, centre, middle) for label, rows, origin in zip(labels, given, origins, strict=True)
    )
    cross, n_cross = _cross(sources, pairs)
    return Question(sources, _controls(control, sources), cross, n_cross, min_cosine, progress)


def _moments(given: Rows, label: str) -> Covariance:
    if isinstance(given, StreamingCovariance):
        return given.result()
    if isinstance(given, Covariance):
        return given
    if not isinstance(given, Tensor) or given.dim() != 2 or not given.is_floating_point():
        found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(f"{label}: float rows [n d], a Covariance or a StreamingCovariance are needed, got {found}")
    if len(given) < 2 or given.shape[1] < 1:
        raise InputError(f"{label}: at least two rows are needed, got {list(given.shape)}")
    moments = StreamingCovariance(given.shape[1])
    try:
        moments.update(given)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    return moments.result()


def _source(label: str, given: Rows, origin: Covariance, centre: Centre, middle: Tensor) -> Source:
    taken = {"each": origin.mean, "pooled": middle, "none": torch.zeros_like(origin.mean)}[centre]
    matrix, n = origin.covariance, origin.count - 1
    if centre != "each":
        away, n = origin.mean - taken, origin.count
        matrix = matrix * ((origin.count - 1) / origin.count) + torch.outer(away, away)
    rows = given.detach().cpu().double() - taken if isinstance(given, Tensor) else None
    return Source(label, matrix, origin.mean, taken, n, origin.count, rows, origin)


def _controls(control: Rows | tuple[Rows, ...] | None, sources: tuple[Source, ...]) -> tuple[Source, ...]:
    if control is None:
        return ()
    given = control if isinstance(control, tuple) else (control,)
    if len(given) != len(sources):
        wanted = "a pair (image control, text control)" if len(sources) == 2 else "one control"
        raise InputError(f"control is {wanted} as the rows are, got {len(given)}")
    found = []
    for rows, source in zip(given, sources, strict=True):
        label = f"{source.label} control"
        origin = _moments(rows, label)
        if origin.d != source.d:
            raise InputError(f"{label}: rows of length {origin.d}, the {source.label} rows have {source.d}")
        found.append(_source(label, rows, origin, "each", origin.mean))
    return tuple(found)


def _cross(
    sources: tuple[Source, ...], pairs: PairCovariance | StreamingPairCovariance | None
) -> tuple[Tensor | None, float]:
    if isinstance(pairs, StreamingPairCovariance):
        pairs = pairs.result()
    if pairs is not None:
        if len(sources) < 2 or (pairs.image.d, pairs.text.d) != (sources[0].d, sources[1].d):
            raise InputError(f"pairs of lengths {pairs.image.d} and {pairs.text.d} do not go with these rows")
        away = torch.outer(pairs.image.mean - sources[0].centre, pairs.text.mean - sources[1].centre)
        return pairs.cross + away * pairs.count / (pairs.count - 1), pairs.count - 1
    if len(sources) == 2:
        image, text = sources
        if image.rows is not None and text.rows is not None and image.count == text.count:
            return image.rows.T @ text.rows / image.n, image.n
    return None, 0.0
