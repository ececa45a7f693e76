"""The overlap of the noise subspaces of subsets, with its floor, its ceiling and its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.subspaces import overlap, overlap_by_chance, principal_angles

_Halves = Mapping[str, tuple[tuple[NoiseSplit, NoiseSplit], ...]]
_Draws = Mapping[str, tuple[NoiseSplit, ...]]


@dataclass(frozen=True, eq=False)
class SubgroupOverlap:
    """How far noise subspaces agree; every table is float64 `[subset subset]`, symmetric.

    Attributes:
        names: of the subsets.
        ranks: dimension of the noise of each, `[subset]`.
        d: dimension of the space.
        overlap: `||U_g' U_h||_F^2 / min(k_g, k_h)` in [0, 1]; NaN where one is empty.
        by_chance: its mean for random (Haar) subspaces, `max(k_g, k_h) / d`: the floor.
        split_half: the overlap of the noise of two random halves of one subset, mean over halves and over `g` and `h`:
            the ceiling that the number of rows leaves. Halves have half of the rows, so the pair may lie above it.
        interval: basic bootstrap interval of the overlap, `[subset subset 2]`: NaN where there are no draws. Few rows
            make an overlap too small, and the interval takes that off: it may lie above the overlap itself.
        angles: principal angles in radians, smallest first, `[subset subset angle]`, NaN beyond `min(k_g, k_h)`.
        n_undefined: bootstrap pairs without an overlap, because a draw had no noise.
        confidence, seed: of the interval.
    """

    names: tuple[str, ...]
    ranks: Tensor
    d: int
    overlap: Tensor
    by_chance: Tensor
    split_half: Tensor
    interval: Tensor
    angles: Tensor
    n_undefined: int
    confidence: float
    seed: int | None

    @property
    def excess(self) -> Tensor:
        """Overlap beyond chance, `[subset subset]`."""
        return self.overlap - self.by_chance

    def to_frame(self) -> pd.DataFrame:
        """A row for each pair of different subsets; angles in degrees."""
        rows = []
        for g, h in combinations(range(len(self.names)), 2):
            angles = self.angles[g, h][~self.angles[g, h].isnan()].rad2deg()
            low, high = self.interval[g, h].tolist()
            rows.append({
                "first": self.names[g], "second": self.names[h], "rank_first": int(self.ranks[g]),
                "rank_second": int(self.ranks[h]), "overlap": float(self.overlap[g, h]), "low": low, "high": high,
                "by_chance": float(self.by_chance[g, h]), "split_half": float(self.split_half[g, h]),
                "median_angle": float(angles.quantile(0.5)) if len(angles) else float("nan"),
                "greatest_angle": float(angles.max()) if len(angles) else float("nan"),
            })  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"SubgroupOverlap({', '.join(self.names)}; d={self.d})"


def overlap_result(
    splits: Mapping[str, NoiseSplit], halves: _Halves, draws: _Draws, *, confidence: float, seed: int | None
) -> SubgroupOverlap:
    """Everything that the splits of subsets, of their halves and of their draws say."""
    names = tuple(splits)
    if len(names) < 2:
        raise InputError(f"an overlap is between subsets: pass two or more, got {len(names)}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is in (0, 1), got {confidence}")
    widths = {name: split.d for name, split in splits.items()}
    d = widths[names[0]]
    other = [name for name in names if widths[name] != d]
    if other:
        raise InputError(f"{names[0]!r} is a split of {d} dimensions and {other[0]!r} one of {widths[other[0]]}")
    bases = [splits[name].basis for name in names]
    ranks = torch.tensor([basis.shape[1] for basis in bases])
    n = len(names)
    found, chance, ceiling = (torch.full((n, n), torch.nan, dtype=torch.float64) for _ in range(3))
    interval = torch.full((n, n, 2), torch.nan, dtype=torch.float64)
    angles = torch.full((n, n, int(ranks.max())), torch.nan, dtype=torch.float64)
    own = [_split_half(halves.get(name, ())) for name in names]
    n_undefined = 0
    for g, h in product(range(n), repeat=2):
        found[g, h] = overlap(bases[g], bases[h])
        chance[g, h] = overlap_by_chance(int(ranks[g]), int(ranks[h]), d)
        ceiling[g, h] = (own[g] + own[h]) / 2
        angle = principal_angles(bases[g], bases[h]).angle
        angles[g, h, : len(angle)] = angle
        if g < h:
            ends, missing = _interval(float(found[g, h]), draws.get(names[g], ()), draws.get(names[h], ()), confidence)
            interval[g, h] = interval[h, g] = ends
            n_undefined += missing
    return SubgroupOverlap(names, ranks, d, found, chance, ceiling, interval, angles, n_undefined, confidence, seed)


def _split_half(halves: tuple[tuple[NoiseSplit, NoiseSplit], ...]) -> float:
    found = [overlap(one.basis, other.basis) for one, other in halves]
    return float(torch.tensor(found, dtype=torch.float64).nanmean()) if found else float("nan")


def _interval(
    observed: float, first: tuple[NoiseSplit, ...], second: tuple[NoiseSplit, ...], confidence: float
) -> tuple[Tensor, int]:
    """The basic bootstrap interval: a draw doubles the noise of a subspace, and lies as far below as that is above."""
    found = torch.tensor([overlap(a.basis, b.basis) for a, b in zip(first, second, strict=True)], dtype=torch.float64)
    known = found[~found.isnan()]
    if len(known) < 2 or observed != observed:
        return torch.full((2,), torch.nan, dtype=torch.float64), len(found) - len(known)
    ends = known.quantile(torch.tensor([(1 + confidence) / 2, (1 - confidence) / 2], dtype=torch.float64))
    return (2 * observed - ends).clamp(0, 1), len(found) - len(known)
