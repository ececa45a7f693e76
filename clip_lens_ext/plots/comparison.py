"""The picture of a comparison of methods: deletion and insertion curves, rank correlations, and their intervals."""

from __future__ import annotations

import os

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clip_lens_ext.attribution.comparison import Comparison
from clip_lens_ext.attribution.faithfulness_result import Faithfulness
from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.plots.page import INK, RULE, SOFT, Page, check_format, shortened

# The two ends in black and grey; colours that differ in lightness too, for eyes that see them alike and for grey print.
_ENDS = {"exact_ablation": (INK, (0, (4, 2))), "random": ("#8c959f", (0, (1, 1.5)))}
_COLOURS = ("#1f6feb", "#d4700a", "#7a3db8", "#1a7f37", "#bf3989", "#0a7f8c", "#7d5a00", "#b35900", "#57606a")
_WIDTH, _MARGIN, _PANEL, _BAR_ROW = 12.0, 0.75, 3.3, 0.3


def plot_comparison(
    comparison: Comparison | Faithfulness, path: str | os.PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw deletion and insertion curves of every method, and their rank correlations with exact ablation.

    Curves are means over samples and targets, with a band for the bootstrap interval over the samples; a single sample
    has none. Exact ablation's own order and the random one are the two ends, in black and grey.

    Args:
        comparison: from `compare` or `faithfulness`.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.
        title: instead of the one that names the site.

    Returns:
        The `Figure`; no pyplot state is touched, so there is nothing to close.

    Raises:
        InputError: `path` has another suffix.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(3, seed=0, split="test").images)
        >>> found = cle.compare(clip.vision, pixels, sae, cle.text_target(clip, world.prompts()[0]), n_steps=8,
        ...                     methods=["attribution_patching", "logit_lens"], progress=False)
        >>> [axes.get_label() for axes in plot_comparison(found).axes if axes.get_label()]
        ['deletion', 'insertion', 'rank correlation']
    """
    if path is not None:
        check_format(path)
    found = comparison.faithfulness if isinstance(comparison, Comparison) else comparison
    top, bars = 1.25, _BAR_ROW * len(found.methods)
    page = Page(_WIDTH, top + _PANEL + 1.0 + bars + 0.75)
    _header(page, found, title)
    width = (_WIDTH - 3 * _MARGIN - 0.2) / 2
    colours = _styles(found.methods)
    scale, unit = (100.0, "cosine points") if found.unit == "cosine" else (1.0, found.unit)
    for index, (name, better) in enumerate((("deletion", "lower"), ("insertion", "higher"))):
        axes = page.axes(_MARGIN + index * (width + _MARGIN), top, width, _PANEL, label=name)
        _curves(axes, getattr(found, name).double().cpu() * scale, found, colours)
        axes.set_title(f"{name.capitalize()}: {better} is better", fontsize=10, color=INK, loc="left", pad=6)
        what = "set to zero" if name == "deletion" else "put back, all others at zero"
        axes.set_xlabel(f"latents {what}, greatest first", fontsize=8.5, color=SOFT)
        axes.set_ylabel(f"prediction, {unit}", fontsize=8.5, color=SOFT)
    left = _MARGIN + 2.1
    axes = page.axes(left, top + _PANEL + 1.0, _WIDTH - left - _MARGIN - 1.2, bars, label="rank correlation")
    _bars(axes, found, colours)
    if path is not None:
        page.figure.savefig(path)
    return page.figure


def _header(page: Page, found: Faithfulness, title: str | None) -> None:
    words = title or "Which order of latents says what the prediction rests on?"
    page.text(_MARGIN, 0.25, shortened(words, 100), size=15, weight="bold")
    labels = found.labels[0] if len(found.labels) == 1 else f"{len(found.labels)} targets"
    n_sample = "1 sample" if found.n_sample == 1 else f"{found.n_sample} samples"
    about = [
        f"model {found.provenance.get('model')}", f"{found.hook_name}, {found.token_scope} tokens",
        f"error term {found.error_term}", n_sample, shortened(str(labels), 50),
        "no interval for one sample" if found.n_sample == 1 else f"bands: {100 * found.confidence:g}% over samples",
    ]  # fmt: skip
    page.text(_MARGIN, 0.62, "  \u00b7  ".join(about), size=8.5, color=SOFT)


def _styles(methods: tuple[str, ...]) -> dict[str, tuple[str, object]]:
    others = [method for method in methods if method not in _ENDS]
    own: dict[str, tuple[str, object]] = {
        method: (_COLOURS[i % len(_COLOURS)], "-" if i < len(_COLOURS) else "--") for i, method in enumerate(others)
    }
    return {**own, **_ENDS}


def _curves(axes: Axes, curves: Tensor, found: Faithfulness, styles: dict[str, tuple[str, object]]) -> None:
    """Mean curves `[method sample target step]` with bands."""
    by_step = curves.mean(dim=2)  # method sample step
    n_method, n_sample, n_step = by_step.shape
    rows = by_step.transpose(1, 2).reshape(n_method * n_step, n_sample)
    bands = bootstrap_intervals(rows, n_bootstrap=found.n_bootstrap, seed=found.seed, confidence=found.confidence)
    bands, steps = bands.reshape(n_method, n_step, 2), found.steps
    for row, method in enumerate(found.methods):
        colour, line = styles[method]
        if n_sample > 1:
            low, high = bands[row].T.numpy()
            axes.fill_between(steps, low, high, color=colour, alpha=0.1, linewidth=0)
        mean = by_step[row].mean(dim=0).numpy()
        axes.plot(steps, mean, color=colour, linestyle=line, linewidth=1.7, label=_shown(method))
    axes.set_xlim(0, found.n_steps)
    _plain(axes)


def _bars(axes: Axes, found: Faithfulness, styles: dict[str, tuple[str, object]]) -> None:
    means, ends = found.mean("rank_correlation"), found.interval("rank_correlation")
    order = means.nan_to_num(-2).argsort(stable=True).tolist()
    for place, row in enumerate(order):
        mean, (low, high), colour = float(means[row]), ends[row].tolist(), styles[found.methods[row]][0]
        if mean != mean:
            axes.text(0.01, place, "not defined: its values are all equal", fontsize=8, color=SOFT, va="center")
            continue
        axes.barh(place, mean, height=0.62, color=colour, alpha=0.8)
        number = f"{mean:+.3f}"
        if low == low:
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
            number += f"  ({low:+.3f} to {high:+.3f})"
        axes.text(1.02, place, number, fontsize=8, color=SOFT, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(order)), [_shown(found.methods[row]) for row in order])
    axes.axvline(0, color=RULE, linewidth=0.8, zorder=0)
    lowest = min([0.0, *(value for value in [*means.tolist(), *ends[:, 0].tolist()] if value == value)])
    axes.set_xlim(min(lowest * 1.1, -0.02), 1.0)
    axes.set_title("Rank correlation with exact ablation: higher is better", fontsize=10, color=INK, loc="left", pad=6)
    compared, active = int(found.n_compared.sum()), int(found.n_active.sum())
    part = f"all {active:,}" if compared == active else f"{compared:,} of the {active:,}"
    axes.set_xlabel(f"Spearman's within each sample, then averaged; {part} active latents. The colours are those above",
                    fontsize=8.5, color=SOFT)  # fmt: skip
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8.5, colors=SOFT, length=2.5, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)


def _shown(method: str) -> str:
    return method.replace("_x_", " \u00d7 ").replace("_", " ")
