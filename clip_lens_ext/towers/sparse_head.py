"""The head that makes a CLIP sparse: a widened projection and a ReLU behind a tower's embedding."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clip_lens_ext.errors import InputError

Activation = Literal["relu", "none", "topk"]


class SparseHead(nn.Module):
    """`z = act(W h)`: the code of an embedding.

    With `"relu"` this is Sparse CLIP's head; `"none"` (widened, and dense) and `"topk"` (the `k` greatest entries, the
    rest at zero; the kept ones through the ReLU) are the ablations.

    Args:
        d_in: numbers in an embedding.
        d_code: numbers in a code; 32 and 72 times `d_in` in the paper.
        activation: `"relu"`, `"none"` or `"topk"`.
        k: entries that `"topk"` keeps.
        seed: of the weights, normal with standard deviation `d_in ** -0.5` as open_clip's projections.

    Raises:
        InputError: a width below 1, an unknown activation, or `k` without `"topk"` or the other way round.

    Example:
        >>> head = SparseHead(8, 64)
        >>> code = head(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
        >>> code.shape, bool((code >= 0).all()), 0.3 < float((code > 0).float().mean()) < 0.7
        (torch.Size([5, 64]), True, True)

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075.
    """

    def __init__(
        self, d_in: int, d_code: int, *, activation: Activation = "relu", k: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        for name, width in (("d_in", d_in), ("d_code", d_code)):
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise InputError(f"{name} is a number of dimensions, at least 1; got {width!r}")
        if activation not in get_args(Activation):
            raise InputError(f"activation is one of {', '.join(get_args(Activation))}, got {activation!r}")
        if (k is not None) != (activation == "topk") or (k is not None and not 1 <= k <= d_code):
            raise InputError(f"k, from 1 to {d_code}, goes with activation='topk' and with no other; got {k!r}")
        self.in_features, self.out_features, self.activation, self.k = d_in, d_code, activation, k
        weight = torch.randn(d_code, d_in, generator=torch.Generator().manual_seed(seed)) * d_in**-0.5
        self.weight = nn.Parameter(weight)

    def forward(self, embedding: Tensor) -> Tensor:
        """Codes `[... d_code]` of embeddings `[... d_in]`."""
        return self.activate(embedding @ self.weight.T)

    def activate(self, before: Tensor) -> Tensor:
        """What follows the projection."""
        if self.activation == "none":
            return before
        if self.k is not None:
            kept = before.topk(self.k, dim=-1)
            before = torch.zeros_like(before).scatter(-1, kept.indices, kept.values)
        return before.relu()

    def extra_repr(self) -> str:
        """Widths and activation, for `repr`."""
        k = "" if self.k is None else f", k={self.k}"
        return f"{self.in_features}, {self.out_features}, {self.activation}{k}"
