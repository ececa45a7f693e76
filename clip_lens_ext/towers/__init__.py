"""A CLIP model as two hooked towers."""

from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families import families
from clip_lens_ext.towers.load import load_clip
from clip_lens_ext.towers.register import register_family, unregister_family
from clip_lens_ext.towers.tower import HookedTower

__all__ = ["HookedCLIP", "HookedTower", "TowerConfig", "families", "load_clip", "register_family", "unregister_family"]
