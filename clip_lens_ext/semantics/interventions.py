"""What an edit of pictures does to every latent and to the predictions, pair by pair, against its controls.

The same picture before and after the edit is one pair, so everything that the edit leaves alone cancels. A control is
another edit of the same pictures: a word of equal length instead of the word, the plate without letters. Measured
against a control, "before" is the control's picture: what is left is what the edit does and its control does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import fingerprint, tensors_sha256, versions
from clip_lens_ext.saes.codes import codes_of
from clip_lens_ext.saes.identity import sae_sha256
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.semantics.intervention_effects import UNTOUCHED, InterventionEffects
from clip_lens_ext.semantics.interventions_pass import (
    EditBatch,
    EditBatches,
    EffectAccumulator,
    EffectRows,
    known_by,
)
from clip_lens_ext.semantics.prompts import Target, embedded_prompts
from clip_lens_ext.semantics.through_latents import Through, cosines, tail, through_latents
from clip_lens_ext.semantics.word_match import holds
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope

Edited = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of pictures.

    Attributes:
        name: of the edit, distinct within one measurement.
        kind: `"text_drawn"`, `"text_masked"`, `"overlay"`, `"background"`, `"crop"`, ...: any word. Edits of one kind
            are each other's controls.
        before: pictures as the tower takes them, `[pair 3 height width]`.
        after: the same pictures edited, or the function that edits them.
        subject: the word that is drawn or masked; what the edit is about.
        controls: by name, other edits of the same pictures.
    """

    name: str
    kind: str
    before: Tensor
    after: Edited
    subject: str = ""
    controls: Mapping[str, Edited] = field(default_factory=dict)

    def pictures(self, edit: Edited) -> Tensor:
        """The pictures after an edit; a function gets a copy, and may work in place.

        Raises:
            InputError: they have another shape or dtype than the ones before.
        """
        edited = edit if isinstance(edit, Tensor) else edit(self.before.clone())
        if edited.shape != self.before.shape:
            raise InputError(
                f"the intervention {self.name!r} makes {list(edited.shape)} of {list(self.before.shape)}: the same "
                "pictures are needed, one by one"
            )
        # Bytes beside normalised floats run through the tower as well, and give changes that look like any other.
        if edited.dtype != self.before.dtype:
            raise InputError(
                f"the intervention {self.name!r} makes {edited.dtype} of {self.before.dtype}: pictures after an edit "
                "are as the tower takes them, like those before"
            )
        return edited


class _Seen(NamedTuple):
    """What the model sees in some pictures."""

    latent: Tensor
    """Greatest activation over the SAE's tokens, 0 where none is positive, float64 `[picture d_sae]`."""
    prediction: Tensor
    """Cosine with each prompt, float64 `[picture prompt]`."""


@torch.no_grad()
def measure_interventions(
    clip: HookedCLIP,
    sae: SAE,
    prompts: str | Sequence[str] | Target,
    interventions: Intervention | Sequence[Intervention],
    *,
    n_prompts: int = 2,
    n_latents: int = 12,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    batch_size: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    progress: bool = True,
) -> InterventionEffects:
    """Latents and predictions before and after each edit, with the paired difference and its standard error.

    `change = mean_x (f(after x) - f(before x))`, positive where the edit raises it, and `error` the standard deviation
    of the pairs' differences over the root of their number. For the prompts that rise most, the part of the change
    that goes through a latent is `mean_x (y(after x) - y(after x, the latent as it was before))`: exact, by running the
    rest of the tower again. Which latents are tried is chosen by the gradient; the rest have no entry.

    Args:
        clip: the model.
        sae: an SAE of the vision tower.
        prompts: what is predicted: texts, or a `Target` of directions, such as `direction_target(vectors,
            labels=names)` for a model without a text tower.
        interventions: one or several, of at least two pairs each.
        n_prompts: of how many prompts, those of the greatest change, the way through latents is measured; prompts that
            hold the subject as a word come in addition.
        n_latents: how many latents for each of them.
        hook_name, token_scope: instead of the SAE's own.
        batch_size: pictures in a batch.
        checkpoint: a file; measurements that were interrupted go on after the last edit in it, and give what
            uninterrupted ones give. Edits are known by their names and pictures: what a function does is not looked at.
        checkpoint_every: edits between two writes.
        progress: draw a bar.

    Returns:
        `InterventionEffects` on the CPU: a row for each edit against the untouched pictures, and one for each edit
        against each of its controls.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: nothing to measure, a name twice, fewer than two pairs, pictures that do not fit, or a checkpoint of
            other measurements.

    Numerics:
        Differences of pairs in float64; predictions in float32 where the model is of half precision. A batch's dense
        latents `[picture token d_sae]` are held a few times over: take small batches for a wide SAE on all tokens.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> plain = world.sample(4, seed=2, split="test", overlay=None, word=None).images
        >>> stamped = cle.planted.normalise(world.draw_overlay(plain, "stamp"))
        >>> edit = Intervention("stamp", "overlay", cle.planted.normalise(plain), stamped)
        >>> prompts = ["a photo of a tulip", "a photo of a duck"]
        >>> effects = measure_interventions(clip, sae, prompts, edit, progress=False)
        >>> bool(effects.prediction_change[0, 0] > effects.prediction_change[0, 1])
        True
    """
    edits = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    _check(edits, batch_size)
    if n_prompts < 1 or n_latents < 1:
        raise InputError(f"n_prompts and n_latents must be at least 1, got {n_prompts} and {n_latents}")
    vectors, texts = embedded_prompts(clip, prompts)
    tower = clip.vision
    name = sae_hook_name(tower, sae, hook_name)
    scope = token_scope or sae.cfg.metadata.token_scope
    known: dict[int, tuple[_Seen, Tensor]] = {}

    def seen(x: Tensor) -> tuple[_Seen, Tensor]:
        # The activation has about as many numbers as the pictures that the caller holds: it is not computed again.
        latents, predictions, activations = [], [], []
        for some in x.split(batch_size):
            activation = tower.run_to(some.to(tower.cfg.device, tower.cfg.dtype), name)
            positions = TokenPositions(scope or default_scope(activation), None, tower.n_prefix)
            codes = codes_of(sae, activation, positions, hook_name=name)
            latents.append(codes.dense().amax(dim=1).clamp(min=0).double().cpu())
            predictions.append(cosines(tail(tower, name, activation), vectors).double().cpu())
            activations.append(activation.to(x.device))
        return _Seen(torch.cat(latents), torch.cat(predictions)), torch.cat(activations)

    def seen_once(x: Tensor) -> tuple[_Seen, Tensor]:
        # Many words are drawn on the same neutral pictures: those are looked at once.
        if id(x) not in known:
            known[id(x)] = seen(x)
        return known[id(x)]

    def step(batch: EditBatch) -> EffectRows:
        edit = batch.edit
        before, old = seen_once(edit.before)
        after, new = seen(edit.pictures(edit.after))
        chosen = _chosen(edit, texts, before.prediction, after.prediction, n_prompts)
        through = through_latents(
            tower, sae, old, new, vectors[chosen], hook_name=name, token_scope=scope,
            n_latents=n_latents, batch_size=batch_size, row=0, prompts=chosen,
        )  # fmt: skip
        pairs = {UNTOUCHED: (before, after)}
        for label, control in edit.controls.items():
            pairs[label] = seen(edit.pictures(control))[0], after
        return _rows(edit, pairs, through)

    settings: dict[str, Any] = {}
    if checkpoint is not None:
        settings = {
            "what": "measure_interventions", "model_sha256": tower_sha256(tower), "sae_sha256": sae_sha256(sae),
            "hook_name": name, "token_scope": scope, "prompts": texts, "n_prompts": n_prompts, "n_latents": n_latents,
            "vectors": tensors_sha256({"vectors": vectors}), "batch_size": batch_size, **known_by(edits),
        }  # fmt: skip
    found = EffectAccumulator()
    run_pass(
        EditBatches(edits), step, found, checkpoint=checkpoint, checkpoint_every=checkpoint_every, settings=settings,
        description="interventions", unit="edit", progress=progress,
    )  # fmt: skip
    columns: dict[str, Any] = {label: tuple(column) if isinstance(column, list) else column
                               for label, column in found.result()._asdict().items()}  # fmt: skip
    return InterventionEffects(
        **columns, prompts=texts, hook_name=name, token_scope=str(scope),
        provenance={"model": tower.cfg.model_name, "sae_sha256": sae.cfg.metadata.sha256,
                    "pictures": [fingerprint(edit.before) for edit in edits], "versions": versions()},
    )  # fmt: skip


def _check(edits: list[Intervention], batch_size: int) -> None:
    if not edits or batch_size < 1:
        raise InputError("there is nothing to measure: at least one intervention and one picture a batch are needed")
    names = [edit.name for edit in edits]
    if len(set(names)) < len(names):
        raise InputError(f"two interventions are called {next(name for name in names if names.count(name) > 1)!r}")
    for edit in edits:
        if edit.before.dim() != 4 or not edit.before.is_floating_point() or len(edit.before) < 2:
            raise InputError(
                f"the intervention {edit.name!r} has {edit.before.dtype} {list(edit.before.shape)}: two pictures or "
                "more are needed, floats [pair 3 height width] as the tower takes them"
            )
        if UNTOUCHED in edit.controls:
            raise InputError(
                f"a control of {edit.name!r} is called {UNTOUCHED!r}, which names the pictures as they were"
            )
        for given in (edit.after, *edit.controls.values()):
            if isinstance(given, Tensor):  # what is there already is looked at before anything is computed
                edit.pictures(given)


def _rows(edit: Intervention, pairs: Mapping[str, tuple[_Seen, _Seen]], through: list[Through]) -> EffectRows:
    """The edit against the untouched pictures, and against each control; of entries, all are of the first row."""
    numbers: dict[str, Tensor] = {}
    for what in ("latent", "prediction"):
        parts = [_paired(getattr(first, what), getattr(second, what)) for first, second in pairs.values()]
        for label, column in zip(("before", "after", "change", "error"), zip(*parts, strict=True), strict=True):
            numbers[f"{what}_{label}"] = torch.stack(column)
    n = len(pairs)
    return EffectRows(
        names=[edit.name] * n, kinds=[edit.kind] * n, subjects=[edit.subject] * n, against=list(pairs),
        n_pairs=torch.tensor([len(edit.before)] * n), **numbers,
        through_row=torch.tensor([one.row for one in through], dtype=torch.int64),
        through_prompt=torch.tensor([one.prompt for one in through], dtype=torch.int64),
        through_latent=torch.tensor([one.latent for one in through], dtype=torch.int64),
        through_change=torch.tensor([one.change for one in through], dtype=torch.float64),
        through_error=torch.tensor([one.error for one in through], dtype=torch.float64),
    )  # fmt: skip


def _paired(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    difference = after - before
    return before.mean(dim=0), after.mean(dim=0), difference.mean(dim=0), difference.std(dim=0) / len(before) ** 0.5


def _chosen(edit: Intervention, texts: tuple[str, ...], before: Tensor, after: Tensor, n: int) -> list[int]:
    """The prompts of which the way through latents is measured: those that hold the subject, and `n` others."""
    order = _paired(before, after)[2].argsort(descending=True, stable=True).tolist()
    named = [place for place, text in enumerate(texts) if holds(text, edit.subject)]
    return named + [place for place in order if place not in named][:n]
