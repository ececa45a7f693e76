"""The label of every latent: the term that its references, or its decoder row, are nearest to."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.data import Preprocess
from clip_lens_ext.errors import InputError, near
from clip_lens_ext.provenance import versions
from clip_lens_ext.semantics.labels import Alignment
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings, embed_references
from clip_lens_ext.semantics.references import References
from clip_lens_ext.semantics.scorers import DecoderProjection, Directions, EmptyPrompt, ScoreBlock
from clip_lens_ext.semantics.soft_wpmi import SoftWPMI
from clip_lens_ext.semantics.term_embeddings import TermEmbeddings
from clip_lens_ext.semantics.vocabulary import Vocabulary
from clip_lens_ext.towers.clip import HookedCLIP

ScorerName = Literal["empty_prompt", "decoder", "soft_wpmi"]
Scorer = EmptyPrompt | DecoderProjection | SoftWPMI


@torch.no_grad()
def align(
    references: References | ReferenceEmbeddings,
    vocabulary: Vocabulary | TermEmbeddings,
    judge: HookedCLIP,
    *,
    images: Any = None,
    scorer: ScorerName | Scorer = "empty_prompt",
    sae: SAE | None = None,
    n_labels: int = 5,
    k: int | None = None,
    preprocess: Preprocess | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Alignment:
    """Give every latent its best terms, with their scores.

    By default `s_j(t) = cos(m_j, t) - cos(m_j, t_empty)` with `m_j` the mean embedding of the latent's references by
    the judge; the label is the term with the greatest. A latent without references gets none.

    Args:
        references: from `collect_references`, or `embed_references` of them, which several calls can share.
        vocabulary: the terms; for a judge without a text tower, embeddings of them from `TermEmbeddings.from_vectors`.
        judge: the CLIP that compares pictures with terms: the model itself, or another.
        images: the data that the references were collected from; needed for `References`, save by `"decoder"`.
        scorer: `"empty_prompt"`, `"soft_wpmi"`, `"decoder"`, or an `EmptyPrompt`, `SoftWPMI` or `DecoderProjection` of
            other settings.
        sae: for `"decoder"`.
        n_labels: how many terms to keep for each latent; the second one gives the margin.
        k: only the first `k` references of each latent, for `References`; not for `"decoder"`, which reads none.
        preprocess: instead of the judge's own.
        cache_dir: keep the term embeddings in this folder.
        batch_size: samples in a batch that the judge embeds.
        progress: draw bars.

    Returns:
        `Alignment`.

    Raises:
        InputError: no images for `References`, embeddings by another judge, an unknown scorer, `n_labels` below 1, or
            an SAE that is not that of the references.

    Numerics:
        Blocks of latents and terms with a running top, never the whole `[latent term]`. Equal scores go to the earlier
        term.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(60, seed=0, split="test").images)
        >>> references = cle.collect_references(clip.vision, pixels, sae, k=5, progress=False)
        >>> vocabulary = Vocabulary.from_terms(["crane", "a crown on waves", "red"])
        >>> alignment = align(references, vocabulary, clip, images=pixels, progress=False)
        >>> len(alignment.labels), set(alignment.labels) <= {*vocabulary.terms, None}
        (1024, True)

    References:
        Dreyer et al., arXiv 2505.20229; CLIP-Dissect, arXiv 2204.10965.
    """
    if isinstance(n_labels, bool) or not isinstance(n_labels, int) or n_labels < 1:
        raise InputError(f"n_labels must be a positive integer, got {n_labels!r}")
    if not isinstance(vocabulary, Vocabulary | TermEmbeddings):
        raise InputError(f"vocabulary is a {type(vocabulary).__name__}: make one, as with Vocabulary.from_terms([...])")

    def embedded() -> TermEmbeddings:
        if isinstance(vocabulary, Vocabulary):
            return vocabulary.embed(judge, cache_dir=cache_dir, progress=progress)
        return _checked_terms(vocabulary, judge)

    chosen = _scorer(scorer, sae)
    directions: Directions | None = None
    if isinstance(chosen, DecoderProjection):
        _check_sae(chosen.sae, references, judge)
        terms = embedded()
        n_references = (_places(references) >= 0).sum(dim=1)
        directions = chosen.directions(judge, references.hook_name)
    else:
        embeddings = _embedded(references, judge, images, k, preprocess, batch_size, progress)
        terms = embedded()
        n_references = embeddings.n_references
        if isinstance(chosen, EmptyPrompt):
            directions = chosen.directions(embeddings, terms)
    if directions is None:
        assert isinstance(chosen, SoftWPMI)
        defined = (n_references > 0) & _have_direction(embeddings)
        blocks = chosen.blocks(embeddings, terms, defined)
    else:
        defined = directions.defined & (n_references > 0)
        directions = directions._replace(defined=defined)
        blocks = directions.blocks(terms.vectors.to(directions.unit))
    top = _TopTerms(references.d_sae, min(n_labels, len(terms)), terms.vectors.dtype)
    with tqdm(total=int(defined.sum()) * len(terms), desc="aligning", unit="score", unit_scale=True,
              disable=not progress) as bar:  # fmt: skip
        for block in blocks:
            top.update(block)
            bar.update(block.score.numel())
    provenance = {
        **references.provenance, "judge": judge.model_name, "judge_text_hash": terms.model_hash,
        "vocabulary": terms.vocabulary, "versions": versions(),
        "vocabulary_source": vocabulary.source if isinstance(vocabulary, Vocabulary) else "embeddings",
    }  # fmt: skip
    return Alignment(
        chosen.name, chosen.unit, top.term, top.score.masked_fill(top.term < 0, torch.nan), n_references, terms.terms,
        judge.model_name, terms.vocabulary, references.hook_name, references.token_scope, chosen.settings(),
        provenance, None if directions is None else directions.unit.masked_fill(~defined[:, None], torch.nan),
        None if directions is None else directions.baseline.masked_fill(~defined, torch.nan),
        None if directions is None else terms.vectors.to(directions.unit),
    )  # fmt: skip


def _checked_terms(terms: TermEmbeddings, judge: HookedCLIP) -> TermEmbeddings:
    width = judge.vision.cfg.d_embed
    if terms.model != judge.model_name or terms.vectors.shape[1] != width:
        raise InputError(
            f"the terms were embedded by {terms.model!r} as {terms.vectors.shape[1]} numbers, and the judge is "
            f"{judge.model_name!r} with {width}: both have to be one model"
        )
    return terms


def _scorer(scorer: str | Scorer, sae: SAE | None) -> Scorer:
    if isinstance(scorer, EmptyPrompt | DecoderProjection | SoftWPMI):
        return scorer
    if scorer == "decoder":
        if sae is None:
            raise InputError("the scorer 'decoder' reads the SAE's decoder: pass sae=")
        return DecoderProjection(sae)
    by_name = {"empty_prompt": EmptyPrompt, "soft_wpmi": SoftWPMI}
    if scorer not in by_name:
        known = (*by_name, "decoder")
        raise InputError(f"no scorer {scorer!r}: there are {', '.join(known)}{near(str(scorer), known)}")
    return by_name[scorer]()


def _places(references: References | ReferenceEmbeddings) -> Tensor:
    return references.row if isinstance(references, ReferenceEmbeddings) else references.sample


def _embedded(
    references: References | ReferenceEmbeddings,
    judge: HookedCLIP,
    images: Any,
    k: int | None,
    preprocess: Preprocess | None,
    batch_size: int,
    progress: bool,
) -> ReferenceEmbeddings:
    """The references as the judge embeds them, or has embedded them."""
    if isinstance(references, References):
        if images is None:
            raise InputError("pass images=, the data that the references were collected from")
        return embed_references(
            references, images, judge, k=k, preprocess=preprocess, batch_size=batch_size, progress=progress
        )
    if references.judge != judge.model_name:
        raise InputError(
            f"the references were embedded by {references.judge!r}, and the judge is {judge.model_name!r}: both have "
            "to be one model"
        )
    if k is not None:
        raise InputError("k= is for embed_references: these references are embedded already")
    return references


def _check_sae(sae: SAE, references: References | ReferenceEmbeddings, judge: HookedCLIP) -> None:
    known, found = references.provenance.get("sae_sha256"), sae.cfg.metadata.sha256
    if sae.cfg.d_sae != references.d_sae or (known is not None and found is not None and known != found):
        raise InputError(
            f"the references are of another SAE ({references.d_sae} latents, sha256 {known}) than sae= "
            f"({sae.cfg.d_sae} latents, sha256 {found})"
        )
    if references.provenance.get("model") != judge.model_name:
        raise InputError(
            f"the scorer 'decoder' reads the SAE's own model, {references.provenance.get('model')!r}: it cannot be "
            f"judged by {judge.model_name!r}"
        )


def _have_direction(embeddings: ReferenceEmbeddings) -> Tensor:
    """Which latents have no reference whose embedding is zero or not finite, `[d_sae]`."""
    length = embeddings.vectors.norm(dim=1)
    fine = length.isfinite() & (length > 0)
    return (fine[embeddings.row.clamp(min=0)] | (embeddings.row < 0)).all(dim=1)


class _TopTerms:
    """The running best terms of every latent, `[d_sae n_labels]`; -1 where there is none yet."""

    def __init__(self, d_sae: int, n_labels: int, dtype: torch.dtype) -> None:
        self.term = torch.full((d_sae, n_labels), -1)
        self.score = torch.full((d_sae, n_labels), -torch.inf, dtype=dtype)

    def update(self, block: ScoreBlock) -> None:
        """Take in scores; of equal ones the earlier term stays first. Terms come in ascending order."""
        n_labels = self.term.shape[1]
        score, column = _best(block.score, min(n_labels, block.score.shape[1]))
        score = torch.cat([self.score[block.latents], score.to(self.score.dtype)], dim=1)
        term = torch.cat([self.term[block.latents], column + block.first_term], dim=1)
        order = score.argsort(dim=1, descending=True, stable=True)[:, :n_labels]
        self.score[block.latents], self.term[block.latents] = score.gather(1, order), term.gather(1, order)


def _best(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` greatest of each row, greatest first, and their columns; of equal ones the first."""
    least, column = score.topk(k, dim=1)
    # topk may take any of several that are equal to the least one taken: those rows are sorted whole.
    tied = (score >= least[:, -1:]).sum(dim=1) > k
    if bool(tied.any()):
        column[tied] = score[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    column = column.sort(dim=1).values
    value = score.gather(1, column)
    order = value.argsort(dim=1, descending=True, stable=True)
    return value.gather(1, order), column.gather(1, order)
