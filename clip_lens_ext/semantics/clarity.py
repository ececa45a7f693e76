"""Clarity: how alike the samples of a latent are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.semantics.latent_scores import NO_DIRECTION, TOO_FEW, LatentScores, Samples, undefined
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings


def clarity(embeddings: Tensor | ReferenceEmbeddings, *, mask: Tensor | None = None) -> LatentScores:
    """The mean cosine of all pairs of a latent's samples; greater where they show one thing.

    `clarity = (||sum_i u_i||^2 - n) / (n (n - 1))` with unit embeddings `u_i`, in [-1/(n - 1), 1]; for the top
    references of a latent it is SemanticLens' score, and over all images that activate it that of Sparse CLIP
    (`StreamingClarity`). The two are not comparable.

    Args:
        embeddings: `ReferenceEmbeddings`, or a tensor `[latent sample d_embed]` of un-normalised or unit vectors.
        mask: for a tensor, booleans `[latent sample]`, true where there is a sample.

    Returns:
        `LatentScores`; NaN where a latent has fewer than two samples, or one whose embedding has no direction.

    Raises:
        InputError: a wrong shape or dtype.

    Numerics:
        Sums in float64, blocks of latents: exact to some 1e-15 for float64 input, to 1e-7 for float32 vectors.

    Example:
        >>> same, apart = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> clarity(torch.stack([same, apart])).value
        tensor([ 1., -1.], dtype=torch.float64)

    References:
        Dreyer et al., SemanticLens, arXiv 2501.05398; all activating images: arXiv 2601.20075.
    """
    samples = Samples(embeddings, mask)
    value = torch.full((samples.n_latents,), torch.nan, dtype=torch.float64)
    count = torch.zeros(samples.n_latents, dtype=torch.int64)
    bad = torch.zeros(samples.n_latents, dtype=torch.bool)
    for block in samples:
        unit = F.normalize(block.vectors, dim=-1)
        n = block.n
        # The squares of the rounded unit vectors themselves, so that equal samples give 1 and not nearly 1.
        squares = unit.square().sum(dim=(1, 2))
        pairs = unit.sum(dim=1).square().sum(dim=1) - squares
        value[block.part] = torch.where(block.defined & (n > 1), pairs / (n * (n - 1)), torch.nan)
        count[block.part], bad[block.part] = n, ~block.defined
    scored = count[count > 1]
    least = -1.0 / (int(scored.min()) - 1) if len(scored) else -1.0
    reasons = undefined({NO_DIRECTION: bad, TOO_FEW: count < 2})
    return LatentScores("clarity", value, count, (least, 1.0), reasons, {}, provenance=samples.provenance)
