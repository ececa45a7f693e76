"""Do some pictures fall into two groups, seen with what tells the pictures of other prompts apart?

Pictures differ most in what no prompt is about: colour, background, place. So they are looked at in the directions in
which the pictures of *other* prompts differ from one another and little within each (Fisher's discriminants), and how
much of their spread two means explain is compared with controls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from torch import Tensor

_N_COMPONENTS = 256
_COLUMNS = 4096  # of ranks that are held at once
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
        within, between = self._scatter(*left_out)
        root = torch.linalg.cholesky(within)
        whiten = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=False)
        values, directions = torch.linalg.eigh(whiten @ between @ whiten.T)
        # Sets of the same pictures differ in nothing: a direction of rounding errors would be as good as any other.
        kept = max(len(values) - self.n_dims, int((values <= _NO_DIFFERENCE * values[-1]).sum()))
        return whiten.T @ directions[:, kept:]

    def within(self, *left_out: int) -> Tensor:
        """How the pictures of one set differ, in the mean of all sets but these, `[d d]`; it has an inverse."""
        return self._scatter(*left_out)[0]

    def _scatter(self, *left_out: int) -> tuple[Tensor, Tensor]:
        n = len(self._within) - len(set(left_out))
        within, between = self._sums
        for i in set(left_out):
            within, between = within - self._within[i], between - self._between[i]
        # Without the ridge, directions in which pictures hardly differ at all would count most.
        ridge = max(_RIDGE * float(within.diagonal().mean()) / n, 1e-300)
        return within / n + ridge * torch.eye(len(within), dtype=within.dtype), between / n


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


def bimodality(points: Tensor, group: Tensor, within: Tensor, *, seed: int, n_splits: int = 8) -> float:
    """Do new points fall on two sides of the line between the groups, or is the line one through a single cloud?

    Half of the points give Fisher's line between the groups, `within^-1 (c_1 - c_0)`; of the *others*, which had no
    part in it, it is measured how much of the spread along that line two means explain. The mean over random halves,
    each used both ways. 1 for two points, 3/4 for a uniform cloud, 2/pi = 0.64 for a normal one.

    Args:
        points: `[picture dim]`.
        group: 0 or 1 of each, as `split_in_two` gives them.
        within: how pictures of one thing differ, `[dim dim]`.
        seed: of the halves.
        n_splits: random halves.

    Returns:
        In [0, 1]; NaN where no half has two pictures of each group, which says nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n_splits):
        order = torch.randperm(len(points), generator=generator)
        for own, others in (order.tensor_split(2), order.tensor_split(2)[::-1]):
            sides = [points[own][group[own] == number] for number in (0, 1)]
            if min(map(len, sides)) >= 2:
                line = torch.linalg.solve(within, sides[1].mean(dim=0) - sides[0].mean(dim=0))
                found.append(_two_means_of_a_line(points[others] @ line))
    return sum(found) / len(found) if found else float("nan")


def _two_means_of_a_line(values: Tensor) -> float:
    """The share of the spread of some numbers that the best two means explain: the best cut of the sorted numbers."""
    values = values.sort().values - values.mean()
    spread = float(values.square().sum())
    n_left = torch.arange(1, len(values), dtype=values.dtype)
    left = values.cumsum(0)[:-1]
    explained = left.square() / n_left + left.square() / (len(values) - n_left)
    return float(explained.max()) / spread if spread > 0 else 0.0


def welch_t(first: Tensor, second: Tensor) -> Tensor:
    """Welch's t of `second` less `first`, `[column]` from two `[sample column]`; 0 where neither varies nor differs."""
    if min(len(first), len(second)) < 2:
        return torch.zeros(first.shape[1], dtype=first.dtype)
    difference = second.mean(dim=0) - first.mean(dim=0)
    error = (first.var(dim=0) / len(first) + second.var(dim=0) / len(second)).sqrt()
    return torch.where(difference == 0, 0.0, difference / error.clamp(min=1e-12))


def auroc(latents: Tensor, sets: Tensor) -> Tensor:
    """How well each latent tells the pictures of each set from all others, `[set d_sae]`: 0.5 is chance.

    The area under the ROC curve: the probability that it is more active on a picture of the set than on one that is
    not, where a tie counts half. NaN for a set of none or all of the pictures.

    Args:
        latents: `[picture d_sae]`.
        sets: bool `[set picture]`.
    """
    inside = sets.double()
    n = inside.sum(dim=1, keepdim=True)
    found = []
    for columns in latents.split(_COLUMNS, dim=1):
        ranks = torch.from_numpy(rankdata(columns.numpy(), axis=0))
        found.append((inside @ ranks - n * (n + 1) / 2) / (n * (len(latents) - n)))
    return torch.cat(found, dim=1)


def purity(group: Tensor, source: Tensor) -> float:
    """Share of pictures whose group is their source's, for the better of the two ways to pair them; 0.5 is chance."""
    same = float((group == source).double().mean())
    return max(same, 1 - same)
