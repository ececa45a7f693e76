"""Jaccard overlap of the words or pictures of features: counted where two have one in common, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

_BLOCK = 256  # rows at a time: early in training one word may be among the words of every feature


class Sets:
    """A set of numbers for each feature.

    Args:
        numbers: `[feature k]`, each once in its row; -1 where there are fewer.
        n: how many numbers there are: they are 0 to `n - 1`.
    """

    def __init__(self, numbers: Tensor, n: int) -> None:
        self.numbers, self.n = numbers, n
        filled = numbers >= 0
        self.size = filled.sum(dim=1)
        indptr = np.concatenate([[0], self.size.cumsum(0).numpy()])
        shape = (len(numbers), max(n, 1))
        self.members = sparse.csr_array((np.ones(int(self.size.sum())), numbers[filled].numpy(), indptr), shape=shape)

    def jaccard(self, other: Sets) -> Iterator[tuple[int, sparse.coo_array]]:
        """`|A_i and B_j| / |A_i or B_j|` where it is above 0, `[feature feature]`, some rows at a time.

        Yields:
            The number of the first row, and the rows.
        """
        mine, others = self.size.numpy(), other.size.numpy()
        for start in range(0, len(mine), _BLOCK):
            common = (self.members[start : start + _BLOCK] @ other.members.T).tocoo()
            union = mine[start + common.row] + others[common.col] - common.data
            yield start, sparse.coo_array((common.data / union, (common.row, common.col)), shape=common.shape)

    def own(self, other: Sets) -> Tensor:
        """Each feature's overlap with the same feature's other set, float64 `[feature]`; NaN where one is empty."""
        common = torch.from_numpy(np.asarray((self.members * other.members).sum(axis=1), dtype=np.float64))
        found = common / (self.size + other.size - common)
        return torch.where((self.size > 0) & (other.size > 0), found, torch.nan)

    def with_others(self, other: Sets) -> Tensor:
        """The mean overlap with the other sets of all other features that have one, float64 `[feature]`.

        NaN where the own set is empty, or no other feature has one.
        """
        total = torch.zeros(len(self.size), dtype=torch.float64)
        for start, rows in self.jaccard(other):
            apart = rows.row + start != rows.col
            total.index_add_(
                0, torch.from_numpy(rows.row[apart].astype(np.int64) + start), torch.from_numpy(rows.data[apart])
            )
        n = int((other.size > 0).sum()) - (other.size > 0).long()
        return torch.where((self.size > 0) & (n > 0), total / n, torch.nan)

    def nearest_pairs(self, least: float, n_min: int) -> dict[tuple[int, int], float]:
        """Pairs of features that are each other's nearest, with their overlap.

        No third feature overlaps more with either of the two; several may overlap as much.

        Args:
            least: overlap that a pair has at least, above 0.
            n_min: members that both have at least; others take no part.
        """
        part = Sets(torch.where((self.size >= n_min)[:, None], self.numbers, -1), self.n)
        greatest = np.zeros(len(self.size))
        found: list[tuple[int, int, float]] = []
        for start, rows in part.jaccard(part):
            apart = rows.row + start != rows.col
            row, column, value = rows.row[apart] + start, rows.col[apart], rows.data[apart]
            np.maximum.at(greatest, row, value)
            close = (value >= least) & (value >= greatest[row])
            found += zip(row[close].tolist(), column[close].tolist(), value[close].tolist(), strict=True)
        # Overlaps are quotients of the same two counts both ways round, so equal ones are equal to the bit.
        return {(one, two): value for one, two, value in found if one < two and value == greatest[one] == greatest[two]}
