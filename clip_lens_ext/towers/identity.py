"""What tells one tower from another: a hash for caches and checkpoints."""

from __future__ import annotations

from clip_lens_ext.provenance import module_sha256
from clip_lens_ext.towers.tower import HookedTower


def tower_sha256(tower: HookedTower) -> str:
    """The sha256 of a tower's weights and configuration, its model's name among it; the same on every device.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip = cle.planted_clip()
        >>> tower_sha256(clip.vision) == tower_sha256(clip.text)
        False
    """
    cfg = {name: value for name, value in tower.cfg.to_dict().items() if name != "device"}
    return module_sha256(tower.native, about=cfg)
