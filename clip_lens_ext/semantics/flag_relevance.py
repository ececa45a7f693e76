"""What a latent's share of a prompt is, what it was expected to be, and from where on it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics.flag_results import Evidence, Flag
from clip_lens_ext.semantics.labels import Alignment
from clip_lens_ext.semantics.prompts import Target


class Attributions(Protocol):
    """What is read of attributions over a data set, as `AttributionSummary` has it."""

    @property
    def share(self) -> Tensor:
        """`[target d_sae]`."""
        ...

    @property
    def n_active(self) -> Tensor:
        """`[target d_sae]`."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """One per target: the prompts."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Model, SAE hash, ..."""
        ...


class Relevance:
    """Measured and expected relevance of every latent for every prompt.

    Args:
        attributions: shares of every prompt.
        alignment: of a score that is a cosine.
        target: the same prompts in the same order, embedded by the judge of the alignment.
        min_share, min_gap: thresholds of the caller; None: from controls.
        share_quantile: a latent matters whose share is at least this quantile of those of all active latents.
        gap_quantile: a latent is unexpected whose gap is at least this quantile of the gaps that the same latents have
            when prompts are shuffled.

    Raises:
        InputError: prompts or latents that differ, or a score that is no cosine.
    """

    def __init__(
        self,
        attributions: Attributions,
        alignment: Alignment,
        target: Target,
        *,
        min_share: float | None,
        min_gap: float | None,
        share_quantile: float,
        gap_quantile: float,
    ) -> None:
        self.prompts = tuple(attributions.labels)
        self.share = attributions.share.double()
        _check(attributions, alignment, target, share_quantile, gap_quantile)
        self.alignment = alignment
        self.alive = attributions.n_active > 0
        self.score = alignment.score_vectors(target.vectors).T.double()
        # A latent without references is one of which nothing is expected.
        self.expected = self.score.nan_to_num(0).clamp(min=0)
        self.without_control: list[str] = []
        self.thresholds: dict[str, float] = {}
        self.sources: dict[str, str] = {}
        active = self.share[self.alive]
        active = active[active.isfinite()]
        if len(active) == 0:
            raise InputError("nothing speaks for any prompt: the attributions have no finite share")
        self.set("share", min_share, lambda: float(active.quantile(share_quantile)),
                 f"quantile {share_quantile:g} of all active latents")  # fmt: skip
        self.gap = self.rank(self.share) - self.rank(self.expected)
        self.matters = self.alive & (self.share >= self.thresholds["share"])
        self.set("gap", min_gap, lambda: self._gap_of_others(gap_quantile),
                 f"quantile {gap_quantile:g} with shuffled prompts")  # fmt: skip
        self.residual = self.share - self._fitted()

    def set(self, name: str, given: float | None, control: Any, source: str) -> None:
        """Note a threshold: the caller's, or what a control says."""
        self.thresholds[name] = float(control()) if given is None else float(given)
        self.sources[name] = source if given is None else "the caller"

    def rank(self, value: Tensor) -> Tensor:
        """Rank of each active latent for each prompt, in [0, 1]; equal values share their mean rank."""
        found = torch.zeros_like(value)
        for row, (line, alive) in enumerate(zip(value, self.alive, strict=True)):
            own = line[alive].nan_to_num(-torch.inf)
            ordered = own.sort().values
            low = torch.searchsorted(ordered, own)
            high = torch.searchsorted(ordered, own, right=True)
            found[row, alive] = (low + high - 1).double() / 2 / max(len(own) - 1, 1)
        return found

    def _gap_of_others(self, quantile: float) -> float:
        """A quantile of the gaps where each prompt has the expectations of another one, for up to ten such shifts."""
        n = len(self.prompts)
        if n < 2:
            raise InputError("one prompt has no other one to be shuffled with: pass more prompts, or min_gap=")
        if not bool(self.matters.any()):
            return float("inf")
        shifts = sorted({1 + round(i * (n - 2) / 9) for i in range(10)})
        share = self.rank(self.share)
        gaps = [(share - self.rank(self.expected.roll(shift, dims=0)))[self.matters] for shift in shifts]
        return float(torch.cat(gaps).quantile(quantile))

    def _fitted(self) -> Tensor:
        """The share that a straight line through all active latents gives to the expected relevance."""
        x, y = self.expected[self.alive], self.share[self.alive].nan_to_num(0)
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum().clamp(min=1e-300)
        return y.mean() + slope * (self.expected - x.mean())

    def number(self, prompt: str) -> int | None:
        """The row of a prompt; None where the attributions have no such prompt."""
        return self.prompts.index(prompt) if prompt in self.prompts else None

    def flag(
        self, kind: str, prompt: str, latent: int, strength: float, unit: str, subject: str,
        evidence: Sequence[Evidence], *, edit: str = "",
    ) -> Flag:  # fmt: skip
        """A flag with what this knows of its prompt and latent."""
        row = self.number(prompt)
        share, expected, gap, residual = (
            (float("nan"),) * 4 if row is None
            else tuple(float(value[row, latent]) for value in (self.share, self.expected, self.gap, self.residual))
        )  # fmt: skip
        passed = (self.thresholds["share"], self.sources["share"]) if self.is_relevant(prompt, latent) else ()
        own = [Evidence("share", share, *passed), Evidence("expected relevance", expected),
               Evidence("residual of the share", residual)]  # fmt: skip
        return Flag(kind, prompt, latent, self.alignment.labels[latent], share, expected, gap, strength, unit, subject,
                    (*evidence, *own), edit)  # fmt: skip

    def is_relevant(self, prompt: str, latent: int) -> bool:
        """Whether a latent matters for a prompt."""
        row = self.number(prompt)
        return row is not None and bool(self.matters[row, latent])


def _check(
    attributions: Attributions, alignment: Alignment, target: Target, share_quantile: float, gap_quantile: float
) -> None:
    labels = tuple(attributions.labels)
    if tuple(target.labels) != labels:
        raise InputError(
            f"the target has the prompts {list(target.labels)[:3]}, the attributions {list(labels)[:3]}: pass the "
            "prompts that the attributions are of, embedded by the judge of the alignment"
        )
    if attributions.share.shape[1] != alignment.d_sae:
        raise InputError(
            f"the attributions are of {attributions.share.shape[1]} latents, the alignment of {alignment.d_sae}"
        )
    if len(set(labels)) < len(labels):
        raise InputError("two targets have one prompt: give each prompt once")
    hashes = {"attributions": attributions.provenance.get("sae_sha256"),
              "alignment": alignment.provenance.get("sae_sha256")}  # fmt: skip
    if None not in hashes.values() and len(set(hashes.values())) > 1:
        raise InputError(f"the attributions and the alignment are of two SAEs: {hashes}")
    if not (0 <= share_quantile <= 1 and 0 <= gap_quantile <= 1):
        raise InputError(f"quantiles are in [0, 1], got {share_quantile} and {gap_quantile}")
