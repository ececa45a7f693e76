"""Zero-shot, retrieval, neighbours and a linear probe one sample at a time, from their definitions."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize


def cosine(a, b):
    """Of two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def unit(a):
    """A vector of length one."""
    return np.asarray(a) / math.sqrt(sum(x * x for x in a))


def zero_shot(images, labels, classes, k):
    """1 where fewer than `k` other classes are as near as the own one; `classes` `[class template d]`."""
    means = [np.mean([unit(one) for one in templates], axis=0) for templates in classes]
    hits = []
    for image, label in zip(images, labels, strict=True):
        near = [cosine(image, mean) for mean in means]
        hits.append(float(sum(c != label and near[c] >= near[label] for c in range(len(means))) < k))
    return hits


def retrieval(queries, candidates, own, k):
    """1 where fewer than `k` strangers are as near as the nearest of a query's own candidates."""
    hits = []
    for query, mine in zip(queries, own, strict=True):
        near = [cosine(query, one) for one in candidates]
        best = max(near[i] for i in mine)
        hits.append(float(sum(i not in mine and near[i] >= best for i in range(len(near))) < k))
    return hits


def neighbours(train, train_labels, test, labels, k):
    """1 where the most frequent class of the `k` nearest, the smallest of equally frequent ones, is the own one."""
    hits = []
    for row, label in zip(test, labels, strict=True):
        order = sorted(range(len(train)), key=lambda i: -cosine(row, train[i]))[:k]
        votes = [train_labels[i] for i in order]
        winner = min(set(votes), key=lambda one: (-votes.count(one), one))
        hits.append(float(winner == label))
    return hits


def probe(train, train_labels, test, labels, c):
    """Multinomial logistic regression with an L2 penalty `1 / (2 c)` on the weights, by its own optimiser."""
    x, xt = np.array([unit(r) for r in train]), np.array([unit(r) for r in test])
    names = sorted(set(train_labels))
    y = np.array([names.index(label) for label in train_labels])
    n_class, d = len(names), x.shape[1]

    def loss(flat):
        w = flat.reshape(n_class, d + 1)
        z = x @ w[:, :d].T + w[:, d]
        z = z - z.max(axis=1, keepdims=True)
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        value = -np.log(p[np.arange(len(y)), y]).sum() + (w[:, :d] ** 2).sum() / (2 * c)
        g = p.copy()
        g[np.arange(len(y)), y] -= 1
        gradient = np.concatenate([g.T @ x + w[:, :d] / c, g.sum(axis=0)[:, None]], axis=1)
        return value, gradient.ravel()

    w = minimize(loss, np.zeros(n_class * (d + 1)), jac=True, method="L-BFGS-B",
                 options={"maxiter": 5000, "gtol": 1e-9, "ftol": 1e-15}).x.reshape(n_class, d + 1)  # fmt: skip
    guess = (xt @ w[:, :d].T + w[:, d]).argmax(axis=1)
    return [float(names[g] == label) for g, label in zip(guess, labels, strict=True)]


def without(rows, basis):
    """Rows less their part in a subspace, one direction at a time."""
    start = np.asarray(rows, dtype=float)
    out = start.copy()
    for column in np.asarray(basis, dtype=float).T:
        out = out - np.outer(start @ column, column)
    return out


def percentiles(values, n_bootstrap, seed, confidence):
    """Percentile interval of a mean over samples drawn anew."""
    rng = np.random.default_rng(seed)
    means = [np.mean([values[i] for i in rng.integers(len(values), size=len(values))]) for _ in range(n_bootstrap)]
    return np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
