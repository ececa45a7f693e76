"""The Logit Lens on SAE latents: what a decoder row says without the rest of the network. Three ways to read it.

- `"decoder"`: `y(project(D_i))`, the row alone through the final LayerNorm (with its bias) and the projection, as if it
  were the whole residual stream. It does not depend on the picture.
- `"frozen_norm"`: what the row adds to the embedding through the residual stream alone, on this picture: LayerNorm and
  the length of the embedding are held at what they are, `W_proj (gain * (D_i - mean(D_i)) / sigma)`, read along the
  derivative of the prediction. For a cosine with `t` that is its product with `t / (|t| |e|)`. It is the direct effect.
- `"embedding"`: `y(W_proj D_i)`, without any LayerNorm or bias.

Times the activation each is the method `activation_x_...`.

Reference: the released evaluation of Dreyer et al. 2505.20229 defines the first so.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_entries, from_pairs, summed_activation
from clip_lens_ext.attribution.direct import direct_effects, linear_projection
from clip_lens_ext.attribution.reach import carries_stream
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.decoder import decoder_rows
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower

LensVariant = Literal["decoder", "frozen_norm", "embedding"]


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
    variant: LensVariant = "decoder",
    times_activation: bool = False,
) -> Attribution:
    """The prediction that each active latent's decoder row makes alone.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`. The error term changes
            the prediction that the result reports, and the point at which `"frozen_norm"` freezes.
        variant: `"decoder"`, `"frozen_norm"` or `"embedding"`, as this module says.
        times_activation: multiply with the latent's activation. It is summed over the SAE's tokens; with
            `"frozen_norm"` over those of them that pooling takes, for only they have a direct effect.

    Returns:
        `Attribution` `[sample target latent]` over the active latents; positive where the row points towards the
        target. Its scale is no difference of predictions, but for `"frozen_norm"` times the activation: compare ranks,
        not values, with other methods.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`; the SAE's vectors are none of the residual stream; or the variant
            needs an end of the tower that this one has not: a linear projection, pooling without attention.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> bool((logit_lens(clip.vision, pixels, sae, target).value.abs() <= 1).all())
        True
        >>> logit_lens(clip.vision, pixels, sae, target, variant="embedding").method
        'logit_lens_embedding'
    """
    if variant not in get_args(LensVariant):
        raise InputError(f"variant is 'decoder', 'frozen_norm' or 'embedding', got {variant!r}")
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    if not carries_stream(site.hook_name):
        raise InputError(f"the Logit Lens reads residual-stream vectors; {site.hook_name} gives none")
    name = "logit_lens" if variant == "decoder" else f"logit_lens_{variant}"
    method = f"activation_x_{name}" if times_activation else name
    settings = {"variant": variant, "times_activation": times_activation}
    if variant == "frozen_norm" and times_activation:
        entries = direct_effects(site, target, site.codes.sample, site.codes.token, site.codes.latent)
        entries = entries * site.codes.value[:, None]
        return from_entries(site, target, entries, site.predict(target), method, settings=settings)
    sample, latent, _ = site.codes.pairs()
    if variant == "frozen_norm":
        value = direct_effects(site, target, sample, None, latent)
    else:
        unique, inverse = latent.unique(return_inverse=True)
        through = tower.project if variant == "decoder" else linear_projection(tower)
        parts = [target(through(decoder_rows(sae, part).to(tower.cfg.dtype))) for part in unique.split(4096)]
        value = torch.cat(parts)[inverse]
    if times_activation:
        value = value * summed_activation(site).to(value.dtype)[:, None]
    return from_pairs(site, target, value, site.predict(target), method, settings=settings)
