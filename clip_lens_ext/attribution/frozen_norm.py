"""Attribution patching with every LayerNorm after the SAE held at the scale that it has.

A LayerNorm divides by the length of its (centred) input. A gradient takes into account that this length moves with the
latent; a lost latent makes the rest louder, which hides a part of its effect. With the scales constant the value is
`z_i * dy/dz_i` of the same network with a division by a number. The L2 norm of a cosine target is no LayerNorm: it
moves.
"""

from __future__ import annotations

import warnings

from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_entries
from clip_lens_ext.attribution.downstream import check_taken_apart, constant_norms
from clip_lens_ext.attribution.gradients import entry_gradients
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def frozen_layer_norm(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    per_token: bool = False,
) -> Attribution:
    """Activation times gradient of every active latent, `z_i * dy/dz_i`, with the LayerNorms' scales constant.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        per_token: one value per (token, latent) instead of the sum over the SAE's tokens.

    Returns:
        `Attribution` `[sample target latent]`, positive where the latent raises the prediction, in its unit.
        `settings["frozen"]` names the LayerNorms that were held: hooks of the tower, and after `native.` those without
        a hook (inside a pooling head, or of queries and keys). Where none comes after the hook
        `settings["vacuous"]` says so, the values are those of `attribution_patching`, and there is a warning.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`, or the tower's blocks have no hooks inside.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(1, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> frozen_layer_norm(clip.vision, pixels, sae, target).settings["frozen"]
        ['ln_final.hook_scale']
    """
    check_taken_apart(tower, "frozen_layer_norm")
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    with constant_norms(tower) as ran:
        gradients, prediction = entry_gradients(site, target)
    settings = {"frozen": list(ran), "vacuous": None if ran else f"no LayerNorm comes after {site.hook_name}"}
    if not ran:
        warnings.warn(f"frozen_layer_norm: {settings['vacuous']}; this is attribution patching", stacklevel=2)
    entries = site.codes.value[:, None] * gradients
    return from_entries(site, target, entries, prediction, "frozen_layer_norm", per_token=per_token, settings=settings)
