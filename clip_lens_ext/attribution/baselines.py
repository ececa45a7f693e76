"""Two orders that know nothing of the prediction: how strongly a latent writes, and chance."""

from __future__ import annotations

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_entries, from_pairs
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.provenance import fingerprint
from clip_lens_ext.saes.shuffled_rows import generator
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


@torch.no_grad()
def activation_energy(
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
    """The length of what each active latent writes, `|z_i| * ||W_dec[i]||`, the same for every target.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term, per_token: as in `attribution_patching`.

    Returns:
        `Attribution` `[sample target latent]`, never negative, in units of the residual stream.
    """
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    length = site.codes.value.new_zeros(len(site.codes))
    for part, rows in site.entry_chunks():
        length[part] = site.codes.value[part].abs() * rows.norm(dim=-1)
    entries = length[:, None].expand(-1, len(target))
    return from_entries(site, target, entries, site.predict(target), "activation_energy", per_token=per_token)


@torch.no_grad()
def random_attribution(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    seed: int = 0,
) -> Attribution:
    """Independent standard normal numbers for every active latent and target: the control for every comparison.

    A sample's numbers follow from the seed and the sample itself, whatever batch it is in: the results of two parts of
    the data merge to what one pass over both gives. Samples that are the same have the same numbers.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        seed: of the numbers; the result records it.

    Returns:
        `Attribution` `[sample target latent]`.
    """
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    prediction = site.predict(target)
    n_pairs = torch.bincount(site.codes.pairs()[0], minlength=len(site.inputs)).tolist()
    drawn = [
        torch.randn(n, len(target), generator=generator(seed, "random", fingerprint(one)), dtype=torch.float64)
        for n, one in zip(n_pairs, site.inputs, strict=True)
    ]
    value = torch.cat(drawn).to(prediction)
    return from_pairs(site, target, value, prediction, "random", seed=seed)
