"""What tells one SAE from another, with a file or without: a hash for checkpoints."""

from __future__ import annotations

from typing import Any

from sae_lens import SAE

from clip_lens_ext.provenance import module_sha256


def sae_sha256(sae: SAE[Any]) -> str:
    """The sha256 of an SAE's weights and of its settings (`k` is no weight), the same on every device.

    Its metadata do not count: where it came from does not change what it computes.

    Example:
        >>> import clip_lens_ext as cle
        >>> sae, other = cle.planted_sae(), cle.planted_sae("blocks.3.hook_resid_post")
        >>> sae_sha256(sae) == sae_sha256(other)
        False
    """
    cfg = {name: value for name, value in sae.cfg.to_dict().items() if name not in ("device", "metadata")}
    return module_sha256(sae, about=cfg)
