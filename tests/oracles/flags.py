"""Flags' numbers by loops from their formulas; it imports nothing of the package."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch


def paired(before, after):
    """Mean difference of pairs, and its standard error."""
    difference = [b - a for a, b in zip(before, after, strict=True)]
    n = len(difference)
    middle = math.fsum(difference) / n
    variance = math.fsum((one - middle) ** 2 for one in difference) / (n - 1)
    return middle, math.sqrt(variance / n)


def welch(first, second):
    means, errors = [], []
    for values in (first, second):
        middle = math.fsum(values) / len(values)
        means.append(middle)
        errors.append(math.fsum((one - middle) ** 2 for one in values) / (len(values) - 1) / len(values))
    return (means[1] - means[0]) / math.sqrt(sum(errors))


def squares(points):
    """Sum of squared distances to the mean."""
    n = len(points)
    middle = [math.fsum(column) / n for column in zip(*points, strict=True)]
    return math.fsum((x - m) ** 2 for point in points for x, m in zip(point, middle, strict=True))


def best_separation(points):
    """The greatest share of the spread that any partition into two explains: all partitions are tried."""
    whole, best = squares(points), math.inf
    for side in itertools.product((0, 1), repeat=len(points) - 1):
        groups = [[point for point, own in zip(points, (0, *side), strict=True) if own == number] for number in (0, 1)]
        if all(groups):
            best = min(best, sum(map(squares, groups)))
    return 1 - best / whole


def rank(values, value):
    """Place of a value among others in [0, 1], equal ones at their mean place."""
    below = sum(other < value for other in values)
    equal = sum(other == value for other in values)
    return (below + (equal - 1) / 2) / (len(values) - 1)


def ring_mean(rows, box):
    """Mean of the pixels that touch a box from outside, corners among them."""
    left, top, right, bottom = box
    around = [
        rows[y][x]
        for y in range(max(top - 1, 0), min(bottom + 1, len(rows)))
        for x in range(max(left - 1, 0), min(right + 1, len(rows[0])))
        if not (left <= x < right and top <= y < bottom)
    ]
    return math.fsum(around) / len(around)


def crop(rows, x, y, size):
    """A part of a picture of one channel, enlarged: every pixel from the four old ones around its own middle."""
    height, width = len(rows), len(rows[0])
    middle = [min(max(value, size / 2), 1 - size / 2) for value in (x, y)]

    def place(number, n, centre):
        """Of a new pixel among the old ones: at least half a pixel inside of the part."""
        found = (number + 0.5) / n * size + centre - size / 2
        reach = max(size / 2 - 0.5 / n, 0.0)
        return min(max(found, centre - reach), centre + reach) * n - 0.5

    def value(column, row):
        column, row = min(max(column, 0.0), width - 1.0), min(max(row, 0.0), height - 1.0)
        left, top = min(int(column), width - 2), min(int(row), height - 2)
        a, b = column - left, row - top
        upper = (1 - a) * rows[top][left] + a * rows[top][left + 1]
        lower = (1 - a) * rows[top + 1][left] + a * rows[top + 1][left + 1]
        return (1 - b) * upper + b * lower

    return [
        [value(place(i, width, middle[0]), place(j, height, middle[1])) for i in range(width)] for j in range(height)
    ]


def auroc(inside: list[float], outside: list[float]) -> float:
    """Share of the pairs in which the one inside is the greater; a tie counts half."""
    won = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one in inside for other in outside)
    return won / (len(inside) * len(outside))


def bimodality(points: np.ndarray, group: np.ndarray, within: np.ndarray, seed: int, n_splits: int) -> float:
    """Fisher's line of one half; of the other half the share of the spread that the best cut of it explains."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(n_splits):
        order = torch.randperm(len(points), generator=generator).numpy()
        middle = (len(points) + 1) // 2
        for own, others in ((order[:middle], order[middle:]), (order[middle:], order[:middle])):
            if min((group[own] == 0).sum(), (group[own] == 1).sum()) < 2:
                continue
            sides = [points[own][group[own] == number].mean(axis=0) for number in (0, 1)]
            values = sorted(float(row @ np.linalg.inv(within) @ (sides[1] - sides[0])) for row in points[others])
            rest = min(squares([[v] for v in values[:cut]]) + squares([[v] for v in values[cut:]])
                       for cut in range(1, len(values)))  # fmt: skip
            found.append(1 - rest / squares([[v] for v in values]))
    return sum(found) / len(found) if found else math.nan
