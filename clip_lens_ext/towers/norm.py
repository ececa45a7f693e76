"""A LayerNorm with TransformerLens' two hooks: the scale that divides, and the normalised vector before the gain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.towers.live import any_live, fire


class HookedNorm(nn.Module):
    """The hooks of one native LayerNorm, which is passed in at each call and keeps its own weights.

    `hook_scale` `[... 1]` is `sqrt(var(x) + eps)` with the biased variance; `hook_normalized` `[... d_model]` is
    `(x - mean(x)) / scale`, before gain and bias, as in TransformerLens. While neither is live the native module
    itself runs. Half-precision inputs are normalised in float32, as the native kernel does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Tensor, native: nn.LayerNorm) -> Tensor:
        """`native(x)`, of the same shape, with the hooks in between where one is live."""
        if not any_live((self.hook_scale, self.hook_normalized)):
            return native(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        centred = wide - wide.mean(dim=-1, keepdim=True)
        scale = fire(self.hook_scale, (centred.pow(2).mean(dim=-1, keepdim=True) + native.eps).sqrt())
        normalized = fire(self.hook_normalized, centred / scale).to(wide.dtype)
        if native.weight is not None:
            normalized = normalized * native.weight.to(wide.dtype)
        if native.bias is not None:
            normalized = normalized + native.bias.to(wide.dtype)
        return normalized.to(x.dtype)
