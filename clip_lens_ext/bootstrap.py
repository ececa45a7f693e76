"""How far a mean over images would move with other images: percentile intervals of the bootstrap.

The images are drawn anew, with replacement, `n_bootstrap` times, and every row of a table sees the same draws, so that
differences of rows are paired. An interval says how much the mean depends on which images these were; it says nothing
of images of another kind.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bootstrap_intervals(values: Tensor, *, n_bootstrap: int, seed: int, confidence: float) -> Tensor:
    """The interval of each row's mean, float64 `[row 2]`.

    Args:
        values: `[row sample ...]`; NaN are left out of the means, and a sample goes with all its values.
        n_bootstrap: draws. The draw `b` is the `b`-th `integers(n, size=n)` of numpy's `default_rng(seed)`.
        seed: of the draws.
        confidence: of the interval, in 0..1: from the quantile `(1 - confidence) / 2` to that above it.

    Returns:
        Lower and upper end; NaN where there is one sample, whose drawing anew says nothing, or no value.

    Example:
        >>> values = torch.arange(20.0)[None]
        >>> low, high = bootstrap_intervals(values, n_bootstrap=200, seed=0, confidence=0.95)[0].tolist()
        >>> low < 9.5 < high
        True
    """
    n_row, n_sample = values.shape[:2]
    if n_sample < 2:
        return torch.full((n_row, 2), torch.nan, dtype=torch.float64)
    plain = values.detach().double().cpu().reshape(n_row, n_sample, -1)
    total, count = plain.nansum(dim=-1).numpy(), (~plain.isnan()).sum(dim=-1).numpy()
    rng = np.random.default_rng(seed)
    means = np.empty((n_bootstrap, n_row))
    for draw in range(n_bootstrap):
        times = np.bincount(rng.integers(n_sample, size=n_sample), minlength=n_sample)
        drawn = count @ times
        means[draw] = np.where(drawn > 0, total @ times / np.maximum(drawn, 1), np.nan)
    found = np.full((2, n_row), np.nan)
    known = ~np.isnan(means).all(axis=0)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    found[:, known] = np.nanquantile(means[:, known], ends, axis=0)
    return torch.from_numpy(found.T.copy())
