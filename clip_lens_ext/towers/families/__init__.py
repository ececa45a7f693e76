"""How each native model family is read, one file each.

A family gives a `Reading`: the native submodules of one tower and the few steps around the blocks, in the native
order. `HookedTower` walks it and fires the hooks; no family knows about hooks.
"""

from __future__ import annotations

from torch import nn

from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.towers.families import open_clip
from clip_lens_ext.towers.families.reading import Reading

_FAMILIES = (open_clip,)


def read_tower(native: nn.Module) -> Reading:
    """The reading of one tower by the first family that knows it.

    Raises:
        UnsupportedModelError: no family reads this module, or a family says what in it cannot be hooked yet.
    """
    for family in _FAMILIES:
        if family.matches(native):
            return family.read(native)
    raise UnsupportedModelError(
        f"no tower family reads a {type(native).__module__}.{type(native).__qualname__}; known are open_clip's native "
        "VisionTransformer, TextTransformer and the text half of CLIP"
    )


__all__ = ["Reading", "read_tower"]
