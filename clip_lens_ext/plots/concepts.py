"""Some concepts of a Sparse CLIP on one page: words, pictures, and agreement beside its control."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from clip_lens_ext.data import image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.plots.page import BLUE, FAINT, INK, SOFT, Page, check_format, shortened
from clip_lens_ext.sparse_clip import Concept, ConceptNames

_MARGIN, _HEAD, _ROW, _SIDE, _GAP, _WORDS, _NUMBERS = 0.45, 1.15, 1.5, 0.82, 0.06, 2.9, 2.35
_THUMBNAIL = 112


def plot_concepts(
    names: ConceptNames,
    images: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    features: Sequence[int] | None = None,
    n_images: int = 8,
    title: str | None = None,
) -> Figure:
    """Draw a row for each feature: its words as bars, its top pictures, and what it scores.

    Args:
        names: from `name_concepts`.
        images: the pictures that were named, in any form that `image_batches` can read by position: a folder, a list,
            a tensor, a Dataset. Tensors beyond [0, 1] are stretched to the range of all that are shown.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.
        features: which, in this order; None: the eight of greatest density that have words and pictures.
        n_images: pictures of a row, at most.
        title: instead of the default.

    Returns:
        The `Figure`; axes are labelled `"words J"`, `"pictures J"` and `"scores J"` with the feature's number.

    Raises:
        InputError: `path` has another suffix, no feature to show or one that is not there, `n_images` below 1, or
            pictures that are others than those that were named or cannot be read by position.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import name_concepts, add_sparse_heads
        >>> words = cle.Vocabulary.from_terms(["crown", "gear", "heart"])
        >>> pixels = cle.planted.normalise(cle.PlantedWorld(0).sample(10, seed=0, split="test").images)
        >>> names = name_concepts(add_sparse_heads(cle.planted_clip(), 32), words, pixels, progress=False)
        >>> figure = plot_concepts(names, pixels, features=names.top(1))
        >>> [axes.get_label().split()[0] for axes in figure.axes]
        ['words', 'pictures', 'scores']
    """
    if path is not None:
        check_format(path)
    if n_images < 1:
        raise InputError(f"n_images is at least 1, got {n_images}")
    chosen = [names.of(feature) for feature in (names.top(8) if features is None else features)]
    if not chosen:
        raise InputError("no feature to show: none has words and pictures")
    pictures = _pictures(names, images, [concept.feature for concept in chosen], n_images)
    shown = min(n_images, names.k_images)
    width = 2 * _MARGIN + _WORDS + shown * _SIDE + _NUMBERS + 0.5
    page = Page(width, _HEAD + _ROW * len(chosen))
    page.text(_MARGIN, 0.25, shortened(title or f"Concepts of {names.images.provenance['model']}", 80), size=14,
              weight="bold")  # fmt: skip
    room = int(width * 14)
    about = (
        f"top words of {len(names.terms):,}, top pictures of {names.images.n_samples:,}  \u00b7  {len(names)} "
        f"features, {names.n_unnamed} without words, {names.n_without_images} without pictures"
    )
    page.text(_MARGIN, 0.6, shortened(about, room), size=8.5, color=SOFT)
    judged = f"agreement in blue by {names.judge}; below it with the words of other features"
    page.text(_MARGIN, 0.8, shortened(judged, room), size=8.5, color=SOFT)
    span = max((abs(v) for c in chosen for v in (c.agreement, c.control) if v == v), default=1.0) or 1.0
    for row, concept in enumerate(chosen):
        top = _HEAD + _ROW * row
        _words(page, concept, top)
        samples = names.images.of(concept.feature).sample[:n_images].tolist()
        _row(page, concept, [pictures[i] for i in samples], top, shown)
        _scores(page, concept, names, _MARGIN + _WORDS + shown * _SIDE + 0.35, top, span)
    if path is not None:
        page.figure.savefig(path)
    return page.figure


def _words(page: Page, concept: Concept, top: float) -> None:
    page.text(_MARGIN, top, shortened(concept.name or "no word", 24), size=12, weight="bold")
    page.text(_MARGIN + _WORDS - 0.25, top + 0.03, f"feature {concept.feature}", size=8, color=FAINT, ha="right")
    words = concept.words[:5]
    axes = page.axes(_MARGIN + 1.45, top + 0.28, _WORDS - 2.2, 0.95, label=f"words {concept.feature}")
    axes.set_axis_off()
    axes.barh(range(len(words)), [word.activation for word in words], height=0.62, color=BLUE)
    axes.set_ylim(4.5, -0.5)
    axes.set_xlim(0, words[0].activation if words else 1)
    for place, word in enumerate(words):
        middle = top + 0.28 + 0.95 * (place + 0.5) / 5
        page.text(_MARGIN, middle, shortened(word.name, 20), size=8, color=INK, va="center")
        page.text(_MARGIN + _WORDS - 0.25, middle, f"{word.activation:.2f}", size=7.5, color=SOFT, ha="right",
                  va="center")  # fmt: skip


def _row(page: Page, concept: Concept, pictures: list[Tensor], top: float, shown: int) -> None:
    left = _MARGIN + _WORDS
    axes = page.axes(left, top + 0.05, shown * _SIDE, _SIDE, label=f"pictures {concept.feature}")
    axes.set_axis_off()
    side = 1 - _GAP / _SIDE
    for place, picture in enumerate(pictures):
        axes.imshow(picture.permute(1, 2, 0).numpy(), extent=(place, place + side, side, 0), aspect="auto")
    axes.set_xlim(0, shown)
    axes.set_ylim(1, 0)
    words = f"activation {concept.images[0].activation:.2f}" if concept.images else "no picture activates it"
    if len(pictures) > 1:
        words += f" to {concept.images[len(pictures) - 1].activation:.2f}"
    page.text(left, top + 0.05 + _SIDE + 0.03, words, size=7, color=FAINT)


def _scores(page: Page, concept: Concept, names: ConceptNames, left: float, top: float, span: float) -> None:
    axes = page.axes(left + 0.8, top + 0.1, 0.9, 0.4, label=f"scores {concept.feature}")
    values = [0.0 if value != value else value for value in (concept.agreement, concept.control)]
    axes.barh([0, 1], values, height=0.62, color=[BLUE, FAINT])
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_xlim(-span, span)
    axes.set_ylim(1.5, -0.5)
    axes.set_axis_off()
    rank = "-" if concept.rank != concept.rank else f"{concept.rank:g} of {names.n_scored}"
    lines = [("agreement", f"{concept.agreement:.2f}"), ("control", f"{concept.control:.2f}"), ("rank", rank),
             ("modality", f"{concept.modality:.2f}"), ("density", f"{concept.density:.3g}")]  # fmt: skip
    for place, (word, value) in enumerate(lines):
        middle = top + 0.2 + 0.2 * place
        page.text(left, middle, word, size=8, color=SOFT, va="center")
        page.text(left + _NUMBERS, middle, value.replace("nan", "-"), size=8, color=INK, va="center", ha="right")


def _pictures(names: ConceptNames, images: Any, features: list[int], n_images: int) -> dict[int, Tensor]:
    """The pictures that some features are shown with, by sample: uint8, at most so many pixels a side."""
    samples = sorted({i for j in features for i in names.images.of(j).sample[:n_images].tolist()})
    if not samples:
        return {}
    indexes = names.images.indexes[samples].tolist()
    batches = image_batches(images, preprocess=_thumbnail, batch_size=1)
    if batches.n_samples is None or indexes[-1] >= batches.n_samples:
        raise InputError("these are not the pictures that were named, or they cannot be read by position")
    found = {batch.indexes[0]: (batch.pixels[0], batch.names[0]) for batch in batches.select(indexes)}
    for sample, index in zip(samples, indexes, strict=True):
        if index not in found or found[index][1] != names.images.names[sample]:
            raise InputError(f"these are not the pictures that were named: {names.images.names[sample]!r} is not where "
                             "it was")  # fmt: skip
    low = min(float(pixels.min()) for pixels, _ in found.values())
    high = max(float(pixels.max()) for pixels, _ in found.values())
    if low >= 0 and high <= 1:  # as the thumbnails of files are
        low, high = 0.0, 1.0
    return {
        sample: ((found[index][0].float() - low) / max(high - low, 1e-12) * 255).round().clamp(0, 255).byte()
        for sample, index in zip(samples, indexes, strict=True)
    }


def _thumbnail(picture: Image.Image) -> Tensor:
    """The middle square of a picture, floats `[3 side side]` in [0, 1]."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    small = picture.crop((left, top, left + side, top + side)).resize((_THUMBNAIL, _THUMBNAIL))
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(_THUMBNAIL, _THUMBNAIL, 3).permute(2, 0, 1).float() / 255
