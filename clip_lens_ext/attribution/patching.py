"""Attribution patching: the gradient at the hook, read along each active latent's decoder row.

`A_i = z_i * (W_dec[i] . g)`, with `g` the gradient of the prediction at the SAE's token: one forward pass of the
prefix, one vector-Jacobian product of the tail, and work for active latents alone. It is the first-order estimate of
`y(as is) - y(latent i set to zero)`, hence positive where the latent raises the prediction. TransformerLens'
`attribution_patch` is written for a corrupted run, `(corrupted - clean) * gradient`: with zero as the corrupted
activation it has the opposite sign.

References: attribution patching, Nanda 2023, Syed et al. 2310.10348; for CLIP's SAE latents Dreyer et al. 2505.20229.
"""

from __future__ import annotations

from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_entries
from clip_lens_ext.attribution.gradients import entry_gradients
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def attribution_patching(
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
    """Activation times gradient of every active latent, `z_i * dy/dz_i` at the actual activation.

    Args:
        tower: the tower whose prediction is explained.
        x: its input, or a `Site` that `open_site` made of it.
        sae: the SAE; its metadata say hook and tokens.
        target: what is explained; several targets cost at most one vector-Jacobian product of the tail each
            (`attribution/gradients.py` says when fewer).
        hook_name, token_scope: instead of the SAE's own.
        error_term: `"kept"` (the default): what the SAE does not reconstruct stays in the activation, held constant;
            or `"dropped"`. None with a `Site` means what it was opened with.
        per_token: one value per (token, latent) instead of the sum over the SAE's tokens.

    Returns:
        `Attribution` `[sample target latent]`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: the input, the SAE or the target do not fit, or the SAE's tokens have no path to the output.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> batch = world.sample(2, seed=0, split="test")
        >>> target = cle.text_target(clip, world.prompts()[:3])
        >>> result = attribution_patching(clip.vision, cle.planted.normalise(batch.images), sae, target)
        >>> result.top(5).values.shape
        torch.Size([2, 3, 5])
    """
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    gradients, prediction = entry_gradients(site, target)
    entries = site.codes.value[:, None] * gradients
    return from_entries(site, target, entries, prediction, "attribution_patching", per_token=per_token)
