"""How open_clip's `VisionTransformer` is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.open_clip_blocks import check_blocks, sizes


class VisionReading:
    """How open_clip's `VisionTransformer` runs."""

    tower: Literal["vision"] = "vision"

    def __init__(self, native: VisionTransformer) -> None:
        check_blocks(native.transformer, "vision tower")
        if native.attn_pool is not None:
            raise UnsupportedModelError(
                "attentional pooling (CoCa's attn_pool) is not read: its pooled vector mixes "
                "learned queries, which no hook of this tower names"
            )
        if native.pool_type not in ("tok", "avg"):
            raise UnsupportedModelError(
                f"pool_type {native.pool_type!r} gives no single vector per image; 'tok' and 'avg' are read"
            )
        self.native = native

    @property
    def ln_after_pool(self) -> bool:
        return self.native.final_ln_after_pool

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.native.transformer.resblocks

    @property
    def ln_pre(self) -> nn.LayerNorm | None:
        return self.native.ln_pre if isinstance(self.native.ln_pre, nn.LayerNorm) else None

    @property
    def ln_final(self) -> nn.LayerNorm:
        return self.native.ln_post

    @property
    def checkpointed(self) -> bool:
        return self.native.transformer.grad_checkpointing

    @property
    def dtype(self) -> torch.dtype:
        return self.native.conv1.weight.dtype

    def config(self, model_name: str) -> TowerConfig:
        height, width = self.native.grid_size
        return TowerConfig(
            tower="vision",
            model_name=model_name,
            family="open_clip",
            **sizes(self.native.transformer),
            d_embed=self.native.output_dim if self.native.proj is not None else self.native.transformer.width,
            n_ctx=height * width + 1,
            pooling="cls" if self.native.pool_type == "tok" else "mean of patches",
            eps=self.native.ln_post.eps,
            device=self.native.ln_post.weight.device,
            dtype=self.dtype,
            image_size=tuple(self.native.image_size),
            patch_size=tuple(self.native.patch_size),
        )

    def check_input(self, x: Tensor) -> None:
        weight = self.native.conv1.weight
        height, width = self.native.image_size
        expected = f"[batch {weight.shape[1]} {height} {width}] of {weight.dtype}"
        if not isinstance(x, Tensor):
            raise InputError(
                f"expected pictures as a tensor {expected}, got {type(x).__name__}: use clip.preprocess(image)[None]"
            )
        if x.dim() == 3 and tuple(x.shape) == (weight.shape[1], height, width):
            raise InputError(
                f"expected pictures {expected}, got one picture {list(x.shape)}: add a batch axis, x[None]"
            )
        if x.dim() != 4 or tuple(x.shape[1:]) != (weight.shape[1], height, width):
            raise InputError(
                f"expected pictures {expected}, got {list(x.shape)}: clip.preprocess resizes a picture "
                "and gives it three channels"
            )
        if x.shape[0] == 0:
            raise InputError(f"expected pictures {expected}, got an empty batch")
        if x.dtype != weight.dtype:
            hint = "use clip.preprocess" if not x.is_floating_point() else f"use x.to({weight.dtype})"
            raise InputError(f"expected pictures {expected}, got {x.dtype}: {hint}")
        if x.device != weight.device:
            raise InputError(
                f"the pictures are on {x.device}, the tower is on {weight.device}: use x.to('{weight.device}')"
            )
        if self.native.training and not isinstance(self.native.patch_dropout, nn.Identity):
            raise InputError(
                "patch dropout drops tokens in training mode, so hooks would see another number of tokens "
                "at every call: call tower.eval() first"
            )

    def embed(self, x: Tensor) -> Tensor:
        x = self.native.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        cls = self.native.class_embedding.view(1, 1, -1).expand(x.shape[0], -1, -1)
        return torch.cat([cls.to(x.dtype), x], dim=1)

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        return self.native.positional_embedding.to(embedded.dtype)

    def after_embedding(self, x: Tensor) -> Tensor:
        return self.native.patch_dropout(x)

    def mask(self, tokens: Tensor | None) -> Tensor | None:
        return None

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return x[:, 0] if self.native.pool_type == "tok" else x[:, 1:].mean(dim=1)

    def pooled_token(self) -> Literal["cls"] | None:
        return "cls" if self.native.pool_type == "tok" else None

    def eot_positions(self, tokens: Tensor) -> None:
        return None

    def project(self, pooled: Tensor) -> Tensor:
        return pooled if self.native.proj is None else pooled @ self.native.proj
