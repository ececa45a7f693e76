"""GradDrop: attribution patching where the effects through different blocks cancel.

The gradient of a latent is a sum over paths; effects of opposite sign can hide each other. For each block `l` after the
SAE the gradient through what that block adds to the stream is set to zero, which leaves every path round it:
`c_i = 1/n * sum_l |I_i without block l|` over the `n` blocks downstream. `I_i` is `z_i * dy/dz_i`, summed over the
SAE's tokens. It has no sign: it says how much a latent matters, not which way.

Reference: AtP*, Kramar et al. 2403.00745. There the sum runs over all `L` layers, divided by `L - 1`: the term of the
latent's own layer is zero, and each layer before it contributes `|I_i|` itself. For an SAE on the first block the two
are equal.
"""

from __future__ import annotations

import warnings

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_entries, from_pairs
from clip_lens_ext.attribution.bound import bar
from clip_lens_ext.attribution.downstream import check_taken_apart, constant, downstream_writes
from clip_lens_ext.attribution.gradients import entry_gradients
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def gradient_dropping(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    per_token: bool = False,
    progress: bool = True,
) -> Attribution:
    """Mean over the downstream blocks of `|z_i * dy/dz_i|`, with the gradient through that block dropped.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        per_token: one value per (token, latent) instead of one for the sum over the SAE's tokens.
        progress: show a bar where it takes more than a few seconds.

    Returns:
        `Attribution` `[sample target latent]`, never negative (`settings["signed"]` is False), in the unit of the
        prediction. `settings["blocks"]` are the blocks that were dropped in turn. `settings["vacuous"]`, with a
        warning, says where the values mean nothing new: no block comes after the hook, and they are
        `|z_i * dy/dz_i|`; or the one block that does is all that the SAE's tokens reach the output through (patches
        before the last block of a tower that pools CLS), and they are zero.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`, or the tower's blocks have no hooks inside.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.2.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(1, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> result = gradient_dropping(clip.vision, pixels, sae, target, progress=False)
        >>> bool((result.value >= 0).all()), result.settings["blocks"]
        (True, [3])
    """
    check_taken_apart(tower, "gradient_dropping")
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    blocks = downstream_writes(site)
    total: Tensor | None = None
    for names in bar(list(blocks.values()) or [[]], "blocks dropped", progress):
        with tower.hooks(fwd_hooks=[(name, constant) for name in names]):
            gradients, prediction = entry_gradients(site, target)
        entries = site.codes.value[:, None] * gradients
        effect = (entries if per_token else _by_pair(site, entries)).abs()
        total = effect if total is None else total + effect
    assert total is not None  # there is at least one round
    value = total / max(1, len(blocks))
    settings = {"signed": False, "blocks": list(blocks), "vacuous": _vacuous(site, list(blocks), value)}
    if settings["vacuous"]:
        warnings.warn(f"gradient_dropping: {settings['vacuous']}", stacklevel=2)
    if per_token:
        return from_entries(site, target, value, prediction, "gradient_dropping", per_token=True, settings=settings)
    return from_pairs(site, target, value, prediction, "gradient_dropping", settings=settings)


def _vacuous(site: Site, blocks: list[int], value: Tensor) -> str | None:
    if not blocks:
        return f"no block comes after {site.hook_name}: nothing can be dropped, the values are |z * dy/dz|"
    if not bool(value.any()):
        return f"without block {blocks[0]} the SAE's tokens have no path to the output: every value is zero"
    return None


def _by_pair(site: Site, entries: Tensor) -> Tensor:
    """Sum of entries `[active target]` over the SAE's tokens, `[pair target]`."""
    sample, _, pair = site.codes.pairs()
    return torch.zeros(len(sample), entries.shape[1]).to(entries).index_add_(0, pair, entries)
