"""How much of each latent's attribution passes through a noise subspace: where attribution and spectrum meet.

Attribution patching is linear in what a latent writes, so a projection takes it apart without a rest. With `U` an
orthonormal basis of the noise, `P = U U'`, `w_i` what one unit of latent `i` adds at its hook, `J` the derivative of
the embedding by the activation there and `g` the gradient of the prediction by the embedding:

- noise **at the SAE's hook**: `noise_i = z_i <J'g, P w_i>`, the part of the latent's own write that lies in it;
- noise **of the embedding**: `noise_i = z_i <g, P J w_i>`, what the latent does to the embedding inside of it, whatever
  its own direction is.

Either way `signal_i = z_i <J'g, w_i> - noise_i` passes through the complement. Both gradients are those at the actual
input: this takes the model's prediction apart, and is not the attribution of a pruned model (run the method within
`prune` for that), whose cosine is taken of another, shorter embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_entries
from clip_lens_ext.attribution.gradients import entry_gradients
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target, wide
from clip_lens_ext.errors import InputError
from clip_lens_ext.noise_attribution_result import NoiseShare
from clip_lens_ext.noise_latents import check_tokens, noise_place
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pruning import EMBEDDING
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def noise_share(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    split: NoiseSplit,
    *,
    noise_hook: str | None = None,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    per_token: bool = False,
) -> NoiseShare:
    """Attribution patching, taken apart into what passes through the noise and what passes through the signal.

    Noise at the SAE's hook: `z_i <J'g, P w_i>`; noise of the embedding: `z_i <g, P J w_i>`. Noise and signal add up to
    the attribution, and have its sign: positive where they raise the prediction.

    Args:
        tower, x, sae, target: as in `attribution_patching`, which gives the whole; the cost is twice that of its tail.
        split: what is noise, at the SAE's hook or in the embedding.
        noise_hook: where the split lies: the SAE's hook, or `"hook_embedding"`. None: the hook of the split, or the
            embedding where it has none (one made of rows).
        hook_name, token_scope, error_term: as in `attribution_patching`.
        per_token: one value per (token, latent) instead of the sum over the SAE's tokens.

    Returns:
        `NoiseShare`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`; or the split is of another hook than those two, of another tower,
            width, or of other tokens than the SAE reads.

    Example:
        >>> import torch
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[:3])
        >>> split = cle.split_noise(torch.randn(2000, 128, generator=torch.Generator().manual_seed(0)), cut=32)
        >>> found = noise_share(clip.vision, pixels, sae, target, split)
        >>> found.noise.shape == found.total.value.shape, found.by_chance
        (True, 0.25)
        >>> found.to_frame().columns.tolist()
        ['sample', 'target', 'latent', 'activation', 'attribution', 'noise', 'signal', 'share']
    """
    at = x.hook_name if isinstance(x, Site) else sae_hook_name(tower, sae, hook_name)
    place = _place(tower, at, split, noise_hook)
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    if place == at:
        check_tokens(split, site.positions.scope)
        through = entry_gradients(_noise_of_site(site, split), target)[0]
    else:
        through = entry_gradients(site, _noise_of_target(target, split))[0]
    whole, prediction = entry_gradients(site, target)
    active = site.codes.value[:, None]
    total = from_entries(site, target, active * whole, prediction, "attribution_patching", per_token=per_token)
    noise = from_entries(site, target, active * through, prediction, "attribution_patching", per_token=per_token)
    return NoiseShare(total=total, noise=noise.value, noise_hook=place, rank=split.rank, d=split.d, rule=split.rule,
                      cut=split.cut)  # fmt: skip


def _place(tower: HookedTower, at: str, split: NoiseSplit, given: str | None) -> str:
    """The hook at which the split lies, checked against the tower."""
    if given is not None:
        tower.check_hook_name(given)
    place = noise_place(split, at, given)
    width = tower.hook_width(place)
    if split.d != width:
        raise InputError(
            f"the split is of {split.d} dimensions, and {place} of the {tower.cfg.tower} tower has {width}"
        )
    # Both towers share the embedding; every other hook is a space of its own.
    if place != EMBEDDING and split.tower not in (None, tower.cfg.tower):
        raise InputError(f"the split is of the {split.tower} tower, this is the {tower.cfg.tower} tower")
    return place


@dataclass(frozen=True, eq=False, kw_only=True)
class _NoiseOfSite(Site):
    """A site whose latents write the projections of their decoder rows."""

    basis: Tensor

    def entry_chunks(
        self, within: slice | None = None, *, at_once: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the active entries with their projected rows `[entry d_in]`."""
        for part, rows in super().entry_chunks(within, at_once=at_once):
            rows = wide(rows)  # two products in bfloat16 would leave two digits
            basis = self.basis.to(rows)
            yield part, (rows @ basis) @ basis.T


def _noise_of_site(site: Site, split: NoiseSplit) -> Site:
    return _NoiseOfSite(**{field.name: getattr(site, field.name) for field in fields(site)}, basis=split.basis)


@dataclass(frozen=True, eq=False, kw_only=True)
class _NoiseOfTarget(Target):
    """A target that depends on the embedding through the noise alone; the rest is what it is, and constant."""

    whole: Target
    basis: Tensor

    def __post_init__(self) -> None:
        """The whole target has been checked."""

    def __call__(self, embedding: Tensor) -> Tensor:
        """The predictions of the whole target, whose gradient is projected."""
        embedding = wide(embedding)
        basis = self.basis.to(embedding)
        noise = (embedding @ basis) @ basis.T
        return self.whole((embedding - noise).detach() + noise)


def _noise_of_target(target: Target, split: NoiseSplit) -> Target:
    return _NoiseOfTarget(vectors=target.vectors, labels=target.labels, cosine=target.cosine, whole=target,
                          basis=split.basis)  # fmt: skip
