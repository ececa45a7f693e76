"""What a family says about one native tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clip_lens_ext.towers.config import TowerConfig


@runtime_checkable
class Reading(Protocol):
    """One native tower, taken apart into the steps that `HookedTower` walks, each of them the native operation.

    Attributes:
        native: the module that holds the tower's weights, registered as `HookedTower.native`.
    """

    native: nn.Module

    @property
    def tower(self) -> Literal["vision", "text"]:
        """Which tower it is."""

    @property
    def ln_after_pool(self) -> bool:
        """Whether the final LayerNorm comes after pooling; then it sees `[batch d_model]`."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The native residual blocks, in order."""

    @property
    def ln_pre(self) -> nn.LayerNorm | None:
        """The LayerNorm before the first block, if there is one."""

    @property
    def ln_final(self) -> nn.LayerNorm:
        """The LayerNorm before the projection."""

    @property
    def checkpointed(self) -> bool:
        """Whether native gradient checkpointing is on."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream; LayerNorms of a half-precision model may keep float32 weights."""

    def config(self, model_name: str) -> TowerConfig:
        """Sizes and kinds."""

    def check_input(self, x: Tensor) -> None:
        """Raise `InputError` where `x` is nothing that this tower can take."""

    def embed(self, x: Tensor) -> Tensor:
        """Token embeddings `[batch token d_model]`, before the positional embedding is added."""

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        """Positional embedding `[token d_model]` in the dtype that the native forward adds."""

    def after_embedding(self, x: Tensor) -> Tensor:
        """What the native forward does between the positional embedding and `ln_pre` (patch dropout)."""

    def mask(self, tokens: Tensor | None) -> Tensor | None:
        """The additive attention mask that the native blocks get."""

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """One vector per sample `[batch d_model]`, from `[batch token d_model]`."""

    def pooled_token(self) -> Literal["cls", "eot", "first", "last"] | None:
        """Which token pooling takes, or None where it mixes several."""

    def eot_positions(self, tokens: Tensor) -> Tensor | None:
        """Position of the end-of-text token of each prompt `[batch]`; None for a vision tower."""

    def project(self, pooled: Tensor) -> Tensor:
        """The un-normalised embedding `[batch d_embed]`."""
