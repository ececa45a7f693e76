"""A linear classifier on unit embeddings, and how well any score tells two classes apart, with intervals.

The intervals are of the bootstrap over pictures, drawn within each class: two measurements of the same pictures see the
same draws, so that the interval of their difference is a paired one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from clip_lens_ext.errors import InputError

N_BOOTSTRAP = 1000
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A logit `weight . e + bias` of unit embeddings; above 0 it says the second class.

    Attributes:
        weight: `[d_embed]`.
        bias: one number.
    """

    weight: Array
    bias: float

    def __call__(self, embeddings: Array) -> Array:
        """Logits `[picture]` of embeddings `[picture d_embed]`."""
        return embeddings @ self.weight + self.bias


def fit_classifier(embeddings: Array, labels: NDArray[np.int64], *, strength: float = 100.0) -> LinearClassifier:
    """Logistic regression: the minimum of `strength * sum of log(1 + exp(-y s)) + |weight|^2 / 2`, `y` in -1, 1.

    This is scikit-learn's `LogisticRegression(C=strength)`: the problem is convex, so any solver finds the one minimum.

    Args:
        embeddings: `[picture d_embed]`, of unit length.
        labels: 0 or 1, `[picture]`.
        strength: of the data against the penalty. Unit embeddings of a CLIP lie close together, so that its default of
            1 would hardly fit them.

    Raises:
        InputError: one class only.
    """
    both_classes(labels)
    data, sign = np.asarray(embeddings, np.float64), 2.0 * labels - 1

    def loss(at: Array) -> tuple[float, Array]:
        margin = sign * (data @ at[:-1] + at[-1])
        slope = -strength * sign * expit(-margin)
        gradient = np.append(data.T @ slope + at[:-1], slope.sum())
        return float(strength * np.logaddexp(0, -margin).sum() + at[:-1] @ at[:-1] / 2), gradient

    start = np.zeros(data.shape[1] + 1)
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-12}
    )
    return LinearClassifier(found.x[:-1], float(found.x[-1]))


@dataclass(frozen=True, eq=False)
class Measured:
    """A number measured on pictures, and what it would be on `N_BOOTSTRAP` other draws of them.

    Attributes:
        value: on the pictures.
        draws: `[draw]`.
    """

    value: float
    draws: Array

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return float(low), float(high)

    def __sub__(self, other: Measured) -> Measured:
        """The difference of two measurements of the same pictures, paired."""
        return Measured(self.value - other.value, self.draws - other.draws)

    @staticmethod
    def mean(several: list[Measured]) -> Measured:
        """Of several scores on the same pictures."""
        return Measured(float(np.mean([one.value for one in several])), np.mean([one.draws for one in several], axis=0))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True, eq=False)
class Accuracy:
    """How well a score tells the classes apart: at its own threshold, 0, and at all thresholds."""

    balanced: Measured
    auroc: Measured

    def __sub__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.balanced - other.balanced, self.auroc - other.auroc)

    @staticmethod
    def mean(several: list[Accuracy]) -> Accuracy:
        """Of several scores on the same pictures: the mean of their accuracies, not of the scores."""
        return Accuracy(Measured.mean([one.balanced for one in several]), Measured.mean([one.auroc for one in several]))


def accuracy(scores: Array, labels: NDArray[np.int64], *, seed: int = 0) -> Accuracy:
    """Balanced accuracy and area under the ROC curve.

    Balanced accuracy is the mean of the shares of both classes that lie on their side of 0; the area is the share of
    pairs, one picture of each class, that the score orders rightly, with ties counted half.

    Args:
        scores: `[picture]`, greater for the second class.
        labels: 0 or 1, `[picture]`.
        seed: of the bootstrap.

    Raises:
        InputError: one class only, or a score that is not finite.

    Example:
        >>> found = accuracy(np.array([-1.0, 0.5, 0.4, 2.0]), np.array([0, 0, 1, 1]))
        >>> found.balanced.value, found.auroc.value
        (0.75, 0.75)
    """
    both_classes(labels)
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise InputError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
    positive, negative = scores[labels == 1], scores[labels == 0]
    times = _draws((len(positive), len(negative)), seed)
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    hits, rejections = (positive > 0).astype(float), (negative <= 0).astype(float)
    balanced = Measured(float(hits.mean() + rejections.mean()) / 2, (times[0] @ hits + times[1] @ rejections) / 2)
    return Accuracy(balanced, Measured(float(wins.mean()), ((times[0] @ wins) * times[1]).sum(axis=1)))


@functools.lru_cache(maxsize=8)
def _draws(counts: tuple[int, int], seed: int) -> tuple[Array, Array]:
    """How often each picture of the two classes is drawn, as shares: `[draw picture]` each."""
    rng = np.random.default_rng(seed)
    first, second = (rng.multinomial(n, np.full(n, 1 / n), N_BOOTSTRAP) / n for n in counts)
    return first, second


def auroc(scores: Array | NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The area alone, by ranks.

    Example:
        >>> auroc(np.array([-1.0, 0.5, 0.4, 2.0]), np.array([0, 0, 1, 1]))
        0.75
    """
    both_classes(labels)
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())
    above = rankdata(scores)[labels == 1].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


def both_classes(labels: NDArray[np.int64]) -> None:
    """Raise `InputError` where there is one class only."""
    counts = np.bincount(labels, minlength=2)
    if len(counts) > 2 or counts.min() == 0:
        raise InputError(f"two classes are needed, 0 and 1; found {dict(enumerate(counts.tolist()))} pictures of each")
