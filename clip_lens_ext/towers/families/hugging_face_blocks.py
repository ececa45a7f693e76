"""What Hugging Face's CLIP and SigLIP towers share: their encoder layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer

from clip_lens_ext.towers.families.attentions import Mask, MLPReading, SeparateProjections, as_keywords

LAYERS: tuple[type, ...] = (CLIPEncoderLayer, SiglipEncoderLayer, Siglip2EncoderLayer)


class HuggingFaceBlock:
    """`CLIPEncoderLayer`, `SiglipEncoderLayer` or `Siglip2EncoderLayer`."""

    def __init__(self, native: nn.Module) -> None:
        self.native: Any = native
        self.attention = SeparateProjections(self.native.self_attn)
        self.mlp = MLPReading(self.native.mlp, "fc1", "activation_fn", "fc2")

    @property
    def ln1(self) -> nn.LayerNorm:
        return self.native.layer_norm1

    @property
    def ln2(self) -> nn.LayerNorm:
        return self.native.layer_norm2

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        return self.native(x, **as_keywords(mask))

    def scale_attn_out(self, x: Tensor) -> Tensor:
        return x

    def scale_mlp_out(self, x: Tensor) -> Tensor:
        return x


def readable(encoder: Any) -> bool:
    """Whether every layer is one whose parts are known."""
    return all(type(layer) in LAYERS for layer in encoder.layers)


def sizes(config: Any) -> dict[str, Any]:
    """The fields of `TowerConfig` that the model's config says."""
    names = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
    return {
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "act_fn": names.get(config.hidden_act, config.hidden_act),
        "eps": config.layer_norm_eps,
    }
