"""The result of an alignment: labels, scores and margins of every latent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.result_files import load_result, save_result


class Label(NamedTuple):
    """A term of a latent, and its score."""

    term: str
    score: float


@dataclass(frozen=True, eq=False)
class Alignment:
    """The best terms of every latent; greater scores mean nearer terms.

    Attributes:
        scorer: name of the score.
        unit: what it is measured in.
        term: number of the best terms, best first, `[d_sae n_labels]`; -1 for a latent without a label.
        score: their scores, `[d_sae n_labels]`; NaN for a latent without a label.
        n_references: how many references each latent has, `[d_sae]`.
        terms: the vocabulary.
        judge: name of the model that compared.
        vocabulary: the vocabulary's fingerprint.
        hook_name, token_scope: where the SAE reads.
        settings: of the scorer, as plain JSON values.
        provenance: model, SAE hash, data fingerprint, judge, versions.
        directions: what is compared with terms, of unit length, `[d_sae d_embed]`, NaN for a latent without a label;
            None where the score is no cosine.
        baseline: what is subtracted from the cosine, `[d_sae]`; None likewise.
        term_vectors: of unit length, `[term d_embed]`; None likewise.
    """

    scorer: str
    unit: str
    term: Tensor
    score: Tensor
    n_references: Tensor
    terms: tuple[str, ...]
    judge: str
    vocabulary: str
    hook_name: str
    token_scope: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    directions: Tensor | None = None
    baseline: Tensor | None = None
    term_vectors: Tensor | None = None

    @property
    def d_sae(self) -> int:
        """Number of latents of the SAE."""
        return len(self.term)

    @cached_property
    def labels(self) -> tuple[str | None, ...]:
        """The best term of each latent; None where there is none."""
        return tuple(None if best < 0 else self.terms[best] for best in self.term[:, 0].tolist())

    @property
    def alignment(self) -> Tensor:
        """The score of each latent's label, `[d_sae]`; NaN where there is none."""
        return self.score[:, 0]

    @property
    def margin(self) -> Tensor:
        """By how much the label's score exceeds that of the second term, `[d_sae]`; NaN where there are not two."""
        if self.score.shape[1] < 2:
            return torch.full_like(self.score[:, 0], torch.nan)
        return self.score[:, 0] - self.score[:, 1]

    @property
    def n_unlabelled(self) -> int:
        """Latents without a label: without references, or whose references cancel."""
        return int((self.term[:, 0] < 0).sum())

    def __repr__(self) -> str:
        return (
            f"Alignment({self.scorer!r} by {self.judge!r}, {self.d_sae - self.n_unlabelled} of {self.d_sae} latents "
            f"labelled with {len(self.terms)} terms, {self.hook_name}, {self.token_scope} tokens)"
        )

    def of(self, latent: int) -> tuple[Label, ...]:
        """The best terms of one latent, best first; empty where it has none.

        Raises:
            InputError: there is no such latent.
        """
        self._check_latent(latent)
        pairs = zip(self.term[latent].tolist(), self.score[latent].tolist(), strict=True)
        return tuple(Label(self.terms[term], score) for term, score in pairs if term >= 0)

    def score_of(self, latent: int, term: str) -> float:
        """The score of one latent for one term of the vocabulary; NaN for a latent without a label.

        Raises:
            InputError: no such latent or term, or a score that was not kept: `"soft_wpmi"` keeps the best terms only.
        """
        self._check_latent(latent)
        number = self._number(term)
        if self.directions is not None and self.baseline is not None and self.term_vectors is not None:
            return float(self.directions[latent] @ self.term_vectors[number] - self.baseline[latent])
        if int(self.term[latent, 0]) < 0:
            return float("nan")
        kept = (self.term[latent] == number).nonzero().flatten()
        if len(kept) == 0:
            raise InputError(
                f"{self.scorer!r} keeps the {self.term.shape[1]} best terms of each latent, and {term!r} is not one "
                f"of latent {latent}: ask align for more n_labels"
            )
        return float(self.score[latent, kept[0]])

    def score_vectors(self, vectors: Tensor) -> Tensor:
        """Scores of every latent for any directions of the judge's embedding space, such as embeddings of prompts.

        Args:
            vectors: `[text d_embed]`, of any length but zero.

        Returns:
            `[d_sae text]`, NaN for a latent without a label.

        Raises:
            InputError: a score that is no cosine, or vectors of another width, of length zero or not finite.
        """
        if self.directions is None or self.baseline is None:
            raise InputError(f"the score {self.scorer!r} is no cosine: it is not defined outside of its vocabulary")
        if vectors.dim() != 2 or vectors.shape[1] != self.directions.shape[1]:
            raise InputError(f"expected vectors [text {self.directions.shape[1]}], got {list(vectors.shape)}")
        if not bool((torch.isfinite(vectors).all(dim=1) & (vectors != 0).any(dim=1)).all()):
            raise InputError("a vector is zero or not finite: it has no direction")
        unit = F.normalize(vectors.detach().to(self.directions.device, self.directions.dtype), dim=1)
        return self.directions @ unit.T - self.baseline[:, None]

    def find(self, term: str, k: int = 5) -> list[int]:
        """The latents with the greatest scores for a term of the vocabulary, best first.

        Raises:
            InputError: no such term, `k` below 1, or a score that is no cosine.
        """
        number = self._number(term)
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        if self.term_vectors is None:
            raise InputError(f"the score {self.scorer!r} keeps the best terms of each latent only: see .labels")
        score = self.score_vectors(self.term_vectors[number : number + 1])[:, 0]
        known = score.isfinite().nonzero().flatten()
        return known[score[known].argsort(descending=True, stable=True)[:k]].tolist()

    def to_frame(self) -> pd.DataFrame:
        """One row for each latent: latent, label, score, margin, second, n_references."""
        second: list[str | None] = [None] * self.d_sae
        if self.term.shape[1] > 1:
            second = [None if number < 0 else self.terms[number] for number in self.term[:, 1].tolist()]
        return pd.DataFrame({
            "latent": range(self.d_sae), "label": pd.Series(self.labels, dtype=object),
            "score": self.alignment.double().numpy(), "margin": self.margin.double().numpy(),
            "second": pd.Series(second, dtype=object), "n_references": self.n_references.numpy(),
        })  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        same = self.term.shape == self.score.shape and len(self.n_references) == self.d_sae
        return same and int(self.term.max()) < len(self.terms)

    def _check_latent(self, latent: int) -> None:
        if not 0 <= latent < self.d_sae:
            raise InputError(f"latents are 0 to {self.d_sae - 1}, got {latent}")

    def _number(self, term: str) -> int:
        if term not in self._numbers:
            hint = near(term, self.terms) if len(self.terms) < 20_000 else ""
            raise InputError(f"{term!r} is not one of the {len(self.terms)} terms of this vocabulary{hint}")
        return self._numbers[term]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {term: number for number, term in enumerate(self.terms)}


@dataclass(frozen=True, eq=False)
class LabelUniqueness:
    """How far labels tell latents apart; `label_uniqueness` makes it.

    Attributes:
        share: share of the labelled latents whose label no other latent has, in [0, 1]; NaN if none has a label.
        n_labelled: latents with a label.
        counts: latents of each label that occurs, the most frequent first.
    """

    share: float
    n_labelled: int
    counts: dict[str, int]

    @property
    def n_labels(self) -> int:
        """Labels that occur."""
        return len(self.counts)


def label_uniqueness(alignment: Alignment) -> LabelUniqueness:
    """The share of labelled latents whose label no other latent has, and how many latents each label has.

    Args:
        alignment: from `align`.

    Returns:
        `LabelUniqueness`. The share falls with more latents and fewer terms: compare at equal sizes.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(60, seed=0, split="test").images)
        >>> references = cle.collect_references(clip.vision, pixels, sae, k=5, progress=False)
        >>> two = cle.Vocabulary.from_terms(["crane", "heart"])
        >>> label_uniqueness(cle.align(references, two, clip, images=pixels, progress=False)).share
        0.0
    """
    best = alignment.term[:, 0]
    number, count = best[best >= 0].unique(return_counts=True)
    order = count.argsort(descending=True, stable=True)
    n_labelled = int(count.sum())
    counts = {alignment.terms[i]: n for i, n in zip(number[order].tolist(), count[order].tolist(), strict=True)}
    share = int((count == 1).sum()) / n_labelled if n_labelled else float("nan")
    return LabelUniqueness(share, n_labelled, counts)
