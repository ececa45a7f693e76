"""CLIP-Dissect's score of a latent and a term."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings
from clip_lens_ext.semantics.scorers import TERMS_AT_ONCE, ScoreBlock
from clip_lens_ext.semantics.term_embeddings import TermEmbeddings


@dataclass(frozen=True)
class SoftWPMI:
    """Soft weighted pointwise mutual information of a latent and a term, from CLIP-Dissect.

    With `p(t|x) = softmax over terms of temperature * cos(x, t)` and a membership `m` that falls linearly over the
    references from `first` towards `last`: `log p(t|j) = sum_i log(1 + m_i (p(t|x_i) - 1) + floor)`, and
    `s_j(t) = log p(t|j) - weight * log mean over latents of p(t|j)`, in nats. It depends on the other terms and on the
    other latents, so scores of different vocabularies or SAEs do not compare. CLIP-Dissect takes equally many images
    for all latents. Where a latent has fewer references, the mean is over the first so many references of all latents
    that have as many: a sum over fewer is greater, and in one mean with the others it would be all of it.

    Args:
        temperature: of the softmax.
        weight: of the mutual information's second part.
        first, last: membership of the strongest reference, and of the one after the last.
        floor: keeps the logarithm finite.

    References:
        Oikarinen and Weng, CLIP-Dissect, arXiv 2204.10965, and its released code, whose defaults these are.
    """

    temperature: float = 10.0
    weight: float = 1.0
    first: float = 0.998
    last: float = 0.97
    floor: float = 1e-7
    name = "soft_wpmi"
    unit = "nats"

    def __post_init__(self) -> None:
        if not 0 <= self.last <= self.first <= 1 or self.temperature <= 0 or self.floor < 0:
            raise InputError(f"needed: 0 <= last <= first <= 1, temperature > 0 and floor >= 0, got {self}")
        if self.floor == 0 and self.first == 1:
            raise InputError("with first=1 and floor=0 the logarithm of 0 can occur")

    def settings(self) -> dict[str, Any]:
        """How it scores, as plain JSON values."""
        return {name: getattr(self, name) for name in ("temperature", "weight", "first", "last", "floor")}

    def blocks(self, embeddings: ReferenceEmbeddings, terms: TermEmbeddings, defined: Tensor) -> Iterator[ScoreBlock]:
        """Scores for a few terms and all latents at a time: the mean over latents needs them all.

        Args:
            embeddings: of the references.
            terms: the vocabulary's.
            defined: the latents to score, `[d_sae]`; the mean is over them.
        """
        images = F.normalize(embeddings.vectors, dim=1)
        vectors = terms.vectors.to(images)
        logits = (self.temperature * (some @ vectors.T) for some in images.split(256))
        normaliser = torch.cat([part.logsumexp(dim=1) for part in logits])[:, None]
        latents = defined.nonzero().flatten()
        row = embeddings.row[latents]
        membership = self.first - torch.arange(row.shape[1], dtype=images.dtype) / row.shape[1] * (
            self.first - self.last
        )
        membership = membership.to(images)[None, :, None]
        there = (row >= 0)[..., None].to(images)
        n_references = (row >= 0).sum(dim=1).clamp(min=1)
        counts = n_references.unique()
        n_latents = torch.stack([(n_references >= n).sum() for n in counts])[:, None] if len(counts) else counts
        # Probabilities of all embedded images, and logarithms of all latents, for so many terms at a time.
        at_once = max(1, min(TERMS_AT_ONCE, 16_000_000 // max(len(images), len(latents), 1)))
        for start in range(0, len(vectors), at_once):
            part = vectors[start : start + at_once]
            probability = (self.temperature * (images @ part.T) - normaliser).exp()
            log_joint = probability.new_empty(len(latents), len(part))
            # A sum over fewer references is greater: in one mean with the others it would be all of it.
            log_sum = probability.new_full((len(counts), len(part)), -math.inf)
            step = max(1, 4_000_000 // (row.shape[1] * len(part)))
            for first in range(0, len(latents), step):
                some = slice(first, first + step)
                inner = 1 + membership * (probability[row[some].clamp(min=0)] - 1) + self.floor
                along = (inner.log_() * there[some]).cumsum(dim=1)
                log_joint[some] = along[:, -1]
                for place, n in enumerate(counts.tolist()):
                    enough = n_references[some] >= n
                    if bool(enough.any()):
                        log_sum[place] = torch.logaddexp(log_sum[place], along[enough, n - 1].logsumexp(dim=0))
            mean = log_sum - n_latents.to(log_sum).log()
            yield ScoreBlock(latents, start, log_joint - self.weight * mean[torch.searchsorted(counts, n_references)])
