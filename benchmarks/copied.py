"""The other way to hook a ViT: a re-implementation in TransformerLens' manner, into which the weights are copied.

Written for the benchmark alone: every block is taken apart at every call, whether somebody listens or not.
"""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

import clip_lens_ext as cle
from clip_lens_ext.towers.block import HookedBlock


class CopiedNorm(nn.Module):
    """LayerNorm with `hook_scale` and `hook_normalized`."""

    def __init__(self, native: nn.LayerNorm) -> None:
        super().__init__()
        self.w, self.b, self.eps = nn.Parameter(native.weight.clone()), nn.Parameter(native.bias.clone()), native.eps
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, of the same shape."""
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / self.hook_scale((x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(x) * self.w + self.b


class CopiedBlock(nn.Module):
    """A pre-LN block with weights by head `[head d_model d_head]`, as TransformerLens keeps them."""

    def __init__(self, block: HookedBlock) -> None:
        super().__init__()
        reading = block.reading
        self.ln1, self.ln2 = CopiedNorm(reading.ln1), CopiedNorm(reading.ln2)
        for which in "qkv":
            weight, bias = reading.attention.weights(which)
            setattr(self, f"W_{which}", nn.Parameter(weight.detach().clone()))
            setattr(self, f"b_{which}", nn.Parameter(bias.detach().clone()))
        self.W_o, self.b_o = nn.Parameter(block.attn.W_O.detach().clone()), nn.Parameter(block.attn.b_O.detach().clone())
        self.mlp_in, self.mlp_out = reading.mlp.native.c_fc, reading.mlp.native.c_proj
        names = ("resid_pre", "q", "k", "v", "attn_scores", "pattern", "z", "attn_out", "resid_mid", "pre", "post",
                 "mlp_out", "resid_post")  # fmt: skip
        self.hooks = nn.ModuleDict({f"hook_{name}": HookPoint() for name in names})

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the block."""
        hooks = self.hooks
        x = hooks["hook_resid_pre"](x)
        y = self.ln1(x)
        q, k, v = (
            hooks[f"hook_{which}"](
                einsum(y, getattr(self, f"W_{which}"), "b t m, h m d -> b t h d") + getattr(self, f"b_{which}")
            )
            for which in "qkv"
        )
        scores = hooks["hook_attn_scores"](einsum(q, k, "b q h d, b k h d -> b h q k") / q.shape[-1] ** 0.5)
        z = hooks["hook_z"](einsum(hooks["hook_pattern"](scores.softmax(dim=-1)), v, "b h q k, b k h d -> b q h d"))
        x = x + hooks["hook_attn_out"](einsum(z, self.W_o, "b t h d, h d m -> b t m") + self.b_o)
        x = hooks["hook_resid_mid"](x)
        post = hooks["hook_post"](F.gelu(hooks["hook_pre"](self.mlp_in(self.ln2(x)))))
        return hooks["hook_resid_post"](x + hooks["hook_mlp_out"](self.mlp_out(post)))


class CopiedTower(HookedRootModule):
    """open_clip's vision tower, copied."""

    def __init__(self, tower: cle.HookedTower) -> None:
        super().__init__()
        self.reading = tower.reading
        self.blocks = nn.ModuleList(CopiedBlock(block) for block in tower.blocks)
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        """The embedding `[batch d_embed]`."""
        reading = self.reading
        x = reading.embed(x)
        x = reading.ln_pre(x + reading.positional_embedding(x))
        for block in self.blocks:
            x = block(x)
        return reading.project(reading.pool(reading.ln_final(x), None))


@torch.no_grad()
def check(copied: CopiedTower, tower: cle.HookedTower, x: Tensor) -> float:
    """Largest relative difference of the copy's embedding from the native one."""
    expected = tower(x)
    return float((copied(x) - expected).abs().max() / expected.abs().max())
