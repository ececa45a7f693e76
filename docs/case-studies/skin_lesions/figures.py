"""The pictures of the case study: what was drawn, how accuracy falls with the agreement, and what the suspects show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from generated import FREE, REVERSED, SAME, Study
from heads import ABLATED, CLASSIFIER, HEADS, KEYED, PROMPTS, RANDOM, REFITTED
from lesions import SHORTCUTS, LesionWorld
from matplotlib.axes import Axes
from measures import Accuracy
from torch import Tensor

from clip_lens_ext.plots.page import FAINT, INK, RULE, SOFT, Page

# Dashes tell the lines apart where colours do not.
STYLES = {
    CLASSIFIER: (INK, "-", "o"),
    PROMPTS: ("#1f6feb", "-", "s"),
    ABLATED: ("#d4700a", "-", "^"),
    RANDOM: ("#d4700a", (0, (1, 1.5)), "v"),
    KEYED: ("#7a3db8", (0, (4, 2)), "d"),
    REFITTED: ("#1a7f37", "-", "D"),
}
SHOWN_AS = {SAME: "biased like the training set", FREE: "without the shortcut", REVERSED: "shortcut reversed"}
_MARGIN = 0.5


def draw_examples(world: LesionWorld, path: Path, *, n_each: int = 5, seed: int = 4) -> None:
    """The same lesions without and with each shortcut: naevi, then melanomas, with signs that grow."""
    versions: list[dict[str, bool]] = [dict.fromkeys(SHORTCUTS, False)]
    versions += [{other: other == name for other in SHORTCUTS} for name in SHORTCUTS]
    drawn = [world.sample(40, seed=seed, split="test", present=present) for present in versions]
    sign, labels = drawn[0].signs.mean(dim=1), drawn[0].labels
    columns: list[int] = []
    for label in (0, 1):
        rows = (labels == label).nonzero().flatten()
        rows = rows[sign[rows].argsort()]
        columns += rows[torch.linspace(0, len(rows) - 1, n_each).round().long()].tolist()
    size, gap, left = 0.82, 0.06, 1.45
    width = left + len(columns) * (size + gap) + 0.3 + _MARGIN
    page = Page(width, 1.0 + len(versions) * (size + gap) + 0.25)
    page.text(_MARGIN, 0.2, "What was planted", size=13, weight="bold")
    offsets = [left + i * (size + gap) + (0.3 if i >= n_each else 0.0) for i in range(len(columns))]
    for name, at in (("naevi", 0), ("melanomas", n_each)):
        page.text(offsets[at], 0.68, f"{name}, of weak to strong signs", size=9, color=SOFT)
    for row, (batch, name) in enumerate(zip(drawn, ("none", *SHORTCUTS), strict=True)):
        top = 0.92 + row * (size + gap)
        page.text(_MARGIN, top + size / 2, name, size=9.5, va="center")
        for column, place in zip(columns, offsets, strict=True):
            page.picture(place, top, size, batch.images[column])
    page.figure.savefig(path)


def draw_accuracy(study: Study, path: Path) -> None:
    """Balanced accuracy against agreement: a row for each shortcut, a column for each set of test pictures."""
    kinds, width, height = (SAME, FREE, REVERSED), 3.3, 2.15
    shortcuts = study.settings.shortcuts
    page = Page(_MARGIN + 0.55 + 3 * (width + 0.35) + 0.15, 1.75 + len(shortcuts) * (height + 0.55))
    page.text(_MARGIN, 0.2, "How far does each head fall with its training set?", size=14, weight="bold")
    page.text(_MARGIN, 0.52, f"Balanced accuracy on {study.settings.n_test} test lesions; bands: 95% over lesions. The "
              "prompts know no training set.", size=9, color=SOFT)  # fmt: skip
    axes = None
    for row, shortcut in enumerate(shortcuts):
        for column, kind in enumerate(kinds):
            axes = page.axes(_MARGIN + 0.55 + column * (width + 0.35), 1.55 + row * (height + 0.55), width, height)
            _lines(axes, study, shortcut, kind)
            if row == 0:
                axes.set_title(SHOWN_AS[kind], fontsize=10, color=INK, loc="left", pad=6)
            if column == 0:
                axes.set_ylabel(shortcut, fontsize=10.5, color=INK, labelpad=8)
            else:
                axes.set_yticklabels([])
            if row == len(shortcuts) - 1:
                axes.set_xlabel("agreement of shortcut and diagnosis in training", fontsize=8.5, color=SOFT)
    assert axes is not None
    handles, names = axes.get_legend_handles_labels()
    corner = (_MARGIN / page.width - 0.01, 1 - 0.72 / page.height)
    page.figure.legend(handles, names, loc="upper left", ncols=3, fontsize=8.5, frameon=False, bbox_to_anchor=corner)
    page.figure.savefig(path)


def _lines(axes: Axes, study: Study, shortcut: str, kind: str) -> None:
    agreements = study.settings.agreements
    places = range(len(agreements))  # as far apart as they are, the last three could not be told apart
    for head in HEADS:
        colour, line, marker = STYLES[head]
        cells = [study.cell(shortcut, agreement).accuracy[kind] for agreement in agreements]
        # Without suspects there is nothing to set to zero, and the head is the one that it was.
        found = [cell.get(head, cell[CLASSIFIER]).balanced for cell in cells]
        low, high = zip(*(one.interval for one in found), strict=True)
        if head in (CLASSIFIER, PROMPTS, ABLATED):
            axes.fill_between(places, low, high, color=colour, alpha=0.09, linewidth=0)
        axes.plot(places, [one.value for one in found], color=colour, linestyle=line, marker=marker, markersize=3.6,
                  linewidth=1.5, label=head)  # fmt: skip
    axes.axhline(0.5, color=RULE, linewidth=0.9, zorder=0)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(places, [f"{agreement:g}" for agreement in agreements])
    _plain(axes)


def draw_bars(accuracy: dict[str, dict[str, Accuracy]], path: Path, *, title: str) -> None:
    """Balanced accuracy of every head on every set of test pictures, with intervals; for a folder."""
    heads = [head for head in HEADS if head in next(iter(accuracy.values()))]
    height, row = 0.28 * len(heads) + 0.25, 0.75
    page = Page(9.5, 1.0 + len(accuracy) * (height + row))
    page.text(_MARGIN, 0.22, title, size=13, weight="bold")
    for number, (pictures, found) in enumerate(accuracy.items()):
        axes = page.axes(3.2, 1.0 + number * (height + row), 4.6, height)
        for place, head in enumerate(reversed(heads)):
            measured, colour = found[head].balanced, STYLES[head][0]
            axes.barh(place, measured.value, height=0.62, color=colour, alpha=0.55 if STYLES[head][1] != "-" else 0.9)
            axes.plot(measured.interval, [place, place], color=FAINT, linewidth=1.4, solid_capstyle="butt")
            axes.text(
                1.02, place, str(measured), fontsize=8, color=SOFT, va="center", transform=axes.get_yaxis_transform()
            )
        axes.set_yticks(range(len(heads)), list(reversed(heads)))
        axes.set_xlim(0, 1)
        axes.axvline(0.5, color=RULE, linewidth=0.9, zorder=0)
        axes.set_title(f"balanced accuracy, {pictures}", fontsize=9.5, color=INK, loc="left", pad=5)
        _plain(axes)
    page.figure.savefig(path)


@dataclass(frozen=True, eq=False)
class SuspectRow:
    """A latent in the figure: words in two lines, and the pictures that activate it most, uint8 `[3 height width]`."""

    heading: str
    about: str
    pictures: Sequence[Tensor]


def draw_suspects(rows: Sequence[SuspectRow], path: Path, *, title: str, about: str) -> None:
    """A row for each suspect: what it is said to carry, and the pictures that activate it most."""
    size, gap, left = 0.82, 0.06, 3.4
    n_pictures = max((len(row.pictures) for row in rows), default=0)
    page = Page(left + n_pictures * (size + gap) + _MARGIN, 1.05 + max(1, len(rows)) * (size + gap) + 0.25)
    page.text(_MARGIN, 0.2, title, size=13, weight="bold")
    page.text(_MARGIN, 0.55, about, size=9, color=SOFT)
    if not rows:
        page.text(_MARGIN, 1.1, "No latent has a share that much greater under the classifier.", size=10)
    for number, row in enumerate(rows):
        top = 0.95 + number * (size + gap)
        page.text(_MARGIN, top + 0.2, row.heading, size=10, weight="bold")
        page.text(_MARGIN, top + 0.45, row.about, size=8.5, color=SOFT)
        for place, picture in enumerate(row.pictures):
            page.picture(left + place * (size + gap), top, size, picture)
    page.figure.savefig(path)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8.5, colors=SOFT, length=2.5, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)
