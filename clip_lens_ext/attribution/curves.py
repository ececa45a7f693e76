"""Deletion and insertion: predictions while latents are taken out, or put back, one after the other.

Every step is one run of the tail on an edited activation. What different methods, targets, samples and steps ask for
is run together in large batches, two curves that take the same latents in the same order are run once, and the two
states that all orders of a sample share, every latent there and every latent gone, once for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.attribution.site import Site
from clip_lens_ext.attribution.targets import Target


@torch.no_grad()
def run_curves(
    site: Site, target: Target, orders: Tensor, steps: Sequence[int], *, batch_size: int, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Predictions along every order, both ways.

    Args:
        site: where the latents are.
        target: what is predicted.
        orders: which pair of the site's codes is taken at each step, `[method sample target step]`; -1 for none.
        steps: after how many of them to look, ascending; only these are run.
        batch_size: edited activations that run through the tail at a time.
        progress: show a bar.

    Returns:
        Deletion and insertion `[method sample target len(steps)]`. Deletion starts from the unedited prediction and
        takes latents out; insertion starts with every active latent at zero and puts them back.
    """
    n_target, n_step = orders.shape[2:]
    taken = orders >= 0
    n_taken = torch.cat([torch.zeros_like(taken[..., :1], dtype=torch.int64), taken.cumsum(dim=-1)], dim=-1)
    packed = orders.gather(-1, (~taken).int().argsort(dim=-1, stable=True))  # what is no edit goes to the end
    ends = _Ends(site, target)
    shape = (*orders.shape[:3], n_step + 1)
    curves = tuple(end[None, :, :, None].expand(shape).clone() for end in (ends.full, ends.empty))
    flat = tuple(curve.reshape(-1, n_step + 1) for curve in curves)
    asked = taken.any(dim=-1).flatten().nonzero().flatten()
    unique, row_of = packed.reshape(-1, n_step)[asked].unique(dim=0, return_inverse=True)
    looked_at = n_taken[..., torch.as_tensor(steps, device=orders.device)]
    wanted = torch.zeros(len(unique), n_step + 1, dtype=torch.bool, device=orders.device)
    wanted[row_of[:, None], looked_at.reshape(-1, len(steps))[asked]] = True
    by_row = row_of.argsort(stable=True)
    bounds = torch.searchsorted(row_of[by_row].contiguous(), torch.arange(len(unique) + 1, device=unique.device))
    at_once = max(1, batch_size // n_step)
    with tqdm(total=len(unique), desc="deletion and insertion curves", unit="order", disable=not progress) as bar:
        for start in range(0, len(unique), at_once):
            rows = unique[start : start + at_once]
            users = by_row[bounds[start] : bounds[start + len(rows)]]
            looks = wanted[start : start + at_once]
            found = _run_rows(site, target, ends, rows, looks, max(1, batch_size // len(rows)))
            for curve, values in zip(flat, found, strict=True):
                curve[asked[users]] = values[row_of[users] - start, :, asked[users] % n_target]
            bar.update(len(rows))
    deletion, insertion = (curve.reshape(shape).gather(-1, looked_at) for curve in flat)
    return deletion, insertion


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Where the entries of each pair of a site's codes are."""

    sample: Tensor
    entry: Tensor
    bounds: Tensor


class _Ends:
    """The two states that every order of a sample shares, and the pairs between them."""

    def __init__(self, site: Site, target: Target) -> None:
        codes, (n_sample, n_token, d_in) = site.codes, site.base.shape
        sample, _, pair = codes.pairs()
        entry = pair.argsort(stable=True)
        bounds = torch.searchsorted(pair[entry].contiguous(), torch.arange(len(sample) + 1, device=pair.device))
        self.pairs = _Pairs(sample, entry, bounds)
        self.n_active = torch.bincount(sample, minlength=n_sample)
        # Sums of many small parts: half precision would lose the last of them.
        self.dtype = torch.promote_types(site.base.dtype, torch.float32)
        total = torch.zeros(n_sample * n_token, d_in, dtype=self.dtype, device=site.base.device)
        for part in torch.arange(len(codes), device=sample.device).split(16_384):
            where = codes.sample[part] * n_token + codes.token[part]
            total.index_add_(0, where, site.contributions(part).to(self.dtype))
        self.base = site.base.to(self.dtype)
        self.floor = self.base - total.reshape(site.base.shape)
        self.full = site.predict(target)
        self.empty = target(site.tail(self.floor.to(site.base.dtype), torch.arange(n_sample, device=sample.device)))


def _run_rows(
    site: Site, target: Target, ends: _Ends, rows: Tensor, wanted: Tensor, n_together: int
) -> tuple[Tensor, Tensor]:
    """Both curves `[row step + 1 target]` of orders of pairs `[row step]`, at most `n_together` steps at a time.

    Only the steps of `wanted` `[row step + 1]` are run; what the curves say of the others means nothing.
    """
    n_row, n_step = rows.shape
    length, sample = (rows >= 0).sum(dim=1), ends.pairs.sample[rows[:, 0]]
    whole = length == ends.n_active[sample]
    out = tuple(first[sample][:, None].repeat(1, n_step + 1, 1) for first in (ends.full, ends.empty))
    state = ends.base.new_zeros(n_row, 1, *ends.base.shape[1:])
    for start in range(0, int(length.max()), n_together):
        part = rows[:, start : start + n_together]
        removed = _contributions(site, ends, part)
        removed[:, 0] += state[:, 0]
        removed = removed.cumsum(dim=1)
        state = removed[:, -1:]
        step = torch.arange(start + 1, start + 1 + part.shape[1], device=rows.device)
        run = wanted[:, step] & (step < length[:, None] + (~whole[:, None]).long())
        row, place = run.nonzero(as_tuple=True)
        own, edit = sample[row], removed[row, place]
        for curve, edited in zip(out, (ends.base[own] - edit, ends.floor[own] + edit), strict=True):
            if len(own):
                curve[row, step[place]] = target(site.tail(edited.to(site.base.dtype), own))
    last = (torch.arange(n_row, device=rows.device)[whole], length[whole])
    out[0][last], out[1][last] = ends.empty[sample[whole]], ends.full[sample[whole]]
    return out[0], out[1]


def _contributions(site: Site, ends: _Ends, part: Tensor) -> Tensor:
    """What the pairs `[row step]` add to the reconstruction, `[row step token d_in]`; nothing where there is none."""
    n_token, d_in = site.base.shape[1:]
    out = ends.base.new_zeros(part.numel() * n_token, d_in)
    place = (part.flatten() >= 0).nonzero().flatten()
    pair = part.flatten()[place]
    first, count = ends.pairs.bounds[pair], ends.pairs.bounds[pair + 1] - ends.pairs.bounds[pair]
    within = torch.arange(int(count.sum()), device=part.device)
    within = within - (count.cumsum(0) - count).repeat_interleave(count)
    entry = ends.pairs.entry[first.repeat_interleave(count) + within]
    where = place.repeat_interleave(count) * n_token + site.codes.token[entry]
    out.index_add_(0, where, site.contributions(entry).to(out.dtype))
    return out.reshape(*part.shape, n_token, d_in)
