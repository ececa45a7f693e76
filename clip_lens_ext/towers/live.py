"""Hook points that cost nothing until someone listens.

A `HookPoint` of TransformerLens is an identity module. A tower has some twenty of them in every block, so it asks
each one first whether anybody listens: the native fast paths run wherever nobody does.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint


def is_live(point: nn.Module) -> bool:
    """Whether anything is registered on a hook point: a forward or a backward hook, of any library.

    Example:
        >>> point = HookPoint()
        >>> is_live(point)
        False
        >>> point.add_hook(lambda activation, hook: None)
        >>> is_live(point)
        True
    """
    return bool(point._forward_hooks or point._backward_hooks or point._forward_pre_hooks or point._backward_pre_hooks)


def any_live(points: Iterable[nn.Module]) -> bool:
    """Whether any of several hook points is live."""
    return any(is_live(point) for point in points)


def fire(point: HookPoint, activation: Tensor) -> Tensor:
    """Pass an activation through a hook point, or around it when nobody listens."""
    return point(activation) if is_live(point) else activation
