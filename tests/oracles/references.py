"""Top-activating samples of every latent by loops over a dense matrix; it imports nothing of the package."""

from __future__ import annotations


def top_references(dense, positions, k):
    """What the definition says, one latent at a time.

    Args:
        dense: activations as nested lists, `[sample][token][latent]`.
        positions: place in the sequence of each token, `[token]`.
        k: how many samples to keep.

    Returns:
        For each latent a list of at most `k` (sample, activation, position), greatest activation first.
    """
    found = []
    for latent in range(len(dense[0][0])):
        rows = []
        for sample, tokens in enumerate(dense):
            best, where = 0.0, None
            for position, token in zip(positions, tokens, strict=True):
                if token[latent] > best:  # strictly: the first of equal tokens stays
                    best, where = token[latent], position
            if where is not None:
                rows.append((sample, best, where))
        rows.sort(key=lambda row: (-row[1], row[0]))
        found.append(rows[:k])
    return found
