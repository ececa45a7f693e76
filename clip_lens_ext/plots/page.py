"""A sheet of paper in inches from its upper left corner, on matplotlib's objects alone: pyplot is never touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from clip_lens_ext.errors import InputError

INK, SOFT, FAINT, RULE = "#1b1f24", "#57606a", "#8c959f", "#d0d7de"
BLUE, ORANGE = "#1f6feb", "#d4700a"
FORMATS = (".png", ".pdf", ".svg", ".jpg", ".jpeg")


class Page:
    """A white figure on which everything is placed in inches, `left` and `top` from the upper left corner.

    Args:
        width, height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float, **settings: Any) -> Axes:
        """Axes whose upper left corner is at (left, top)."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height), **settings
        )

    def text(self, left: float, top: float, words: str, *, size: float = 9, color: str = INK, **settings: Any) -> Text:
        """Words whose upper left corner is at (left, top); `$` means a dollar."""
        settings = {"va": "top", "ha": "left", "family": "DejaVu Sans", "parse_math": False, **settings}
        return self.figure.text(
            left / self.width, 1 - top / self.height, words, fontsize=size, color=color, **settings
        )

    def rule(self, left: float, top: float, width: float) -> None:
        """A thin horizontal line."""
        axes = self.axes(left, top, width, 0.01)
        axes.set_axis_off()
        axes.plot([0, 1], [0, 0], color=RULE, linewidth=1, clip_on=False)
        axes.set_xlim(0, 1)

    def picture(self, left: float, top: float, size: float, pixels: Tensor, *, label: str = "") -> Axes:
        """A picture uint8 `[3 height width]` in a square; its axes are in pixels."""
        axes = self.axes(left, top, size, size, label=label)
        height, width = pixels.shape[1:]
        axes.imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), interpolation="antialiased")
        bare(axes)
        return axes


def bare(axes: Axes, *, edge: str = RULE) -> None:
    """Take ticks off, leave a thin frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(edge)
        spine.set_linewidth(0.6)


def signed(value: float, digits: int) -> str:
    """A number with its sign; one that rounds to zero is `+0`, and never `-0`.

    Example:
        >>> signed(-0.001, 2), signed(1.5, 2)
        ('+0.00', '+1.50')
    """
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def shortened(words: str, room: int, *, keep_end: bool = False) -> str:
    """One line of at most `room` characters, cut at its end, or at its start where the end says more.

    Example:
        >>> shortened("a very long prompt", 10), shortened("/photos/2024/crane.jpg", 14, keep_end=True)
        ('a very ...', '...4/crane.jpg')
    """
    line = " ".join(words.split())
    if len(line) <= room:
        return line
    return f"...{line[3 - room :]}" if keep_end else f"{line[: room - 3]}..."


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` where a picture cannot be written under this name."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"a picture is written as {', '.join(FORMATS)}; not so {os.fspath(path)!r}")
