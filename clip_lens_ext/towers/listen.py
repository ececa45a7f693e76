"""The pass through a tower whose blocks are not taken apart: the native forward runs, and its blocks are listened to.

For blocks of another kind than pre-LN attention and MLP. Each has `hook_resid_pre` and `hook_resid_post`, what goes in
and what comes out. Torch hooks are put on the native blocks for the time of a pass, and only where a hook point of
ours is live; with none live the native forward alone runs.

The tail from a hook runs the native forward on an empty input and puts the given activation in its place: right, and no
faster than a whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.families.listened import ListenedReading
from clip_lens_ext.towers.live import fire, is_live
from clip_lens_ext.towers.walk import ReachedError

if TYPE_CHECKING:
    from clip_lens_ext.towers.tower import HookedTower


class ResidualHooks(nn.Module):
    """The hooks of a block that is not taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint()
        self.hook_resid_post = HookPoint()


class Listen:
    """How a tower of any blocks runs.

    Args:
        reading: the native tower, and which of its modules are blocks.
    """

    def __init__(self, reading: ListenedReading) -> None:
        self.reading = reading
        self.splits: list[str] = []

    def build(self, tower: HookedTower) -> None:
        """Give the tower its hook points."""
        tower.blocks = nn.ModuleList(ResidualHooks() for _ in self.reading.blocks)
        tower.hook_embedding = HookPoint()
        layers = range(len(tower.blocks))
        self.splits = [f"blocks.{layer}.hook_resid_{part}" for layer in layers for part in ("pre", "post")]
        self.splits.append("hook_embedding")

    def forward(self, tower: HookedTower, x: Tensor) -> Tensor:
        """The embedding."""
        with self._listening(tower, 0, len(self.splits)):
            return fire(tower.hook_embedding, self.reading.native_forward(x))

    def run_to(self, tower: HookedTower, x: Tensor, hook_name: str, *, detach: bool = False) -> Tensor:
        """The value that enters a hook; whoever wants no graph of it takes it off."""
        at = self.splits.index(hook_name)
        with self._listening(tower, 0, at):
            if hook_name == "hook_embedding":
                return self.reading.native_forward(x)

            def stop(found: Tensor) -> Tensor:
                raise ReachedError(self.reading.to_tokens(found))

            with self._on(at, stop):
                try:
                    self.reading.native_forward(x)
                except ReachedError as reached:
                    return reached.activation
        raise InputError(f"{hook_name} does not fire on this pass")

    def run_from(self, tower: HookedTower, hook_name: str, activation: Tensor, tokens: Tensor | None) -> Tensor:
        """The embedding from the value that enters a split."""
        at = self.splits.index(hook_name)
        if hook_name == "hook_embedding":
            return fire(tower.hook_embedding, activation)
        if any(module.training for module in tower.native.modules()):
            raise InputError(
                "the tail of this family runs the whole native forward, which in training mode would update running "
                "statistics and drop out: call tower.eval() first"
            )
        point = self._point(tower, at)
        empty = self.reading.empty_input(len(activation)) if tokens is None else tokens

        def put(found: Tensor) -> Tensor:
            return self.reading.from_tokens(fire(point, activation), found)

        with self._on(at, put), self._listening(tower, at + 1, len(self.splits)):
            return fire(tower.hook_embedding, self.reading.native_forward(empty))

    def shape_at(self, tower: HookedTower, hook_name: str) -> tuple[int, ...]:
        """Shape of the activation at a split, without the batch axis."""
        return self.reading.shapes()[self.splits.index(hook_name)]

    def width_at(self, tower: HookedTower, hook_name: str) -> int | None:
        """Size of the last axis at a hook; None where it is not known."""
        return None if ".hook_sae" in hook_name else self.shape_at(tower, hook_name)[-1]

    def lens(self, rows: Tensor) -> Tensor:
        """There is no map from one residual vector to the embedding: what follows the blocks is not taken apart."""
        raise InputError(
            "the Logit Lens needs the final LayerNorm and the projection, and this family's blocks and head are not "
            "taken apart (tower.cfg.hooks is 'residual'): use attribution_patching or exact_ablation"
        )

    @staticmethod
    def _point(tower: HookedTower, at: int) -> HookPoint:
        hooks = cast(ResidualHooks, tower.blocks[at // 2])
        return hooks.hook_resid_post if at % 2 else hooks.hook_resid_pre

    @contextmanager
    def _listening(self, tower: HookedTower, start: int, stop: int) -> Iterator[None]:
        """Fire the live hook points of the splits from `start` to before `stop`."""
        with ExitStack() as stack:
            for at in range(start, min(stop, len(self.splits) - 1)):
                point = self._point(tower, at)
                if is_live(point):
                    stack.enter_context(self._on(at, self._firing(point)))
            yield

    def _firing(self, point: HookPoint) -> Any:
        return lambda found: self.reading.from_tokens(fire(point, self.reading.to_tokens(found)), found)

    @contextmanager
    def _on(self, at: int, change: Any) -> Iterator[None]:
        """For the time of a pass `change` sees, and replaces, what enters or leaves a native block."""
        layer, part = divmod(at, 2)
        block = self.reading.blocks[layer]
        handle = _on_output(block, change) if part else _on_input(block, change)
        try:
            yield
        finally:
            handle.remove()


def _on_input(block: nn.Module, change: Any) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(name for name in ("hidden_states", "x") if name in kwargs)
        return args, {**kwargs, name: change(kwargs[name])}

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(block: nn.Module, change: Any) -> RemovableHandle:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    return block.register_forward_hook(hook)


