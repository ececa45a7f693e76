"""What a tower is, in the field names that TransformerLens' tools read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class TowerConfig:
    """Sizes and kinds of one tower; `tower.cfg` makes it anew at each access, so device and dtype are never stale.

    `n_ctx` is the number of tokens at the residual hooks: patches and CLS of a vision tower, the context length of a
    text tower. `ActivationCache` reads `n_layers`, `n_heads`, `d_model`, `d_head`, `normalization_type`, `attn_only`,
    `positional_embedding_type` and `device`.
    """

    tower: Literal["vision", "text"]
    model_name: str
    family: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_embed: int
    n_ctx: int
    pooling: str
    act_fn: str
    eps: float
    device: torch.device
    dtype: torch.dtype
    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    vocab_size: int | None = None
    normalization_type: str = "LN"
    attn_only: bool = False
    parallel_attn_mlp: bool = False
    positional_embedding_type: str = "standard"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values.

        Example:
            >>> import clip_lens_ext as cle
            >>> cle.planted_clip().vision.cfg.to_dict()["tower"]
            'vision'
        """
        return {
            key: str(value) if isinstance(value, torch.device | torch.dtype) else value
            for key, value in asdict(self).items()
        }
