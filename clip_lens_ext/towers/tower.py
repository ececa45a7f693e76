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
from clip_lens_ext.towers.block import HookedBlock
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families import Reading, read_tower
from clip_lens_ext.towers.hook_calls import HookCalls
from clip_lens_ext.towers.live import fire
from clip_lens_ext.towers.memory import PrefixMemory
from clip_lens_ext.towers.norm import HookedNorm
from clip_lens_ext.towers.sae_calls import SAECalls


class HookedTower(SAECalls, HookCalls, HookedRootModule):
    """A vision or text tower of a CLIP model with TransformerLens' hooks and SAELens' calls.

    `tower(x)` is the un-normalised projected embedding `[batch d_embed]`: bit-equal to the native forward while no
    hook inside a block is live. The native module is neither changed nor copied; it is `tower.native`.

    Prefix and tail: `run_to(x, hook_name)` is the activation that enters a hook, `run_from(hook_name, activation)` the
    rest of the model from there, and `run_from(h, run_to(x, h))` is bit-equal to `tower(x)`.

    Args:
        native: an open_clip `VisionTransformer` or `TextTransformer`, or a whole `CLIP` for its text tower.
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

    reading: Reading

    def __init__(self, native: nn.Module, *, model_name: str = "unnamed") -> None:
        super().__init__()
        reading = read_tower(native)
        self.__dict__["reading"] = reading
        self.native = reading.native
        self._cfg = reading.config(model_name)
        self._memory = PrefixMemory()
        self._tokens: Tensor | None = None
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.hook_full_embed = HookPoint()
        if reading.ln_pre is not None:
            self.ln_pre = HookedNorm()
        self.blocks = nn.ModuleList(HookedBlock(block) for block in reading.blocks)
        self.ln_final = HookedNorm()
        self.hook_pooled = HookPoint()
        self.hook_embedding = HookPoint()
        blocks = [
            f"blocks.{layer}.hook_resid_{part}" for layer in range(len(self.blocks)) for part in ("pre", "mid", "post")
        ]
        self._splits = ["hook_embed", "hook_full_embed", *blocks, "hook_pooled", "hook_embedding"]
        self.setup()

    @property
    def cfg(self) -> TowerConfig:
        """Sizes and kinds of the tower, with the device and dtype that it has now."""
        return replace(self._cfg, device=self.reading.ln_final.weight.device, dtype=self.reading.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The un-normalised embedding `[batch d_embed]`.

        Args:
            x: a vision tower takes pictures `[batch 3 height width]` as `clip.preprocess` makes them, a text tower
                token ids `[batch n_ctx]` as `clip.tokenize` makes them.

        Raises:
            InputError: wrong shape, dtype or device, NaN or infinite pixels, token ids out of range.
        """
        self._check_input(x)
        with self._running(x):
            return self._walk(self.reading.embed(x), 0, len(self._splits), self._mask(x))

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
            if hook_name in self._splits:
                found = self._walk(self.reading.embed(x), 0, self._splits.index(hook_name), self._mask(x), detach=True)
            else:
                found = self._capture(x, hook_name)
        needed_gradient = found.requires_grad
        found = found.detach().requires_grad_(False)
        if needed_gradient:
            self._memory.remember_gradient(found)
        pooled_at = self.reading.eot_positions(x) if self._pools_at_eot() else None
        if pooled_at is not None:
            self._memory.remember(found, x, pooled_at)
        return found

    def run_from(self, hook_name: str, activation: Tensor, *, tokens: Tensor | None = None) -> Tensor:
        """The tail: the embedding as a differentiable function of the activation at a hook of the residual stream.

        Args:
            hook_name: `hook_embed`, `hook_full_embed`, a `hook_resid_*`, `hook_pooled` or `hook_embedding`: the hooks
                at which the activation is all that the rest of the tower needs (`tower.split_names()`).
            activation: `[batch token d_model]`; `[batch d_model]` at `hook_pooled`, `[batch d_embed]` at
                `hook_embedding`. Any batch size.
            tokens: token ids `[batch n_ctx]` of the prompts, for a text tower that pools at the end-of-text token.
                Without them those of the `run_to` that made the activation are used, where that is unambiguous.

        Returns:
            The un-normalised embedding `[batch d_embed]`.

        Raises:
            HookNameError: no such hook, or one at which the activation is only a part of the state.
            InputError: the activation has the wrong shape, or the prompts are not known.
        """
        self.check_hook_name(hook_name)
        if hook_name not in self._splits:
            raise HookNameError(
                f"{hook_name!r} carries only a part of the state, so nothing can run on from it alone; "
                "use tower.hooks(...) there, or one of tower.split_names()"
            )
        self._check_activation(hook_name, activation)
        if tokens is None and self._pools_at_eot() and hook_name not in ("hook_pooled", "hook_embedding"):
            tokens = self._memory.recall(activation)
        if tokens is not None and len(tokens) != len(activation):
            raise InputError(f"tokens has {len(tokens)} prompts, the activation has {len(activation)} samples")
        if torch.is_grad_enabled() and not activation.requires_grad and self._memory.needed_gradient(activation):
            activation = activation.detach().requires_grad_()
        with self._running(tokens):
            return self._walk(activation, self._splits.index(hook_name), len(self._splits), self._mask(tokens))

    def split_names(self) -> list[str]:
        """The hooks at which `run_from` can start, in the order of the forward pass."""
        return list(self._splits)

    def hook_width(self, hook_name: str) -> int | None:
        """Size of the last axis at a hook; None at the attention scores and the pattern, whose last axis is tokens."""
        self.check_hook_name(hook_name)
        cfg, last = self._cfg, hook_name.split(".")[-1]
        if last in ("hook_attn_scores", "hook_pattern") or ".hook_sae" in hook_name:
            return None
        widths = {"hook_pre": cfg.d_mlp, "hook_post": cfg.d_mlp, "hook_embedding": cfg.d_embed, "hook_scale": 1}
        widths |= dict.fromkeys(("hook_q", "hook_k", "hook_v", "hook_z"), cfg.d_head)
        return widths.get(last, cfg.d_model)

    def project(self, rows: Tensor) -> Tensor:
        """Residual-stream vectors pushed alone through the final LayerNorm and the projection: the Logit Lens' map.

        Args:
            rows: `[... d_model]`.

        Returns:
            `[... d_embed]`, un-normalised.
        """
        return self.reading.project(self.reading.ln_final(rows))

    def eot_positions(self, tokens: Tensor | None) -> Tensor | None:
        """Position of the end-of-text token of each prompt `[batch]`; None for a vision tower."""
        return None if tokens is None else self.reading.eot_positions(tokens)

    def _pools_at_eot(self) -> bool:
        return self.reading.pooled_token() == "eot"

    def _mask(self, x: Tensor | None) -> Tensor | None:
        return self.reading.mask(x)

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
        cfg = self.cfg
        ends = {"hook_pooled": (cfg.d_model,), "hook_embedding": (cfg.d_embed,)}
        expected = ends.get(hook_name, (cfg.n_ctx, cfg.d_model))
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

    def _walk(self, x: Tensor, start: int, stop: int, mask: Tensor | None, *, detach: bool = False) -> Tensor:
        at = start
        while at < stop:
            x, at = self._step(x, at, stop, mask)
            if detach:
                # The graph of one step at a time: MultiheadAttention takes its fused path, whose last bits differ,
                # only where nothing needs a gradient, so needing one has to be passed on.
                x = x.detach().requires_grad_(x.requires_grad)
        return x

    def _step(self, x: Tensor, at: int, stop: int, mask: Tensor | None) -> tuple[Tensor, int]:
        """From the value that enters split `at` to the one that enters a later split, at most `stop`."""
        name = self._splits[at]
        if name == "hook_embed":
            return self._add_positions(fire(self.hook_embed, x)), at + 1
        if name == "hook_full_embed":
            x = self.reading.after_embedding(fire(self.hook_full_embed, x))
            return (x if self.reading.ln_pre is None else self.ln_pre(x, self.reading.ln_pre)), at + 1
        if name == "hook_pooled":
            return self.reading.project(fire(self.hook_pooled, x)), at + 1
        if name == "hook_embedding":
            return fire(self.hook_embedding, x), at + 1
        layer, part = divmod(at - 2, 3)
        block = cast(HookedBlock, self.blocks[layer])
        if part == 0 and stop >= at + 2:
            return block(x, mask, checkpointed=self.reading.checkpointed), at + 2
        if part == 0:
            return block.to_mid(x, mask), at + 1
        if part == 1:
            return block.from_mid(x), at + 1
        x = fire(block.hook_resid_post, x)
        return (self._pool(x) if layer == len(self.blocks) - 1 else x), at + 1

    def _add_positions(self, x: Tensor) -> Tensor:
        positions = self.reading.positional_embedding(x)
        return x + fire(self.hook_pos_embed, positions.expand(x.shape[0], -1, -1))

    def _pool(self, x: Tensor) -> Tensor:
        if self.reading.ln_after_pool:
            return self.ln_final(self.reading.pool(x, self._tokens), self.reading.ln_final)
        return self.reading.pool(self.ln_final(x, self.reading.ln_final), self._tokens)

    def _capture(self, x: Tensor, hook_name: str) -> Tensor:
        """The input of a hook inside a block or a LayerNorm; the pass ends there."""

        def stop(point: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handle = self.hook_dict[hook_name].register_forward_pre_hook(stop, prepend=True)
        try:
            self._walk(self.reading.embed(x), 0, len(self._splits), self._mask(x), detach=True)
        except _ReachedError as reached:
            return reached.activation
        finally:
            handle.remove()
        raise InputError(f"{hook_name} does not fire on this pass")


class _ReachedError(Exception):
    """Not an error: how a pass ends in the middle of a native block."""

    def __init__(self, activation: Tensor) -> None:
        super().__init__()
        self.activation = activation
