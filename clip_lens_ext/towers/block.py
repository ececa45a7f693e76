"""One pre-LN transformer block of a native CLIP tower, in TransformerLens' words.

    hook_resid_pre -+-> hook_attn_in -> ln1 -> attn -> hook_attn_out -+
                    |                                                 v
                    +-----------------------------------------------> + -> hook_resid_mid
    hook_resid_mid -+-> hook_mlp_in  -> ln2 -> mlp  -> hook_mlp_out  -+
                    |                                                 v
                    +-----------------------------------------------> + -> hook_resid_post

An edit at `hook_resid_pre` or `hook_resid_mid` reaches both branches; one at `hook_attn_in` or `hook_mlp_in` reaches
the layer alone, not the skip. Layer scale, where a block has it, is inside `hook_attn_out` and `hook_mlp_out`, so that
these are what is added to the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.towers.attention import HookedAttention, HookedMLP
from clip_lens_ext.towers.families.attentions import Mask
from clip_lens_ext.towers.families.reading import BlockReading
from clip_lens_ext.towers.live import any_live, fire
from clip_lens_ext.towers.norm import HookedNorm


class HookedBlock(nn.Module):
    """The hooks of one native pre-LN block.

    The native block keeps its weights and its own forward. Where no hook inside it is live it runs whole; else its
    submodules are called one by one, in its own order, with the hooks in between.

    Args:
        reading: the block by its parts; the native one is kept by reference.
    """

    reading: BlockReading
    _inner_points: list[HookPoint]

    def __init__(self, reading: BlockReading) -> None:
        super().__init__()
        self.__dict__["reading"] = reading
        self.hook_resid_pre = HookPoint()
        self.hook_attn_in = HookPoint()
        self.ln1 = HookedNorm()
        self.attn = HookedAttention(reading.attention)
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.ln2 = HookedNorm()
        self.mlp = HookedMLP(reading.mlp)
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()
        ends = (self.hook_resid_pre, self.hook_resid_post)
        points = [module for module in self.modules() if isinstance(module, HookPoint)]
        self.__dict__["_inner_points"] = [point for point in points if all(point is not end for end in ends)]

    def forward(self, x: Tensor, mask: Mask = None, *, checkpointed: bool = False) -> Tensor:
        """The stream before `hook_resid_post` fires, from the stream before `hook_resid_pre` fires.

        Args:
            x: residual stream, `[batch token d_model]`.
            mask: what the family's blocks get.
            checkpointed: recompute the block in the backward pass, as native gradient checkpointing does. Ignored
                where a hook inside is live, which would fire twice.
        """
        x = fire(self.hook_resid_pre, x)
        if not any_live(self._inner_points):
            if checkpointed and torch.is_grad_enabled():
                return checkpoint(self.reading.run, x, mask, use_reentrant=False)
            return self.reading.run(x, mask)
        return self.from_mid(self._attention_half(x, mask))

    def to_mid(self, x: Tensor, mask: Mask = None) -> Tensor:
        """The stream before `hook_resid_mid` fires, from the stream before `hook_resid_pre` fires."""
        return self._attention_half(fire(self.hook_resid_pre, x), mask)

    def from_mid(self, x: Tensor) -> Tensor:
        """The stream before `hook_resid_post` fires, from the stream before `hook_resid_mid` fires."""
        x = fire(self.hook_resid_mid, x)
        branch = self.ln2(fire(self.hook_mlp_in, x), self.reading.ln2)
        return x + fire(self.hook_mlp_out, self.reading.scale_mlp_out(self.mlp(branch)))

    def at_token(self, x: Tensor, at: Tensor, mask: Mask = None) -> Tensor:
        """The stream after the block at one token per sample, `[batch d_model]`; no hook fires.

        Args:
            x: the stream before the block, `[batch token d_model]`.
            at: position of the token in each sample, `[batch]`.
            mask: what the family's blocks get.
        """
        own = x[torch.arange(len(x), device=x.device), at]
        own = own + self.reading.scale_attn_out(self.attn.at_token(self.reading.ln1(x), at, mask))
        return own + self.reading.scale_mlp_out(self.reading.mlp.run(self.reading.ln2(own)))

    def _attention_half(self, x: Tensor, mask: Mask) -> Tensor:
        branch = self.ln1(fire(self.hook_attn_in, x), self.reading.ln1)
        return x + fire(self.hook_attn_out, self.reading.scale_attn_out(self.attn(branch, mask)))
