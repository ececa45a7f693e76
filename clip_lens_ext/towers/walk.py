"""The pass through a tower whose native parts are called one by one, with the hooks in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.block import HookedBlock
from clip_lens_ext.towers.families.reading import Reading
from clip_lens_ext.towers.live import fire
from clip_lens_ext.towers.norm import HookedNorm

if TYPE_CHECKING:
    from clip_lens_ext.towers.tower import HookedTower


class Walk:
    """How a tower of pre-LN blocks runs.

    Args:
        reading: the native tower.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.splits: list[str] = []

    def build(self, tower: HookedTower) -> None:
        """Give the tower its hook points."""
        tower.hook_embed = HookPoint()
        tower.hook_pos_embed = HookPoint()
        tower.hook_full_embed = HookPoint()
        if self.reading.ln_pre is not None:
            tower.ln_pre = HookedNorm()
        tower.blocks = nn.ModuleList(HookedBlock(block) for block in self.reading.blocks)
        tower.ln_final = HookedNorm()
        tower.hook_pooled = HookPoint()
        tower.hook_embedding = HookPoint()
        layers = range(len(tower.blocks))
        blocks = [f"blocks.{layer}.hook_resid_{part}" for layer in layers for part in ("pre", "mid", "post")]
        self.splits = ["hook_embed", "hook_full_embed", *blocks, "hook_pooled", "hook_embedding"]

    def forward(self, tower: HookedTower, x: Tensor) -> Tensor:
        """The embedding."""
        return self._walk(tower, self.reading.embed(x), 0, len(self.splits), x)

    def run_to(self, tower: HookedTower, x: Tensor, hook_name: str, *, detach: bool = False) -> Tensor:
        """The value that enters a hook; with `detach` its graph is that of the last step alone."""
        if hook_name in self.splits:
            return self._walk(tower, self.reading.embed(x), 0, self.splits.index(hook_name), x, detach=detach)
        return self._capture(tower, x, hook_name)

    def run_from(self, tower: HookedTower, hook_name: str, activation: Tensor, tokens: Tensor | None) -> Tensor:
        """The embedding from the value that enters a split."""
        return self._walk(tower, activation, self.splits.index(hook_name), len(self.splits), tokens)

    def shape_at(self, tower: HookedTower, hook_name: str) -> tuple[int, ...]:
        """Shape of the activation at a split, without the batch axis."""
        cfg = tower.cfg
        ends: dict[str, tuple[int, ...]] = {"hook_pooled": (cfg.d_pooled,), "hook_embedding": (cfg.d_embed,)}
        return ends.get(hook_name, (cfg.n_ctx, cfg.d_model))

    def width_at(self, tower: HookedTower, hook_name: str) -> int | None:
        """Size of the last axis at a hook; None where that axis is tokens."""
        cfg, last = tower._cfg, hook_name.split(".")[-1]
        if last in ("hook_attn_scores", "hook_pattern") or ".hook_sae" in hook_name:
            return None
        widths: dict[str, int | None] = {"hook_pre": cfg.d_mlp, "hook_post": cfg.d_mlp, "hook_embedding": cfg.d_embed}
        widths |= dict.fromkeys(("hook_q", "hook_k", "hook_v", "hook_z"), cfg.d_head)
        widths |= {"hook_scale": 1, "hook_pooled": cfg.d_pooled}
        if hook_name == "ln_final.hook_normalized":
            return int(self.reading.ln_final.normalized_shape[-1])
        return widths.get(last, cfg.d_model)

    def lens(self, rows: Tensor) -> Tensor:
        """Residual vectors through all that follows the last block."""
        return self.reading.lens(rows)

    def _walk(
        self, tower: HookedTower, x: Tensor, start: int, stop: int, given: Tensor | None, *, detach: bool = False
    ) -> Tensor:
        tokens = given if self.reading.tower == "text" else None
        mask = self.reading.mask(tokens)
        at = start
        while at < stop:
            x, at = self._step(tower, x, at, stop, mask, tokens)
            if detach:
                # The graph of one step at a time: MultiheadAttention takes its fused path, whose last bits differ,
                # only where nothing needs a gradient, so needing one has to be passed on.
                x = x.detach().requires_grad_(x.requires_grad)
        return x

    def _step(
        self, tower: HookedTower, x: Tensor, at: int, stop: int, mask: object, tokens: Tensor | None
    ) -> tuple[Tensor, int]:
        """From the value that enters split `at` to the one that enters a later split, at most `stop`."""
        name = self.splits[at]
        if name == "hook_embed":
            return self._add_positions(tower, fire(tower.hook_embed, x)), at + 1
        if name == "hook_full_embed":
            x = self.reading.after_embedding(fire(tower.hook_full_embed, x))
            return (x if self.reading.ln_pre is None else tower.ln_pre(x, self.reading.ln_pre)), at + 1
        if name == "hook_pooled":
            return self.reading.project(fire(tower.hook_pooled, x)), at + 1
        if name == "hook_embedding":
            return fire(tower.hook_embedding, x), at + 1
        layer, part = divmod(at - 2, 3)
        block = cast(HookedBlock, tower.blocks[layer])
        if part == 0 and stop >= at + 2:
            return block(x, mask, checkpointed=self.reading.checkpointed), at + 2
        if part == 0:
            return block.to_mid(x, mask), at + 1
        if part == 1:
            return block.from_mid(x), at + 1
        x = fire(block.hook_resid_post, x)
        return (self._pool(tower, x, tokens) if layer == len(tower.blocks) - 1 else x), at + 1

    def _add_positions(self, tower: HookedTower, x: Tensor) -> Tensor:
        positions = self.reading.positional_embedding(x)
        return x + fire(tower.hook_pos_embed, positions.expand(x.shape[0], -1, -1))

    def _pool(self, tower: HookedTower, x: Tensor, tokens: Tensor | None) -> Tensor:
        x = self.reading.before_norm(x)
        if self.reading.ln_after_pool:
            return tower.ln_final(self.reading.pool(x, tokens), self.reading.ln_final)
        return self.reading.pool(tower.ln_final(x, self.reading.ln_final), tokens)

    def _capture(self, tower: HookedTower, x: Tensor, hook_name: str) -> Tensor:
        """The input of a hook inside a block or a LayerNorm; the pass ends there."""

        def stop(point: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise ReachedError(inputs[0])

        handle = tower.hook_dict[hook_name].register_forward_pre_hook(stop, prepend=True)
        try:
            self._walk(tower, self.reading.embed(x), 0, len(self.splits), x, detach=True)
        except ReachedError as reached:
            return reached.activation
        finally:
            handle.remove()
        raise InputError(f"{hook_name} does not fire on this pass")


class ReachedError(Exception):
    """Not an error: how a pass ends in the middle of a native block."""

    def __init__(self, activation: Tensor) -> None:
        super().__init__()
        self.activation = activation
