"""The direct effect: what a vector of the residual stream adds to the embedding through the stream alone.

`W_proj (gain * (v - mean(v)) / sigma)` at the tokens that pooling takes, with `sigma` of the final LayerNorm as it is
on the input; the prediction is read along its derivative with the length of the embedding held. What attention and
MLPs further on make of the vector is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from clip_lens_ext.attribution.forward_mode import pushed_forward
from clip_lens_ext.attribution.site import Site
from clip_lens_ext.attribution.targets import Target, wide
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.decoder import decoder_rows
from clip_lens_ext.towers.families import Reading
from clip_lens_ext.towers.tower import HookedTower

_AT_ONCE = 4096  # rows that are read at a time


@torch.no_grad()
def direct_effects(site: Site, target: Target, sample: Tensor, token: Tensor | None, latent: Tensor) -> Tensor:
    """Direct effect on each target of one unit of some latents, `[n target]`.

    Args:
        site: where.
        target: what is read.
        sample: of each, `[n]`.
        token: index along the SAE's tokens of each, `[n]`; None for one unit at every one of them.
        latent: of each, `[n]`.

    Raises:
        InputError: this tower has no direct path that can be read off, or none from these tokens.
    """
    factor, embedding = _frozen(site)
    through = linear_projection(site.tower)
    gain = cast(Reading, site.tower.reading).ln_final.weight
    length = wide(embedding).norm(dim=-1, keepdim=True)
    amount = factor.sum(dim=1)[sample] if token is None else factor[sample, token]
    out = wide(embedding).new_zeros(len(sample), len(target))
    for start in range(0, len(sample), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        own, rows = sample[part], decoder_rows(site.sae, latent[part]).to(embedding.dtype)
        rows = (rows - rows.mean(dim=-1, keepdim=True)) * amount[part, None]
        change = through(rows if gain is None else rows * gain.to(rows.dtype))

        def read(moved: Tensor, own: Tensor = own) -> Tensor:
            return target.at_length(moved, length[own])

        out[part] = pushed_forward(read, embedding[own], change)
    return out


def linear_projection(tower: HookedTower) -> Callable[[Tensor], Tensor]:
    """The linear part of what follows the final LayerNorm and the pooling: `[... d_model]` to `[... d_embed]`.

    Raises:
        InputError: the tower pools by attention, or its projection is not linear, or its end is not taken apart.
    """
    if tower.cfg.hooks != "full" or _pooling(tower) is None:
        what = "its blocks and head run as they are" if tower.cfg.hooks != "full" else f"pooling is {tower.cfg.pooling}"
        raise InputError(
            f"between the stream of this tower and its embedding there is no linear map ({what}): use variant='decoder'"
        )
    project = cast(Reading, tower.reading).project
    zero = torch.zeros(1, tower.cfg.d_model, dtype=tower.cfg.dtype, device=tower.cfg.device)
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 1, tower.cfg.d_model, generator=generator).to(zero)
    bias = project(zero)
    both = project(one) + project(other) - project(one + other)
    slack = 16 * torch.finfo(zero.dtype).eps * float(project(one).abs().max() + project(other).abs().max())
    if float((both - bias).abs().max()) > slack:
        raise InputError("the projection of this tower is not linear (an MLP head): use variant='decoder'")
    return lambda rows: project(rows) - bias


def _pooling(tower: HookedTower) -> str | None:
    """The token or tokens whose mean is pooled; None where pooling is no mean."""
    means = tower.cfg.pooling in ("mean of patches", "mean")
    return tower.reading.pooled_token() or (tower.cfg.pooling if means else None)


def _frozen(site: Site) -> tuple[Tensor, Tensor]:
    """How much of a row at each of the SAE's tokens reaches the projection, `[sample token]`, and the embedding."""
    tower, codes = site.tower, site.codes
    linear_projection(tower)  # a tower without one is refused before anything runs
    reading = cast(Reading, tower.reading)
    if site.hook_name == "hook_full_embed" and reading.ln_pre is not None:
        raise InputError("between hook_full_embed and the stream lies a LayerNorm: take blocks.0.hook_resid_pre")
    stream, embedding = _final_stream(site)
    share = _share(site, stream)
    norm = reading.ln_final
    seen = (share[..., None] * stream).sum(dim=1, keepdim=True) if reading.ln_after_pool else stream
    inverse = (seen.var(dim=-1, unbiased=False) + norm.eps).rsqrt().expand(stream.shape[:2])
    after = norm(seen) if reading.ln_after_pool else norm(stream) * share[..., None]
    again = reading.project(after.sum(dim=1))
    slack = 1e3 * torch.finfo(stream.dtype).eps
    if not torch.allclose(again, embedding, rtol=slack, atol=slack * float(embedding.abs().max())):
        raise InputError(
            "the embedding is not LayerNorm, pooling and projection of the stream alone: is a hook live at the end of "
            "the tower? Take it off, or use variant='decoder'"
        )
    position = codes.position.to(stream.device)
    factor = (share * inverse).gather(1, position) * site.scale[..., 0].to(stream.dtype)
    if not bool((factor != 0).any()):
        raise InputError(
            f"an SAE on {site.positions.scope!r} has no direct path to the output: pooling takes "
            f"{_pooling(tower)} alone, and what these tokens write gets there through attention"
        )
    return factor, embedding


def _final_stream(site: Site) -> tuple[Tensor, Tensor]:
    """The stream after the last block `[sample token d_model]`, and the embedding, of the site's own prediction."""
    seen: list[Tensor] = []
    last = site.tower.hook_dict[f"blocks.{site.tower.cfg.n_layers - 1}.hook_resid_post"]
    handle = last.register_forward_hook(lambda point, args, out: seen.append(out))
    try:
        embedding = site.tail(site.base, torch.arange(len(site.base), device=site.base.device))
    finally:
        handle.remove()
    return seen[0], embedding


def _share(site: Site, stream: Tensor) -> Tensor:
    """Weight of each token in the pooled vector, `[sample token]`."""
    n_sample, n_token = stream.shape[:2]
    share = stream.new_zeros(n_sample, n_token)
    pooled = _pooling(site.tower)
    if pooled in ("mean of patches", "mean"):
        first = site.tower.n_prefix if pooled == "mean of patches" else 0
        share[:, first:] = 1 / (n_token - first)
        return share
    at = torch.full((n_sample,), {"last": n_token - 1}.get(str(pooled), 0), device=stream.device)
    if pooled == "eot":
        at = cast(Tensor, site.tower.eot_positions(site.tokens)).to(stream.device)
    share[torch.arange(n_sample, device=stream.device), at] = 1
    return share
