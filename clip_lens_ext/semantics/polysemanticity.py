"""Polysemanticity: do the samples of a latent fall into two groups that mean different things?"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics.latent_scores import NO_DIRECTION, TOO_FEW, LatentScores, Samples, undefined
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings

_MAX_ITERATIONS = 300
_FALLBACK_SAMPLES = 10
_FLAT = "a centroid of zero length"


def polysemanticity(
    embeddings: Tensor | ReferenceEmbeddings, *, mask: Tensor | None = None, n_init: int = 10, seed: int = 0
) -> LatentScores:
    """One minus the cosine of the two centroids of a 2-means clustering; greater where a latent has two meanings.

    `polysemanticity = 1 - cos(c_1, c_2)`, in [0, 2], with the centroids of the un-normalised embeddings. Where a
    cluster has fewer than two samples there are no two groups, and the score is, as published, `1 - mean_i cos(m, x_i)`
    over the first ten samples, with `m` the mean of all.

    Args:
        embeddings: `ReferenceEmbeddings`, or a tensor `[latent sample d_embed]`, the strongest sample first.
        mask: for a tensor, booleans `[latent sample]`, true where there is a sample.
        n_init: starts by k-means++, of which the clustering with the least sum of squares is taken.
        seed: of the starts; the result does not depend on how the latents are split into blocks.

    Returns:
        `LatentScores`; NaN where a latent has fewer than two samples, one whose embedding has no direction, or a
        centroid of zero length. `settings["n_fallback"]` counts the latents without two groups.

    Raises:
        InputError: a wrong shape or dtype, or `n_init` below 1.

    Numerics:
        Lloyd's iterations in float64 on the inner products of each latent's samples, so their cost does not depend on
        `d_embed`; the best of `n_init` starts is improved further by moves of single samples. Still a local optimum.

    Example:
        >>> vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
        >>> f"{polysemanticity(vectors).value.item():.3f}"
        '0.900'

    References:
        Dreyer et al., SemanticLens, arXiv 2501.05398, and its released code, whose fallback this is.
    """
    if isinstance(n_init, bool) or not isinstance(n_init, int) or n_init < 1:
        raise InputError(f"n_init must be a positive integer, got {n_init!r}")
    samples = Samples(embeddings, mask)
    draws = torch.rand(samples.n_latents, n_init, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    value = torch.full((samples.n_latents,), torch.nan, dtype=torch.float64)
    count = torch.zeros(samples.n_latents, dtype=torch.int64)
    bad, flat, fell_back = (torch.zeros(samples.n_latents, dtype=torch.bool) for _ in range(3))
    for block in samples:
        gram = block.vectors @ block.vectors.mT
        usable = block.defined & (block.n > 1)
        gram = torch.where(usable[:, None, None], gram, 0.0)  # a NaN would never let the iterations end
        second = two_means(gram, block.mask, draws[block.part])
        groups = torch.stack([block.mask & ~second, second], dim=1).double()
        size = groups.sum(dim=2)
        one = (size < 2).any(dim=1)
        apart, flat_pair = _cosine_of_means(gram, groups[:, 0], groups[:, 1])
        mean, flat_mean = _cosine_with_mean(gram, block.mask)
        found = 1 - torch.where(one, mean, apart)
        no_length = torch.where(one, flat_mean, flat_pair) & usable
        value[block.part] = torch.where(usable & ~no_length, found, torch.nan)
        count[block.part], bad[block.part] = block.n, ~block.defined
        flat[block.part], fell_back[block.part] = no_length, one & usable
    reasons = undefined({NO_DIRECTION: bad, TOO_FEW: count < 2, _FLAT: flat})
    settings = {"n_init": n_init, "n_fallback": int(fell_back.sum())}
    return LatentScores("polysemanticity", value, count, (0.0, 2.0), reasons, settings, seed, samples.provenance)


def two_means(gram: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
    """The better half of `n_init` 2-means clusterings, from inner products.

    Args:
        gram: inner products of each latent's samples, `[latent sample sample]`.
        mask: `[latent sample]`, true where there is a sample.
        draws: uniform numbers for the starts, `[latent start 2]`.

    Returns:
        Which samples are in the second cluster, `[latent sample]`.
    """
    second = _start(gram, mask, draws)
    for _ in range(_MAX_ITERATIONS):
        distance = _squared_distances(gram, mask, second)
        moved = (distance[:, :, 1] < distance[:, :, 0]) & mask[:, None]
        if torch.equal(moved, second):
            break
        second = moved
    best = _sum_of_squares(gram, mask, second).argmin(dim=1)
    second = second[torch.arange(len(best)), best][:, None]
    for _ in range(_MAX_ITERATIONS):
        moved = _move_one(gram, mask, second)
        if torch.equal(moved, second):
            break
        second = moved
    return second[:, 0]


def _sum_of_squares(gram: Tensor, mask: Tensor, second: Tensor) -> Tensor:
    """Of every clustering, `[latent start]`."""
    distance = _squared_distances(gram, mask, second)
    return torch.where(second, distance[:, :, 1], distance[:, :, 0]).masked_fill(~mask[:, None], 0).sum(dim=2)


def _move_one(gram: Tensor, mask: Tensor, second: Tensor) -> Tensor:
    """Every clustering with that sample moved whose move lowers its sum of squares most; the same where none does.

    Moving a sample at squared distance `d` from its cluster's centroid to the other, at `e`, lowers the sum by
    `d * a / (a - 1) - e * b / (b + 1)`, with the clusters' sizes `a` and `b` before.
    """
    distance = _squared_distances(gram, mask, second)
    size = torch.stack([(~second & mask[:, None]).sum(dim=2), second.sum(dim=2)], dim=2)[..., None].double()
    leave = distance * size / (size - 1)
    join = distance * size / (size + 1)
    gain = torch.where(second, leave[:, :, 1] - join[:, :, 0], leave[:, :, 0] - join[:, :, 1])
    fixed = torch.where(second, size[:, :, 1] < 2, size[:, :, 0] < 2) | ~mask[:, None]
    # An empty cluster has no centroid: all samples are one point.
    gain = gain.masked_fill(fixed | (size == 0).any(dim=2), -torch.inf)
    best, sample = gain.max(dim=2, keepdim=True)
    slack = 1e-12 * gram.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None]
    return torch.where(best > slack, second.scatter(2, sample, ~second.gather(2, sample)), second)


def _start(gram: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
    """k-means++: a sample at random, and a second with a probability that grows with its squared distance."""
    square = gram.diagonal(dim1=1, dim2=2)
    first = _draw(mask.double()[:, None].expand(-1, draws.shape[1], -1), draws[..., 0])
    to_first = _from_sample(gram, square, first).masked_fill(~mask[:, None], 0)
    other = _draw(to_first, draws[..., 1])
    return (_from_sample(gram, square, other) < to_first) & mask[:, None]


def _draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """A sample for each start, with a probability in proportion to its weight; `[latent start]`."""
    upto = weight.cumsum(dim=2)
    place = (upto <= (uniform * upto[..., -1])[..., None]).sum(dim=2)
    return place.clamp(max=weight.shape[2] - 1)


def _from_sample(gram: Tensor, square: Tensor, centre: Tensor) -> Tensor:
    """Squared distance of every sample from one sample for each start, `[latent start sample]`."""
    cross = gram.gather(1, centre[..., None].expand(-1, -1, gram.shape[2]))
    return (square[:, None] - 2 * cross + square.gather(1, centre)[..., None]).clamp(min=0)


def _squared_distances(gram: Tensor, mask: Tensor, second: Tensor) -> Tensor:
    """Squared distance of every sample from both centroids, `[latent start cluster sample]`."""
    groups = torch.stack([~second & mask[:, None], second], dim=2).double()
    size = groups.sum(dim=3, keepdim=True)
    weight = groups / size.clamp(min=1)
    cross = (weight.flatten(1, 2) @ gram).view_as(weight)
    own = (cross * weight).sum(dim=3, keepdim=True)
    distance = gram.diagonal(dim1=1, dim2=2)[:, None, None] - 2 * cross + own
    return distance.masked_fill(size == 0, torch.inf)


def _cosine_of_means(gram: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of two sums of samples, `[latent]`, and whether one of them is zero."""
    inner = torch.einsum("li,lij,lj->l", one, gram, other)
    squares = [torch.einsum("li,lij,lj->l", group, gram, group) for group in (one, other)]
    scale = gram.diagonal(dim1=1, dim2=2).amax(dim=1)
    # A sum that cancels leaves rounding of the size of its terms, not zero.
    flat = torch.stack(
        [square <= 1e-12 * scale * group.sum(dim=1) ** 2 for square, group in zip(squares, (one, other), strict=True)]
    )
    cosine = inner / (squares[0].clamp(min=0).sqrt() * squares[1].clamp(min=0).sqrt())
    return cosine.clamp(-1, 1), flat.any(dim=0)


def _cosine_with_mean(gram: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of the first samples with the mean of all, `[latent]`, and whether that mean is zero."""
    weight = mask.double()
    inner = torch.einsum("lij,lj->li", gram, weight)
    square = torch.einsum("li,li->l", inner, weight)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    flat = square <= 1e-12 * diagonal.amax(dim=1) * weight.sum(dim=1) ** 2
    early = weight * (weight.cumsum(dim=1) <= _FALLBACK_SAMPLES)
    cosine = inner / (diagonal.sqrt() * square.clamp(min=0).sqrt()[:, None])
    total = torch.where(early > 0, cosine.clamp(-1, 1), 0.0).sum(dim=1)
    return total / early.sum(dim=1).clamp(min=1), flat
