"""Do some pictures fall into two groups, seen with what tells the pictures of other prompts apart?

Pictures differ most in what no prompt is about: colour, background, place. So they are looked at in the directions in
which the pictures of *other* prompts differ from one another and little within each (Fisher's discriminants), and how
much of their spread two means explain is compared with controls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.decomposition import PCA
from torch import Tensor

_N_COMPONENTS = 256
_RIDGE = 1e-2
_NO_DIFFERENCE = 1e-10
_MAX_ITERATIONS = 50


class Split(NamedTuple):
    """Two groups of pictures."""

    group: Tensor
    """0 for the larger group, 1 for the smaller one, `[picture]`."""
    separation: float
    """Share of the spread that the two means explain, in [0, 1]."""


def principal_components(latents: Tensor, *, seed: int) -> Tensor:
    """The first principal components of the pictures' latents, float64 `[picture component]`, at most 256.

    Discriminants need a matrix of features times features, which the latents are too many for, and most of them fire
    on next to none of the pictures.

    Args:
        latents: float64 `[picture d_sae]`.
        seed: of the randomised solver, which scikit-learn takes where there are many pictures and latents.
    """
    n = min(_N_COMPONENTS, *latents.shape)
    return torch.from_numpy(PCA(n, random_state=seed).fit_transform(latents.numpy()))


class Discriminants:
    """Directions that tell sets of pictures apart, with any of the sets left out.

    Args:
        features: float64 `[sample d]`.
        sets: numbers of the samples of each set, `[set n]`; a sample may be in several.
        n_dims: how many directions.
    """

    def __init__(self, features: Tensor, sets: Tensor, n_dims: int) -> None:
        self.features, self.n_dims = features, n_dims
        mean = features.mean(dim=0)
        self._within, self._between = [], []
        for numbers in sets:
            rows = features[numbers]
            own = rows.mean(dim=0)
            self._within.append((rows - own).T @ (rows - own) / len(rows))
            self._between.append(torch.outer(own - mean, own - mean))
        self._sums = torch.stack(self._within).sum(dim=0), torch.stack(self._between).sum(dim=0)

    def without(self, *left_out: int) -> Tensor:
        """The directions `[d n_dims]` of all sets but these; fewer where the sets do not differ in so many."""
        n = len(self._within) - len(set(left_out))
        within, between = self._sums
        for i in set(left_out):
            within, between = within - self._within[i], between - self._between[i]
        within, between = within / n, between / n
        # Without it, directions in which pictures hardly differ at all would count most.
        ridge = max(_RIDGE * float(within.diagonal().mean()), 1e-300)
        root = torch.linalg.cholesky(within + ridge * torch.eye(len(within), dtype=within.dtype))
        whiten = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=False)
        values, directions = torch.linalg.eigh(whiten @ between @ whiten.T)
        # Sets of the same pictures differ in nothing: a direction of rounding errors would be as good as any other.
        kept = max(len(values) - self.n_dims, int((values <= _NO_DIFFERENCE * values[-1]).sum()))
        return whiten.T @ directions[:, kept:]


def split_in_two(points: Tensor, *, seed: int, n_init: int = 8) -> Split:
    """2-means of points `[picture dim]`, the best of some random starts.

    `separation = 1 - sum_x |x - c(x)|^2 / sum_x |x - mean|^2`, where `c(x)` is the nearer of the two means.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = float((points - points.mean(dim=0)).square().sum())
    best, group = spread, torch.zeros(len(points), dtype=torch.int64)
    for _ in range(n_init if spread > 0 else 0):
        centres = points[torch.randperm(len(points), generator=generator)[:2]]
        for _ in range(_MAX_ITERATIONS):
            nearest = torch.cdist(points, centres).argmin(dim=1)
            if len(nearest.unique()) < 2:
                break
            moved = torch.stack([points[nearest == number].mean(dim=0) for number in (0, 1)])
            if torch.equal(moved, centres):
                break
            centres = moved
        rest = float(torch.cdist(points, centres).amin(dim=1).square().sum())
        if rest < best:
            best, group = rest, torch.cdist(points, centres).argmin(dim=1)
    if 2 * int(group.sum()) > len(group):
        group = 1 - group
    return Split(group, 1 - best / spread if spread > 0 else 0.0)


def welch_t(first: Tensor, second: Tensor) -> Tensor:
    """Welch's t of `second` less `first`, `[column]` from two `[sample column]`; 0 where neither varies nor differs."""
    if min(len(first), len(second)) < 2:
        return torch.zeros(first.shape[1], dtype=first.dtype)
    difference = second.mean(dim=0) - first.mean(dim=0)
    error = (first.var(dim=0) / len(first) + second.var(dim=0) / len(second)).sqrt()
    return torch.where(difference == 0, 0.0, difference / error.clamp(min=1e-12))


def purity(group: Tensor, source: Tensor) -> float:
    """Share of pictures whose group is their source's, for the better of the two ways to pair them; 0.5 is chance."""
    same = float((group == source).double().mean())
    return max(same, 1 - same)
