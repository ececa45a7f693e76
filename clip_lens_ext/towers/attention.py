"""Multi-head attention and MLP of a native block, taken apart only as far as somebody listens."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.towers.live import any_live, fire, is_live


class HookedAttention(nn.Module):
    """The hooks of one native `nn.MultiheadAttention` (self-attention, one fused input projection).

    Hooks: `hook_q`, `hook_k`, `hook_v`, `hook_z` `[batch token head d_head]`; `hook_attn_scores` (scaled and masked)
    and `hook_pattern` `[batch head token token]`, query before key; `hook_result` `[batch token head d_model]`, the
    write of each head without the output bias. With none live the native module runs, fused. Scores and pattern are
    computed only for a listener of theirs; the head results, which cost `n_heads` times the memory, for theirs.

    Args:
        native: the module whose hooks these are. It is kept by reference and never changed.
    """

    native: nn.MultiheadAttention

    def __init__(self, native: nn.MultiheadAttention) -> None:
        super().__init__()
        self.__dict__["native"] = native  # by reference: registered once, under the tower's own `native`
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return self.native.num_heads

    def _in_projection(self) -> tuple[Tensor, Tensor]:
        weight = rearrange(
            self.native.in_proj_weight, "(qkv head d_head) d_model -> qkv head d_model d_head", qkv=3, head=self.n_heads
        )
        bias = rearrange(self.native.in_proj_bias, "(qkv head d_head) -> qkv head d_head", qkv=3, head=self.n_heads)
        return weight, bias

    @property
    def W_Q(self) -> Tensor:
        """Query weights `[head d_model d_head]`, a view of the native ones."""
        return self._in_projection()[0][0]

    @property
    def W_K(self) -> Tensor:
        """Key weights `[head d_model d_head]`, a view of the native ones."""
        return self._in_projection()[0][1]

    @property
    def W_V(self) -> Tensor:
        """Value weights `[head d_model d_head]`, a view of the native ones."""
        return self._in_projection()[0][2]

    @property
    def W_O(self) -> Tensor:
        """Output weights `[head d_head d_model]`, a view of the native ones."""
        return rearrange(self.native.out_proj.weight, "d_model (head d_head) -> head d_head d_model", head=self.n_heads)

    @property
    def b_O(self) -> Tensor:
        """Output bias `[d_model]`."""
        return self.native.out_proj.bias

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention output `[batch token d_model]` of the normalised input `x`, same shape.

        Args:
            x: input of the three projections, `[batch token d_model]`.
            mask: additive mask, `[token token]` or `[batch*head token token]`, or None.
        """
        mask = mask.to(x.dtype) if mask is not None else None
        if not any_live(self.children()):
            return self._native_forward(x, mask)
        q, k, v = F.linear(x, self.native.in_proj_weight, self.native.in_proj_bias).chunk(3, dim=-1)
        split = "batch token (head d_head) -> batch token head d_head"
        q = fire(self.hook_q, rearrange(q, split, head=self.n_heads))
        k = fire(self.hook_k, rearrange(k, split, head=self.n_heads))
        v = fire(self.hook_v, rearrange(v, split, head=self.n_heads))
        if mask is not None and mask.dim() == 3:
            mask = rearrange(mask, "(batch head) query key -> batch head query key", head=self.n_heads)
        z = fire(self.hook_z, self._mix(q, k, v, mask))
        if not is_live(self.hook_result):
            return self.native.out_proj(rearrange(z, "batch token head d_head -> batch token (head d_head)"))
        result = einsum(z, self.W_O, "batch token head d_head, head d_head d_model -> batch token head d_model")
        return fire(self.hook_result, result).sum(dim=2) + self.b_O

    def at_token(self, x: Tensor, at: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention output of one token per sample, `[batch d_model]`: about a hundredth of the work of all tokens.

        With a single query neither keys nor values need to be formed: `q . (x W_K)` is `(q W_K') . x`, and
        `sum_t p_t (x_t W_V)` is `(sum_t p_t x_t) W_V`. The key bias is the same for all keys, and drops out of the
        softmax. No hook fires, and nothing is dropped out. Equal to `forward` up to rounding.

        Args:
            x: input of the three projections, `[batch token d_model]`.
            at: position of the token in each sample, `[batch]`.
            mask: additive mask `[token token]`, or None.
        """
        (w_q, w_k, w_v), (b_q, _, b_v) = self._in_projection()
        own = x[torch.arange(len(x), device=x.device), at]
        q = einsum(own, w_q, "batch d_model, head d_model d_head -> batch head d_head") + b_q
        q = einsum(q, w_k, "batch head d_head, head d_model d_head -> batch head d_model")
        scores = torch.bmm(q, x.transpose(1, 2)) / self.native.head_dim**0.5
        if mask is not None:
            scores = scores + mask.to(x.dtype)[at][:, None]
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        mixed = torch.bmm(wide.softmax(dim=-1).to(x.dtype), x)
        z = einsum(mixed, w_v, "batch head d_model, head d_model d_head -> batch head d_head") + b_v
        return self.native.out_proj(rearrange(z, "batch head d_head -> batch (head d_head)"))

    def _native_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # One and the same object for query, key and value: else MultiheadAttention leaves its fused path,
        # and bit-parity with the native block is lost.
        if not self.native.batch_first:
            x = x.transpose(0, 1)
            return self.native(x, x, x, need_weights=False, attn_mask=mask)[0].transpose(0, 1)
        return self.native(x, x, x, need_weights=False, attn_mask=mask)[0]

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.native.dropout if self.native.training else 0.0
        if not any_live((self.hook_attn_scores, self.hook_pattern)):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
        scores = einsum(q, k, "batch query head d_head, batch key head d_head -> batch head query key")
        scores = scores / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask
        scores = fire(self.hook_attn_scores, scores)
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        pattern = fire(self.hook_pattern, wide.softmax(dim=-1).to(v.dtype))
        pattern = F.dropout(pattern, dropout)
        return einsum(pattern, v, "batch head query key, batch key head d_head -> batch query head d_head")


class HookedMLP(nn.Module):
    """The hooks of a native two-layer MLP: `hook_pre` and `hook_post` `[batch token d_mlp]`, around the activation."""

    native: nn.Sequential

    def __init__(self, native: nn.Sequential) -> None:
        super().__init__()
        self.__dict__["native"] = native
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """MLP output `[batch token d_model]` of the normalised input."""
        if not any_live((self.hook_pre, self.hook_post)):
            return self.native(x)
        linear_in, activation, linear_out = self.native
        pre = fire(self.hook_pre, linear_in(x))
        return linear_out(fire(self.hook_post, activation(pre)))
