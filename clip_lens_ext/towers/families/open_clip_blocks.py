"""What the towers of open_clip share: its residual attention block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn

from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.towers.families.attentions import Mask, MLPReading, MultiheadAttentionReading


class OpenClipBlock:
    """open_clip's `ResidualAttentionBlock`."""

    def __init__(self, native: ResidualAttentionBlock) -> None:
        self.native: Any = native
        self.attention = MultiheadAttentionReading(native.attn)
        self.mlp = MLPReading(native.mlp, "c_fc", "gelu", "c_proj")

    @property
    def ln1(self) -> nn.LayerNorm:
        return self.native.ln_1

    @property
    def ln2(self) -> nn.LayerNorm:
        return self.native.ln_2

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        run: Callable[..., Tensor] = self.native
        if not self.native.attn.batch_first:
            return run(x.transpose(0, 1).contiguous(), attn_mask=mask).transpose(0, 1)
        return run(x, attn_mask=mask)

    def scale_attn_out(self, x: Tensor) -> Tensor:
        return self.native.ls_1(x)

    def scale_mlp_out(self, x: Tensor) -> Tensor:
        return self.native.ls_2(x)


def activation_name(block: ResidualAttentionBlock) -> str:
    """The MLP's activation in TransformerLens' words."""
    names = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
    kind = type(block.mlp[1]).__name__
    return names.get(kind, kind)


def read_blocks(transformer: Transformer, what: str) -> list[OpenClipBlock]:
    """The blocks by their parts.

    Raises:
        UnsupportedModelError: a block is no plain pre-LN self-attention block.
    """
    for index, block in enumerate(transformer.resblocks):
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            raise UnsupportedModelError(
                f"block {index} of the {what} is a {type(block).__name__}: only open_clip's plain "
                "self-attention ResidualAttentionBlock is read"
            )
    return [OpenClipBlock(block) for block in transformer.resblocks]


def sizes(transformer: Transformer) -> dict[str, Any]:
    """The fields of `TowerConfig` that the blocks say."""
    block = transformer.resblocks[0]
    return {
        "n_layers": len(transformer.resblocks),
        "n_heads": block.attn.num_heads,
        "d_model": block.attn.embed_dim,
        "d_head": block.attn.head_dim,
        "d_mlp": block.mlp[0].out_features,
        "act_fn": activation_name(block),
    }
