"""Exact ablation: what the prediction loses when one latent is set to zero, measured and not estimated.

`A_i = y(as is) - y(z_i = 0 at every token of the SAE)`: the ground truth that every other method is compared with.
The prefix has run once; the tail runs on batches of edited activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.assemble import from_pairs
from clip_lens_ext.attribution.bound import MEMORY_LIMIT, bar, tail_batch
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
    latents: Sequence[int] | Tensor | Attribution | None = None,
    top_k: int | None = None,
    batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = True,
) -> Attribution:
    """The loss of prediction when each active latent is set to zero, one at a time.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        latents: only these: their numbers, or an `Attribution` of this input, whose pairs are measured. None measures
            every active latent. A latent that is asked for and not active on a sample loses nothing there, and is left
            out of the result as in every other method.
        top_k: with an `Attribution`: of each sample and target only the `top_k` greatest, as `.top(top_k)` gives them;
            the pairs of all targets are measured for all targets.
        batch_size: edited activations that run through the tail at a time, instead of what `memory_limit` allows.
        memory_limit: bytes that a batch may take, by estimate.
        progress: show a bar where it takes more than a few seconds.

    Returns:
        `Attribution` `[sample target latent]`: positive where the latent raises the prediction.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`; a latent that the SAE does not have, none that is active, or an
            `Attribution` of another input.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> exact_ablation(clip.vision, pixels, sae, target).top(3).latents.shape
        torch.Size([2, 1, 3])
        >>> patching = cle.attribution_patching(clip.vision, pixels, sae, target)
        >>> len(exact_ablation(clip.vision, pixels, sae, target, latents=patching, top_k=5))
        10
    """
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    batch = tail_batch(site, len(target), gradient=False, batch_size=batch_size, memory_limit=memory_limit)
    kept = _kept(site, latents, top_k)
    prediction = site.predict(target)
    sample, _, pair = site.codes.pairs()
    entry_order = pair.argsort(stable=True)  # the entries of one pair side by side
    bounds = torch.searchsorted(pair[entry_order].contiguous(), torch.arange(len(sample) + 1, device=pair.device))
    value = prediction.new_zeros(len(kept), len(target))
    n_token, d_in = site.base.shape[1:]
    for start in bar(range(0, len(kept), batch), "exact ablation", progress):
        pairs = kept[start : start + batch]
        lengths = bounds[pairs + 1] - bounds[pairs]
        nth = torch.arange(len(pairs), device=pair.device).repeat_interleave(lengths)
        ends = lengths.cumsum(dim=0)
        within = torch.arange(len(nth), device=pair.device) - (ends - lengths)[nth]
        entries = entry_order[bounds[pairs][nth] + within]
        removed = site.base.new_zeros(len(pairs) * n_token, d_in)
        where = nth * n_token + site.codes.token[entries]
        removed.index_add_(0, where, site.contributions(entries).to(removed.dtype))
        own = sample[pairs]
        edited = site.base[own] - removed.reshape(-1, n_token, d_in)
        value[start : start + batch] = prediction[own] - target(site.tail(edited, own))
    settings = None if latents is None else {"latents": "some of the active ones", "top_k": top_k}
    return from_pairs(site, target, value, prediction, "exact_ablation", kept=kept, settings=settings)


def _kept(site: Site, latents: Sequence[int] | Tensor | Attribution | None, top_k: int | None) -> Tensor:
    """The numbers of the pairs to measure, in order."""
    sample, latent, _ = site.codes.pairs()
    if top_k is not None and not isinstance(latents, Attribution):
        raise InputError("top_k ranks by an Attribution: pass it as latents=")
    if latents is None:
        return torch.arange(len(sample), device=sample.device)
    if isinstance(latents, Attribution):
        wanted = _pairs_of(site, latents, top_k)
    else:
        wanted = torch.as_tensor(latents, device=sample.device).flatten()
        if wanted.is_floating_point() or wanted.dtype == torch.bool or len(wanted) == 0:
            raise InputError("latents are whole numbers, at least one: which latents to set to zero")
        if int(wanted.min()) < 0 or int(wanted.max()) >= site.codes.d_sae:
            raise InputError(f"the SAE has the latents 0..{site.codes.d_sae - 1}, got {wanted.tolist()}")
        everywhere = torch.arange(site.codes.n_sample, device=sample.device)[:, None] * site.codes.d_sae
        wanted = (everywhere + wanted).flatten()
    kept = torch.isin(sample * site.codes.d_sae + latent, wanted).nonzero().flatten()
    if len(kept) == 0:
        raise InputError("none of these latents is active on this input, so there is nothing to measure")
    return kept


def _pairs_of(site: Site, result: Attribution, top_k: int | None) -> Tensor:
    """`sample * d_sae + latent` of the pairs of a result, or of the greatest of each sample and target."""
    origin, here = result.provenance or {}, site.provenance()
    same = all(origin.get(key) == here[key] for key in ("data_fingerprint", "sae_sha256", "model"))
    place = (result.hook_name, result.token_scope, result.d_sae, result.n_sample)
    if not same or place != (site.hook_name, site.positions.scope, site.codes.d_sae, site.codes.n_sample):
        raise InputError("latents= is an Attribution of another input, another SAE or another site")
    if top_k is None:
        return (result.sample * result.d_sae + result.latent).to(site.codes.sample.device)
    best = result.top(top_k).latents
    sample = torch.arange(result.n_sample)[:, None, None].expand_as(best)
    return (sample * result.d_sae + best)[best >= 0].to(site.codes.sample.device)
