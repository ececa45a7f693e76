"""Integrated gradients: the gradient averaged along the straight path from a baseline to the actual latents.

`A_i = (z_i - z0_i) * integral over a in [0, 1] of dy/dz_i at z0 + a (z - z0)`, all latents moving together. Where the
mean is taken exactly the attributions add up to `y(z) - y(z0)` (completeness); what is missing is in the result.
The error term, and the factor of an SAE that normalises its input, stay what they are at the actual input.

References: Sundararajan et al. 1703.01365; for SAE latents Marks et al. 2403.19647.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_entries
from clip_lens_ext.attribution.bound import MEMORY_LIMIT, tail_batch
from clip_lens_ext.attribution.gradients import Path, path_gradients
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower

_GAP = 0.01  # of the sum of absolute attributions: a gap above is worth a warning


def integrated_gradients(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    n_steps: int = 16,
    baseline: Tensor | None = None,
    per_token: bool = False,
    batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = True,
) -> Attribution:
    """Difference to a baseline times the mean gradient on the way from it, for every latent that differs from it.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        n_steps: points on the path, the nodes of Gauss and Legendre: exact where the gradient along the path is a
            polynomial of degree up to `2 n_steps - 1`.
        baseline: latents to start from; None is zero. `[d_sae]` for every token, for instance mean activations, or
            `[sample token d_sae]` over the SAE's own tokens.
        per_token: one value per (token, latent) instead of the sum over the SAE's tokens.
        batch_size: points that run through the tail at a time, instead of what `memory_limit` allows.
        memory_limit: bytes that a batch may take, by estimate.
        progress: show a bar where it takes more than a few seconds.

    Returns:
        `Attribution` `[sample target latent]`, positive where the latent raises the prediction against the baseline.
        Its pairs are the latents that are active or that are not zero in the baseline. `completeness_gap`
        `[sample target]` is the sum of the attributions minus `y(input) - y(baseline)`, in the unit of the prediction;
        above a hundredth of the sum of absolute attributions there is a warning.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`; no step, or a baseline of another shape or with NaN.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[:3])
        >>> result = integrated_gradients(clip.vision, pixels, sae, target, n_steps=32)
        >>> bool(result.completeness_gap.abs().max() < 1e-3)
        True
    """
    if n_steps < 1:
        raise InputError(f"n_steps must be at least 1, got {n_steps}")
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    batch = tail_batch(site, len(target), gradient=True, batch_size=batch_size, memory_limit=memory_limit)
    site, difference = _against(site, baseline)
    node, weight = np.polynomial.legendre.leggauss(n_steps)
    step = _written(site, difference)
    path = Path(step, ((node + 1) / 2).tolist(), (weight / 2).tolist(), batch)
    entries = difference[:, None] * path_gradients(site, target, path, progress=progress)
    with torch.no_grad():
        samples = torch.arange(site.codes.n_sample, device=site.base.device)
        prediction, start = site.predict(target), target(site.tail((site.base - step).to(site.base.dtype), samples))
    gap = _sum(site, entries) - (prediction - start)
    size = _sum(site, entries.abs())
    if bool((gap.abs() > _GAP * size).any()):
        warnings.warn(
            f"integrated gradients: {n_steps} steps leave up to {float((gap.abs() / size).max()):.0%} of the sum of "
            "absolute attributions unexplained (completeness_gap); take more steps",
            stacklevel=2,
        )
    return from_entries(
        site,
        target,
        entries,
        prediction,
        "integrated_gradients",
        per_token=per_token,
        completeness_gap=gap,
        settings={"n_steps": n_steps, "nodes": "Gauss-Legendre", "baseline": _name(baseline)},
    )


def _sum(site: Site, entries: Tensor) -> Tensor:
    """Over the entries of each sample, `[sample target]`."""
    return entries.new_zeros(site.codes.n_sample, entries.shape[1]).index_add_(0, site.codes.sample, entries)


def _name(baseline: Tensor | None) -> str:
    return "zero" if baseline is None else f"latents {list(baseline.shape)} {fingerprint(baseline)}"


def _against(site: Site, baseline: Tensor | None) -> tuple[Site, Tensor]:
    """The site with every entry that is active at the input or in the baseline, and `z - z0` of each `[entry]`."""
    codes = site.codes
    if baseline is None:
        return site, codes.value
    sizes = (codes.n_sample, codes.n_token, codes.d_sae)
    if not isinstance(baseline, Tensor) or tuple(baseline.shape) not in ((codes.d_sae,), sizes):
        found = list(baseline.shape) if isinstance(baseline, Tensor) else type(baseline).__name__
        raise InputError(f"baseline is latents [{codes.d_sae}] for every token, or {list(sizes)}, got {found}")
    if not baseline.is_floating_point() or not torch.isfinite(baseline).all():
        raise InputError("baseline must be finite floating-point latents")
    start = baseline.detach().to(codes.value.device, codes.value.dtype).expand(sizes)
    # Places in the dense [sample token d_sae], in the order of the codes.
    active = (codes.sample * codes.n_token + codes.token) * codes.d_sae + codes.latent
    place = torch.unique(torch.cat([active, _nonzero_places(start, baseline)]))
    value = codes.value.new_zeros(len(place))
    value[torch.searchsorted(place, active)] = codes.value
    row, latent = place // codes.d_sae, place % codes.d_sae
    sample, token = row // codes.n_token, row % codes.n_token
    union = replace(codes, sample=sample, token=token, latent=latent, value=value)
    return replace(site, codes=union), value - start[sample, token, latent]


def _nonzero_places(start: Tensor, baseline: Tensor) -> Tensor:
    """Where the baseline is not zero, as places in the dense `[sample token d_sae]`."""
    n_sample, n_token, d_sae = start.shape
    if baseline.dim() == 1:
        latent = baseline.to(start.device).nonzero().flatten()
        return (torch.arange(n_sample * n_token, device=start.device)[:, None] * d_sae + latent).flatten()
    sample, token, latent = start.nonzero(as_tuple=True)
    return (sample * n_token + token) * d_sae + latent


def _written(site: Site, amount: Tensor) -> Tensor:
    """What latents of some amount `[entry]` write at the SAE's tokens, `[batch token d_in]`."""
    n_sample, n_token, d_in = site.base.shape
    out = torch.zeros(n_sample * n_token, d_in, dtype=amount.dtype, device=amount.device)
    for part, rows in site.entry_chunks():
        where = site.codes.sample[part] * n_token + site.codes.token[part]
        out.index_add_(0, where, (rows * amount[part][:, None]).to(out.dtype))
    return out.reshape(n_sample, n_token, d_in)
