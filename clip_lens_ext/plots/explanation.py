"""The picture of one decision: which latents the score of an image rests on, and whether that can be believed."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_lens_ext.errors import InputError
from clip_lens_ext.explanation import Decision, Explanation
from clip_lens_ext.plots.card import GAP, WIDTH, Block, Cards, CardShape
from clip_lens_ext.plots.page import BLUE, FAINT, INK, ORANGE, RULE, SOFT, Page, check_format, shortened, signed

_MARGIN, _SIDE, _SIDE_GAP = 0.4, 3.3, 0.5
_HEADER, _BLOCK_TITLE, _BLOCK_GAP, _FOOTER = 1.32, 0.62, 0.3, 0.42
_IN_A_ROW = 5
_BLOCKS = (
    Block("attribution", "attribution patching", BLUE,
          "activation \u00d7 gradient of the {unit}: the first-order estimate of exact ablation"),
    Block("logit_lens", "Logit Lens", ORANGE,
          "where the decoder row alone points: its {unit} with the prompt, whatever the image"),
)


def plot_explanation(
    explanation: Explanation, path: str | os.PathLike[str] | None = None, *, decision: int = 0
) -> Figure:
    """Draw one decision: the image, and its top latents by attribution patching and by the Logit Lens.

    Every latent has its activation, its attribution beside exact ablation, where on the image it fires, and the
    reference images that activate it most, with a frame around the patch that does. On the left, both methods are
    held against exact ablation over all active latents.

    Args:
        explanation: from `explain_images`.
        path: where to write it, as PNG, PDF, SVG or JPEG; None: nowhere.
        decision: which of `explanation.decisions`.

    Returns:
        The `Figure`; no pyplot state is touched, so there is nothing to close.

    Raises:
        InputError: there is no such decision, or `path` has another suffix.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.explain import explain_images
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(1, seed=0, split="test", classes=["crane"]).images)
        >>> figure = plot_explanation(explain_images(clip, pixels, sae, "a photo of a crane", k=3, progress=False))
        >>> [axes.get_label() for axes in figure.axes if "scatter" in axes.get_label()]
        ['scatter attribution', 'scatter logit_lens']
    """
    if path is not None:
        check_format(path)
    if not 0 <= decision < len(explanation.decisions):
        raise InputError(f"there are {len(explanation.decisions)} decisions, number {decision} is none of them")
    shown = explanation.decisions[decision]
    shape = CardShape(bool(shown.heat), _most_references(explanation, shown))
    places = [shown.top(explanation.k, block.by).tolist() for block in _BLOCKS]
    rows = [max(1, -(-len(some) // _IN_A_ROW)) for some in places]
    columns = max(3, min(_IN_A_ROW, max(map(len, places))))
    row_height = shape.height + 0.15
    body = sum(_BLOCK_TITLE + n * row_height for n in rows) + _BLOCK_GAP
    right = _MARGIN + _SIDE + _SIDE_GAP
    page = Page(right + columns * (WIDTH + GAP) - GAP + _MARGIN, _HEADER + max(body, 8.1) + _FOOTER)
    _header(page, explanation, shown)
    _side(page, explanation, shown, places)
    cards = Cards(page, explanation, shown, shape, _span(explanation, shown, [i for some in places for i in some]))
    top = _HEADER
    for block, some, n_rows in zip(_BLOCKS, places, rows, strict=True):
        _block_title(page, right, top, explanation, shown, block)
        for index, place in enumerate(some):
            row, column = divmod(index, columns)
            left, below = right + column * (WIDTH + GAP), top + _BLOCK_TITLE + row * row_height
            cards.draw(left, below, block, place, rank=index + 1)
        top += _BLOCK_TITLE + n_rows * row_height + _BLOCK_GAP
    _footer(page, explanation)
    if path is not None:
        page.figure.savefig(path)
    return page.figure


def _most_references(explanation: Explanation, decision: Decision) -> int:
    if explanation.references is None or not explanation.reference_pictures:
        return 0
    places = torch.cat([decision.top(explanation.k, block.by) for block in _BLOCKS])
    found = [len(explanation.references.of(int(latent)).sample) for latent in decision.latent[places]]
    return min(explanation.n_references, max(found))


def _span(explanation: Explanation, decision: Decision, places: Sequence[int]) -> tuple[float, float]:
    values = torch.cat([decision.attribution[places], decision.exact[places]]).double() * explanation.scale
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    return (low, high) if high > low else (0.0, 1.0)


def _header(page: Page, explanation: Explanation, decision: Decision) -> None:
    room = int((page.width - 2 * _MARGIN) * 4.6) - 14
    prompt = shortened(decision.prompt, room)
    page.text(_MARGIN, 0.3, f"Why {decision.prediction:+.3f} for \u201c{prompt}\u201d?", size=19, weight="bold")
    read = {"cls": "the CLS token", "pooled": "the pooled vector", "patches": f"{explanation.n_tokens} patches",
            "all": f"all {explanation.n_tokens} tokens"}
    tokens = read.get(explanation.token_scope, explanation.token_scope)
    site = (f"model {explanation.model}", f"SAE of {explanation.d_sae:,} latents at {explanation.hook_name}, {tokens}",
            f"error term {explanation.error_term}", f"{len(decision.latent)} latents active")
    unit = f"{explanation.points} (100 \u00d7 cosine)" if explanation.unit == "cosine" else explanation.unit
    sign = f"attribution and exact ablation in {unit}:  positive = raises the {explanation.unit}"
    page.text(_MARGIN, 0.7, "  \u00b7  ".join(site), size=9.5, color=SOFT)
    page.text(_MARGIN, 0.91, sign, size=9.5, color=SOFT)
    page.rule(_MARGIN, 1.17, page.width - 2 * _MARGIN)


def _block_title(
    page: Page, left: float, top: float, explanation: Explanation, decision: Decision, block: Block
) -> None:
    places = decision.top(explanation.k, block.by)
    if len(places):
        title = f"Top {len(places)} by {block.method}"
        total = float(decision.exact[places].sum()) * explanation.scale
        words = f"{block.meaning.format(unit=explanation.unit)}.  Sum of their exact ablations: {signed(total, 2)}"
    else:
        title = f"No {block.method}"
        words = next((note for note in explanation.notes if block.method in note), "")
    page.text(left, top, title, size=13, weight="bold", color=block.colour)
    page.text(left, top + 0.26, words, size=8.5, color=SOFT)


def _side(page: Page, explanation: Explanation, decision: Decision, places: Sequence[Sequence[int]]) -> None:
    """The image, both methods against exact ablation, and how to read it all."""
    page.picture(_MARGIN, _HEADER, _SIDE, decision.picture, label="image")
    top = _HEADER + _SIDE + 0.1
    page.text(_MARGIN, top, shortened(decision.image, 38, keep_end=True), size=10, weight="bold")
    words = f"{explanation.unit} with the prompt {decision.prediction:+.4f}"
    page.text(_MARGIN, top + 0.2, words, size=9, color=SOFT)
    top += 0.62
    page.text(_MARGIN, top, "Held against exact ablation", size=10, weight="bold")
    words = f"each dot one of the {len(decision.latent)} active latents; numbers: the greatest exact"
    page.text(_MARGIN, top + 0.19, words, size=8, color=SOFT)
    top += 0.7
    stacked = page.height > 11.5  # beside heat maps there is room for large ones
    width, height = (_SIDE - 0.4, 1.3) if stacked else ((_SIDE - 0.8) / 2, 1.25)
    right, down = (0.0, height + 0.72) if stacked else (width + 0.45, 0.0)
    for index, (block, some) in enumerate(zip(_BLOCKS, places, strict=True)):
        if not some:
            continue
        corner = _MARGIN + 0.35 + index * right, top + index * down
        axes = page.axes(*corner, width, height, label=f"scatter {block.by}")
        _scatter(axes, explanation, decision, block, some)
    _how_to_read(page, top + down + height + 0.55, explanation)


def _scatter(axes: Axes, explanation: Explanation, decision: Decision, block: Block, places: Sequence[int]) -> None:
    exact = decision.exact.double().numpy() * explanation.scale
    values = getattr(decision, block.by).double().numpy() * (explanation.scale if block.by == "attribution" else 1)
    axes.axhline(0, color=RULE, linewidth=0.7, zorder=0)
    axes.axvline(0, color=RULE, linewidth=0.7, zorder=0)
    axes.scatter(exact, values, s=7, color=FAINT, alpha=0.55, linewidths=0)
    axes.scatter(exact[places], values[places], s=16, color=block.colour, linewidths=0)
    if block.by == "attribution":
        axes.axline((0, 0), slope=1, color=INK, linewidth=0.7, linestyle=(0, (3, 3)), zorder=0)
    for place in decision.top(3, "exact").tolist():
        axes.annotate(str(int(decision.latent[place])), (exact[place], values[place]), xytext=(-3, 0), fontsize=6,
                      textcoords="offset points", ha="right", va="center", color=SOFT)
    rank = decision.agreement[block.by]
    found = f"rank corr. {rank:+.2f}" if rank == rank else "rank corr. not defined"
    axes.set_title(f"{block.method}\n{found}", fontsize=8, color=block.colour, family="DejaVu Sans", pad=4)
    axes.set_xlabel("exact (points)" if explanation.unit == "cosine" else "exact", fontsize=7, color=SOFT, labelpad=1)
    axes.tick_params(labelsize=6.5, colors=SOFT, length=2, width=0.5, pad=1.5)
    axes.locator_params(nbins=4)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)


def _how_to_read(page: Page, top: float, explanation: Explanation) -> None:
    page.text(_MARGIN, top, "How to read it", size=10, weight="bold")
    y = explanation.unit
    lines = [
        ("attribution", f"activation \u00d7 gradient of the {y}, over all the SAE's tokens"),
        ("exact", f"{y} as it is minus {y} with this latent set to zero: measured"),
        ("Logit Lens", f"{y} of the decoder row alone with the prompt, in units of {y}"),
        ("activation", "summed over the SAE's tokens" if explanation.n_tokens > 1 else "in the SAE's units"),
    ]
    if explanation.decisions[0].heat:
        lines.append(("heat map", "the latent's activation at each patch of this image"))
    if explanation.reference_pictures:
        n = 0 if explanation.references is None else explanation.references.n_samples
        frame = "; frame: the patch that does" if explanation.decisions[0].heat else ""
        lines.append(("below it", f"the images of {n:,} that activate the latent most{frame}"))
    at = top + 0.24
    for word, meaning in lines:
        wrapped = textwrap.wrap(meaning, width=43)
        page.text(_MARGIN, at, word, size=7.5, weight="bold", color=SOFT)
        page.text(_MARGIN + 0.78, at, "\n".join(wrapped), size=7.5, color=SOFT, linespacing=1.25)
        at += 0.145 * len(wrapped) + 0.045


def _footer(page: Page, explanation: Explanation) -> None:
    made = explanation.provenance["versions"]["clip-lens-ext"]
    sha = explanation.provenance.get("sae_sha256")
    parts = [f"clip-lens-ext {made}", f"SAE sha256 {sha[:12]}" if sha else "SAE without a file", *explanation.notes]
    page.text(_MARGIN, page.height - 0.32, "  \u00b7  ".join(parts), size=8, color=SOFT)
