"""Curves, overlaps, intervals and sums over data sets, from their definitions: loops, sets, whole runs of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from oracles.attribution import Explained


def insertion_curve(explained: Explained, order: Sequence[int], n_steps: int, target: int) -> list[float]:
    """The prediction with all active latents at zero but the first 0, 1, ..., n_steps of an order."""
    curve = []
    for step in range(n_steps + 1):
        back = set(order[:step])
        curve.append(float(explained.without([i for i in explained.active() if i not in back])[target]))
    return curve


def descending(values: dict[int, float]) -> list[int]:
    """Keys, the greatest value first, and of equal ones the lower key."""
    return sorted(values, key=lambda key: (-values[key], key))


def overlap(a: dict[int, float], b: dict[int, float], k: int) -> float:
    """How many of the k greatest of `b` are among the k greatest of `a`, over k; NaN where there are no more than k."""
    if len(a) <= k:
        return math.nan
    return len(set(descending(a)[:k]) & set(descending(b)[:k])) / k


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, by linear interpolation between the two nearest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def bootstrap(values: Sequence[Sequence[float]], n_bootstrap: int, seed: int, confidence: float) -> tuple[float, float]:
    """Ends of the percentile interval of the mean of `[sample value]`, samples drawn anew, NaN left out."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n_bootstrap):
        drawn = rng.integers(len(values), size=len(values))
        numbers = [value for sample in drawn for value in values[sample] if value == value]
        if numbers:
            means.append(math.fsum(numbers) / len(numbers))
    if not means:
        return math.nan, math.nan
    return quantile(means, (1 - confidence) / 2), quantile(means, (1 + confidence) / 2)


def aggregate(
    images: Sequence[dict[int, float]], d_sae: int, k: int
) -> tuple[list[float], list[float], list[int], list[int]]:
    """Mean, share, times in the top k and times active of each latent, over images `{active latent: attribution}`."""
    mean = [math.fsum(image.get(latent, 0.0) for image in images) / len(images) for latent in range(d_sae)]
    for_it = math.fsum(max(value, 0.0) for value in mean)
    share = [value / for_it for value in mean]
    n_top = [sum(latent in descending(image)[:k] for image in images) for latent in range(d_sae)]
    n_active = [sum(latent in image for image in images) for latent in range(d_sae)]
    return mean, share, n_top, n_active
