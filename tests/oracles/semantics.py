"""Scores of latents by loops over pairs, from their published formulas; it imports nothing of the package."""

from __future__ import annotations

import itertools
import math


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def cosine(x, y):
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def mean(vectors):
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def clarity(vectors):
    """Mean cosine of all pairs."""
    pairs = [cosine(x, y) for x, y in itertools.combinations(vectors, 2)]
    return math.fsum(pairs) / len(pairs)


def monosemanticity(vectors, activations, lowest=None):
    """Mean cosine of all pairs, weighted by the products of min-max normalised activations."""
    low = min(activations) if lowest is None else lowest
    high = max(activations)
    weights = [(a - low) / (high - low) for a in activations]
    above = below = 0.0
    for (x, v), (y, w) in itertools.combinations(list(zip(vectors, weights, strict=True)), 2):
        above += v * w * cosine(x, y)
        below += v * w
    return above / below


def redundancy(means):
    """For each latent the greatest cosine with another, and which."""
    found = []
    for i, one in enumerate(means):
        rows = [(cosine(one, other), -j) for j, other in enumerate(means) if j != i]
        best, j = max(rows)
        found.append((best, -j))
    return found


def squares(vectors, chosen):
    """Sum of squared distances to the mean of some vectors."""
    centre = mean([vectors[i] for i in chosen])
    return math.fsum(dot(d, d) for d in ([a - b for a, b in zip(vectors[i], centre, strict=True)] for i in chosen))


def best_split(vectors):
    """The partition into two non-empty sets with the least sum of squares, by trying them all: the set without 0."""
    n = len(vectors)
    best = None
    for size in range(1, n):
        for chosen in itertools.combinations(range(1, n), size):
            rest = [i for i in range(n) if i not in chosen]
            cost = squares(vectors, chosen) + squares(vectors, rest)
            if best is None or cost < best[0] - 1e-12:
                best = (cost, set(chosen))
    return best


def polysemanticity(vectors, second):
    """The published score of a partition: samples in `second`, and the rest."""
    one = [v for i, v in enumerate(vectors) if i not in second]
    other = [v for i, v in enumerate(vectors) if i in second]
    if min(len(one), len(other)) < 2:
        centre = mean(vectors)
        early = vectors[:10]
        return 1 - math.fsum(cosine(centre, v) for v in early) / len(early)
    return 1 - cosine(mean(one), mean(other))


def empty_prompt(vectors, term, empty):
    """cos(mean, term) - cos(mean, empty)."""
    centre = mean(vectors)
    return cosine(centre, term) - cosine(centre, empty)


def soft_wpmi(references, terms, k, *, temperature=10.0, weight=1.0, first=0.998, last=0.97, floor=1e-7):
    """CLIP-Dissect's score of every latent and term.

    Args:
        references: of each latent, its reference embeddings, strongest first, at most `k`.
        terms: embeddings.
        k: over how many references the membership falls.
    """
    joint, after = [], []  # `after[latent][n]`: the sums over its first n references
    for vectors in references:
        row = [0.0] * len(terms)
        after.append([list(row)])
        for i, vector in enumerate(vectors):
            logits = [temperature * cosine(vector, term) for term in terms]
            total = math.fsum(math.exp(logit) for logit in logits)
            membership = first - i / k * (first - last)
            for t, logit in enumerate(logits):
                row[t] += math.log(1 + membership * (math.exp(logit) / total - 1) + floor)
            after[-1].append(list(row))
        joint.append(row)
    found = []
    for row, own in zip(joint, after, strict=True):
        n = len(own) - 1  # the mean is over the first n references of all latents that have so many
        others = [sums[n] for sums in after if len(sums) > n]
        shares = [math.fsum(math.exp(sums[t]) for sums in others) / len(others) for t in range(len(terms))]
        found.append([row[t] - weight * math.log(shares[t]) for t in range(len(terms))])
    return found


def ranked(scores, n):
    """The numbers of the `n` best scores, the first of equal ones first."""
    return sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:n]
