"""How a latent is compared with terms: each scorer gives blocks of scores `[latent term]`, never the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.decoder import decoder_rows
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings
from clip_lens_ext.semantics.term_embeddings import TermEmbeddings
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.tower import HookedTower

_LATENTS_AT_ONCE = 1024
TERMS_AT_ONCE = 4096


class ScoreBlock(NamedTuple):
    """Scores of some latents for some terms."""

    latents: Tensor
    """Numbers, `[latent]`."""
    first_term: int
    """The first of consecutive terms."""
    score: Tensor
    """`[latent term]`."""


class Directions(NamedTuple):
    """Scores that are cosines: `score_j(t) = cos(direction_j, t) - baseline_j`."""

    unit: Tensor
    """`[d_sae d_embed]`, of unit length; zeros for a latent that has none."""
    baseline: Tensor
    """`[d_sae]`."""
    defined: Tensor
    """Which latents have one, `[d_sae]`."""

    def blocks(self, terms: Tensor) -> Iterator[ScoreBlock]:
        """Scores for unit term embeddings `[term d_embed]`."""
        latents = self.defined.nonzero().flatten()
        for some in latents.split(_LATENTS_AT_ONCE):
            unit, baseline = self.unit[some], self.baseline[some, None]
            for start in range(0, len(terms), TERMS_AT_ONCE):
                yield ScoreBlock(some, start, unit @ terms[start : start + TERMS_AT_ONCE].T - baseline)


@dataclass(frozen=True)
class EmptyPrompt:
    """The cosine of a latent's mean reference embedding with a term, less its cosine with the empty prompt.

    `s_j(t) = cos(m_j, t) - cos(m_j, t_empty)`: positive where the term says more than no word at all. It ranks the
    terms of one latent as the plain cosine does; the empty prompt makes the scores of different latents comparable.

    Args:
        mean: of the `"raw"` (un-normalised) embeddings, as published, or of `"unit"` ones.

    References:
        Dreyer et al., arXiv 2505.20229, and its released code.
    """

    mean: Literal["raw", "unit"] = "raw"
    name = "empty_prompt"
    unit = "difference of cosines"

    def __post_init__(self) -> None:
        if self.mean not in ("raw", "unit"):
            raise InputError(f"mean is of 'raw' or of 'unit' embeddings, got {self.mean!r}")

    def settings(self) -> dict[str, Any]:
        """How it scores, as plain JSON values."""
        return {"mean": self.mean}

    def directions(self, embeddings: ReferenceEmbeddings, terms: TermEmbeddings) -> Directions:
        """The mean embedding of each latent, and its cosine with the empty prompt.

        Raises:
            InputError: the terms came without an embedding of the empty prompt.
        """
        if terms.empty is None:
            raise InputError(
                "the scorer 'empty_prompt' compares with the empty prompt, and these terms came without it: pass "
                "TermEmbeddings.from_vectors(..., empty=...), or another scorer"
            )
        mean = embeddings.mean(normalize=self.mean == "unit")
        length = embeddings.vectors.norm(dim=1) if self.mean == "raw" else embeddings.vectors.new_ones(1)
        own = length.expand(len(embeddings.vectors))[embeddings.row.clamp(min=0)]
        greatest = own.masked_fill(embeddings.row < 0, 0).amax(dim=1)
        # A mean that cancels leaves rounding of the size of its terms, which points anywhere.
        defined = mean.isfinite().all(dim=1) & (mean.norm(dim=1) > 10 * torch.finfo(mean.dtype).eps * greatest)
        unit = torch.where(defined[:, None], F.normalize(mean, dim=1), 0)
        return Directions(unit, unit @ terms.empty.to(unit), defined)


@dataclass(frozen=True)
class DecoderProjection:
    """The cosine of a latent's decoder row, sent alone through the end of the tower, with a term.

    `s_j(t) = cos(project(D_j), t)`: what the latent writes, read by the Logit Lens; no picture is needed. The judge has
    to be the SAE's own model.

    Args:
        sae: the SAE, of a hook of the residual stream.
    """

    sae: SAE
    name = "decoder"
    unit = "cosine"

    def settings(self) -> dict[str, Any]:
        """How it scores, as plain JSON values."""
        return {"sae_sha256": self.sae.cfg.metadata.sha256}

    @torch.no_grad()
    def directions(self, judge: HookedCLIP, hook_name: str) -> Directions:
        """Where each decoder row points in the embedding space."""
        tower: HookedTower | None = judge.text if self.sae.cfg.metadata.tower == "text" else judge.vision
        if tower is None:
            raise InputError(f"{judge.model_name} is a vision tower alone")
        name = sae_hook_name(tower, self.sae, hook_name)
        if "hook_resid" not in name and name != "hook_full_embed":
            raise InputError(f"the scorer 'decoder' reads residual-stream vectors; {name} gives none")
        parts = []
        for latents in torch.arange(self.sae.cfg.d_sae, device=self.sae.W_dec.device).split(4096):
            rows = decoder_rows(self.sae, latents).detach()
            projected = tower.project(rows.to(tower.cfg.device, tower.cfg.dtype)).cpu()
            parts.append(projected if projected.dtype == torch.float64 else projected.float())
        vectors = torch.cat(parts)
        length = vectors.norm(dim=1)
        defined = length.isfinite() & (length > 0)
        unit = torch.where(defined[:, None], F.normalize(vectors, dim=1), 0)
        return Directions(unit, unit.new_zeros(len(unit)), defined)
