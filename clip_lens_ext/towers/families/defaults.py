"""What most towers do at each step of the walk, to start a reading of one's own from."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from clip_lens_ext.towers.families.attentions import AttentionReading, Mask, MLPReading
from clip_lens_ext.towers.families.reading import PooledToken


class ReadingDefaults:
    """A tower without `ln_pre`, mask or patch dropout, that pools one token after the final LayerNorm.

    A family overrides what its tower does otherwise, and adds the rest of `Reading`: `blocks`, `ln_final`, `device`,
    `dtype`, `config`, `check_input`, `embed`, `positional_embedding`, `project`.
    """

    native: Any
    tower: Literal["vision", "text"] = "vision"

    @property
    def needs_tokens(self) -> bool:
        return False

    @property
    def ln_after_pool(self) -> bool:
        return False

    @property
    def ln_pre(self) -> nn.LayerNorm | None:
        return None

    @property
    def ln_final(self) -> nn.LayerNorm:
        raise NotImplementedError

    @property
    def checkpointed(self) -> bool:
        return False

    def native_forward(self, x: Tensor) -> Tensor:
        found = self.native(x)
        return found[0] if isinstance(found, tuple) else found

    def after_embedding(self, x: Tensor) -> Tensor:
        return x

    def mask(self, tokens: Tensor | None) -> Mask:
        return None

    def before_norm(self, x: Tensor) -> Tensor:
        return x

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return x[:, 0]

    def pooled_token(self) -> PooledToken | None:
        return "cls"

    def eot_positions(self, tokens: Tensor) -> Tensor | None:
        return None

    def project(self, pooled: Tensor) -> Tensor:
        return pooled

    def lens(self, rows: Tensor) -> Tensor:
        return self.project(self.ln_final(rows))


class BlockDefaults:
    """A block without layer scale; a family adds `ln1`, `ln2` and `run`.

    Args:
        native: the block.
        attention: its attention.
        mlp: its MLP.
    """

    def __init__(self, native: Any, attention: AttentionReading, mlp: MLPReading) -> None:
        self.native, self.attention, self.mlp = native, attention, mlp

    def scale_attn_out(self, x: Tensor) -> Tensor:
        return x

    def scale_mlp_out(self, x: Tensor) -> Tensor:
        return x
