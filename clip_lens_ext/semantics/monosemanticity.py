"""Monosemanticity: clarity in which a pair of samples counts as much as both activate the latent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics.latent_scores import NO_DIRECTION, TOO_FEW, LatentScores, Samples, undefined
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings

ONE_SAMPLE = "one sample carries all of the weight"
# Below this share of weight on pairs the closed form is a difference of rounding errors.
LEAST_SHARE = 1e-9


def monosemanticity(
    embeddings: Tensor | ReferenceEmbeddings,
    activations: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    lowest: Tensor | float | None = None,
) -> LatentScores:
    """The mean cosine of all pairs of a latent's samples, weighted by their activations.

    `MS = sum_{i<j} w_i w_j cos(e_i, e_j) / sum_{i<j} w_i w_j` with `w = (a - min a) / (max a - min a)`, in [-1, 1]; in
    closed form `(||sum_i w_i u_i||^2 - sum_i w_i^2) / ((sum_i w_i)^2 - sum_i w_i^2)`. The scale of `w` cancels, so only
    the least activation matters.

    Args:
        embeddings: `ReferenceEmbeddings`, or a tensor `[latent sample d_embed]`.
        activations: of each latent on each sample, `[latent sample]`; None: those of the `ReferenceEmbeddings`.
        mask: for a tensor, booleans `[latent sample]`, true where there is a sample.
        lowest: the activation that gets weight 0, a number or `[latent]`. None: for a tensor the least of the latent's
            samples, as published where they are all images; for `ReferenceEmbeddings` the least over all samples of
            their pass, of which the references are the heaviest.

    Returns:
        `LatentScores`; NaN where a latent has fewer than two samples, one without direction, or all weight on one
        sample. Over all images in one pass: `StreamingMonosemanticity`.

    Raises:
        InputError: a wrong shape or dtype, NaN activations, or an activation below `lowest`.

    Example:
        >>> vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
        >>> monosemanticity(vectors, torch.tensor([[4.0, 4.0, 1.0, 0.0]])).value
        tensor([0.6667], dtype=torch.float64)

    References:
        Pach et al., arXiv 2504.02821.
    """
    samples = Samples(embeddings, mask)
    if activations is None:
        if not isinstance(embeddings, ReferenceEmbeddings):
            raise InputError("a tensor of embeddings needs activations= [latent sample]")
        activations = embeddings.activation
    if isinstance(embeddings, ReferenceEmbeddings) and lowest is None:
        lowest = embeddings.lowest
    shape = (samples.n_latents, samples.n_samples)
    if tuple(activations.shape) != shape or not activations.is_floating_point():
        raise InputError(f"activations are floats {list(shape)}, got {activations.dtype} {list(activations.shape)}")
    floor = None if lowest is None else torch.as_tensor(lowest, dtype=torch.float64).cpu()
    if floor is not None and floor.shape not in ((), (samples.n_latents,)):
        raise InputError(f"lowest is one number, or [{samples.n_latents}], got {list(floor.shape)}")
    floor = None if floor is None else floor.expand(samples.n_latents)
    value = torch.full((samples.n_latents,), torch.nan, dtype=torch.float64)
    count = torch.zeros(samples.n_latents, dtype=torch.int64)
    bad, single = (torch.zeros(samples.n_latents, dtype=torch.bool) for _ in range(2))
    for block in samples:
        activation = activations[block.part].detach().cpu().double()
        if not (activation.isfinite() | ~block.mask).all():
            raise InputError("activations hold NaN or infinite values")
        above = activation.masked_fill(~block.mask, torch.inf)
        least = above.amin(dim=1) if floor is None else floor[block.part]
        weight = (activation - least[:, None]).masked_fill(~block.mask, 0)
        if (weight < 0).any():
            raise InputError(f"an activation is {float(-weight.min()):.3g} below lowest: weights cannot be negative")
        weight = weight / weight.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        unit = F.normalize(block.vectors, dim=-1)
        own = (weight.square() * unit.square().sum(dim=2)).sum(dim=1)
        pairs = torch.einsum("ls,lsd->ld", weight, unit).square().sum(dim=1) - own
        total = weight.sum(dim=1).square()
        among = total - weight.square().sum(dim=1)
        few = block.n < 2
        alone = ~(among > LEAST_SHARE * total)
        value[block.part] = torch.where(block.defined & ~few & ~alone, pairs / among, torch.nan)
        count[block.part], bad[block.part], single[block.part] = block.n, ~block.defined, alone
    reasons = undefined({NO_DIRECTION: bad, TOO_FEW: count < 2, ONE_SAMPLE: single})
    settings = {
        "weights": "activations of references" if isinstance(embeddings, ReferenceEmbeddings) else "activations"
    }
    return LatentScores("monosemanticity", value, count, (-1.0, 1.0), reasons, settings, provenance=samples.provenance)
