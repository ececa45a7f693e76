"""Exact ablation: what the prediction loses when one latent is set to zero, measured and not estimated.

`A_i = y(as is) - y(z_i = 0 at every token of the SAE)`: the ground truth that every other method is compared with.
The prefix has run once; the tail runs on batches of edited activations.
"""

from __future__ import annotations

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_pairs
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


@torch.no_grad()
def exact_ablation(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    batch_size: int = 64,
) -> Attribution:
    """The loss of prediction when each active latent is set to zero, one at a time.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        batch_size: edited activations that run through the tail at a time; bounds the memory.

    Returns:
        `Attribution` `[sample target latent]`: positive where the latent raises the prediction.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> exact_ablation(clip.vision, pixels, sae, target).top(3).latents.shape
        torch.Size([2, 1, 3])
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    prediction = site.predict(target)
    sample, _, pair = site.codes.pairs()
    entry_order = pair.argsort(stable=True)  # the entries of one pair side by side
    bounds = torch.searchsorted(pair[entry_order].contiguous(), torch.arange(len(sample) + 1, device=pair.device))
    value = prediction.new_zeros(len(sample), len(target))
    n_token, d_in = site.base.shape[1:]
    for start in range(0, len(sample), batch_size):
        stop = min(start + batch_size, len(sample))
        entries = entry_order[bounds[start] : bounds[stop]]
        removed = site.base.new_zeros((stop - start) * n_token, d_in)
        where = (pair[entries] - start) * n_token + site.codes.token[entries]
        removed.index_add_(0, where, site.contributions(entries).to(removed.dtype))
        own = sample[start:stop]
        edited = site.base[own] - removed.reshape(-1, n_token, d_in)
        value[start:stop] = prediction[own] - target(site.tail(edited, own))
    return from_pairs(site, target, value, prediction, "exact_ablation")
