"""Tiny random models of every tower family, each with what the oracle has to know of it.

`FULL`: towers whose blocks are taken apart; `RESIDUAL`: towers that are listened to. Every axis has another size.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    M2M100Config,
    MT5Config,
    RobertaConfig,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from clip_lens_ext.towers.families.views import HuggingFaceText, HuggingFaceVision
from oracles.models import EMBED_DIM, VISION, randomise_
from oracles.tower import Spec


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of one family."""

    name: str
    tower: str
    make: Callable[[], nn.Module]
    spec: Callable[[nn.Module], Spec] | None = None
    size: tuple[int, int] = (24, 24)
    n_ids: int = 9
    pad_id: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, with random weights that are not trivial."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)
            warnings.simplefilter("ignore")
            return randomise_(self.make(), seed).eval()

    def inputs(self, batch: int = 2, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the tower takes."""
        generator = torch.Generator().manual_seed(seed)
        if self.tower == "vision":
            return torch.randn(batch, 3, *self.size, generator=generator).to(dtype)
        ids = torch.randint(10, 40, (batch, self.n_ids), generator=generator)
        for sample in range(batch):
            end = 3 + (2 * sample + seed) % 5
            ids[sample, end] = 49
            ids[sample, end + 1 :] = self.pad_id
        return ids


# ---- Hugging Face -------------------------------------------------------------------------------------------------

_VISION = {"hidden_size": 48, "intermediate_size": 120, "num_hidden_layers": 2, "num_attention_heads": 3,
           "image_size": 24, "patch_size": 8}  # fmt: skip
_TEXT = {"hidden_size": 40, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 50, "max_position_embeddings": 9}  # fmt: skip
_IDS = {"bos_token_id": 1, "pad_token_id": 0}


def hf_clip(attention: str = "sdpa", eos: int = 49, act: str = "quick_gelu") -> CLIPModel:
    """A whole `CLIPModel`."""
    config = CLIPConfig(
        text_config={**_TEXT, **_IDS, "eos_token_id": eos, "hidden_act": act},
        vision_config={**_VISION, "hidden_act": act},
        projection_dim=EMBED_DIM,
    )
    config._attn_implementation = attention
    return CLIPModel(config)


def hf_siglip() -> SiglipModel:
    """A whole `SiglipModel`."""
    text = {**_TEXT, **_IDS, "eos_token_id": 49, "projection_size": 48}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))


def _renamed(model: nn.Module, tower: str, prefix: str) -> dict[str, Tensor]:
    """Hugging Face's weights of one tower under open_clip's names."""
    found = {}
    state = {name: value.detach().double() for name, value in model.state_dict().items()}
    names = {
        "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.patch_embedding.bias": "conv1.bias", "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final",
        "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        new = name.removeprefix(prefix)
        for old, by in names.items():
            new = new.replace(old, by)
        found[new] = value
    for name in [name for name in found if ".self_attn.q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        found[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
    projection = state.get("visual_projection.weight" if tower == "vision" else "text_projection.weight")
    if tower == "vision" and projection is not None:
        found["proj"] = projection.T
    elif projection is not None:
        found["text_projection.weight"] = projection
    return found


def hf_spec(model: nn.Module) -> Spec:
    """The oracle's view of a Hugging Face tower."""
    owner: Any = model.model if isinstance(model, HuggingFaceVision | HuggingFaceText) else model
    tower = "text" if hasattr(getattr(owner, "text_model", owner), "final_layer_norm") else "vision"
    if isinstance(model, HuggingFaceVision):
        tower = "vision"
    name = f"{tower}_model"
    inner = getattr(owner, name, owner)
    weights = _renamed(owner, tower, f"{name}." if inner is not owner else "")
    config = inner.config
    siglip = "siglip" in config.model_type
    head: Callable[[Tensor], Tensor] | None = None
    if siglip and tower == "vision":
        head = inner.head
    if siglip and tower == "text":
        weights["text_projection.weight"] = weights.pop("head.weight")
        weights["text_projection.bias"] = weights.pop("head.bias")
    pool = "tok" if tower == "vision" else "last" if siglip else "argmax"
    return Spec(
        tower, weights, config.num_attention_heads, config.num_hidden_layers, config.hidden_act == "quick_gelu",
        config.layer_norm_eps, pool, ln_after_pool=tower == "vision" and not siglip,
        causal=tower == "text" and not siglip, patch=(8, 8), head=head, gelu_tanh=config.hidden_act.endswith("tanh"),
        prefix=torch.zeros(0, 48, dtype=torch.float64) if siglip and tower == "vision" else None,
    )  # fmt: skip


# ---- timm ---------------------------------------------------------------------------------------------------------


def timm_model(head: int | None = EMBED_DIM, **settings: Any) -> TimmModel:
    """open_clip's `TimmModel` around a tiny ViT, made as its constructor makes it."""
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    sizes = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.5}
    model.trunk = TimmViT(**{**sizes, "num_classes": head or 0, **settings})
    model.image_size = (24, 32)
    model.head = nn.Sequential()
    return model


def timm_spec(model: nn.Module) -> Spec:
    """The oracle's view of a timm tower."""
    trunk: Any = model.trunk
    names = {
        "patch_embed.proj": "conv1", "blocks.": "transformer.resblocks.", "norm1": "ln_1", "norm2": "ln_2",
        "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias", "attn.proj.": "attn.out_proj.",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "ls1.": "ls_1.", "ls2.": "ls_2.", "fc_norm.": "ln_post.",
        "norm_pre.": "ln_pre.",
    }  # fmt: skip
    weights = {}
    for name, value in trunk.state_dict().items():
        for old, by in names.items():
            name = name.replace(old, by)
        weights["ln_post." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value.detach().double()
    weights["positional_embedding"] = weights.pop("pos_embed")[0]
    if "head.weight" in weights:
        weights["proj.weight"], weights["proj.bias"] = weights.pop("head.weight"), weights.pop("head.bias")
    tokens = [weights[name][0] for name in ("cls_token", "reg_token") if name in weights]
    prefix = torch.cat(tokens) if tokens else torch.zeros(0, 48, dtype=torch.float64)
    after = not isinstance(trunk.fc_norm, nn.Identity)
    head = trunk.pool if trunk.attn_pool is not None or trunk.global_pool == "avg" else None
    return Spec(
        "vision", weights, 3, 2, False, (trunk.fc_norm if after else trunk.norm).eps, "tok", ln_after_pool=after,
        patch=(8, 8), prefix=prefix, head=head,
    )  # fmt: skip


# ---- CoCa ---------------------------------------------------------------------------------------------------------


def coca_vision(kind: str | bool = True) -> VisionTransformer:
    """CoCa's vision tower: one attentional pooler, or two."""
    return VisionTransformer(
        **{name: VISION[name] for name in ("image_size", "patch_size", "width", "layers", "mlp_ratio")}, heads=3,
        # With two poolers open_clip normalises the stream with a LayerNorm of the output's width: both must be one.
        output_dim=EMBED_DIM if kind is True else 48, attentional_pool=kind, attn_pooler_queries=5,
        attn_pooler_heads=4, output_tokens=True,
    )  # fmt: skip


def coca_text(**settings: Any) -> TextTransformer:
    """CoCa's text tower: a class token at the end, and a mask of the padding."""
    return TextTransformer(
        context_length=9, vocab_size=50, width=40, heads=4, layers=2, mlp_ratio=1.5, output_dim=EMBED_DIM,
        **{"embed_cls": True, "pad_id": 0, "output_tokens": True, **settings},
    )  # fmt: skip


def coca_vision_spec(model: nn.Module) -> Spec:
    """The oracle's view of CoCa's vision tower."""
    native: Any = model
    weights = {name: value.detach().double() for name, value in native.state_dict().items()}
    one = native.attn_pool_contrastive is None

    def two(x: Tensor) -> Tensor:
        return native.attn_pool_contrastive(x if native.attn_pool_type == "parallel" else native.attn_pool(x))[:, 0]

    return Spec(
        "vision", weights, 3, 2, False, native.ln_post.eps, "tok", patch=(8, 8),
        before_norm=native.attn_pool if one else None, head=None if one else two,
    )  # fmt: skip


def coca_text_spec(model: nn.Module) -> Spec:
    """The oracle's view of CoCa's text tower."""
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    return Spec("text", weights, 4, 2, False, 1e-5, "last", ln_after_pool=True, causal=True, pad_id=0)


# ---- towers that are listened to ----------------------------------------------------------------------------------


def timm_by_name(name: str, size: int, pool: str = "avg") -> TimmModel:
    """A small model of timm's by its name, as open_clip makes it."""
    return TimmModel(name, EMBED_DIM, image_size=size, pool=pool, proj="linear")


def swin() -> TimmModel:
    """A Swin transformer, whose blocks see `[batch height width channel]`."""
    model = timm_model(None)
    model.trunk = SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=24, depths=(2, 1), num_heads=(2, 3), num_classes=EMBED_DIM
    )
    model.image_size = (64, 64)
    return model


def resnet() -> ModifiedResNet:
    """OpenAI's ResNet, small."""
    return ModifiedResNet((1, 2, 1, 1), output_dim=EMBED_DIM, heads=4, image_size=64, width=8)


def hf_encoder(kind: str) -> HFTextEncoder:
    """A Hugging Face encoder inside open_clip."""
    sizes = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 40}
    configs: dict[str, Any] = {
        "roberta": lambda: RobertaConfig(
            **sizes, intermediate_size=60, max_position_embeddings=12, pad_token_id=1, type_vocab_size=1
        ),
        "mt5": lambda: MT5Config(
            vocab_size=50, d_model=40, d_kv=10, d_ff=60, num_layers=2, num_heads=4, pad_token_id=0
        ),
        "nllb": lambda: M2M100Config(
            vocab_size=50, d_model=40, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=60,
            decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=60, max_position_embeddings=12, pad_token_id=1,
        ),
    }  # fmt: skip
    config = configs[kind]()
    model = HFTextEncoder(kind, EMBED_DIM, config=config, pooler_type="mean_pooler", proj_type="mlp")
    if config.is_encoder_decoder:
        model.transformer = model.transformer.encoder  # as open_clip does where it fetches the weights
    return model


_RECT = (24, 32)
FULL = [
    Case("hf-clip-vision", "vision", lambda: HuggingFaceVision(hf_clip()), hf_spec),
    Case("hf-clip-text", "text", lambda: HuggingFaceText(hf_clip()), hf_spec),
    Case("hf-clip-text-old-eos", "text", lambda: HuggingFaceText(hf_clip(eos=2)), hf_spec),
    Case("hf-clip-vision-eager", "vision", lambda: HuggingFaceVision(hf_clip("eager", act="gelu")), hf_spec),
    Case("hf-clip-text-eager", "text", lambda: HuggingFaceText(hf_clip("eager")), hf_spec),
    Case("hf-vision-model", "vision", lambda: CLIPVisionModel(CLIPVisionConfig(**_VISION)), hf_spec),
    Case(
        "hf-vision-projected", "vision",
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**_VISION, projection_dim=EMBED_DIM)), hf_spec,
    ),
    Case("hf-text-model", "text", lambda: CLIPTextModel(CLIPTextConfig(**_TEXT, **_IDS, eos_token_id=49)), hf_spec),
    Case(
        "hf-text-projected", "text",
        lambda: CLIPTextModelWithProjection(
            CLIPTextConfig(**_TEXT, **_IDS, eos_token_id=49, projection_dim=EMBED_DIM)
        ), hf_spec,
    ),
    Case("hf-siglip-vision", "vision", lambda: HuggingFaceVision(hf_siglip()), hf_spec),
    Case("hf-siglip-text", "text", lambda: HuggingFaceText(hf_siglip()), hf_spec),
    Case("hf-siglip-vision-model", "vision", lambda: SiglipVisionModel(SiglipVisionConfig(**_VISION)), hf_spec),
    Case("hf-siglip-text-model", "text", lambda: SiglipTextModel(SiglipTextConfig(**_TEXT, **_IDS)), hf_spec),
    Case("hf-siglip2-text-model", "text", lambda: Siglip2TextModel(Siglip2TextConfig(**_TEXT, **_IDS)), hf_spec),
    Case("timm-siglip", "vision", lambda: timm_model(None, global_pool="map", class_token=False), timm_spec, _RECT),
    Case("timm-cls", "vision", lambda: timm_model(init_values=0.1, pre_norm=True), timm_spec, _RECT),
    Case("timm-avg", "vision", lambda: timm_model(global_pool="avg", qkv_bias=True), timm_spec, _RECT),
    Case(
        "timm-registers", "vision",
        lambda: timm_model(reg_tokens=2, no_embed_class=True, final_norm=True), timm_spec, _RECT,
    ),
    Case("coca-vision", "vision", coca_vision, coca_vision_spec, _RECT),
    Case("coca-vision-parallel", "vision", lambda: coca_vision("parallel"), coca_vision_spec, _RECT),
    Case("coca-vision-cascade", "vision", lambda: coca_vision("cascade"), coca_vision_spec, _RECT),
    Case("coca-text", "text", coca_text, coca_text_spec),
]  # fmt: skip
RESIDUAL = [
    Case("resnet", "vision", resnet, size=(64, 64)),
    Case("convnext", "vision", lambda: timm_by_name("test_convnext", 160), size=(160, 160)),
    Case("fastvit", "vision", lambda: timm_by_name("fastvit_t8", 64), size=(64, 64)),
    Case("eva", "vision", lambda: timm_by_name("eva02_tiny_patch14_224", 224, "token"), size=(224, 224)),
    Case("swin", "vision", swin, size=(64, 64)),
    Case("roberta", "text", lambda: hf_encoder("roberta"), pad_id=1, n_ids=10),
    Case("mt5", "text", lambda: hf_encoder("mt5"), n_ids=77),
    Case("nllb", "text", lambda: hf_encoder("nllb"), pad_id=1, n_ids=12),
]
BY_NAME = {case.name: case for case in (*FULL, *RESIDUAL)}


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One model for all tests that leave it as it is."""
    return BY_NAME[name].build().to(dtype)
