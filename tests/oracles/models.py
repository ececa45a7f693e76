"""Tiny random open_clip models: every axis has another size, and no weight is trivially zero or one."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

# 3 x 4 patches and CLS: 13 tokens of 48 numbers in 3 heads of 16, an MLP of 120, embeddings of 20.
VISION: dict[str, Any] = {
    "image_size": (24, 32),
    "patch_size": 8,
    "width": 48,
    "layers": 2,
    "head_width": 16,
    "mlp_ratio": 2.5,
}
# 9 tokens of 40 numbers in 4 heads of 10, an MLP of 60.
TEXT: dict[str, Any] = {
    "context_length": 9,
    "vocab_size": 50,
    "width": 40,
    "heads": 4,
    "layers": 3,
    "mlp_ratio": 1.5,
}
EMBED_DIM = 20
EOS_ID = 7

VISION_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bare": {
        "no_ln_pre": True,
        "ls_init_value": 0.1,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "quick_gelu": True,
    },
    "average": {"ls_init_value": 0.1, "pool_type": "avg"},
    "late_norm": {"no_ln_pre": True, "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-3}},
}
TEXT_VARIANTS: dict[str, dict[str, Any]] = {
    "flattened": {},
    "eos": {"pool_type": "eos", "eos_id": EOS_ID, "ls_init_value": 0.1, "quick_gelu": True},
    "last": {"pool_type": "last", "no_causal_mask": True, "norm_kwargs": {"eps": 1e-3}},
    "first": {"pool_type": "first", "proj_bias": True, "no_causal_mask": True},
    "unprojected": {"proj_type": "none"},
    "module": {"module": True},
}


def randomise_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights in place: gains and layer scales around 0.6, biases that matter, the rest of unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or (parameter.dim() == 1 and name.endswith("weight")):
                parameter.copy_(0.6 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif name.endswith(("positional_embedding", "token_embedding.weight")):
                parameter.copy_(0.7 * noise)
            elif parameter.dim() > 1:
                fan_in = parameter[0].numel() if name.endswith("weight") else parameter.shape[0]
                parameter.copy_(1.3 * noise / fan_in**0.5)
    return module


def build_clip(vision: str = "plain", text: str = "flattened", *, seed: int = 0, **settings: Any) -> CLIP:
    """A whole random CLIP in evaluation mode; activations of both towers follow the vision variant's `quick_gelu`."""
    vision_cfg = {**VISION, **VISION_VARIANTS[vision]}
    text_cfg = {**TEXT, **TEXT_VARIANTS[text]}
    quick_gelu = bool(vision_cfg.pop("quick_gelu", False)) | bool(text_cfg.pop("quick_gelu", False))
    text_cfg.pop("module", None)
    with torch.random.fork_rng(devices=[]):
        model = CLIP(EMBED_DIM, CLIPVisionCfg(**vision_cfg), CLIPTextCfg(**text_cfg), quick_gelu=quick_gelu, **settings)
    return randomise_(model, seed).eval()


def build_vision(variant: str = "plain", *, seed: int = 0) -> nn.Module:
    """A random `VisionTransformer`."""
    return build_clip(vision=variant, seed=seed).visual


def build_text(variant: str = "flattened", *, seed: int = 0) -> nn.Module:
    """A random `CLIP` for its text half, or for `"module"` a `TextTransformer`."""
    if variant != "module":
        return build_clip(text=variant, seed=seed)
    sizes = {**TEXT, "output_dim": EMBED_DIM}
    with torch.random.fork_rng(devices=[]):
        return randomise_(TextTransformer(**sizes), seed).eval()


def build(tower: str, variant: str, *, seed: int = 0) -> nn.Module:
    """A random native model by tower and variant."""
    return build_vision(variant, seed=seed) if tower == "vision" else build_text(variant, seed=seed)


def build_wide(tower: str, *, seed: int = 0) -> nn.Module:
    """A model so wide that torch's fused attention and its parts differ in the last bits; smaller ones do not."""
    vision = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 3, "head_width": 64}
    text = {"context_length": 64, "vocab_size": 50, "width": 128, "heads": 2, "layers": 3}
    with torch.random.fork_rng(devices=[]):
        model = CLIP(EMBED_DIM, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    randomise_(model, seed).eval()
    return model.visual if tower == "vision" else model


def wide_inputs(tower: str, batch: int = 4, *, seed: int = 1) -> Tensor:
    """Input of a tower of `build_wide`."""
    generator = torch.Generator().manual_seed(seed)
    if tower == "vision":
        return torch.randn(batch, 3, 64, 64, generator=generator)
    return torch.randint(1, 50, (batch, 64), generator=generator)


def sequence_first_(model: nn.Module) -> nn.Module:
    """The same model with `[token batch d_model]` inside its transformer, as old checkpoints are run."""
    for module in model.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = False
    return model


def pictures(batch: int = 2, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pictures `[batch 3 24 32]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *VISION["image_size"], generator=generator).to(dtype)


def prompts(batch: int = 2, *, seed: int = 1) -> Tensor:
    """Token ids `[batch 9]`: the greatest id, and `EOS_ID` before it, each at another position in each prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 40, (batch, TEXT["context_length"]), generator=generator)
    for sample in range(batch):
        end = 3 + (2 * sample + seed) % 5
        ids[sample, end] = TEXT["vocab_size"] - 1
        ids[sample, end - 1 - sample % 2] = EOS_ID
        ids[sample, end + 1 :] = 0
    return ids


def inputs(tower: str, batch: int = 2, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Input of a tower: pictures, or token ids."""
    return pictures(batch, seed=seed, dtype=dtype) if tower == "vision" else prompts(batch, seed=seed)


def native_forward(model: nn.Module, x: Tensor) -> Tensor:
    """What the untouched model makes of a tower's input."""
    return model.encode_text(x) if isinstance(model, CLIP) else model(x)
