"""An SAE in the forward pass: which tokens it reads, what becomes of its error, and how gradients pass it.

For the tokens `x` of the SAE's scope, with `z = encode(x)` and `x_hat = decode(z)`:

- error term kept: the activation that goes on is `x + (x_hat' - x_hat)`, where `x_hat'` is decoded from the latents as
  hooks left them. Without an edit that is `x` to the last bit, and an edit of latent `i` moves it along `W_dec[i]`.
- error term dropped: it is `x_hat'`.

Straight through: the gradient reaches the latents through `W_dec`, and what is upstream of the SAE as if the SAE were
not there, so that SAEs at several hooks do not disturb each other's gradients.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.saes.decoder import check_reconstructs
from clip_lens_ext.towers.live import any_live, fire
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope
from clip_lens_ext.towers.sae_calls import register_splice
from clip_lens_ext.towers.tower import HookedTower


class SplicedSAE:
    """One SAE at one hook of a tower; `tower.add_sae` makes it.

    Args:
        tower: the tower whose hook is meant; it says what the hook's width is.
        sae: the SAE.
        use_error_term, hook_name, token_scope, straight_through: as in `HookedTower.add_sae`.
    """

    def __init__(
        self,
        tower: HookedTower,
        sae: SAE,
        *,
        use_error_term: bool | None = None,
        hook_name: str | None = None,
        token_scope: TokenScope | None = None,
        straight_through: bool | None = None,
    ) -> None:
        check_reconstructs(sae)
        self.sae = sae
        self.hook_name = sae_hook_name(tower, sae, hook_name)
        self.token_scope = token_scope or sae.cfg.metadata.token_scope
        self.n_prefix = tower.n_prefix
        self.use_error_term = True if use_error_term is None else use_error_term
        self.straight_through = self.use_error_term if straight_through is None else straight_through
        self.hook_points: dict[str, HookPoint] = dict(sae.hook_dict)
        if self.token_scope is not None:
            TokenPositions(self.token_scope)  # an unknown scope is an error now, not in the middle of a pass

    def __call__(self, activation: Tensor, eot: Tensor | None) -> Tensor:
        """The activation that goes on, of the same shape."""
        positions = TokenPositions(self.token_scope or default_scope(activation), eot, self.n_prefix)
        positions.check(activation, self.hook_name)
        return positions.put(activation, self._replace(positions.take(activation)))

    def _replace(self, x: Tensor) -> Tensor:
        source = x.detach().requires_grad_(torch.is_grad_enabled()) if self.straight_through else x
        recons = self.sae.decode(self.sae.encode(source))
        if self.use_error_term:
            clean = self._clean_reconstruction(x) if any_live(self.hook_points.values()) else recons.detach()
            error = (x - clean.to(x.dtype)).detach()
            edited_error = fire(self.hook_points["hook_sae_error"], error)
            if self.straight_through:
                # The differences are exact zeros where nothing was edited: the pass stays bit-equal to the native one.
                out = x + (recons - clean).to(x.dtype) + (edited_error - error)
            else:
                out = recons.to(x.dtype) + edited_error
        else:
            out = recons.to(x.dtype)
            if self.straight_through:
                out = out + (x - x.detach())
        return fire(self.hook_points["hook_sae_output"], out)

    @torch.no_grad()
    def _clean_reconstruction(self, x: Tensor) -> Tensor:
        with _without_hooks(self.sae):
            return self.sae.decode(self.sae.encode(x))


@contextmanager
def _without_hooks(sae: SAE) -> Iterator[None]:
    """The SAE's own function, whatever is registered on its hook points."""
    stashed: list[tuple[HookPoint, Any, Any]] = []
    try:
        for point in sae.hook_dict.values():
            stashed.append((point, point._forward_hooks, point._forward_pre_hooks))
            point._forward_hooks, point._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for point, forward_hooks, pre_hooks in stashed:
            point._forward_hooks, point._forward_pre_hooks = forward_hooks, pre_hooks


def sae_hook_name(tower: HookedTower, sae: SAE, hook_name: str | None = None) -> str:
    """The hook of a tower that an SAE reads.

    Raises:
        HookNameError: the SAE does not say and `hook_name` is None, or the tower has no such hook.
        InputError: the SAE's width does not fit the hook, or the SAE is of the other tower.
    """
    name = hook_name or sae.cfg.metadata.hook_name
    if not name:
        raise HookNameError("the SAE does not say which hook it reads: pass hook_name=")
    tower.check_hook_name(name)
    named_tower = sae.cfg.metadata.tower
    if named_tower is not None and named_tower != tower.cfg.tower:
        raise InputError(f"the SAE is of a {named_tower} tower, this is the {tower.cfg.tower} tower")
    width = tower.hook_width(name)
    if sae.cfg.reshape_activations == "hook_z" and width is not None:
        width *= tower.cfg.n_heads or 1
    if width != sae.cfg.d_in:
        raise InputError(
            f"the SAE reads vectors of {sae.cfg.d_in}, {name} gives {width}: is it an SAE of another model "
            "or another hook?"
        )
    if sae.W_dec.device != tower.cfg.device:
        raise InputError(
            f"the SAE is on {sae.W_dec.device}, the tower is on {tower.cfg.device}: use sae.to('{tower.cfg.device}')"
        )
    return name


register_splice(SplicedSAE)
