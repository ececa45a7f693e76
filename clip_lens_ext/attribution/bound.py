"""How many edited activations go through the tail at a time, within a bound on the memory, and the bar for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TypeVar

from tqdm.auto import tqdm

from clip_lens_ext.attribution.reach import stream_hooks
from clip_lens_ext.attribution.site import Site
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.pooled_tail import can_run_pooled

MEMORY_LIMIT = 512 << 20
_MOST = 4096  # copies; more at a time are not faster
_T = TypeVar("_T")


def bar(parts: Iterable[_T], what: str, progress: bool) -> Iterator[_T]:
    """The parts, with a progress bar where they take more than a few seconds."""
    return iter(tqdm(parts, desc=what, disable=not progress, delay=3, leave=False))


def tail_batch(
    site: Site, n_target: int, *, gradient: bool, batch_size: int | None = None, memory_limit: int = MEMORY_LIMIT
) -> int:
    """Edited activations in a batch: as many as asked for, or as `memory_limit` bytes hold, and at least one.

    Raises:
        InputError: `batch_size` or `memory_limit` is less than 1.
    """
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        return batch_size
    if memory_limit < 1:
        raise InputError(f"memory_limit is a number of bytes, at least 1, got {memory_limit}")
    per_copy = tail_numbers(site, gradient=gradient) + 4 * n_target
    return max(1, min(_MOST, memory_limit // (per_copy * site.base.element_size())))


def tail_numbers(site: Site, *, gradient: bool) -> int:
    """Numbers that one edited activation holds on its way through the tail, an estimate from above.

    In a block: stream, two normalised copies, queries, keys, values, the mix and the two outputs, all of `d_model`; the
    MLP before and after its activation; scores and pattern of each head. Without a gradient one block is alive at a
    time, with it every block that is left.
    """
    cfg = site.tower.cfg
    n_edited, d_in = site.base.shape[1:]
    own = 6 * n_edited * d_in  # what is removed, its decoder rows, the edited tokens
    if site.activation.dim() == 2 or site.is_pooled_token:
        return own + 4 * (cfg.d_model + cfg.d_embed)
    n_token, d_model = site.activation.shape[1:]
    around = stream_hooks(site.hook_name)
    if can_run_pooled(site.tower, site.hook_name if around is None else around[1]):
        return own + 4 * n_token * d_model + 2 * n_token * (cfg.n_heads or 1)
    per_token = 12 * d_model + 2 * (cfg.d_mlp or 8 * d_model) + 2 * n_token * (cfg.n_heads or 1)
    if cfg.hooks == "residual":
        return own + _listened_numbers(site, gradient=gradient)
    return own + per_token * n_token * (_blocks_left(site) if gradient else 1)


def _listened_numbers(site: Site, *, gradient: bool) -> int:
    """Of a tower whose native forward runs whole: its widest stage, or with a gradient every stage.

    Stages before the hook too: weights that need a gradient make autograd keep what goes into them.
    """
    names = site.tower.split_names()[:-1]
    sizes = [prod(site.tower._pass.shape_at(site.tower, name)) for name in names]
    every = sum(sizes) // 2  # each block has two hooks
    return 32 * max(*sizes, every if gradient else 0)


def _blocks_left(site: Site) -> int:
    parts = site.hook_name.split(".")
    return site.tower.cfg.n_layers - (int(parts[1]) if parts[0] == "blocks" else 0)
