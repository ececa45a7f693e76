"""open_clip's native towers: `VisionTransformer`, `TextTransformer`, and the text half that `CLIP` keeps in itself."""

from __future__ import annotations

from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

from clip_lens_ext.towers.families.open_clip_text import TextReading
from clip_lens_ext.towers.families.open_clip_vision import VisionReading
from clip_lens_ext.towers.families.reading import Reading
from clip_lens_ext.towers.families.views import FlattenedText

NAME = "open_clip"


def matches(native: nn.Module) -> bool:
    """Whether this family reads the module."""
    return isinstance(native, VisionTransformer | TextTransformer | FlattenedText)


def read(native: nn.Module) -> Reading:
    """The reading of a vision tower, a text tower, or the text half of a whole `CLIP`.

    Raises:
        UnsupportedModelError: the module is of this family but has a part that is not read.
    """
    return VisionReading(native) if isinstance(native, VisionTransformer) else TextReading(native)
