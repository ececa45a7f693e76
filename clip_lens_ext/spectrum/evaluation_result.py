"""How well a model does with its noise pruned, beside every control, and what follows from the intervals."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import load_result, save_result

NONE, NOISE, RANDOM = "none", "noise", "random"
TOP, LOWEST, PROJECTOR = "top variance", "lowest variance", "projector weights"
PRUNED = (NONE, NOISE, RANDOM, TOP, LOWEST, PROJECTOR)


@dataclass(frozen=True, eq=False)
class PruningEvaluation:
    """Scores with nothing pruned, with the noise pruned, and with each control of as many dimensions.

    Every score is a share of samples that come out right, in 0..1, higher is better. Tables are float64
    `[rank pruned measure]`, NaN where a control does not exist (`left_out` says why).

    Attributes:
        measures: `"zero-shot top-1"`, `"image to text R@1"`, `"kNN"`, `"linear probe"`, ..., as far as the data go.
        pruned: what is pruned in each row: `"none"`, `"noise"`, and the controls.
        ranks: dimensions that are pruned, of each split.
        score: share that is right; of random subspaces the mean over the draws.
        interval: of `score`, by bootstrap over the samples, `[rank pruned measure 2]`.
        difference: score of the noise less that of the row, on the same samples: positive where pruning the noise does
            better.
        difference_interval: of `difference`, `[rank pruned measure 2]`.
        draws: score of each random subspace, `[rank draw measure]`.
        n: samples of each measure.
        d: dimension of the space.
        left_out: controls and measures that do not exist here, and why.
        skipped: names of pictures that could not be read.
        n_bootstrap, confidence, seed: of the intervals and the random subspaces.
        settings: rule and cut of each split, its hook, neighbours and the probe's penalty.
        provenance: model, data fingerprint, versions.
    """

    measures: tuple[str, ...]
    pruned: tuple[str, ...]
    ranks: tuple[int, ...]
    score: Tensor
    interval: Tensor
    difference: Tensor
    difference_interval: Tensor
    draws: Tensor
    n: tuple[int, ...]
    d: int
    left_out: dict[str, str]
    skipped: tuple[str, ...]
    n_bootstrap: int
    confidence: float
    seed: int
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """A row for each rank, pruning and measure."""
        rows = []
        for i, rank in enumerate(self.ranks):
            for j, pruned in enumerate(self.pruned):
                for k, measure in enumerate(self.measures):
                    low, high = self.interval[i, j, k].tolist()
                    less, more = self.difference_interval[i, j, k].tolist()
                    rows.append({
                        "rank": 0 if pruned == NONE else rank, "of_rank": rank, "pruned": pruned, "measure": measure,
                        "score": float(self.score[i, j, k]), "low": low, "high": high,
                        "noise_minus_this": float(self.difference[i, j, k]), "difference_low": less,
                        "difference_high": more, "n": self.n[k],
                    })  # fmt: skip
        return pd.DataFrame(rows)

    def verdict(self, *, margin: float = 0.01) -> str:
        """What the intervals say of each measure at each rank, in words.

        - Against nothing pruned: *helps* or *costs* where the interval of the difference lies on one side of zero;
          *harmless* where it lies above `-margin`; *not decided* where it is too wide for either.
        - Against random dimensions: *better* where the interval lies above zero and no draw does as well.
        - Against the lowest variance: *does just as well* where the interval lies within the margin, and *not told
          apart* where it is wider and has zero in it: then nothing here speaks for the noise beyond its variance.

        An end of the bootstrap's interval at zero says that no sample was seen to change that way, and not that none
        would: of `n` samples it is moved to `1 - (1 - confidence) ** (1 / n)`, which is 3 / n for 95 %. So fewer than
        299 samples cannot show anything to be harmless within a point.

        Args:
            margin: how much loss, as a share of samples, counts as none.

        Raises:
            InputError: the margin is negative.
        """
        if margin < 0:
            raise InputError(f"margin is a share of samples, 0 or more; got {margin}")
        lines = []
        for i, rank in enumerate(self.ranks):
            for k, measure in enumerate(self.measures):
                parts = [
                    self._against_none(i, k, margin),
                    self._against_random(i, k),
                    self._against_lowest(i, k, margin),
                ]
                lines.append(f"{rank} of {self.d} dimensions pruned, {measure}: " + " ".join(p for p in parts if p))
        return "\n".join(lines)

    def _ends(self, i: int, j: int, k: int) -> tuple[float, float]:
        """The interval of a difference, with the rule of three for the side on which no sample changed."""
        low, high = self.difference_interval[i, j, k].tolist()
        unseen = 1 - (1 - self.confidence) ** (1 / self.n[k])
        return -unseen if low == 0 else low, unseen if high == 0 else high

    def summary(self) -> str:
        """The verdict, with what was left out."""
        left = [f"No {name}: {why}." for name, why in self.left_out.items()]
        skipped = [f"{len(self.skipped)} pictures could not be read and are left out."] if self.skipped else []
        return "\n".join([self.verdict(), *left, *skipped])

    def _against_none(self, i: int, k: int, margin: float) -> str:
        j = self.pruned.index(NONE)
        low, high = self._ends(i, j, k)
        found = _points(float(self.difference[i, j, k]), low, high)
        if low != low:
            return f"{found} against nothing pruned, with no interval for one sample."
        if low > 0:
            return f"pruning the noise helps, {found}."
        if high < 0:
            small = low >= -margin
            return f"pruning the noise costs {'little' if small else 'something'}, {found}."
        if low >= -margin:
            return f"pruning the noise is harmless within {_size(margin)}, {found}."
        return f"whether pruning the noise is harmless within {_size(margin)} is not decided, {found}."

    def _against_random(self, i: int, k: int) -> str:
        if RANDOM not in self.pruned:
            return ""
        j = self.pruned.index(RANDOM)
        low, high = self._ends(i, j, k)
        found = _points(float(self.difference[i, j, k]), low, high)
        own = float(self.score[i, self.pruned.index(NOISE), k])
        as_good = int((self.draws[i, :, k] >= own).sum())
        if low > 0 and as_good == 0:
            return f"It is better than pruning as many random dimensions, {found}."
        if high < 0:
            return f"It is worse than pruning as many random dimensions, {found}."
        of_draws = f"{as_good} of {self.draws.shape[1]} draws do at least as well"
        return f"Random dimensions are not shown to be worse ({of_draws}), {found}."

    def _against_lowest(self, i: int, k: int, margin: float) -> str:
        if LOWEST not in self.pruned:
            return ""
        j = self.pruned.index(LOWEST)
        low, high = self._ends(i, j, k)
        found = _points(float(self.difference[i, j, k]), low, high)
        if low > 0:
            return f"It is better than pruning the dimensions of lowest variance, {found}."
        if high < 0:
            return f"Pruning the dimensions of lowest variance does better, {found}."
        if -margin <= low and high <= margin:
            return f"Pruning the dimensions of lowest variance does just as well, {found}."
        return f"It is not told apart from pruning the dimensions of lowest variance, {found}."

    def __repr__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"PruningEvaluation({ranks} of {self.d} dimensions; {', '.join(self.measures)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningEvaluation:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        shape = (len(self.ranks), len(self.pruned), len(self.measures))
        return self.score.shape == self.difference.shape == shape and len(self.n) == len(self.measures)


def _points(value: float, low: float, high: float) -> str:
    """A difference in points of a hundred samples, with its interval."""
    ends = "" if low != low else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * value:+.1f} points{ends}"


def _size(margin: float) -> str:
    """A margin in points of a hundred samples."""
    return "1 point" if margin == 0.01 else f"{100 * margin:g} points"
