"""Covariances by two passes of exact sums, the Marchenko-Pastur law by its density; no import of the package."""

from __future__ import annotations

import math

import numpy as np


def two_passes(rows, correction=1):
    """Mean and covariance of a list of rows, every sum by `math.fsum`."""
    n, d = len(rows), len(rows[0])
    mean = [math.fsum(row[j] for row in rows) / n for j in range(d)]
    away = [[row[j] - mean[j] for j in range(d)] for row in rows]
    covariance = [[math.fsum(row[i] * row[j] for row in away) / (n - correction) for j in range(d)] for i in range(d)]
    return mean, covariance


def marchenko_pastur_share_below(value, ratio, steps=200_000):
    """Share of the law below a value, by the midpoint rule on its density."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    width = (value - low) / steps
    x = low + width * (np.arange(steps) + 0.5)
    return float(np.sum(np.sqrt((high - x) * (x - low)) / (2 * math.pi * ratio * x)) * width)


def projector(basis):
    """`U U'` by outer products of the columns."""
    found = np.zeros((len(basis), len(basis)))
    for column in np.asarray(basis, dtype=float).T:
        found += np.outer(column, column)
    return found


def mean_squared_cosine(first, second):
    """Trace of the product of the two projectors over the smaller dimension."""
    return float(np.trace(projector(first) @ projector(second))) / min(first.shape[1], second.shape[1])


def planted(n, *, d, rank, noise, seed, rotation_seed=0, gap=0.0, n_text=None, strength=None, loud=1.0, own=0):
    """Image rows and text rows with `rank` shared directions of signal, and the basis of the rest, all rotated.

    `strength` are the signals' standard deviations (3 to 1), `noise` that of the noise, one number or `d`; texts are
    `loud` times as large; `own` of the noise directions are signal of unit strength in the images alone, and no part
    of the basis.
    """
    turn = np.linalg.qr(np.random.default_rng(rotation_seed).normal(size=(d, d)))[0]
    rng = np.random.default_rng(seed)
    strong = np.zeros(d)
    strong[:rank] = np.linspace(3, 1, rank) if strength is None else strength
    shared = rng.normal(size=(n, d)) * strong
    text = shared[: n_text or n] + noise * rng.normal(size=(n_text or n, d))
    image = shared + noise * rng.normal(size=(n, d))
    image[:, rank : rank + own] += rng.normal(size=(n, own))
    direction = turn[:, -1] * gap / 2
    return image @ turn.T + direction, loud * text @ turn.T - direction, turn[:, rank + own :]
