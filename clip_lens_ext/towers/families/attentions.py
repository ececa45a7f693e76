"""How the attention and the MLP of a native block are read: three layouts of the projections, one of the MLP.

A reading never runs anything of its own where the native module could run: `run` is the native call, and the other
methods are its parts, for a pass on which somebody listens in between.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Mask = Any
"""What a family's blocks get as their mask: None, an additive tensor, or `CAUSAL`."""

CAUSAL = "causal"
"""A causal mask that the native attention makes by itself."""

_SPLIT = "batch token (head d_head) -> batch token head d_head"


class AttentionReading:
    """Self-attention of one native block, by the names that most of them give their parts.

    Attributes:
        native: the module.
        n_heads: heads.
        d_head: width of a head.
    """

    def __init__(self, native: Any) -> None:
        self.native: Any = native
        self.n_heads: int = native.num_heads
        self.d_head: int = native.head_dim

    @property
    def scale(self) -> float:
        """What the dot products are multiplied with."""
        return self.native.scale

    @property
    def dropout(self) -> float:
        """Probability of dropping an entry of the pattern, in the mode that the module is in."""
        return self.native.dropout if self.native.training else 0.0

    @property
    def absorbs_keys(self) -> bool:
        """Whether queries, keys and values are plain linear maps, so that one query needs no keys to be formed."""
        return True

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        """The native attention of the normalised input `[batch token d_model]`, with its output projection."""
        raise NotImplementedError

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as they enter the dot products, each `[batch token head d_head]`."""
        raise NotImplementedError

    def weights(self, which: str) -> tuple[Tensor, Tensor | None]:
        """Weight `[head d_model d_head]` and bias `[head d_head]` of `"q"`, `"k"` or `"v"`: views of native ones."""
        raise NotImplementedError

    @property
    def projection(self) -> nn.Linear:
        """The output projection."""
        return self.native.out_proj

    def out(self, z: Tensor) -> Tensor:
        """What follows the heads, of `[... head*d_head]`: the output projection, with its bias."""
        return self.projection(z)

    @property
    def out_weight(self) -> Tensor:
        """Weight of the output projection as torch keeps it, `[d_model head*d_head]`."""
        return self.projection.weight

    @property
    def out_bias(self) -> Tensor | None:
        """Bias of the output projection `[d_model]`."""
        return self.projection.bias

    def additive(self, mask: Mask, q: Tensor) -> Tensor | None:
        """The mask as a tensor that is added to scores `[batch head query key]`."""
        if mask is None:
            return None
        if isinstance(mask, str):
            n = q.shape[1]
            return torch.full((n, n), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        mask = mask.to(q.dtype)
        return rearrange(mask, "(b head) q k -> b head q k", head=self.n_heads) if mask.dim() == 3 else mask

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, _SPLIT, head=self.n_heads)

    def _by_head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        by_head = rearrange(weight, "(head d_head) d_model -> head d_model d_head", head=self.n_heads)
        return by_head, None if bias is None else rearrange(bias, "(head d_head) -> head d_head", head=self.n_heads)


class MultiheadAttentionReading(AttentionReading):
    """`torch.nn.MultiheadAttention` with one fused input projection (open_clip)."""

    @property
    def scale(self) -> float:
        return self.d_head**-0.5

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        mask = mask.to(x.dtype) if mask is not None else None
        # One and the same object for query, key and value: else MultiheadAttention leaves its fused path,
        # and bit-parity with the native block is lost.
        if not self.native.batch_first:
            x = x.transpose(0, 1)
            return self.native(x, x, x, need_weights=False, attn_mask=mask)[0].transpose(0, 1)
        return self.native(x, x, x, need_weights=False, attn_mask=mask)[0]

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(x, self.native.in_proj_weight, self.native.in_proj_bias).chunk(3, dim=-1)
        return self._split(q), self._split(k), self._split(v)

    def weights(self, which: str) -> tuple[Tensor, Tensor | None]:
        index = "qkv".index(which)
        bias = None if self.native.in_proj_bias is None else self.native.in_proj_bias.chunk(3)[index]
        return self._by_head(self.native.in_proj_weight.chunk(3)[index], bias)


class SeparateProjections(AttentionReading):
    """`q_proj`, `k_proj`, `v_proj`, `out_proj` (Hugging Face's CLIP and SigLIP)."""

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        return self.native(hidden_states=x, **as_keywords(mask))[0]

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        native = self.native
        return self._split(native.q_proj(x)), self._split(native.k_proj(x)), self._split(native.v_proj(x))

    def weights(self, which: str) -> tuple[Tensor, Tensor | None]:
        linear = getattr(self.native, f"{which}_proj")
        return self._by_head(linear.weight, linear.bias)


class FusedProjection(AttentionReading):
    """`qkv`, `q_norm`, `k_norm`, `norm`, `proj` (timm's `Attention`, ungated)."""

    @property
    def dropout(self) -> float:
        return self.native.attn_drop.p if self.native.training else 0.0

    @property
    def absorbs_keys(self) -> bool:
        return all(isinstance(norm, nn.Identity) for norm in (self.native.q_norm, self.native.k_norm))

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        return self.native(x, attn_mask=mask)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self._split(part) for part in self.native.qkv(x).chunk(3, dim=-1))
        return self.native.q_norm(q), self.native.k_norm(k), v

    @property
    def projection(self) -> nn.Linear:
        return self.native.proj

    def out(self, z: Tensor) -> Tensor:
        return self.native.proj_drop(self.native.proj(self.native.norm(z)))

    def weights(self, which: str) -> tuple[Tensor, Tensor | None]:
        index, linear = "qkv".index(which), self.native.qkv
        bias = None if linear.bias is None else linear.bias.chunk(3)[index]
        return self._by_head(linear.weight.chunk(3)[index], bias)


def as_keywords(mask: Mask) -> dict[str, Any]:
    """A mask in the words of Hugging Face's encoder layers."""
    if isinstance(mask, str):
        return {"attention_mask": None, "is_causal": True}
    return {"attention_mask": mask}


class MLPReading:
    """A two-layer MLP: `run` is the native call, `pre`, `act` and `out` its parts.

    Args:
        native: the module.
        first, activation, second: names of its parts, in order.
    """

    def __init__(self, native: Any, first: str, activation: str, second: str) -> None:
        self.native, self._names = native, (first, activation, second)

    def run(self, x: Tensor) -> Tensor:
        """The native MLP."""
        return self.native(x)

    def pre(self, x: Tensor) -> Tensor:
        """Before the activation, `[... d_mlp]`."""
        return getattr(self.native, self._names[0])(x)

    def act(self, x: Tensor) -> Tensor:
        """The activation."""
        return getattr(self.native, self._names[1])(x)

    def out(self, x: Tensor) -> Tensor:
        """The second layer, `[... d_model]`."""
        return getattr(self.native, self._names[2])(x)
