"""Redundancy: does another latent mean the same?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.semantics.latent_scores import NO_DIRECTION, LatentScores, Samples, undefined
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings

_BLOCK = 512


def redundancy(embeddings: Tensor | ReferenceEmbeddings, *, mask: Tensor | None = None) -> LatentScores:
    """The greatest cosine of a latent's mean embedding with that of any other latent; greater where it has a twin.

    `redundancy_j = max over i != j of cos(m_j, m_i)`, with `m` the mean of the un-normalised embeddings, in [-1, 1];
    the published score of an SAE is the mean over its latents, `.mean`. It grows with the number of latents, so SAEs
    of different width do not compare.

    Args:
        embeddings: `ReferenceEmbeddings`, or a tensor `[latent sample d_embed]`.
        mask: for a tensor, booleans `[latent sample]`, true where there is a sample.

    Returns:
        `LatentScores`, with the other latent in `.partner`; NaN where a latent has no sample, a sample without
        direction, a mean of zero, or no other latent to compare with.

    Raises:
        InputError: a wrong shape or dtype.

    Numerics:
        Means in float64; cosines in the precision of the embeddings, a block of latents against all at a time.

    Example:
        >>> vectors = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 0.0]]])
        >>> scores = redundancy(vectors)
        >>> scores.value, scores.partner
        (tensor([1., 0., 1.], dtype=torch.float64), tensor([2, 0, 0]))

    References:
        Dreyer et al., SemanticLens, arXiv 2501.05398.
    """
    samples = Samples(embeddings, mask)
    full = embeddings.vectors if isinstance(embeddings, ReferenceEmbeddings) else embeddings
    dtype = torch.float64 if full.dtype == torch.float64 else torch.float32
    means = torch.zeros(samples.n_latents, full.shape[-1], dtype=dtype)
    count = torch.zeros(samples.n_latents, dtype=torch.int64)
    bad, flat = (torch.zeros(samples.n_latents, dtype=torch.bool) for _ in range(2))
    for block in samples:
        mean = block.vectors.sum(dim=1) / block.n.clamp(min=1)[:, None]
        length = mean.norm(dim=1)
        # A sum that cancels leaves rounding of the size of its terms, not zero.
        flat[block.part] = ~(length > 1e-12 * block.vectors.norm(dim=-1).amax(dim=1)) & (block.n > 0)
        means[block.part] = F.normalize(mean, dim=1).to(dtype)
        count[block.part], bad[block.part] = block.n, ~block.defined
    usable = (count > 0) & ~bad & ~flat
    chosen = usable.nonzero().flatten()
    unit = means[chosen]
    value = torch.full((samples.n_latents,), torch.nan, dtype=torch.float64)
    partner = torch.full((samples.n_latents,), -1)
    if len(chosen) > 1:
        for start in range(0, len(chosen), _BLOCK):
            cosine = unit[start : start + _BLOCK] @ unit.T
            row = torch.arange(len(cosine))
            cosine[row, row + start] = -torch.inf
            best, other = cosine.max(dim=1)
            value[chosen[start : start + _BLOCK]] = best.double().clamp(-1, 1)
            partner[chosen[start : start + _BLOCK]] = chosen[other]
    alone = usable if len(chosen) < 2 else torch.zeros_like(usable)
    reasons = undefined({
        NO_DIRECTION: bad, "no sample": count == 0, "a mean embedding of zero": flat, "no other latent": alone,
    })  # fmt: skip
    return LatentScores("redundancy", value, count, (-1.0, 1.0), reasons, {}, provenance=samples.provenance,
                        partner=partner)  # fmt: skip
