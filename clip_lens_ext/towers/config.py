"""What a tower is, in the field names that TransformerLens' tools read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class TowerConfig:
    """Sizes and kinds of one tower; `tower.cfg` makes it anew at each access, so device and dtype are never stale.

    `n_ctx` is the number of tokens at the residual hooks: patches and class token of a vision tower, the context length
    of a text tower; `n_prefix_tokens` of them come before the patches. `d_pooled` is the width of the pooled vector.
    `hooks` says what there is: `"full"`, every hook of TransformerLens' block, or `"residual"`, the stream before and
    after each block or stage and the embedding, for blocks of another kind. Then `n_heads`, `d_head`, `d_mlp`,
    `act_fn` and `eps` are None, and `n_ctx` and `d_model` are those of the last block.

    `ActivationCache` reads `n_layers`, `n_heads`, `d_model`, `d_head`, `normalization_type`, `attn_only`,
    `positional_embedding_type` and `device`.
    """

    tower: Literal["vision", "text"]
    model_name: str
    family: str
    n_layers: int
    n_heads: int | None
    d_model: int
    d_head: int | None
    d_mlp: int | None
    d_embed: int
    n_ctx: int
    pooling: str
    act_fn: str | None
    eps: float | None
    device: torch.device
    dtype: torch.dtype
    n_prefix_tokens: int = 0
    d_pooled: int = 0
    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    vocab_size: int | None = None
    normalization_type: str = "LN"
    attn_only: bool = False
    parallel_attn_mlp: bool = False
    positional_embedding_type: str = "standard"
    hooks: Literal["full", "residual"] = "full"

    def __post_init__(self) -> None:
        if not self.d_pooled:
            object.__setattr__(self, "d_pooled", self.d_model)

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
