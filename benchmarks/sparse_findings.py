"""How the tables of Sparse CLIP decide whether a finding of the paper holds: by intervals of the bootstrap.

A finding says that a mean lies above or below a threshold. It holds where the whole interval does, it does not hold
where the whole interval lies on the other side, and it is not decided where the threshold is inside.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from clip_lens_ext.bootstrap import bootstrap_intervals

N_BOOTSTRAP, CONFIDENCE = 2000, 0.95
HOLDS, FAILS, OPEN = "holds here", "does not hold here", "not decided"
DECIDED = (
    f"What the paper found, and whether it holds here, by {CONFIDENCE:.0%} intervals of the bootstrap; *not decided* "
    "is what has the threshold inside its interval. Each row is one training: what another one would give, no interval "
    "says."
)


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float

    def above(self, threshold: float = 0.0) -> str:
        """Whether the mean is greater: one of the three words."""
        return HOLDS if self.low > threshold else FAILS if self.high < threshold else OPEN

    def below(self, threshold: float = 0.0) -> str:
        """Whether the mean is less."""
        return HOLDS if self.high < threshold else FAILS if self.low > threshold else OPEN

    @property
    def points(self) -> str:
        """A difference of shares, in words."""
        return f"{100 * self.mean:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"

    @property
    def percent(self) -> str:
        """A share, in words."""
        return f"{100 * self.mean:.0f}% ({100 * self.low:.0f} to {100 * self.high:.0f})"

    @property
    def number(self) -> str:
        """In words."""
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def over(values: Tensor) -> Interval:
    """The mean of `[sample]` or `[sample draw]`, and its interval over samples; NaN are left out.

    Of values that were paired before, as differences on the same pictures, the interval is of the paired difference.
    """
    found = bootstrap_intervals(values.double()[None], n_bootstrap=N_BOOTSTRAP, seed=0, confidence=CONFIDENCE)[0]
    return Interval(float(values.double().nanmean()), float(found[0]), float(found[1]))


def between(one: Tensor, other: Tensor) -> Interval:
    """Mean of some samples less that of others which are not theirs, each drawn anew alone; NaN are left out."""
    parts = [values[~values.isnan()].double().numpy() for values in (one, other)]
    if min(map(len, parts)) < 2:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(0)
    means = [np.array([part[rng.integers(len(part), size=len(part))].mean() for _ in range(N_BOOTSTRAP)])
             for part in parts]  # fmt: skip
    low, high = np.quantile(means[0] - means[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(parts[0].mean() - parts[1].mean()), float(low), float(high))


def both(*verdicts: str) -> str:
    """Of a finding with several parts: it holds where all do, and does not where one does not."""
    if not verdicts:
        return OPEN
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def counted(verdicts: list[str]) -> tuple[int, int, int]:
    """How many hold, do not, and are not decided."""
    return verdicts.count(HOLDS), verdicts.count(FAILS), verdicts.count(OPEN)
