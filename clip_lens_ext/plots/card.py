"""One latent as a card: its number, how much it matters, where it fires, and what else activates it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.patches import Rectangle

from clip_lens_ext.explanation import Decision, Explanation, Ranking
from clip_lens_ext.plots.page import BLUE, FAINT, INK, SOFT, Page, signed

WIDTH, GAP = 2.12, 0.24
_HEAD, _LINE, _SPACE, _STRIP_COLUMNS, _MOSAIC_COLUMNS = 0.95, 0.2, 0.05, 4, 3
_HEAT: Colormap = LinearSegmentedColormap.from_list("heat", ["#ffe066", "#ff9f1c", "#ef233c"])


class Block(NamedTuple):
    """One ranking of latents: its field of `Decision`, its name, its colour, and what it is."""

    by: Ranking
    method: str
    colour: str
    meaning: str


@dataclass(frozen=True)
class CardShape:
    """What every card of a figure has room for.

    Args:
        heat: whether there is a heat map.
        n_references: reference pictures of a card; 0 for none.
    """

    heat: bool
    n_references: int

    @property
    def columns(self) -> int:
        """Reference pictures side by side: small under a heat map, large in its place."""
        return _STRIP_COLUMNS if self.heat else _MOSAIC_COLUMNS

    @property
    def rows(self) -> int:
        """Rows of reference pictures."""
        return -(-self.n_references // self.columns)

    @property
    def cell(self) -> float:
        """Side of a reference picture with its margin, in inches."""
        return (WIDTH + _SPACE) / self.columns

    @property
    def height(self) -> float:
        """In inches."""
        return _HEAD + (WIDTH + _LINE if self.heat else 0) + (self.rows * self.cell + _LINE if self.rows else 0)


@dataclass(frozen=True, eq=False)
class Cards:
    """Draws the cards of one decision.

    Args:
        page: where to.
        explanation: for references, units and the grid.
        decision: whose latents.
        shape: what a card has room for.
        span: lowest and highest value of the bars, common to all cards so that lengths can be compared.
    """

    page: Page
    explanation: Explanation
    decision: Decision
    shape: CardShape
    span: tuple[float, float]

    def draw(self, left: float, top: float, block: Block, place: int, rank: int) -> None:
        """Draw one card; its axes are labelled with `block.by` and the latent.

        Args:
            left, top: of the card, in inches.
            block: what the latent is shown for.
            place: of the latent in `decision.latent`.
            rank: of the latent in the block, from 1.
        """
        latent = int(self.decision.latent[place])
        text = self.page.text
        text(left, top, f"latent {latent}", size=12, weight="bold")
        text(left + WIDTH, top + 0.03, f"#{rank}", size=9.5, color=FAINT, ha="right")
        self._bars(left, top + 0.26, place, label=f"{block.by} bars {latent}")
        lens = float(self.decision.logit_lens[place])
        if lens == lens:
            ranked_by_it = block.by == "logit_lens"
            text(left, top + 0.7, f"Logit Lens {signed(lens, 3)}", size=8, color=block.colour if ranked_by_it else SOFT,
                 weight="bold" if ranked_by_it else "normal")
        activation = f"activation {float(self.decision.activation[place]):.3g}"
        text(left + WIDTH, top + 0.7, activation, size=8, color=SOFT, ha="right")
        below = top + _HEAD
        if self.shape.heat:
            self._heat_map(left, below, latent, label=f"{block.by} heat {latent}")
            below += WIDTH + _LINE
        if self.shape.n_references:
            self._references(left, below, latent, block)

    def _bars(self, left: float, top: float, place: int, *, label: str) -> None:
        scale = self.explanation.scale
        values = [float(self.decision.attribution[place]) * scale, float(self.decision.exact[place]) * scale]
        axes = self.page.axes(left + 0.78, top, WIDTH - 0.78 - 0.58, 0.36, label=label)
        axes.barh([0, 1], values, height=0.62, color=[BLUE, INK])
        axes.axvline(0, color=FAINT, linewidth=0.8)
        axes.set_xlim(*self.span)
        axes.set_ylim(1.5, -0.5)
        axes.set_axis_off()
        for row, (word, value, colour) in enumerate(zip(("attribution", "exact"), values, (BLUE, INK), strict=True)):
            middle = top + 0.09 + 0.18 * row
            self.page.text(left, middle, word, size=8, color=SOFT, va="center")
            self.page.text(left + WIDTH, middle, signed(value, 2), size=8.5, weight="bold", ha="right", va="center",
                           color=colour)

    def _heat_map(self, left: float, top: float, latent: int, *, label: str) -> None:
        heat, picture = self.decision.heat[latent], self.decision.picture
        patches, strongest = int((heat > 0).sum()), float(heat.max())
        fade = 0.38 if patches else 0.75
        grey = picture.float().mean(dim=0, keepdim=True).expand(3, -1, -1)
        axes = self.page.picture(left, top, WIDTH, (grey * (1 - fade) + 255 * fade).byte(), label=label)
        if strongest > 0:
            share = (heat.clamp_min(0) / strongest).numpy()
            axes.imshow(share, cmap=_HEAT, vmin=0, vmax=1, alpha=(share > 0) * (0.35 + 0.5 * share),
                        extent=(0, picture.shape[2], picture.shape[1], 0), interpolation="nearest")
        else:
            negative = "its activation\nis negative on patches"  # as TopK SAEs without a ReLU have them
            why = negative if heat.any() else "fires on CLS alone,\nwhich has no place\non the image"
            axes.text(0.5, 0.5, why, fontsize=8, color=INK, ha="center", va="center", transform=axes.transAxes,
                      family="DejaVu Sans", linespacing=1.4)
        words = f"on {patches} of {heat.numel()} patches, to {strongest:.2g}" if patches else "on no patch"
        if self.decision.off_grid[latent]:
            words += f"; on CLS, {self.decision.off_grid[latent]:.2g}"
        self.page.text(left, top + WIDTH + 0.03, words, size=7, color=FAINT)

    def _references(self, left: float, top: float, latent: int, block: Block) -> None:
        assert self.explanation.references is not None
        shape, found = self.shape, self.explanation.references.of(latent)
        if len(found.sample) == 0:
            self.page.text(left, top, "active on no reference image", size=7, color=FAINT)
            return
        # One axes for the whole strip, in units of its cells: an axes for each picture takes seconds.
        height = shape.rows * shape.cell - _SPACE
        axes = self.page.axes(left, top, WIDTH, height, label=f"{block.by} references {latent}")
        axes.set_axis_off()
        side = 1 - _SPACE / shape.cell
        for index, sample in enumerate(found.sample[: shape.n_references].tolist()):
            row, column = divmod(index, shape.columns)
            pixels = self.explanation.reference_pictures[sample].permute(1, 2, 0).numpy()
            place = column, column + side, row + side, row
            axes.imshow(pixels, extent=place, interpolation="antialiased", aspect="auto")
            if shape.heat:
                self._frame(axes, column, row, side, int(found.position[index]), block.colour)
        axes.set_xlim(0, shape.columns - 1 + side)
        axes.set_ylim(shape.rows - 1 + side, 0)
        words = f"strongest {float(found.activation[0]):.3g}"
        self.page.text(left, top + shape.rows * shape.cell, words, size=7, color=FAINT)

    def _frame(self, axes: Axes, left: float, top: float, side: float, position: int, colour: str) -> None:
        """A frame around the patch at which a reference image activates the latent most."""
        height, width = self.explanation.grid
        patch = position - self.explanation.first_patch
        if patch < 0:  # CLS has no place on the picture
            return
        row, column = divmod(patch, width)
        corner = (left + column * side / width, top + row * side / height)
        for edge, line in (("white", 2.0), (colour, 1.0)):
            axes.add_patch(Rectangle(corner, side / width, side / height, fill=False, edgecolor=edge, linewidth=line))
