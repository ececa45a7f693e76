"""Attributions added up batch by batch, in memory that does not grow with the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.shards import check_mergeable
from clip_lens_ext.attribution.summary import AttributionSummary
from clip_lens_ext.errors import InputError
from clip_lens_ext.image_files import Skipped

_SUMS = ("total", "n_top", "n_active", "n_images")
# What one summary has one of; read off the first attribution that comes in.
_SITE = ("method", "unit", "hook_name", "tower", "token_scope", "error_term", "settings", "seed")
_ORIGIN = ("model", "sae_sha256", "sae_format")


class AttributionAccumulator:
    """Sums of attributions for each target and latent, `[target d_sae]` in float64 on the CPU.

    Args:
        labels: of the targets.
        d_sae: number of latents.
        k: a latent is counted where it is among the `k` greatest attributions of an image.
        own_images: whether each target is summed over images of its own; then `update` takes a mapping.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(4, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[:2])
        >>> found = AttributionAccumulator(target.labels, sae.cfg.d_sae, k=3)
        >>> for part in pixels.split(2):
        ...     found.update(cle.attribution_patching(clip.vision, part, sae, target))
        >>> found.result().n_images
        tensor([4, 4])
    """

    def __init__(self, labels: Sequence[str], d_sae: int, *, k: int = 10, own_images: bool = False) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k must be a positive integer, got {k!r}")
        self.labels, self.d_sae, self.k, self.own_images = tuple(labels), d_sae, k, own_images
        shape = (len(self.labels), d_sae)
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.n_top = torch.zeros(shape, dtype=torch.int64)
        # All targets see the same images, unless each has its own.
        self.n_active = torch.zeros(len(self.labels) if own_images else 1, d_sae, dtype=torch.int64)
        self.n_images = torch.zeros(len(self.labels), dtype=torch.int64)
        self._facts: dict[str, Any] = {}

    def update(self, result: Attribution | Mapping[int, Attribution], /) -> None:
        """Take in the attributions of a batch.

        Args:
            result: of all targets on the same images; with `own_images` a mapping from the number of a target to the
                result of that target alone, on images of its own.

        Raises:
            InputError: a result of other targets, another site, method or SAE, or per token.
        """
        if isinstance(result, Mapping) != self.own_images:
            wanted = "a mapping from targets to results" if self.own_images else "one result of all targets"
            raise InputError(f"this accumulator has own_images={self.own_images} and takes {wanted}")
        parts = result if isinstance(result, Mapping) else {None: result}
        for number, part in parts.items():
            self._check(number, part)
        for number, part in parts.items():
            self._add(slice(None) if number is None else slice(number, number + 1), part)

    def add_silent(self, n_images: int, *, target: int | None = None) -> None:
        """Take in images on which no latent is active at all: they count in every mean, with zero."""
        self.n_images[slice(None) if target is None else slice(target, target + 1)] += n_images

    def merge(self, other: AttributionAccumulator, /) -> AttributionAccumulator:
        """Take in another one of the same settings, and return itself."""
        check_mergeable("accumulators", self._settings(), other._settings())
        if self._facts and other._facts:
            check_mergeable("accumulators", self._facts, other._facts)
        self._facts = self._facts or other._facts
        for name in _SUMS:
            getattr(self, name).add_(getattr(other, name))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Sums and settings."""
        return {**{name: getattr(self, name).clone() for name in _SUMS}, "facts": self._facts,
                "of": self._settings()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said.

        Raises:
            InputError: the state is of other settings.
        """
        check_mergeable("accumulators", self._settings(), {**state["of"], "labels": tuple(state["of"]["labels"])})
        self._facts = dict(state["facts"])
        for name in _SUMS:
            setattr(self, name, state[name].clone())

    def result(
        self, *, skipped: Sequence[Skipped] = (), provenance: Mapping[str, Any] | None = None
    ) -> AttributionSummary:
        """The summary so far.

        Args:
            skipped: what the pass could not read.
            provenance: what is known of the origin beyond the model and the SAE.

        Raises:
            InputError: nothing was taken in.
        """
        if not self._facts:
            raise InputError("no attribution was taken in, so there is nothing to sum up")
        site = {name: self._facts[name] for name in _SITE if name not in ("settings", "seed")}
        return AttributionSummary(
            total=self.total.clone(), n_top=self.n_top.clone(), n_images=self.n_images.clone(),
            n_active=self.n_active.expand(len(self.labels), -1).clone(), labels=self.labels, k=self.k,
            own_images=self.own_images, skipped=tuple(skipped),
            provenance={**{name: self._facts[name] for name in _ORIGIN}, **(provenance or {})}, **site,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        return {"labels": self.labels, "d_sae": self.d_sae, "k": self.k, "own_images": self.own_images}

    def _check(self, number: int | None, part: Attribution) -> None:
        if number is not None and not 0 <= number < len(self.labels):
            raise InputError(f"targets are 0 to {len(self.labels) - 1}, got {number}")
        labels = self.labels if number is None else (self.labels[number],)
        if part.labels != labels or part.d_sae != self.d_sae:
            raise InputError(
                f"expected attributions to {', '.join(labels)} over {self.d_sae} latents, got {', '.join(part.labels)} "
                f"over {part.d_sae}"
            )
        if part.token is not None:
            raise InputError("the attribution is per token; compute it with per_token=False")
        if not torch.isfinite(part.value).all():
            raise InputError("the attribution holds NaN or infinite values")
        origin = part.provenance or {}
        facts = {**{name: getattr(part, name) for name in _SITE}, **{name: origin.get(name) for name in _ORIGIN}}
        facts = json.loads(json.dumps(facts))  # as they come back from a checkpoint
        if self._facts:
            check_mergeable("attributions", self._facts, facts)
        self._facts = facts

    def _add(self, rows: slice, part: Attribution) -> None:
        latent = part.latent.cpu()
        self.total[rows].index_add_(1, latent, part.value.detach().double().cpu().T)
        self.n_images[rows] += part.n_sample
        active = rows if self.own_images else slice(None)
        # A result may have values for latents that are not active, where a baseline is not zero.
        self.n_active[active].index_add_(1, latent, (part.activation != 0).long().cpu()[None].expand(
            self.n_active[active].shape[0], -1))  # fmt: skip
        top = part.top(self.k).latents.transpose(0, 1).flatten(1)
        for target, found in zip(self.n_top[rows], top, strict=True):
            target.add_(torch.bincount(found[found >= 0], minlength=self.d_sae))
