"""What the eigenvalues of a covariance of pure noise look like: the laws of Marchenko and Pastur, and of Wachter."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import gamma as gamma_distribution

from clip_lens_ext.errors import InputError


def marchenko_pastur_edges(ratio: float, *, variance: float = 1.0) -> tuple[float, float]:
    """Between which values the eigenvalues of a noise covariance lie: `s^2 (1 -+ sqrt(p/n))^2`.

    Args:
        ratio: `p / n`, dimensions over rows. Beyond 1 the covariance also has the eigenvalue 0.
        variance: `s^2`, of each coordinate.

    Example:
        >>> marchenko_pastur_edges(0.25)
        (0.25, 2.25)

    Reference:
        Marchenko and Pastur (1967), Distribution of eigenvalues for some sets of random matrices.
    """
    root = math.sqrt(_checked(ratio))
    return variance * (1 - root) ** 2, variance * (1 + root) ** 2


@lru_cache(maxsize=1024)
def marchenko_pastur_median(ratio: float) -> float:
    """The median of the Marchenko-Pastur law with unit variance, for `ratio = p / n` in (0, 1].

    Example:
        >>> round(marchenko_pastur_median(1.0), 4)
        0.6528
    """
    if not 0 < ratio <= 1:
        raise InputError(f"the median is taken for a ratio in (0, 1], got {ratio}: turn rows and dimensions around")
    low, high = marchenko_pastur_edges(ratio)
    # x = middle + half cos(theta) takes the square roots out of both ends of the density
    # sqrt((high - x)(x - low)) / (2 pi ratio x), and Gauss-Legendre then has every digit.
    nodes, weights = np.polynomial.legendre.leggauss(400)
    middle, half = (low + high) / 2, (high - low) / 2

    def excess(value: float) -> float:
        end = math.acos(min(1.0, max(-1.0, (value - middle) / half)))
        theta = end * (nodes + 1) / 2
        density = (half * np.sin(theta)) ** 2 / (2 * math.pi * ratio * (middle + half * np.cos(theta)))
        return float(weights @ density) * end / 2 - 0.5  # what lies above the value, less one half

    return float(brentq(excess, low, high, xtol=1e-14))


def gavish_donoho_factor(ratio: float) -> float:
    """`omega(beta)`: the optimal hard threshold for singular values, over their median.

    `omega = lambda* / sqrt(mu)`, `lambda* = sqrt(2 (b + 1) + 8 b / (b + 1 + sqrt(b^2 + 14 b + 1)))`, `mu` the median of
    the Marchenko-Pastur law.

    Args:
        ratio: `beta`, the shorter side of the matrix over the longer, in (0, 1].

    Example:
        >>> round(gavish_donoho_factor(1.0), 3)
        2.858

    Reference:
        Gavish and Donoho (2014), The optimal hard threshold for singular values is 4/sqrt(3), arXiv 1305.5870.
    """
    known = 2 * (ratio + 1) + 8 * ratio / (ratio + 1 + math.sqrt(ratio**2 + 14 * ratio + 1))
    return math.sqrt(known / marchenko_pastur_median(ratio))


def greatest_noise_eigenvalue(n_dimensions: float, n_rows: float, *, variance: float, alpha: float) -> float:
    """What the greatest eigenvalue of a noise covariance exceeds with probability `alpha` (Tracy and Widom).

    The centring and the scale of Johnstone; the quantile by Chiani's shifted gamma distribution.

    Reference:
        Johnstone (2001), On the distribution of the largest eigenvalue in principal components analysis; Chiani (2014),
        Distribution of the largest eigenvalue for real Wishart and Gaussian random matrices, arXiv 1209.3394.
    """
    n, p = math.sqrt(max(n_rows - 0.5, 0.5)), math.sqrt(max(n_dimensions - 0.5, 0.5))
    quantile = float(gamma_distribution.ppf(1 - alpha, a=46.446, scale=0.186054)) - 9.84801
    return variance / n_rows * ((n + p) ** 2 + quantile * (n + p) * (1 / n + 1 / p) ** (1 / 3))


def wachter_edges(ratio_above: float, ratio_below: float) -> tuple[float, float]:
    """Between which values the eigenvalues of `A B^-1` lie for two noise covariances of one variance.

    `((1 -+ h) / (1 - y_b))^2` with `h = sqrt(y_a + y_b - y_a y_b)`.

    Args:
        ratio_above: `y_a = p / n` of `A`.
        ratio_below: `y_b = p / n` of `B`, below 1.

    Example:
        >>> wachter_edges(0.25, 0.0) == marchenko_pastur_edges(0.25)
        True

    Reference:
        Wachter (1980), The limiting empirical measure of multiple discriminant ratios.
    """
    _checked(ratio_above)
    if not 0 <= ratio_below < 1:
        raise InputError(f"the covariance below needs more rows than dimensions, got a ratio of {ratio_below}")
    root = math.sqrt(ratio_above + ratio_below - ratio_above * ratio_below)
    return ((1 - root) / (1 - ratio_below)) ** 2, ((1 + root) / (1 - ratio_below)) ** 2


def _checked(ratio: float) -> float:
    if not ratio > 0 or not math.isfinite(ratio):
        raise InputError(f"a ratio of dimensions to rows is positive and finite, got {ratio}")
    return ratio
