"""Is it the same noise in other data? How far the noise subspaces of subsets agree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.cuts import Cut
from clip_lens_ext.spectrum.invariance_result import SubgroupOverlap, overlap_result
from clip_lens_ext.spectrum.noise import split_noise
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.rules import Rule

_Group = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class SubgroupSplits:
    """The noise splits of several subsets, with those that `subgroup_overlap` needs for its baselines.

    Attributes:
        splits: of each subset, by name.
        halves: of each subset, pairs of splits of random halves of its rows.
        draws: of each subset, splits of bootstrap draws of its rows.
        seed: of the halves and the draws.
    """

    splits: dict[str, NoiseSplit]
    halves: dict[str, tuple[tuple[NoiseSplit, NoiseSplit], ...]]
    draws: dict[str, tuple[NoiseSplit, ...]]
    seed: int

    def __repr__(self) -> str:
        ranks = ", ".join(f"{name}: {split.rank}" for name, split in self.splits.items())
        return f"SubgroupSplits({len(self.splits)} subsets, noise dimensions {ranks})"


def split_subgroups(
    groups: Mapping[str, _Group],
    *,
    rule: str | Rule = "intersection",
    cut: str | int | Cut | None = None,
    n_halves: int = 3,
    n_bootstrap: int = 50,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> SubgroupSplits:
    """`split_noise` of each subset, of random halves of it, and of bootstrap draws of its rows.

    Args:
        groups: by name, rows `[n d]`, or a pair (image rows, text rows); two of one length are pairs and stay together.
        rule, cut, settings: as in `split_noise`.
        n_halves: random cuts into halves, for the ceiling.
        n_bootstrap: draws with replacement, for the intervals; 0: none.
        seed: of both.
        progress: draw a bar.

    Returns:
        `SubgroupSplits`, for `subgroup_overlap`.

    Raises:
        InputError: fewer than two subsets, one of fewer than four rows, or what `split_noise` raises.

    Warns:
        UserWarning: as `split_noise`, once for each subset as a whole.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> scale = torch.tensor([3.0] * 4 + [0.1] * 2)
        >>> groups = {name: torch.randn(500, 6, generator=generator) * scale for name in ("photos", "sketches")}
        >>> split_subgroups(groups, cut=2, n_bootstrap=10, progress=False)
        SubgroupSplits(2 subsets, noise dimensions photos: 2, sketches: 2)
    """
    if len(groups) < 2:
        raise InputError(f"an overlap is between subsets: pass two or more, got {len(groups)}")
    for name, value in (("n_halves", n_halves), ("n_bootstrap", n_bootstrap)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{name} is an integer, 0 or more; got {value!r}")
    given = {name: _rows(name, group) for name, group in groups.items()}
    same: dict[str, Any] = {"rule": rule, "cut": cut, "progress": False, **settings}
    splits = {name: split_noise(*rows, **same) for name, rows in given.items()}
    halves: dict[str, tuple[tuple[NoiseSplit, NoiseSplit], ...]] = {}
    draws: dict[str, tuple[NoiseSplit, ...]] = {}
    generator = torch.Generator().manual_seed(seed)
    total = len(given) * (2 * n_halves + n_bootstrap)
    with tqdm(total=total, desc="splits of halves and draws", unit="split", disable=not progress) as bar, \
            warnings.catch_warnings():  # fmt: skip
        warnings.simplefilter("ignore", UserWarning)  # the whole subset has warned already

        def split_of(rows: tuple[Tensor, ...]) -> NoiseSplit:
            found = split_noise(*rows, **same)
            bar.update()
            return found

        for name, rows in given.items():
            halves[name] = tuple((split_of(one), split_of(other)) for one, other in _halved(rows, n_halves, generator))
            draws[name] = tuple(split_of(drawn) for drawn in _drawn(rows, n_bootstrap, generator))
    return SubgroupSplits(splits, halves, draws, seed)


def subgroup_overlap(
    splits: SubgroupSplits | Mapping[str, NoiseSplit] | Sequence[NoiseSplit], *, confidence: float = 0.95
) -> SubgroupOverlap:
    """How far the noise subspaces of subsets agree, pair by pair.

    `overlap(g, h) = ||U_g' U_h||_F^2 / min(k_g, k_h)`, the mean squared cosine of the principal angles, in [0, 1]; by
    chance `max(k_g, k_h) / d`.

    Args:
        splits: from `split_subgroups`; or splits of your own, by name or in a list, which have no ceiling and no
            interval (NaN).
        confidence: of the bootstrap intervals.

    Returns:
        `SubgroupOverlap`.

    Raises:
        InputError: fewer than two splits, or splits of different spaces.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> scale = torch.tensor([3.0] * 4 + [0.1] * 2)
        >>> groups = {name: torch.randn(500, 6, generator=generator) * scale for name in ("photos", "sketches")}
        >>> found = subgroup_overlap(split_subgroups(groups, cut=2, n_bootstrap=10, progress=False))
        >>> bool(found.overlap[0, 1] > 0.99), round(float(found.by_chance[0, 1]), 3)
        (True, 0.333)
    """
    if isinstance(splits, SubgroupSplits):
        return overlap_result(splits.splits, splits.halves, splits.draws, confidence=confidence, seed=splits.seed)
    named = dict(splits) if isinstance(splits, Mapping) else {str(i): split for i, split in enumerate(splits)}
    return overlap_result(named, {}, {}, confidence=confidence, seed=None)


def _rows(name: str, group: _Group) -> tuple[Tensor, ...]:
    rows = group if isinstance(group, tuple) else (group,)
    if not 1 <= len(rows) <= 2 or not all(isinstance(one, Tensor) and one.dim() == 2 for one in rows):
        raise InputError(f"subset {name!r}: rows [n d], or a pair (image rows, text rows), are needed")
    if min(len(one) for one in rows) < 4:
        raise InputError(f"subset {name!r} has {min(len(one) for one in rows)} rows: at least four are needed")
    return rows


def _halved(
    rows: tuple[Tensor, ...], n: int, generator: torch.Generator
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    for _ in range(n):
        orders = _each(rows, lambda count: torch.randperm(count, generator=generator))
        cuts = [len(order) // 2 for order in orders]
        one = tuple(part[order[:cut]] for part, order, cut in zip(rows, orders, cuts, strict=True))
        other = tuple(part[order[cut:]] for part, order, cut in zip(rows, orders, cuts, strict=True))
        yield one, other


def _drawn(rows: tuple[Tensor, ...], n: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    for _ in range(n):
        orders = _each(rows, lambda count: torch.randint(count, (count,), generator=generator))
        yield tuple(part[order] for part, order in zip(rows, orders, strict=True))


def _each(rows: tuple[Tensor, ...], make: Any) -> list[Tensor]:
    """An order for each modality; pairs share one."""
    orders = [make(len(rows[0])).to(rows[0].device)]
    for part in rows[1:]:
        orders.append(orders[0].to(part.device) if len(part) == len(rows[0]) else make(len(part)).to(part.device))
    return orders
