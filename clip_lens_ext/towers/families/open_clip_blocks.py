"""What the towers of open_clip share: its residual attention block."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import ResidualAttentionBlock, Transformer

from clip_lens_ext.errors import UnsupportedModelError


def activation_name(block: ResidualAttentionBlock) -> str:
    """The MLP's activation in TransformerLens' words."""
    names = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
    kind = type(block.mlp[1]).__name__
    return names.get(kind, kind)


def check_blocks(transformer: Transformer, what: str) -> None:
    """Raise `UnsupportedModelError` where a block is no plain pre-LN self-attention block."""
    for index, block in enumerate(transformer.resblocks):
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            raise UnsupportedModelError(
                f"block {index} of the {what} is a {type(block).__name__}: only open_clip's plain "
                "self-attention ResidualAttentionBlock is read"
            )


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
