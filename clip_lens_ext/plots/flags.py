"""One flag on one page: what activates the latent, how much it matters, and what the edit did."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.plots.page import BLUE, FAINT, INK, ORANGE, SOFT, Page, check_format, shortened
from clip_lens_ext.semantics.crops import ReferenceCrops
from clip_lens_ext.semantics.flag_results import Flag, at_least
from clip_lens_ext.semantics.intervention_effects import InterventionEffects
from clip_lens_ext.semantics.word_match import holds

if TYPE_CHECKING:
    from clip_lens_ext.attribution.summary import AttributionSummary

_WIDTH, _MARGIN, _CELL, _COLUMNS, _N_CROPS, _N_BARS = 10.0, 0.4, 0.72, 4, 12, 8
_PANEL, _LINE = 2.2, 0.17
_COLUMN = (_WIDTH - 4 * _MARGIN) / 3


def plot_flag(
    flag: Flag,
    crops: ReferenceCrops,
    attributions: AttributionSummary,
    *,
    effects: InterventionEffects | None = None,
    pictures: tuple[Tensor, Tensor] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw one flag: references, label, attribution among the others, and the edit's before and after.

    Args:
        flag: from `flag_components`.
        crops: of the flag's latent, from `crop_references`. Floats are stretched to the range of all of them.
        attributions: that the flags were made from; the prompt's greatest shares are shown, for a compound noun those
            of its word; none where they have no such prompt, as for one that interventions alone looked at.
        effects: that the flags were made from; needed for what an edit did.
        pictures: one picture before and after the edit, `[3 height width]` each, to be shown.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.

    Returns:
        The `Figure`; no pyplot state is touched, so there is nothing to close. Axes are labelled by what they show.

    Raises:
        InputError: `path` has another suffix, effects without the flag's edit, or pictures that are no pair.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(12, seed=0, split="test").images)
        >>> target = cle.text_target(clip, ["a photo of a bow"])
        >>> attributions = cle.aggregate_attributions(clip.vision, pixels, sae, target, progress=False)
        >>> references = cle.collect_references(clip.vision, pixels, sae, k=4, progress=False)
        >>> latent = int(attributions.top(1).latents[0, 0])
        >>> crops = cle.crop_references(references, latent, pixels, clip.vision)
        >>> flag = cle.Flag("unexplained", "a photo of a bow", latent, "bow", 0.1, 0.0, 0.5, 0.5, "ranks", "", ())
        >>> [axes.get_label() for axes in plot_flag(flag, crops, attributions).axes if axes.get_label()]
        ['references', 'shares']
    """
    if path is not None:
        check_format(path)
    if pictures is not None and (len(pictures) != 2 or pictures[0].shape != pictures[1].shape):
        raise InputError("pictures are one before and one after the edit, of one shape")
    row = None if effects is None else _row(flag, effects)
    if pictures is not None and row is None:
        raise InputError("pictures are of an edit, and no edit decided this flag, or effects= is not given")
    lines = _evidence(flag)
    meaning = textwrap.wrap(flag.meaning, 128)
    start = 1.05 + 0.2 * len(meaning)
    page = Page(_WIDTH, start + _PANEL + 0.75 + _LINE * len(lines) + 0.3)
    label = "no label" if flag.label is None else f"labelled \u201c{flag.label}\u201d"
    page.text(_MARGIN, 0.28, f"{flag.kind}: \u201c{shortened(flag.prompt, 60)}\u201d", size=15, weight="bold")
    subject = f"; about \u201c{flag.subject}\u201d" if flag.subject else ""
    strength = f"strength {flag.strength:.3g} {flag.strength_unit}"
    page.text(_MARGIN, 0.66, f"latent {flag.latent}, {label}{subject}; {strength}", size=10, color=SOFT)
    for place, line in enumerate(meaning):
        page.text(_MARGIN, 0.9 + 0.2 * place, line, size=10, color=INK)
    start += 0.25
    _references(page, crops, start)
    prompt = _prompt_of_shares(flag, attributions)
    if prompt is not None:
        _shares(page, flag, attributions, prompt, _MARGIN * 2 + _COLUMN, start)
    if effects is not None and row is not None:
        _change(page, flag, effects, row, pictures, 3 * _MARGIN + 2 * _COLUMN, start)
    top = start + _PANEL + 0.6
    page.rule(_MARGIN, top - 0.12, _WIDTH - 2 * _MARGIN)
    for place, line in enumerate(lines):
        page.text(_MARGIN, top + _LINE * place, line, size=8, color=SOFT)
    if path is not None:
        page.figure.savefig(path)
    return page.figure


def _row(flag: Flag, effects: InterventionEffects) -> int | None:
    """The edit that decided a flag; None where none did."""
    return effects.row(flag.edit) if flag.edit else None


def _prompt_of_shares(flag: Flag, attributions: AttributionSummary) -> str | None:
    """The prompt for which the latent matters: for a compound noun that of its word."""
    if flag.kind == "compound noun":
        return min((label for label in attributions.labels if holds(label, flag.subject)), key=len, default=None)
    return flag.prompt if flag.prompt in attributions.labels else None


def _references(page: Page, crops: ReferenceCrops, top: float) -> None:
    page.text(_MARGIN, top - 0.28, "What activates it most", size=10, weight="bold")
    axes = page.axes(_MARGIN, top, _COLUMN, _PANEL, label="references")
    axes.set_axis_off()
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(_PANEL / (_COLUMN / _COLUMNS), 0)
    if not crops.pictures:
        page.text(_MARGIN, top, "nothing activates it", size=8, color=FAINT)
        return
    shown = [picture.float() for picture in crops.pictures[:_N_CROPS]]
    low, high = min(float(one.min()) for one in shown), max(float(one.max()) for one in shown)
    for place, picture in enumerate(shown):
        line, column = divmod(place, _COLUMNS)
        pixels = _bytes(picture, low, high).permute(1, 2, 0).numpy()
        axes.imshow(pixels, extent=(column + 0.03, column + 0.97, line + 0.97, line + 0.03), aspect="auto")
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(_PANEL / (_COLUMN / _COLUMNS), 0)


def _shares(
    page: Page, flag: Flag, attributions: AttributionSummary, prompt: str, left: float, top: float
) -> None:  # fmt: skip
    title = "Share of what speaks for the prompt" if prompt == flag.prompt else f"Shares for \u201c{prompt}\u201d"
    page.text(left, top - 0.28, shortened(title, 38), size=10, weight="bold")
    share = attributions.share[attributions.labels.index(prompt)].nan_to_num(0)
    best = share.argsort(descending=True, stable=True)[:_N_BARS].tolist()
    shown = best if flag.latent in best else [*best[:-1], flag.latent]
    axes = page.axes(left + 0.75, top, _COLUMN - 1.4, _PANEL, label="shares")
    values = [100 * float(share[latent]) for latent in shown]
    axes.barh(range(len(shown)), values, height=0.62, color=[ORANGE if one == flag.latent else FAINT for one in shown])
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_ylim(_N_BARS - 0.4, -0.6)
    axes.set_axis_off()
    for place, (latent, value) in enumerate(zip(shown, values, strict=True)):
        middle = top + _PANEL * (place + 0.6) / (_N_BARS + 0.2)
        own = latent == flag.latent
        page.text(left, middle, f"latent {latent}", size=8, color=ORANGE if own else SOFT, va="center",
                  weight="bold" if own else "normal")  # fmt: skip
        page.text(left + _COLUMN, middle, f"{value:.1f}%", size=8, color=INK, ha="right", va="center")


def _change(
    page: Page, flag: Flag, effects: InterventionEffects, row: int, pictures: tuple[Tensor, Tensor] | None,
    left: float, top: float,
) -> None:  # fmt: skip
    column = effects.prompts.index(flag.prompt)
    page.text(left, top - 0.28, shortened(f"The edit: {effects.names[row]}", 38), size=10, weight="bold")
    numbers = [("prediction", effects.prediction_before[row, column], effects.prediction_after[row, column],
                effects.prediction_error[row, column]),
               ("latent", effects.latent_before[row, flag.latent], effects.latent_after[row, flag.latent],
                effects.latent_error[row, flag.latent])]  # fmt: skip
    height = 0.95 if pictures is not None else _PANEL
    for place, (what, before, after, error) in enumerate(numbers):
        width = (_COLUMN - 0.5) / 2
        axes = page.axes(
            left + place * (width + 0.5), top + 0.22, width, height - 0.45, label=f"{what} before and after"
        )
        axes.bar([0, 1], [float(before), float(after)], width=0.6, color=[FAINT, BLUE], yerr=[0.0, float(error)])
        axes.axhline(0, color=FAINT, linewidth=0.8)
        axes.set_xticks([0, 1], ["before", "after"], fontsize=7.5, color=SOFT)
        axes.tick_params(axis="y", labelsize=7, colors=SOFT, length=2)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_title(what, fontsize=8.5, color=INK, loc="left", pad=3)
    if pictures is not None:
        low, high = (float(torch.stack(pictures).float().aminmax()[end]) for end in (0, 1))
        for place, (word, picture) in enumerate(zip(("before", "after"), pictures, strict=True)):
            page.picture(left + place * 1.3, top + 1.1, 1.1, _bytes(picture.float(), low, high), label=word)


def _bytes(picture: Tensor, low: float, high: float) -> Tensor:
    return ((picture - low) / max(high - low, 1e-12) * 255).round().clamp(0, 255).byte()


def _evidence(flag: Flag) -> list[str]:
    lines = []
    for one in flag.evidence:
        least = "" if one.threshold is None else f", {at_least(one)} needed ({one.source})"
        lines += textwrap.wrap(f"{one.name}: {one.value:.3g}{least}", 150)
    return lines
