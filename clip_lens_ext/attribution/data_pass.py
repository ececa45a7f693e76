"""Attributions over a data set: one prefix for each batch, shared by every target that is summed up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.accumulate import AttributionAccumulator
from clip_lens_ext.attribution.methods import Method, find_method
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.summary import AttributionSummary
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.data import ImageBatch, ImageBatches, Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import versions
from clip_lens_ext.saes.codes import encode
from clip_lens_ext.saes.identity import sae_sha256
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


@dataclass(frozen=True, eq=False)
class AttributionPass:
    """How the images of a data set are explained: what `aggregate_attributions` and `compare_heads` share.

    Attributes:
        tower, sae: what is explained.
        targets: each is summed up by itself; they share the prefix.
        method: a name of `METHODS`, or what is called in the same way.
        k: of the counts.
        target_of: for each image, by its position in the data, the number of the target that it is summed up for.
        hook_name, token_scope, error_term: the site, as in `attribution_patching`.
    """

    tower: HookedTower
    sae: SAE
    targets: tuple[Target, ...]
    method: str | Method
    k: int
    target_of: Sequence[int] | Tensor | None
    hook_name: str | None
    token_scope: TokenScope | None
    error_term: ErrorTerm | None

    def run(
        self,
        images: Any,
        *,
        preprocess: Preprocess | None,
        batch_size: int,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int,
        progress: bool,
    ) -> tuple[AttributionSummary, ...]:
        """The summary of each target, after one pass over the images."""
        sae_hook_name(self.tower, self.sae, self.hook_name)  # an SAE that does not fit is no fault of the first image
        if isinstance(self.method, str):
            find_method(self.method)
        batches = image_batches(images, preprocess=preprocess, batch_size=batch_size)
        own = self._own_targets(batches)
        found = Several(tuple(
            AttributionAccumulator(target.labels, self.sae.cfg.d_sae, k=self.k, own_images=own is not None)
            for target in self.targets
        ))  # fmt: skip
        report = run_pass(
            batches, lambda batch: self._explained(batch, own), found, checkpoint=checkpoint,
            checkpoint_every=checkpoint_every, description="attributions", progress=progress,
            settings=None if checkpoint is None else self._settings(own, batches),
        )  # fmt: skip
        origin = {"data_fingerprint": report.fingerprint, "versions": versions()}
        return tuple(
            part.result(skipped=report.skipped, provenance={**origin, "target_fingerprint": target.fingerprint})
            for part, target in zip(found.parts, self.targets, strict=True)
        )

    def _own_targets(self, batches: ImageBatches) -> list[int] | None:
        if self.target_of is None:
            return None
        own = torch.as_tensor(self.target_of)
        if own.dim() != 1 or own.is_floating_point() or own.dtype is torch.bool or len(own) == 0:
            raise InputError("target_of is a list of integers: the number of a target for each image")
        n_images, n_targets = batches.n_samples, len(self.targets[0])
        if n_images is not None and n_images != len(own):
            raise InputError(f"target_of has {len(own)} numbers for {n_images} images")
        if int(own.min()) < 0 or int(own.max()) >= n_targets:
            raise InputError(f"target_of: targets are 0 to {n_targets - 1}, got {int(own.min())} to {int(own.max())}")
        return own.tolist()

    def _explained(self, batch: ImageBatch, own: list[int] | None) -> list[list[Explained]]:
        """What a batch adds to the summary of each of `targets`."""
        x = batch.pixels.to(self.tower.cfg.device)
        x = x.to(self.tower.cfg.dtype) if x.is_floating_point() else x
        if own is None:
            return [[Explained(None, one, len(x))] for one in self._attributions(x, batch.names, self.targets)]
        if max(batch.indexes) >= len(own):
            raise InputError(f"target_of has {len(own)} numbers, and there is an image {max(batch.indexes)}")
        numbers = torch.tensor([own[index] for index in batch.indexes])
        found: list[list[Explained]] = [[] for _ in self.targets]
        for number in numbers.unique().tolist():
            rows = (numbers == number).nonzero().flatten()
            alone = tuple(target.select([number]) for target in self.targets)
            names = [batch.names[row] for row in rows.tolist()]
            for parts, one in zip(found, self._attributions(x[rows.to(x.device)], names, alone), strict=True):
                parts.append(Explained(number, one, len(rows)))
        return found

    def _attributions(self, x: Tensor, names: Sequence[str], targets: Sequence[Target]) -> list[Attribution | None]:
        """The attribution of each target, on one prefix; None where no latent is active in any image."""
        where: dict[str, Any] = {"hook_name": self.hook_name, "token_scope": self.token_scope}
        try:
            site = open_site(self.tower, x, self.sae, error_term=self.error_term, **where)
        except InputError as error:
            if len(encode(self.tower, x, self.sae, **where)) == 0:
                return [None] * len(targets)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"images {shown}: {error}") from error
        return [self._attribution(site, target) for target in targets]

    def _attribution(self, site: Site, target: Target) -> Attribution:
        method = find_method(self.method) if isinstance(self.method, str) else self.method
        found = method(self.tower, site, self.sae, target)
        if not isinstance(found, Attribution):
            raise InputError(
                f"{self.method!r} gives a {type(found).__name__}; only an Attribution can be summed up image by image"
            )
        return found

    def _settings(self, own: list[int] | None, batches: ImageBatches) -> dict[str, Any]:
        """By what two passes are the same pass, for its checkpoint."""
        metadata = self.sae.cfg.metadata
        return {
            "method": self.method if isinstance(self.method, str) else called(self.method), "k": self.k,
            "targets": [target.fingerprint for target in self.targets], "target_of": own,
            "hook_name": sae_hook_name(self.tower, self.sae, self.hook_name),
            "token_scope": self.token_scope or metadata.token_scope, "error_term": self.error_term or "kept",
            "model": self.tower.cfg.model_name, "model_sha256": tower_sha256(self.tower),
            "sae_sha256": sae_sha256(self.sae), "batch_size": batches.batch_size,
        }  # fmt: skip


class Explained(NamedTuple):
    """The attribution of some images of a batch: of all targets, or of the one target that is theirs.

    It is None where no latent is active in any of the images.
    """

    target: int | None
    result: Attribution | None
    n_images: int


class Several:
    """One accumulator for each of several targets, in one pass."""

    def __init__(self, parts: tuple[AttributionAccumulator, ...]) -> None:
        self.parts = parts

    def update(self, value: list[list[Explained]], /) -> None:
        """Take in a batch: one list for each accumulator."""
        for accumulator, several in zip(self.parts, value, strict=True):
            for target, result, n_images in several:
                if result is None:
                    accumulator.add_silent(n_images, target=target)
                else:
                    accumulator.update(result if target is None else {target: result})

    def merge(self, other: Several, /) -> Several:
        """Take in another one, accumulator by accumulator, and return itself."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The states of all, each name with the number of its accumulator before it."""
        return {f"{i}.{name}": value for i, part in enumerate(self.parts) for name, value in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said."""
        for i, part in enumerate(self.parts):
            own = {name.removeprefix(f"{i}."): value for name, value in state.items() if name.startswith(f"{i}.")}
            part.load_state_dict(own)

    def result(self) -> tuple[AttributionSummary, ...]:
        """The summaries so far."""
        return tuple(part.result() for part in self.parts)


def called(method: Method) -> str:
    """The name of a method, the same in every process.

    Example:
        >>> from functools import partial
        >>> called(partial(sorted, reverse=True))
        'sorted(reverse=True)'
    """
    if isinstance(method, partial):
        given = [*map(repr, method.args), *(f"{name}={value!r}" for name, value in sorted(method.keywords.items()))]
        return f"{called(method.func)}({', '.join(given)})"
    return str(getattr(method, "__qualname__", type(method).__qualname__))
