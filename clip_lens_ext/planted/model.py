"""The dual encoder of the planted world: a genuine open_clip model from a small config."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from open_clip.model import CLIP

from clip_lens_ext.planted.drawing import SIZE
from clip_lens_ext.planted.tokenizer import WordTokenizer

__all__ = ["CONTEXT_LENGTH", "ClipConfig", "build_clip"]

CONTEXT_LENGTH: Final = 16
"""Tokens per text: the longest caption, start and end."""


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the dual encoder."""

    embed_dim: int = 128
    patch_size: int = 6
    head_width: int = 32
    vision_layers: int = 4
    vision_width: int = 128
    text_layers: int = 3
    text_width: int = 96


def build_clip(config: ClipConfig, tokenizer: WordTokenizer, *, seed: int = 0) -> CLIP:
    """An untrained model; the global random state stays as it was.

    Args:
        config: Sizes.
        tokenizer: Gives the vocabulary size and the context length.
        seed: Seed of the initial weights.

    Returns:
        A module on the CPU in float32, in training mode.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld, WordTokenizer
        >>> from clip_lens_ext.planted.model import ClipConfig, build_clip
        >>> clip = build_clip(ClipConfig(), WordTokenizer(PlantedWorld(0).vocabulary))
        >>> round(sum(weight.numel() for weight in clip.parameters()) / 1e6, 1)
        1.2
    """
    vision = {
        "image_size": SIZE,
        "patch_size": config.patch_size,
        "layers": config.vision_layers,
        "width": config.vision_width,
        "head_width": config.head_width,
    }
    text = {
        "context_length": tokenizer.context_length,
        "vocab_size": tokenizer.vocab_size,
        "layers": config.text_layers,
        "width": config.text_width,
        "heads": config.text_width // config.head_width,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(embed_dim=config.embed_dim, vision_cfg=vision, text_cfg=text, quick_gelu=False)
