"""Rank correlation over the latents of one sample and target."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors `[n]`, ties averaged; NaN where one of them is constant or n < 2.

    Example:
        >>> import torch
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
        0.5
    """
    first, second = (rankdata(v.detach().double().cpu().numpy()) for v in (a, b))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return round(float(np.corrcoef(first, second)[0, 1]), 12)
