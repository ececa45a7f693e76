"""Two orders of the same latents: rank correlation, and how much of their tops they share."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors `[n]`, ties averaged; NaN where one of them is constant or n < 2.

    Example:
        >>> import torch
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
        0.5
    """
    return float(spearman_columns(a[:, None], b[:, None])[0])


def spearman_columns(a: Tensor, b: Tensor) -> Tensor:
    """`spearman` of each column of `[n column]` with the same column of the other, float64 `[column]`."""
    if len(a) < 2:
        return torch.full((a.shape[1],), torch.nan, dtype=torch.float64)
    first, second = (torch.from_numpy(rankdata(v.detach().double().cpu().numpy(), axis=0)) for v in (a, b))
    first, second = (ranks - ranks.mean(dim=0) for ranks in (first, second))
    size = first.square().sum(dim=0).sqrt() * second.square().sum(dim=0).sqrt()
    found = (first * second).sum(dim=0) / size  # 0/0 where a column is constant
    return torch.round(found, decimals=12)


def top_overlap(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Share of the `k` greatest of `b` that are among the `k` greatest of `a`, by column, float64 `[column]`.

    Args:
        a, b: `[n column]`; of equal values the first are the greater.
        k: how many. NaN where there are no more than `k`: all of them are in both, which says nothing.

    Example:
        >>> import torch
        >>> top_overlap(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1.0], [2.0], [3.0]]), 2)
        tensor([0.5000], dtype=torch.float64)
    """
    if len(a) <= k:
        return torch.full((a.shape[1],), torch.nan, dtype=torch.float64)
    chosen = []
    for values in (a, b):
        order = values.argsort(dim=0, descending=True, stable=True)[:k]
        chosen.append(torch.zeros_like(values, dtype=torch.bool).scatter_(0, order, True))
    return (chosen[0] & chosen[1]).sum(dim=0).double().cpu() / k
