"""Concepts over training on one page: stability, modality, density, and what happened."""

from __future__ import annotations

import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clip_lens_ext.plots.page import BLUE, INK, ORANGE, RULE, SOFT, Page, check_format, shortened
from clip_lens_ext.sparse_clip import ConceptDrift

_WIDE, _HIGH, _LEFT, _TOP, _ACROSS, _DOWN = 4.1, 2.3, (0.85, 5.95), (1.55, 4.85), 10.6, 7.75
_BINS = np.linspace(0, 1, 21)
_SHADES = ("#c6dbef", "#08306b")  # of the first checkpoint and of the last
_EVENTS = {"birth": "#1a7f37", "revival": "#0a7f8c", "death": "#57606a", "switch": ORANGE, "merge": "#7a3db8"}
_HATCH = {"birth": "", "revival": "//", "death": "xx", "switch": "", "merge": ".."}


def plot_drift(drift: ConceptDrift, path: str | os.PathLike[str] | None = None, *, title: str | None = None) -> Figure:
    """Draw how concepts change over training, in four panels.

    - *stability*: mean overlap of words and of pictures with those of the last checkpoint, and dashed the mean overlap
      with those of other features; a band holds the middle half of the features.
    - *modality*: the share of the features at each modality score, a line for each checkpoint, dark for late.
    - *density*: median over the features that are active, on a logarithmic scale, with a band for the middle half.
    - *events*: births, revivals, deaths, switches and merges at each checkpoint after the first.

    Args:
        drift: from `concept_drift`.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.
        title: instead of the default.

    Returns:
        The `Figure`; its axes are labelled by the names above.

    Raises:
        InputError: `path` has another suffix.

    Example:
        >>> import torch, clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import concept_drift, name_concepts, add_sparse_heads
        >>> words = cle.Vocabulary.from_terms(["crown", "gear", "heart"])
        >>> pixels = cle.planted.normalise(cle.PlantedWorld(0).sample(40, seed=0, split="test").images)
        >>> names = [
        ...     name_concepts(
        ...         add_sparse_heads(cle.planted_clip(), 32, seed=seed), words, pixels, k_images=3, progress=False
        ...     )
        ...     for seed in (0, 1)
        ... ]
        >>> [axes.get_label() for axes in plot_drift(concept_drift(list(enumerate(names)))).axes]
        ['stability', 'modality', 'density', 'events']
    """
    if path is not None:
        check_format(path)
    page = Page(_ACROSS, _DOWN)
    page.text(0.5, 0.25, shortened(title or "How concepts change over training", 80), size=14, weight="bold")
    alive = drift.alive.sum(dim=1).tolist()
    about = (
        f"{drift.d_code} features, {alive[0]} of them with words and pictures at {drift.labels[0]}, {alive[-1]} at "
        f"{drift.labels[-1]}  \u00b7  overlap is Jaccard, of at most {drift.settings['k_words']} words and "
        f"{drift.settings['k_images']} pictures"
    )
    page.text(0.5, 0.62, about, size=8.5, color=SOFT)
    titles = {
        "stability": "Overlap with the last checkpoint", "modality": "Modality score: 0 texts, 1 pictures",
        "density": "Density: mean activation of a feature", "events": "What happened since the checkpoint before",
    }  # fmt: skip
    for number, (label, draw) in enumerate(zip(titles, (_stability, _modality, _density, _events), strict=True)):
        left, top = _LEFT[number % 2], _TOP[number // 2]
        page.text(left, top - 0.3, titles[label], size=10, weight="bold")
        axes = page.axes(left, top, _WIDE, _HIGH, label=label)
        draw(axes, drift)
        _plain(axes)
    if path is not None:
        page.figure.savefig(path)
    return page.figure


def _stability(axes: Axes, drift: ConceptDrift) -> None:
    x = np.arange(len(drift))
    for what, word, colour in (("image", "pictures", BLUE), ("word", "words", ORANGE)):
        own, control = (getattr(drift, f"{what}_{kind}") for kind in ("stability", "control"))
        low, high = _quartiles(own)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(x, own.nanmean(dim=1), color=colour, linewidth=1.8, marker="o", markersize=3, label=word)
        axes.plot(x, control.nanmean(dim=1), color=colour, linewidth=1.2, linestyle=(0, (4, 2)),
                  label=f"{word} of other features")  # fmt: skip
    axes.set_ylim(0, 1.02)
    _checkpoints(axes, drift)
    axes.legend(fontsize=7, frameon=False, labelcolor=SOFT, loc="upper left")


def _modality(axes: Axes, drift: ConceptDrift) -> None:
    n = len(drift)
    for step, (label, score) in enumerate(zip(drift.labels, drift.modality, strict=True)):
        known = score[score.isfinite()].numpy()
        share = np.histogram(known, bins=_BINS)[0] / max(len(known), 1)
        colour = _mixed(step / max(n - 1, 1))
        name = shortened(label, 14) if n <= 6 or step in (0, n - 1) else None
        axes.stairs(share, _BINS, color=colour, linewidth=1.5, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of features", fontsize=8, color=SOFT)
    axes.legend(fontsize=7, frameon=False, labelcolor=SOFT, loc="best")


def _density(axes: Axes, drift: ConceptDrift) -> None:
    x = np.arange(len(drift))
    active = drift.density.masked_fill(drift.density <= 0, float("nan"))
    low, high = _quartiles(active)
    axes.fill_between(x, low, high, color=BLUE, alpha=0.12, linewidth=0)
    axes.plot(x, active.nanmedian(dim=1).values, color=BLUE, linewidth=1.8, marker="o", markersize=3)
    if bool(active.isfinite().any()):
        axes.set_yscale("log")
    _checkpoints(axes, drift)


def _events(axes: Axes, drift: ConceptDrift) -> None:
    counts = drift.counts()
    shown = [kind for kind in _EVENTS if kind in ("birth", "switch", "merge") or counts[kind].any()]
    width = 0.8 / len(shown)
    for place, kind in enumerate(shown):
        x = np.arange(1, len(drift)) + (place - (len(shown) - 1) / 2) * width
        axes.bar(x, counts[kind].iloc[1:], width=0.92 * width, color=_EVENTS[kind], hatch=_HATCH[kind],
                 edgecolor="white", linewidth=0, label=f"{kind} ({counts[kind].sum()})")  # fmt: skip
    axes.set_xlim(0.4, len(drift) - 0.4)
    axes.set_ylim(bottom=0)
    _checkpoints(axes, drift, first=1)
    axes.legend(fontsize=7, frameon=False, labelcolor=SOFT, loc="best")


def _quartiles(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The middle half of each row, without what is not defined; NaN for a row of nothing."""
    ends = [np.nanquantile(row[np.isfinite(row)], (0.25, 0.75)) if np.isfinite(row).any() else (np.nan, np.nan)
            for row in values.numpy()]  # fmt: skip
    return np.array([low for low, _ in ends]), np.array([high for _, high in ends])


def _mixed(share: float) -> tuple[float, ...]:
    first, last = ([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in _SHADES)
    return tuple(a + share * (b - a) for a, b in zip(first, last, strict=True))


def _checkpoints(axes: Axes, drift: ConceptDrift, *, first: int = 0) -> None:
    every = -(-len(drift) // 8)  # eight labels have room
    shown = range(first, len(drift), every)
    axes.set_xticks(list(shown), [shortened(drift.labels[i], 10) for i in shown])
    axes.set_xlabel("checkpoint", fontsize=8, color=SOFT)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=SOFT, length=2.5, width=0.6, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)
