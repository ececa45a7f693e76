"""Hugging Face's CLIP and SigLIP: the halves of `CLIPModel` and `SiglipModel`, and their single-tower classes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Siglip2TextModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from clip_lens_ext.towers.families.hugging_face_blocks import readable
from clip_lens_ext.towers.families.hugging_face_text import HuggingFaceTextReading
from clip_lens_ext.towers.families.hugging_face_vision import HuggingFaceVisionReading
from clip_lens_ext.towers.families.reading import Reading
from clip_lens_ext.towers.families.views import HuggingFaceText, HuggingFaceVision

NAME = "hugging_face"

_VISION = (CLIPVisionModel, CLIPVisionModelWithProjection, SiglipVisionModel, HuggingFaceVision)
_TEXT = (CLIPTextModel, CLIPTextModelWithProjection, SiglipTextModel, Siglip2TextModel, HuggingFaceText)


def matches(native: nn.Module) -> bool:
    """Whether this family reads the module."""
    if not isinstance(native, _VISION + _TEXT):
        return False
    half: Any = native.model if isinstance(native, HuggingFaceText | HuggingFaceVision) else native
    name = "vision_model" if isinstance(native, _VISION) else "text_model"
    return readable(getattr(half, name, half).encoder)


def read(native: nn.Module) -> Reading:
    """The reading of a vision or a text tower.

    Raises:
        UnsupportedModelError: the module is of this family but has a part that is not read.
    """
    return HuggingFaceVisionReading(native) if isinstance(native, _VISION) else HuggingFaceTextReading(native)
