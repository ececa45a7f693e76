"""Multi-head attention and MLP of a native block, taken apart only as far as somebody listens."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint

from clip_lens_ext.towers.families.attentions import AttentionReading, Mask, MLPReading
from clip_lens_ext.towers.live import any_live, fire, is_live


class HookedAttention(nn.Module):
    """The hooks of one native self-attention.

    Hooks: `hook_q`, `hook_k`, `hook_v`, `hook_z` `[batch token head d_head]`; `hook_attn_scores` (scaled and masked)
    and `hook_pattern` `[batch head token token]`, query before key; `hook_result` `[batch token head d_model]`, the
    write of each head without the output bias. With none live the native module runs, fused. Scores and pattern are
    computed only for a listener of theirs; the head results, which cost `n_heads` times the memory, for theirs.

    Args:
        reading: the module whose hooks these are, by its parts. It is never changed.
    """

    reading: AttentionReading

    def __init__(self, reading: AttentionReading) -> None:
        super().__init__()
        self.__dict__["reading"] = reading  # by reference: registered once, under the tower's own `native`
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
        return self.reading.n_heads

    @property
    def W_Q(self) -> Tensor:
        """Query weights `[head d_model d_head]`, a view of the native ones."""
        return self.reading.weights("q")[0]

    @property
    def W_K(self) -> Tensor:
        """Key weights `[head d_model d_head]`, a view of the native ones."""
        return self.reading.weights("k")[0]

    @property
    def W_V(self) -> Tensor:
        """Value weights `[head d_model d_head]`, a view of the native ones."""
        return self.reading.weights("v")[0]

    @property
    def W_O(self) -> Tensor:
        """Output weights `[head d_head d_model]`, a view of the native ones."""
        return rearrange(self.reading.out_weight, "d_model (head d_head) -> head d_head d_model", head=self.n_heads)

    @property
    def b_O(self) -> Tensor:
        """Output bias `[d_model]`; zeros where there is none."""
        bias = self.reading.out_bias
        return self.reading.out_weight.new_zeros(len(self.reading.out_weight)) if bias is None else bias

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        """Attention output `[batch token d_model]` of the normalised input `x`, same shape.

        Args:
            x: input of the three projections, `[batch token d_model]`.
            mask: what the family's blocks get.
        """
        if not any_live(self.children()):
            return self.reading.run(x, mask)
        q, k, v = self.reading.qkv(x)
        q, k, v = fire(self.hook_q, q), fire(self.hook_k, k), fire(self.hook_v, v)
        z = fire(self.hook_z, self._mix(q, k, v, self.reading.additive(mask, q)))
        if not is_live(self.hook_result):
            return self.reading.out(rearrange(z, "batch token head d_head -> batch token (head d_head)"))
        result = einsum(z, self.W_O, "batch token head d_head, head d_head d_model -> batch token head d_model")
        return fire(self.hook_result, result).sum(dim=2) + self.b_O

    def at_token(self, x: Tensor, at: Tensor, mask: Mask = None) -> Tensor:
        """Attention output of one token per sample, `[batch d_model]`: about a hundredth of the work of all tokens.

        With a single query neither keys nor values need to be formed: `q . (x W_K)` is `(q W_K') . x`, and
        `sum_t p_t (x_t W_V)` is `(sum_t p_t x_t) W_V`. The key bias is the same for all keys, and drops out of the
        softmax. No hook fires, and nothing is dropped out. Equal to `forward` up to rounding.

        Args:
            x: input of the three projections, `[batch token d_model]`.
            at: position of the token in each sample, `[batch]`.
            mask: what the family's blocks get.
        """
        (w_q, b_q), (w_k, _), (w_v, b_v) = (self.reading.weights(which) for which in "qkv")
        rows = torch.arange(len(x), device=x.device)
        q = einsum(x[rows, at], w_q, "batch d_model, head d_model d_head -> batch head d_head")
        q = q if b_q is None else q + b_q
        q = einsum(q, w_k, "batch head d_head, head d_model d_head -> batch head d_model")
        scores = torch.bmm(q, x.transpose(1, 2)) * self.reading.scale
        additive = self.reading.additive(mask, x)
        if additive is not None:
            whole = additive.expand(len(x), self.n_heads, x.shape[1], x.shape[1])
            scores = scores + whole[rows, :, at]
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        mixed = torch.bmm(wide.softmax(dim=-1).to(x.dtype), x)
        z = einsum(mixed, w_v, "batch head d_model, head d_model d_head -> batch head d_head")
        z = z if b_v is None else z + b_v
        return self.reading.out(rearrange(z, "batch head d_head -> batch (head d_head)"))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.reading.dropout
        if not any_live((self.hook_attn_scores, self.hook_pattern)):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.reading.scale
            )
            return mixed.transpose(1, 2)
        scores = einsum(q, k, "batch query head d_head, batch key head d_head -> batch head query key")
        scores = scores * self.reading.scale
        if mask is not None:
            scores = scores + mask
        scores = fire(self.hook_attn_scores, scores)
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        pattern = fire(self.hook_pattern, wide.softmax(dim=-1).to(v.dtype))
        pattern = F.dropout(pattern, dropout)
        return einsum(pattern, v, "batch head query key, batch key head d_head -> batch query head d_head")


class HookedMLP(nn.Module):
    """The hooks of a native two-layer MLP: `hook_pre` and `hook_post` `[batch token d_mlp]`, around the activation."""

    reading: MLPReading

    def __init__(self, reading: MLPReading) -> None:
        super().__init__()
        self.__dict__["reading"] = reading
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """MLP output `[batch token d_model]` of the normalised input."""
        if not any_live((self.hook_pre, self.hook_post)):
            return self.reading.run(x)
        pre = fire(self.hook_pre, self.reading.pre(x))
        return self.reading.out(fire(self.hook_post, self.reading.act(pre)))
