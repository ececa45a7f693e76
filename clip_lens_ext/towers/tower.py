"""One CLIP tower as a hooked model: its own forward walks the native submodules and fires the hooks between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families import Reading, TowerReading, read_tower
from clip_lens_ext.towers.families.listened import ListenedReading
from clip_lens_ext.towers.hook_calls import HookCalls
from clip_lens_ext.towers.listen import Listen
from clip_lens_ext.towers.live import fire
from clip_lens_ext.towers.memory import PrefixMemory
from clip_lens_ext.towers.norm import HookedNorm
from clip_lens_ext.towers.sae_calls import SAECalls
from clip_lens_ext.towers.walk import Walk


class HookedTower(SAECalls, HookCalls, HookedRootModule):
    """A vision or text tower of a CLIP model with TransformerLens' hooks and SAELens' calls.

    `tower(x)` is the un-normalised projected embedding `[batch d_embed]`: bit-equal to the native forward while no
    hook inside a block is live. The native module is neither changed nor copied; it is `tower.native`.

    Prefix and tail: `run_to(x, hook_name)` is the activation that enters a hook, `run_from(hook_name, activation)` the
    rest of the model from there, and `run_from(h, run_to(x, h))` is bit-equal to `tower(x)`.

    Args:
        native: a tower of one of the families (docs/towers.md), or a whole open_clip `CLIP` for its text tower.
        model_name: goes into results and SAE metadata.

    Raises:
        UnsupportedModelError: no family reads `native`.

    Example:
        >>> import clip_lens_ext as cle
        >>> tower = cle.planted_clip().vision
        >>> x = torch.zeros(2, 3, 48, 48)
        >>> embedding, cache = tower.run_with_cache(x, names_filter="blocks.1.attn.hook_pattern")
        >>> cache["blocks.1.attn.hook_pattern"].shape
        torch.Size([2, 4, 65, 65])
        >>> hook = "blocks.2.hook_resid_post"
        >>> torch.equal(tower.run_from(hook, tower.run_to(x, hook)), tower(x))
        True
    """

    reading: TowerReading
    _pass: Walk | Listen
    blocks: nn.ModuleList
    hook_embed: HookPoint
    hook_pos_embed: HookPoint
    hook_full_embed: HookPoint
    hook_embedding: HookPoint
    ln_pre: HookedNorm
    ln_final: HookedNorm
    hook_pooled: HookPoint

    def __init__(self, native: nn.Module, *, model_name: str = "unnamed") -> None:
        super().__init__()
        reading = read_tower(native)
        self.__dict__["reading"] = reading
        runs = Listen(reading) if isinstance(reading, ListenedReading) else Walk(cast(Reading, reading))
        self.__dict__["_pass"] = runs
        self.native = reading.native
        self._cfg = reading.config(model_name)
        self._memory = PrefixMemory()
        self._tokens: Tensor | None = None
        self._pass.build(self)
        self.setup()

    @property
    def cfg(self) -> TowerConfig:
        """Sizes and kinds of the tower, with the device and dtype that it has now."""
        return replace(self._cfg, device=self.reading.device, dtype=self.reading.dtype)

    def forward(self, x: Tensor, *, stop_at_layer: int | None = None) -> Tensor:
        """The un-normalised embedding `[batch d_embed]`.

        Args:
            x: a vision tower takes pictures `[batch 3 height width]` as `clip.preprocess` makes them, a text tower
                token ids `[batch n_ctx]` as `clip.tokenize` makes them.
            stop_at_layer: as in TransformerLens: give the residual stream `[batch token d_model]` before this block and
                run nothing after it. Negative numbers count from the end; the number of blocks means after the last.

        Raises:
            InputError: wrong shape, dtype or device, NaN or infinite pixels, token ids out of range, no such block.
        """
        self._check_input(x)
        with self._running(x):
            if stop_at_layer is None:
                return self._pass.forward(self, x)
            n_layers = len(self.blocks)
            layer = stop_at_layer + n_layers if stop_at_layer < 0 else stop_at_layer
            if not 0 <= layer <= n_layers:
                raise InputError(f"stop_at_layer={stop_at_layer}: this tower has {n_layers} blocks")
            if layer < n_layers:
                return self._pass.run_to(self, x, f"blocks.{layer}.hook_resid_pre")
            last = f"blocks.{n_layers - 1}.hook_resid_post"
            return fire(self.hook_dict[last], self._pass.run_to(self, x, last))

    def run_to(self, x: Tensor, hook_name: str) -> Tensor:
        """The prefix: the activation that enters a hook, without gradients. Nothing after the hook is run.

        Hooks before it fire; those at the hook itself fire in `run_from`.

        Args:
            x: as for `tower(x)`.
            hook_name: any hook of the tower.

        Returns:
            The activation at the hook, detached; `[batch token d_model]` at the residual hooks.

        Raises:
            HookNameError: no hook has this name.
            InputError: as for `tower(x)`.
        """
        self.check_hook_name(hook_name)
        self._check_input(x)
        with self._running(x):
            found = self._pass.run_to(self, x, hook_name, detach=True)
        needed_gradient = found.requires_grad
        found = found.detach().requires_grad_(False)
        if needed_gradient:
            self._memory.remember_gradient(found)
        if self.reading.needs_tokens:
            pooled_at = self.reading.eot_positions(x) if self._pools_at_eot() else None
            # Where the mask depends on the prompts as well, prompts are the same only if all their ids are.
            self._memory.remember(found, x, x if pooled_at is None else pooled_at)
        return found

    def run_from(self, hook_name: str, activation: Tensor, *, tokens: Tensor | None = None) -> Tensor:
        """The tail: the embedding as a differentiable function of the activation at a hook of the residual stream.

        Args:
            hook_name: `hook_embed`, `hook_full_embed`, a `hook_resid_*`, `hook_pooled` or `hook_embedding`: the hooks
                at which the activation is all that the rest of the tower needs (`tower.split_names()`).
            activation: `[batch token d_model]`; `[batch d_model]` at `hook_pooled`, `[batch d_embed]` at
                `hook_embedding`. Any batch size.
            tokens: token ids `[batch n_ctx]` of the prompts, for a text tower that pools at the end-of-text token, or
                whose mask depends on the prompt.
                Without them those of the `run_to` that made the activation are used, where that is unambiguous.

        Returns:
            The un-normalised embedding `[batch d_embed]`.

        Raises:
            HookNameError: no such hook, or one at which the activation is only a part of the state.
            InputError: the activation has the wrong shape, or the prompts are not known.
        """
        self.check_hook_name(hook_name)
        if hook_name not in self._pass.splits:
            raise HookNameError(
                f"{hook_name!r} carries only a part of the state, so nothing can run on from it alone; "
                "use tower.hooks(...) there, or one of tower.split_names()"
            )
        self._check_activation(hook_name, activation)
        if tokens is None and self.reading.needs_tokens and hook_name not in ("hook_pooled", "hook_embedding"):
            tokens = self._memory.recall(activation)
        if tokens is not None and len(tokens) != len(activation):
            raise InputError(f"tokens has {len(tokens)} prompts, the activation has {len(activation)} samples")
        if torch.is_grad_enabled() and not activation.requires_grad and self._memory.needed_gradient(activation):
            activation = activation.detach().requires_grad_()
        with self._running(tokens):
            return self._pass.run_from(self, hook_name, activation, tokens)

    def split_names(self) -> list[str]:
        """The hooks at which `run_from` can start, in the order of the forward pass."""
        return list(self._pass.splits)

    def hook_width(self, hook_name: str) -> int | None:
        """Size of the last axis at a hook; None at the attention scores and the pattern, whose last axis is tokens."""
        self.check_hook_name(hook_name)
        return self._pass.width_at(self, hook_name)

    def project(self, rows: Tensor) -> Tensor:
        """Residual-stream vectors pushed alone through the final LayerNorm and the projection: the Logit Lens' map.

        Where a tower pools by attention, each vector is the only token that the pooling attends to.

        Args:
            rows: `[... d_model]`.

        Returns:
            `[... d_embed]`, un-normalised.

        Raises:
            InputError: `cfg.hooks` is `"residual"`: the end of the tower is not taken apart.
        """
        return self._pass.lens(rows)

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches, for `TokenPositions`; a text tower counts its first token."""
        return self._cfg.n_prefix_tokens if self._cfg.tower == "vision" else 1

    def eot_positions(self, tokens: Tensor | None) -> Tensor | None:
        """Position of the end-of-text token of each prompt `[batch]`; None for a vision tower."""
        return None if tokens is None else self.reading.eot_positions(tokens)

    def _pools_at_eot(self) -> bool:
        return self.reading.pooled_token() == "eot"

    def _check_input(self, x: Tensor) -> None:
        self.reading.check_input(x)
        if x.is_floating_point() and not x.is_meta and not torch.compiler.is_compiling():
            finite = torch.isfinite(x.flatten(1).sum(dim=1))  # one pass; a sum is finite only where all addends are
            if not finite.all() and not torch.isfinite(x).all():
                bad = (~torch.isfinite(x.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
                raise InputError(
                    f"NaN or infinite pixels in sample {bad[0]}" + (f" and {len(bad) - 1} more" if bad[1:] else "")
                )

    def _check_activation(self, hook_name: str, activation: Tensor) -> None:
        cfg, expected = self.cfg, self._pass.shape_at(self, hook_name)
        axes = " ".join(["batch", *map(str, expected)])
        if not isinstance(activation, Tensor) or tuple(activation.shape[1:]) != expected or len(activation) == 0:
            found = list(activation.shape) if isinstance(activation, Tensor) else type(activation).__name__
            raise InputError(f"the activation at {hook_name} is [{axes}], got {found}")
        if activation.dtype != cfg.dtype or activation.device != cfg.device:
            raise InputError(
                f"the activation at {hook_name} is {cfg.dtype} on {cfg.device}, "
                f"got {activation.dtype} on {activation.device}"
            )

    @contextmanager
    def _running(self, x: Tensor | None) -> Iterator[None]:
        # An SAE on the end-of-text token reads the prompts of the pass that is under way.
        before, self._tokens = self._tokens, x if self.reading.tower == "text" else None
        try:
            yield
        finally:
            self._tokens = before
