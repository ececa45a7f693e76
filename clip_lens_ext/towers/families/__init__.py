"""How each native model family is read, one file each.

A family gives a `Reading`: the native submodules of one tower and the few steps around the blocks, in the native
order. `HookedTower` walks it and fires the hooks; no family knows about hooks.
"""

from __future__ import annotations

from clip_lens_ext.towers.families.reading import BlockReading, Reading, TowerReading
from clip_lens_ext.towers.families.registry import families, read_tower, split_model

__all__ = ["BlockReading", "Reading", "TowerReading", "families", "read_tower", "split_model"]
