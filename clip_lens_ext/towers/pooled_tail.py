"""The tail at one token: where the embedding is read from a single token, the last block has to be run for it alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.block import HookedBlock
from clip_lens_ext.towers.families import Reading
from clip_lens_ext.towers.live import any_live
from clip_lens_ext.towers.tower import HookedTower


def can_run_pooled(tower: HookedTower, hook_name: str) -> bool:
    """Whether `run_pooled` says what `run_from` says: near enough to the end, one token, and nobody listens."""
    if tower.cfg.hooks != "full" or hook_name not in _starts(tower):
        return False
    last = cast(HookedBlock, tower.blocks[-1]).reading
    return (
        tower.reading.pooled_token() is not None
        and last.attention.absorbs_keys
        and not last.native.training  # it might drop something
        and not any_live(tower.hook_points())
    )


def run_pooled(tower: HookedTower, hook_name: str, activation: Tensor, *, tokens: Tensor | None = None) -> Tensor:
    """The embedding `[batch d_embed]` from the input or output of the last block, at the pooled token alone.

    Equal to `tower.run_from(hook_name, activation, tokens=tokens)` up to rounding, and differentiable like it, with
    about a hundredth of the work at the input of the last block. For methods that run the tail on many edits.

    Args:
        tower: one for which `can_run_pooled` holds.
        hook_name: `hook_resid_pre`, `mid` or `post` of the last block, or `post` of the one before.
        activation: `[batch token d_model]`.
        tokens: token ids of the prompts, for a tower that pools at the end-of-text token.

    Example:
        >>> import clip_lens_ext as cle
        >>> tower, hook = cle.planted_clip().vision, "blocks.2.hook_resid_post"
        >>> activation = tower.run_to(torch.zeros(2, 3, 48, 48), hook)
        >>> pooled = run_pooled(tower, hook, activation)
        >>> torch.allclose(pooled, tower.run_from(hook, activation), atol=1e-5)
        True
    """
    block, reading = cast(HookedBlock, tower.blocks[-1]), cast(Reading, tower.reading)
    at = _pooled_at(tower, activation, tokens)
    if _starts(tower)[hook_name] == "block":
        return tower.project(block.at_token(activation, at, reading.mask(tokens)))
    own = activation[torch.arange(len(activation), device=activation.device), at]
    return tower.project(block.from_mid(own) if _starts(tower)[hook_name] == "mlp" else own)


def _starts(tower: HookedTower) -> dict[str, str]:
    """Hook -> what of the last block comes after it."""
    last = tower.cfg.n_layers - 1
    starts = {f"blocks.{last}.hook_resid_pre": "block", f"blocks.{last - 1}.hook_resid_post": "block"}
    return starts | {f"blocks.{last}.hook_resid_mid": "mlp", f"blocks.{last}.hook_resid_post": "nothing"}


def _pooled_at(tower: HookedTower, activation: Tensor, tokens: Tensor | None) -> Tensor:
    """Position of the pooled token in each sample, `[batch]`."""
    if tower.reading.pooled_token() == "eot":
        positions = tower.eot_positions(tokens)
        if positions is None:
            raise InputError("a tower that pools at the end-of-text token needs tokens=")
        return positions
    position = activation.shape[1] - 1 if tower.reading.pooled_token() == "last" else 0
    return torch.full((len(activation),), position, device=activation.device)
