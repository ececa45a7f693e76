"""What a family says about one native tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.attentions import AttentionReading, Mask, MLPReading

PooledToken = Literal["cls", "eot", "first", "last"]


class BlockReading(Protocol):
    """One native pre-LN block by its parts, each of them the native operation."""

    @property
    def native(self) -> Any:
        """The block."""

    @property
    def attention(self) -> AttentionReading:
        """Its attention."""

    @property
    def mlp(self) -> MLPReading:
        """Its MLP."""

    @property
    def ln1(self) -> nn.LayerNorm:
        """The LayerNorm before the attention."""

    @property
    def ln2(self) -> nn.LayerNorm:
        """The LayerNorm before the MLP."""

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        """The native block, whole, on `[batch token d_model]`."""

    def scale_attn_out(self, x: Tensor) -> Tensor:
        """What the block does between its attention and the stream: layer scale, drop path, or nothing."""

    def scale_mlp_out(self, x: Tensor) -> Tensor:
        """What the block does between its MLP and the stream."""


@runtime_checkable
class TowerReading(Protocol):
    """What every reading of a tower says, however it runs."""

    @property
    def native(self) -> Any:
        """The module that holds the tower's weights, registered as `HookedTower.native`."""

    @property
    def tower(self) -> Literal["vision", "text"]:
        """Which tower it is."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream; LayerNorms of a half-precision model may keep float32 weights."""

    @property
    def needs_tokens(self) -> bool:
        """Whether the tail depends on the prompts as well as on the activation."""

    def config(self, model_name: str) -> TowerConfig:
        """Sizes and kinds."""

    def check_input(self, x: Tensor) -> None:
        """Raise `InputError` where `x` is nothing that this tower can take."""

    def native_forward(self, x: Tensor) -> Tensor:
        """The un-normalised embedding `[batch d_embed]` by the model's own forward: what the tower is held against."""

    def pooled_token(self) -> PooledToken | None:
        """Which token pooling takes, or None where it mixes several."""

    def eot_positions(self, tokens: Tensor) -> Tensor | None:
        """Position of the end-of-text token of each prompt `[batch]`; None where no token is the end."""


@runtime_checkable
class Reading(TowerReading, Protocol):
    """One native tower of pre-LN blocks, taken apart into the steps that `HookedTower` walks.

    The walk: `embed`, plus `positional_embedding`, `after_embedding`, `ln_pre`, the blocks, then `pool` of `ln_final`
    of `before_norm`, or with `ln_after_pool` `ln_final` of `pool` of `before_norm`, then `project`.
    """

    @property
    def ln_after_pool(self) -> bool:
        """Whether the final LayerNorm comes after pooling; then it sees `[batch d_model]`."""

    @property
    def blocks(self) -> Sequence[BlockReading]:
        """The residual blocks, in order."""

    @property
    def ln_pre(self) -> nn.LayerNorm | None:
        """The LayerNorm before the first block, if there is one."""

    @property
    def ln_final(self) -> nn.LayerNorm:
        """The LayerNorm before the projection."""

    @property
    def checkpointed(self) -> bool:
        """Whether native gradient checkpointing is on, and the walk has to do it."""

    def embed(self, x: Tensor) -> Tensor:
        """Token embeddings `[batch token d_model]`, before the positional embedding is added."""

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        """Positional embedding `[token d_model]` in the dtype that the native forward adds."""

    def after_embedding(self, x: Tensor) -> Tensor:
        """What the native forward does between the positional embedding and `ln_pre` (patch dropout)."""

    def mask(self, tokens: Tensor | None) -> Mask:
        """The attention mask as the native blocks get it."""

    def before_norm(self, x: Tensor) -> Tensor:
        """What the native forward does between the last block and the final LayerNorm or pooling (CoCa's pooler)."""

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """One vector per sample `[batch d_model]`, from `[batch token d_model]`."""

    def project(self, pooled: Tensor) -> Tensor:
        """The un-normalised embedding `[batch d_embed]`."""

    def lens(self, rows: Tensor) -> Tensor:
        """Residual vectors `[... d_model]` pushed alone through all that follows the last block, `[... d_embed]`."""
