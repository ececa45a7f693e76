"""Sets of latents at zero: what is predicted without them, beside random latents of like activation at zero.

The check of a flag: if latents make a decision, the decision goes without them, and does not go without as many others
that are worth as much. The rest of the activation stays, the SAE's error with it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.data import ImageBatch, Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.pass_rows import RowAccumulator
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import tensors_sha256, versions
from clip_lens_ext.saes.codes import SparseCodes, codes_of
from clip_lens_ext.saes.decoder import check_decoder, check_reconstructs, decoder_rows, output_scale
from clip_lens_ext.saes.identity import sae_sha256
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.semantics.prompts import Target, embedded_prompts
from clip_lens_ext.semantics.switch_off_pass import AXES, OffBatch
from clip_lens_ext.semantics.switched_off import SwitchedOff
from clip_lens_ext.semantics.through_latents import cosines, tail
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope

_ENTRIES_AT_ONCE = 16_384  # decoder rows that are gathered at a time: 50 MB at d_model 768


@torch.no_grad()
def switch_off(
    clip: HookedCLIP,
    images: Any,
    sae: SAE,
    prompts: str | Sequence[str] | Target,
    latents: Sequence[int] | Tensor | Mapping[str, Sequence[int]],
    *,
    n_controls: int = 5,
    n_nearest: int = 4,
    spared: Sequence[int] | Tensor = (),
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    seed: int = 0,
    preprocess: Preprocess | None = None,
    batch_size: int = 16,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> SwitchedOff:
    """Predict with latents set to zero at every token of the SAE, the error term kept.

    `x' = x - sum_{j in set} z_j D_j`, and the rest of the tower runs on `x'`. A control takes away, in each sample, one
    random active latent outside of the set for each of the set's that is active there: one of the `n_nearest` whose
    worth, the sum over tokens of activation times norm of the decoder row, is nearest to that latent's. A set's numbers
    and controls are the same whatever other sets there are.

    Args:
        clip: the model.
        images: samples, as `clip_lens_ext.data.image_batches` takes them: a folder, a tensor, a data set, ...
        sae: an SAE of the vision tower.
        prompts: what is predicted: texts (their cosines), or a `Target`, whose own predictions are taken.
        latents: one set of latents, or several by name, which share the run up to the SAE's hook.
        n_controls: random sets for each set; 0: none.
        n_nearest: of how many latents nearest in worth a control takes one at random.
        spared: latents that no control takes away, such as those of a greater set that this one is the first part of.
        hook_name, token_scope: instead of the SAE's own.
        seed: of the controls; a sample's depend on its position in the data, not on batches or other samples.
        preprocess: instead of the model's own.
        batch_size: samples in a batch.
        checkpoint: a file; a pass that was interrupted goes on from it, and gives what an uninterrupted one gives.
        checkpoint_every: batches between two writes.
        progress: draw a bar.

    Returns:
        `SwitchedOff` on the CPU.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: no latent, one that the SAE does not have, no sample that can be read, or a checkpoint of another
            pass.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(4, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[:3])
        >>> best = cle.attribution_patching(clip.vision, pixels, sae, target).top(5).latents[0, 0]
        >>> found = switch_off(clip, pixels, sae, target, best, n_controls=2, progress=False)
        >>> found.after.shape, found.control.shape
        (torch.Size([1, 4, 3]), torch.Size([1, 2, 4, 3]))
        >>> bool(found.after[0, 0, 0] < found.before[0, 0])
        True
    """
    sets = _sets(latents, sae.cfg.d_sae)
    if n_controls < 0 or n_nearest < 1:
        raise InputError(f"n_controls is 0 or more, n_nearest 1 or more, got {n_controls} and {n_nearest}")
    check_reconstructs(sae)
    kept = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    if len(spared):
        kept[_sets({"spared": spared}, sae.cfg.d_sae)["spared"]] = True
    reader = _reader(clip, prompts)
    tower = clip.vision
    name = sae_hook_name(tower, sae, hook_name)
    scope = token_scope or sae.cfg.metadata.token_scope
    batches = image_batches(images, preprocess=preprocess or clip.preprocess, batch_size=batch_size)
    masks = {label: torch.zeros(sae.cfg.d_sae, dtype=torch.bool).index_fill(0, members, True)
             for label, members in sets.items()}  # fmt: skip

    def step(batch: ImageBatch) -> OffBatch:
        pixels = batch.pixels.to(tower.cfg.device, tower.cfg.dtype)
        at = _Hook(clip, sae, name, scope, tower.run_to(pixels, name))
        worth = at.worth()
        after, control, n_off, activation, replaced = [], [], [], [], []
        for label, mask in masks.items():
            off = (worth > 0) & mask
            after.append(reader.read(at.without(off)))
            n_off.append(off.sum(dim=1))
            activation.append((worth * off).sum(dim=1))
            # Drawn by the sample's own place: other batches and other sets leave a control as it is.
            draws = [torch.stack([matched(worth[row], off[row], mask | kept, n_nearest=n_nearest,
                                          rng=random.Random(f"{seed} {index} {label} {draw}"))
                                  for row, index in enumerate(batch.indexes)])
                     for draw in range(n_controls)]  # fmt: skip
            control.append([reader.read(at.without(draw)) for draw in draws])
            replaced.append([(worth * draw).sum(dim=1) for draw in draws])
        before = reader.read(at.without(torch.zeros_like(worth, dtype=torch.bool)))
        return OffBatch(
            before, torch.stack(after), _stacked(control, before), torch.stack(n_off), torch.stack(activation),
            _stacked(replaced, worth[:, 0]), torch.tensor(batch.indexes), list(batch.names),
        )  # fmt: skip

    numbers = {label: members.tolist() for label, members in sets.items()}
    spared = kept.nonzero().flatten().tolist()
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        settings = {
            "what": "switch_off", "model_sha256": tower_sha256(tower), "sae_sha256": sae_sha256(sae), "hook_name": name,
            "token_scope": scope, "target": reader.fingerprint, "prompts": reader.labels,
            "sets": list(numbers.items()), "n_controls": n_controls, "n_nearest": n_nearest, "spared": spared,
            "seed": seed, "batch_size": batches.batch_size,
        }  # fmt: skip
    found = RowAccumulator(OffBatch, AXES)
    report = run_pass(
        batches, step, found, checkpoint=checkpoint, checkpoint_every=checkpoint_every, settings=settings,
        description="switching latents off", progress=progress,
    )  # fmt: skip
    whole = found.result()._asdict()
    return SwitchedOff(
        sets=tuple(sets), latents=numbers, prompts=reader.labels, names=tuple(whole.pop("names")), **whole,
        hook_name=name, token_scope=str(scope), seed=seed, skipped=report.skipped,
        provenance={"model": clip.model_name, "sae_sha256": sae.cfg.metadata.sha256, "n_nearest": n_nearest,
                    "spared": spared, "data_fingerprint": report.fingerprint, "versions": versions()},
    )  # fmt: skip


def matched(worth: Tensor, off: Tensor, chosen: Tensor, *, n_nearest: int, rng: random.Random) -> Tensor:
    """For each latent that is off, another active one at random among the nearest in worth, true `[d_sae]`.

    Args:
        worth: of each latent, 0 where it is not active, `[d_sae]`.
        off: which active latents are to be replaced, `[d_sae]`.
        chosen: latents that no control may have, `[d_sae]`.
        n_nearest: among how many nearest ones.
        rng: of the choice.
    """
    found = torch.zeros_like(off)
    free = ((worth > 0) & ~chosen).nonzero().flatten()
    wanted = off.nonzero().flatten()
    # The greatest first: for those there are the fewest of like worth.
    for latent in wanted[worth[wanted].argsort(descending=True, stable=True)]:
        if len(free) == 0:
            break
        distance = (worth[free].log() - worth[latent].log()).abs()
        nearest = distance.argsort(stable=True)[:n_nearest]
        place = int(nearest[rng.randrange(len(nearest))])
        found[free[place]] = True
        free = torch.cat([free[:place], free[place + 1 :]])
    return found


class _Hook:
    """A batch at the SAE's hook."""

    def __init__(
        self, clip: HookedCLIP, sae: SAE, hook_name: str, scope: TokenScope | None, activation: Tensor
    ) -> None:
        self.clip, self.sae, self.hook_name, self.activation = clip, sae, hook_name, activation
        self.positions = TokenPositions(scope or default_scope(activation), None, clip.vision.n_prefix)
        self.codes: SparseCodes = codes_of(sae, activation, self.positions, hook_name=hook_name)
        self.rows = self.positions.take(activation)
        flat = self.rows.reshape(-1, sae.cfg.d_in).to(sae.dtype)
        if len(self.codes):
            check_decoder(sae, flat[:1], self.codes.latent.unique())
        self.scale = output_scale(sae, flat)[:, 0]
        self.norm = decoder_rows(sae, torch.arange(sae.cfg.d_sae, device=flat.device)).norm(dim=-1)

    def worth(self) -> Tensor:
        """Sum over the tokens of activation times norm of the decoder row, `[sample d_sae]`."""
        codes = self.codes
        scale = self.scale[codes.sample * codes.n_token + codes.token]
        value = (codes.value * scale).abs() * self.norm[codes.latent]
        found = value.new_zeros(codes.n_sample * codes.d_sae)
        found.index_add_(0, codes.sample * codes.d_sae + codes.latent, value)
        return found.reshape(codes.n_sample, codes.d_sae).cpu()

    def without(self, off: Tensor) -> Tensor:
        """Embeddings `[sample d_embed]` with some latents of each sample at zero, `[sample d_sae]`."""
        codes = self.codes
        entries = off.to(codes.latent.device)[codes.sample, codes.latent].nonzero().flatten()
        rows = self.rows.reshape(-1, self.sae.cfg.d_in)
        removed = torch.zeros_like(rows)
        for some in entries.split(_ENTRIES_AT_ONCE):
            token = codes.sample[some] * codes.n_token + codes.token[some]
            amount = (codes.value[some] * self.scale[token])[:, None]
            removed.index_add_(0, token, (decoder_rows(self.sae, codes.latent[some]) * amount).to(rows.dtype))
        edited = (rows - removed).reshape(self.rows.shape)
        return tail(self.clip.vision, self.hook_name, self.positions.put(self.activation, edited))


def _stacked(values: list[list[Tensor]], like: Tensor) -> Tensor:
    """`[set draw ...]`, also where there is no draw."""
    return torch.stack([torch.stack(draws) if draws else like.new_zeros(0, *like.shape) for draws in values])


class _Reader(NamedTuple):
    """What is predicted from embeddings."""

    read: Callable[[Tensor], Tensor]
    """Predictions, float64 `[sample prompt]` on the CPU."""
    labels: tuple[str, ...]
    fingerprint: str


def _reader(clip: HookedCLIP, prompts: str | Sequence[str] | Target) -> _Reader:
    if isinstance(prompts, Target) and callable(prompts):
        # A target of one's own may have no hash: then what it is made of is all that is known of it.
        own = getattr(prompts, "fingerprint", "")
        known = tensors_sha256({"vectors": prompts.vectors}, about=f"{type(prompts).__name__} {own}")
        return _Reader(lambda embedding: prompts(embedding).double().cpu(), tuple(prompts.labels), known)
    vectors, labels = embedded_prompts(clip, prompts)
    known = tensors_sha256({"vectors": vectors})
    return _Reader(lambda embedding: cosines(embedding, vectors).double().cpu(), labels, known)


def _sets(latents: Sequence[int] | Tensor | Mapping[str, Sequence[int] | Tensor], d_sae: int) -> dict[str, Tensor]:
    named = latents if isinstance(latents, Mapping) else {"latents": latents}
    found = {}
    for name, members in named.items():
        numbers = torch.as_tensor(members).cpu().flatten()
        if numbers.numel() == 0 or numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise InputError(f"the set {name!r} has no latents: they are whole numbers, at least one")
        if int(numbers.min()) < 0 or int(numbers.max()) >= d_sae:
            raise InputError(f"the SAE has the latents 0..{d_sae - 1}, and the set {name!r} has {numbers.tolist()}")
        found[str(name)] = numbers.long().unique()
    if not found:
        raise InputError("there is no set of latents to switch off")
    return found
