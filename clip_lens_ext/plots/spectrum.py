"""Pictures of spectra, of their cuts, of how far the noise of subsets agrees, and of what pruning it does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import ceil

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.plots.page import BLUE, INK, ORANGE, RULE, SOFT, Page, check_format, shortened
from clip_lens_ext.spectrum import Covariance, NoiseSplit, PruningEvaluation, SubgroupOverlap

# Lightness differs as well as hue, for eyes that see hues alike and for grey print.
_CUTS = ("#7a3db8", "#1a7f37", "#bf3989", "#0a7f8c", "#7d5a00", "#57606a", "#b35900", "#1b1f24")
_DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_PRUNED = {
    "none": (INK, (0, (1, 1.5))), "noise": (BLUE, "-"), "random": ("#8c959f", "-"), "top variance": ("#bf3989", "-"),
    "lowest variance": (ORANGE, (0, (5, 2))), "projector weights": ("#1a7f37", (0, (5, 1.5, 1, 1.5))),
}  # fmt: skip


def plot_spectrum(
    splits: NoiseSplit | Sequence[NoiseSplit],
    image: Covariance,
    text: Covariance | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw the eigenvalues of each modality with every cut marked, and the variance of images against that of texts.

    On the left eigenvalues from greatest to lowest on a logarithmic scale, with a line where each split's noise begins,
    were it the last `rank` directions. On the right a dot for each eigenvector of the mean covariance: its variance
    among images and among texts; filled where more than half of it lies in the noise of the first split.

    Args:
        splits: one or several, of the same space.
        image, text: the covariances; None: one tower alone, and no right panel.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.
        title: instead of the one that names the place.

    Raises:
        InputError: no split, another width, or `path` has another suffix.

    Example:
        >>> import clip_lens_ext as cle
        >>> rows = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(0))
        >>> image, text = (cle.StreamingCovariance(8) for _ in rows)
        >>> image.update(rows[0])
        >>> text.update(rows[1])
        >>> split = cle.split_noise(image, text, cut=3)
        >>> [axes.get_label() for axes in plot_spectrum(split, image.result(), text.result()).axes]
        ['spectrum', 'image against text']
    """
    given = (splits,) if isinstance(splits, NoiseSplit) else tuple(splits)
    sources = [image] if text is None else [image, text]
    widths = {split.d for split in given} | {source.d for source in sources}
    if not given or len(widths) > 1:
        raise InputError("splits and covariances of one space are needed")
    wide = 11.0 if text is not None else 8.6
    page = _page(path, wide, 5.2, title or f"Spectrum of {_place(given[0])}", _about(given[0], sources))
    width = 4.55 if text is not None else 7.0
    _spectrum(page.axes(0.8, 1.3, width, 3.2, label="spectrum"), given, sources)
    if text is not None:
        _against(page.axes(6.6, 1.3, 3.9, 3.2, label="image against text"), given[0], image, text)
    return _written(page, path)


def plot_overlap(
    overlap: SubgroupOverlap, path: str | os.PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw how far the noise of each pair of subsets agrees, as a heat map with the floor and the ceiling in each cell.

    Args:
        overlap: from `subgroup_overlap`.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.
        title: instead of the default.

    Raises:
        InputError: `path` has another suffix.

    Example:
        >>> import clip_lens_ext as cle
        >>> generator = torch.Generator().manual_seed(0)
        >>> groups = {name: torch.randn(100, 6, generator=generator) for name in ("photos", "sketches")}
        >>> found = cle.subgroup_overlap(cle.split_subgroups(groups, cut=2, n_bootstrap=5, progress=False))
        >>> plot_overlap(found).axes[0].get_label()
        'overlap'
    """
    n = len(overlap.names)
    side = max(2.4, 0.95 * n)
    about = f"mean squared cosine of the principal angles, 0 to 1  \u00b7  {overlap.d} dimensions"
    page = _page(path, side + 4.2, side + 2.6, title or "Is it the same noise in other data?", about)
    axes = page.axes(2.1, 1.3, side, side, label="overlap")
    values = overlap.overlap
    shown = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="Blues")
    for i in range(n):
        for j in range(n):
            colour = "white" if float(values[i, j]) > 0.6 else INK
            words = f"{float(values[i, j]):.2f}"
            if i != j:
                words += f"\n({float(overlap.by_chance[i, j]):.2f}, {float(overlap.split_half[i, j]):.2f})"
            axes.text(j, i, words, ha="center", va="center", fontsize=7.5, color=colour)
    names = [f"{shortened(name, 18)} ({int(k)})" for name, k in zip(overlap.names, overlap.ranks, strict=True)]
    axes.set_xticks(range(n), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(n), names, fontsize=8)
    axes.tick_params(length=0, colors=SOFT)
    bar = page.figure.colorbar(shown, cax=page.axes(2.3 + side, 1.3, 0.15, side, label="scale"))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=SOFT, length=2)
    page.text(
        0.5, side + 2.25, "In brackets: by chance, and of two halves of one subset. After a name: noise dimensions.",
        size=8, color=SOFT,
    )  # fmt: skip
    return _written(page, path)


def plot_pruning(
    evaluation: PruningEvaluation, path: str | os.PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw each measure over the number of pruned dimensions, with every control and bands for the intervals.

    Args:
        evaluation: from `evaluate_pruning`; one rank gives points with intervals, several give curves.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.
        title: instead of the default.

    Raises:
        InputError: `path` has another suffix.

    Example:
        >>> import clip_lens_ext as cle
        >>> rows = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
        >>> data = cle.EvaluationData(rows, labels=torch.arange(80) % 2)
        >>> splits = [cle.split_noise(rows, cut=k) for k in (1, 2)]
        >>> found = cle.evaluate_pruning(None, splits, data, n_random=2, n_bootstrap=20, progress=False)
        >>> [axes.get_label() for axes in plot_pruning(found).axes]
        ['kNN', 'linear probe']
    """
    n = len(evaluation.measures)
    columns = min(n, 4)
    rows = ceil(n / columns)
    wide, high = 2.6, 2.1
    about = (
        f"share that is right, with nothing, the noise, or as many other dimensions pruned  \u00b7  {evaluation.d} "
        f"dimensions  \u00b7  {100 * evaluation.confidence:g}% intervals"
    )
    width = max(8.0, 0.8 + columns * (wide + 0.55))
    page = _page(path, width, 1.9 + rows * (high + 0.85), title or "What pruning does", about)
    handles: dict[str, Artist] = {}
    for k, measure in enumerate(evaluation.measures):
        left, top = 0.7 + (k % columns) * (wide + 0.55), 1.75 + (k // columns) * (high + 0.85)
        axes = page.axes(left, top, wide, high, label=measure)
        handles |= _curves(axes, evaluation, k)
        axes.set_title(f"{measure}  (n = {evaluation.n[k]})", fontsize=9, color=INK, loc="left", pad=5)
        axes.set_xlabel("dimensions pruned", fontsize=8, color=SOFT)
        _plain(axes)
    page.figure.legend(
        list(handles.values()), list(handles), loc="upper left", ncol=len(handles), fontsize=8, frameon=False,
        bbox_to_anchor=(0.5 / width, 1 - 0.95 / page.height), labelcolor=SOFT,
    )  # fmt: skip
    return _written(page, path)


def _spectrum(axes: Axes, splits: tuple[NoiseSplit, ...], sources: list[Covariance]) -> None:
    labels = splits[0].modalities if len(splits[0].modalities) == len(sources) else ("image", "text")
    lowest = torch.inf
    for label, source, colour in zip(labels, sources, (BLUE, ORANGE), strict=False):
        values = torch.linalg.eigvalsh(source.covariance).flip(0)
        seen = values > values[0] * 1e-12  # a logarithm has no place for what is zero up to rounding
        lowest = min(lowest, float(values[seen].min()))
        axes.plot(torch.arange(1, len(values) + 1)[seen], values[seen], color=colour, linewidth=1.8, label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=lowest / 2)
    for number, split in enumerate(splits):
        axes.axvline(
            split.d - split.rank + 0.5, color=_CUTS[number % len(_CUTS)], linewidth=1.2,
            linestyle=_DASHES[number % len(_DASHES)], label=f"{split.rule}, {split.cut}: {split.rank} noise",
        )  # fmt: skip
    axes.set_xlabel("direction, greatest variance first", fontsize=8.5, color=SOFT)
    axes.set_ylabel("variance", fontsize=8.5, color=SOFT)
    axes.legend(fontsize=7, framealpha=0.9, edgecolor="none", labelcolor=SOFT, loc="lower left")
    _plain(axes)


def _against(axes: Axes, split: NoiseSplit, image: Covariance, text: Covariance) -> None:
    vectors = torch.linalg.eigh((image.covariance + text.covariance) / 2).eigenvectors
    x, y = (_along(source.covariance, vectors) for source in (image, text))
    noise = (split.basis.T @ vectors).square().sum(dim=0) > 0.5
    floor = 1e-12 * float(torch.cat([x, y]).max())
    x, y = x.clamp_min(floor), y.clamp_min(floor)
    axes.scatter(x[~noise], y[~noise], s=14, facecolors="none", edgecolors=SOFT, linewidths=0.8, label="signal")
    axes.scatter(x[noise], y[noise], s=14, color=BLUE, label=f"noise by {split.rule}, {split.cut}")
    ends = [float(torch.cat([x, y]).min()), float(torch.cat([x, y]).max())]
    axes.plot(ends, ends, color=RULE, linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"variance among {split.modalities[0]}s", fontsize=8.5, color=SOFT)
    axes.set_ylabel(f"variance among {split.modalities[-1]}s", fontsize=8.5, color=SOFT)
    axes.legend(fontsize=7, frameon=False, labelcolor=SOFT, loc="lower right")
    _plain(axes)


def _along(covariance: Tensor, vectors: Tensor) -> Tensor:
    return ((covariance @ vectors) * vectors).sum(dim=0)


def _curves(axes: Axes, found: PruningEvaluation, k: int) -> dict[str, Artist]:
    """A line for each pruning, and its band; of a single rank points with bars, side by side."""
    handles: dict[str, Artist] = {}
    x = torch.tensor(found.ranks, dtype=torch.float64)
    for j, name in enumerate(found.pruned):
        colour, dash = _PRUNED[name]
        y, (low, high) = found.score[:, j, k], found.interval[:, j, k].T
        if len(found.ranks) > 1:
            axes.fill_between(x.numpy(), low.numpy(), high.numpy(), color=colour, alpha=0.1, linewidth=0)
            handles[name] = axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.6, marker="o", markersize=2.5)[0]
        else:
            place = float(x[0]) + 0.12 * (j - (len(found.pruned) - 1) / 2)
            axes.plot([place, place], [float(low), float(high)], color=colour, linewidth=1.4)
            handles[name] = axes.plot([place], [float(y)], color=colour, marker="o", markersize=5, linestyle="")[0]
            axes.set_xticks(list(found.ranks))
    return handles


def _page(path: str | os.PathLike[str] | None, width: float, height: float, title: str, about: str) -> Page:
    if path is not None:
        check_format(path)
    page = Page(width, height)
    page.text(0.5, 0.25, shortened(title, 90), size=14, weight="bold")
    page.text(0.5, 0.6, about, size=8.5, color=SOFT)
    return page


def _written(page: Page, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        page.figure.savefig(path)
    return page.figure


def _place(split: NoiseSplit) -> str:
    return f"{split.hook_name or 'the rows'}" + (f", {split.token_scope} tokens" if split.token_scope else "")


def _about(split: NoiseSplit, sources: list[Covariance]) -> str:
    rows = ", ".join(f"{source.count:,} {label} rows" for label, source in zip(split.modalities, sources, strict=False))
    return f"{split.d} dimensions  \u00b7  {rows}"


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=SOFT, length=2.5, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)
