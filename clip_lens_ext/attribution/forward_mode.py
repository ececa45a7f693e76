"""A direction pushed forward through a function: its derivative along the direction, whatever the number of outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.no_grad()
def pushed_forward(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> Tensor:
    """`J(at) direction`, of the shape of `function(at)`.

    Args:
        function: of torch operations.
        at: the point.
        direction: of the same shape and dtype.

    Example:
        >>> pushed_forward(lambda x: x**2, torch.tensor([3.0]), torch.tensor([10.0]))
        tensor([60.])
    """
    with forward_ad.dual_level(), warnings.catch_warnings():
        # torch's own decompositions, imported at the first dual number, warn of torch.jit.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(at, direction)))
        # No tangent: the result does not depend on the input.
        return torch.zeros_like(found.primal) if found.tangent is None else found.tangent
