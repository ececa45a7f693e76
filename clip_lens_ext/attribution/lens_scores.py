"""The Logit Lens of every latent of an SAE, active or not: it does not know the picture, so one table is enough."""

from __future__ import annotations

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.reach import carries_stream
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.decoder import decoder_rows
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.towers.tower import HookedTower

_ROWS_AT_ONCE = 4096


@torch.no_grad()
def logit_lens_scores(tower: HookedTower, sae: SAE, target: Target, *, hook_name: str | None = None) -> Tensor:
    """The prediction that each decoder row of the SAE makes alone, `L_i = y(project(W_dec[i]))`.

    `faithfulness` takes it among its results, and then deletes in the order of all latents: this is how the released
    evaluation ranks the Logit Lens, and most of its deletions take latents that are not active and change nothing.

    Args:
        tower: the tower that the SAE belongs to.
        sae: the SAE.
        target: what is predicted.
        hook_name: instead of the SAE's own.

    Returns:
        `[target d_sae]`, in the target's unit; positive where the row points towards the target.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: the SAE does not fit, or its rows are no vectors of the residual stream.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> logit_lens_scores(clip.vision, sae, cle.text_target(clip, world.prompts()[:3])).shape
        torch.Size([3, 1024])

    Reference: the released evaluation of Dreyer et al. 2505.20229.
    """
    name = sae_hook_name(tower, sae, hook_name)
    if not carries_stream(name):
        raise InputError(f"the Logit Lens reads residual-stream vectors; {name} gives none")
    latents = torch.arange(sae.cfg.d_sae, device=sae.W_dec.device)
    parts = [
        target(tower.project(decoder_rows(sae, part).to(tower.cfg.dtype))) for part in latents.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(parts).T.contiguous()
