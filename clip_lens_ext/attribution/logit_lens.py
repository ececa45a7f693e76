"""The Logit Lens on SAE latents: where a decoder row points, read as if it were the whole residual stream.

`L_i = y(project(W_dec[i]))`: the decoder row alone goes through the final LayerNorm (with its bias) and the projection,
and the prediction is read off, for instance its cosine with a prompt. It does not depend on the picture; times the
activation it is `z_i * L_i`.

Reference: the released evaluation of Dreyer et al. 2505.20229 defines it so.
"""

from __future__ import annotations

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_pairs, summed_activation
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.decoder import decoder_rows
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


@torch.no_grad()
def logit_lens(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    times_activation: bool = False,
) -> Attribution:
    """The prediction that each active latent's decoder row makes alone.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`; the error term only
            changes the prediction that the result reports.
        times_activation: multiply with the latent's activation, summed over the SAE's tokens.

    Returns:
        `Attribution` `[sample target latent]` over the active latents; positive where the row points towards the
        target. Its scale is no difference of predictions: compare ranks, not values, with other methods.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`, or the SAE's vectors are no residual-stream vectors.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> result = logit_lens(clip.vision, pixels, sae, cle.text_target(clip, world.prompts()[0]))
        >>> bool((result.value.abs() <= 1).all())
        True
    """
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    if "hook_resid" not in site.hook_name and site.hook_name != "hook_full_embed":
        raise InputError(f"the Logit Lens reads residual-stream vectors; {site.hook_name} gives none")
    _, latent, _ = site.codes.pairs()
    unique, inverse = latent.unique(return_inverse=True)
    lens = torch.cat(
        [target(tower.project(decoder_rows(sae, part).to(tower.cfg.dtype))) for part in unique.split(4096)]
    )
    value = lens[inverse]
    if times_activation:
        value = value * summed_activation(site).to(value.dtype)[:, None]
    method = "activation_x_logit_lens" if times_activation else "logit_lens"
    return from_pairs(site, target, value, site.predict(target), method)
