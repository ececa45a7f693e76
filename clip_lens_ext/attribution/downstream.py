"""What of a tower comes after an SAE's hook: blocks and LayerNorms that a method can hold constant by their hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.attribution.site import Site
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.families import Reading
from clip_lens_ext.towers.tower import HookedTower


def check_taken_apart(tower: HookedTower, method: str) -> None:
    """Raise `InputError` where the blocks have no hooks inside."""
    if tower.cfg.hooks != "full":
        raise InputError(
            f"{method} needs hooks inside the blocks, and this tower ({tower.cfg.family}) has those of the stream alone"
        )


def constant(value: Tensor, hook: HookPoint) -> Tensor:
    """A hook: the same value, and no gradient through it."""
    return value.detach()


def downstream_writes(site: Site) -> dict[int, list[str]]:
    """Block -> the hooks of what it adds to the stream after the SAE's hook, in order.

    At `hook_resid_mid` and `hook_attn_out` the block's own MLP is downstream, and nothing else of it.
    """
    if site.activation.dim() == 2:
        return {}
    parts = site.hook_name.split(".")
    layer, last = (int(parts[1]), parts[-1]) if parts[0] == "blocks" else (0, "hook_resid_pre")
    found = {
        later: [f"blocks.{later}.hook_attn_out", f"blocks.{later}.hook_mlp_out"]
        for later in range(layer, site.tower.cfg.n_layers)
    }
    if last in ("hook_resid_mid", "hook_attn_out"):
        found[layer] = found[layer][1:]
    elif last in ("hook_resid_post", "hook_mlp_out"):
        del found[layer]
    return found


@contextmanager
def constant_norms(tower: HookedTower) -> Iterator[dict[str, None]]:
    """A context in which every LayerNorm divides by a constant, the number that it divides by anyway.

    Those of the blocks and of the tower's end are held by their `hook_scale`. Native ones without a hook, inside a
    pooling head or of queries and keys, get a torch hook for the time of the context.

    Yields:
        The names of those that ran, in order: `..._hook_scale` of the tower, and after `native.` those without a hook.
    """
    ran: dict[str, None] = {}

    def held(value: Tensor, hook: HookPoint) -> Tensor:
        ran[str(hook.name)] = None
        return value.detach()

    scales = [name for name in tower.hook_dict if name.endswith(".hook_scale")]
    with ExitStack() as stack:
        for name, norm in _without_hooks(tower):

            def hold(module: nn.LayerNorm, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> Tensor:
                ran[f"native.{name}"] = None
                return with_constant_scale(module, args[0])

            stack.callback(norm.register_forward_hook(hold).remove)
        stack.enter_context(tower.hooks(fwd_hooks=[(name, held) for name in scales]))
        yield ran


def _without_hooks(tower: HookedTower) -> list[tuple[str, nn.LayerNorm]]:
    """Native LayerNorms that no hook of the tower stands for."""
    reading = cast(Reading, tower.reading)
    hooked = [reading.ln_pre, reading.ln_final, *(norm for block in reading.blocks for norm in (block.ln1, block.ln2))]
    known = {id(norm) for norm in hooked}
    modules = tower.native.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, nn.LayerNorm) and id(module) not in known]


def with_constant_scale(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm of `[... d]` whose scale is the same number, and constant."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = tuple(range(-len(norm.normalized_shape), 0))
    centred = wide - wide.mean(dim=dims, keepdim=True)
    scale = (centred.pow(2).mean(dim=dims, keepdim=True) + norm.eps).sqrt().detach()
    out = centred / scale
    out = out if norm.weight is None else out * norm.weight.to(wide.dtype)
    out = out if norm.bias is None else out + norm.bias.to(wide.dtype)
    return out.to(x.dtype)
