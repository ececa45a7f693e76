"""How open_clip's `VisionTransformer` is read, with its attentional poolers (CoCa)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.defaults import ReadingDefaults
from clip_lens_ext.towers.families.inputs import check_patch_dropout, check_pictures
from clip_lens_ext.towers.families.open_clip_blocks import OpenClipBlock, read_blocks, sizes


class VisionReading(ReadingDefaults):
    """How open_clip's `VisionTransformer` runs."""

    tower: Literal["vision"] = "vision"

    def __init__(self, native: VisionTransformer) -> None:
        if native.pool_type not in ("tok", "avg") and getattr(native, "attn_pool_contrastive", None) is None:
            raise UnsupportedModelError(
                f"pool_type {native.pool_type!r} gives no single vector per image; 'tok' and 'avg' are read"
            )
        self.native: Any = native
        self._blocks = read_blocks(native.transformer, "vision tower")

    @property
    def ln_after_pool(self) -> bool:
        return self.native.final_ln_after_pool and self.native.attn_pool is None

    @property
    def blocks(self) -> Sequence[OpenClipBlock]:
        return self._blocks

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
    def device(self) -> torch.device:
        return self.native.ln_post.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.native.conv1.weight.dtype

    @property
    def _two_poolers(self) -> bool:
        return self.native.attn_pool is not None and getattr(self.native, "attn_pool_contrastive", None) is not None

    @property
    def _d_pooled(self) -> int:
        pooler = self.native.attn_pool_contrastive if self._two_poolers else self.native.attn_pool
        return self.native.transformer.width if pooler is None else pooler.attn.embed_dim

    def config(self, model_name: str) -> TowerConfig:
        native = self.native
        height, width = native.grid_size
        pooling = {"tok": "cls", "avg": "mean of patches"}.get(native.pool_type, native.pool_type)
        return TowerConfig(
            tower="vision",
            model_name=model_name,
            family="open_clip",
            **sizes(native.transformer),
            d_embed=native.output_dim if native.proj is not None else self._d_pooled,
            d_pooled=self._d_pooled,
            n_ctx=height * width + 1,
            n_prefix_tokens=1,
            pooling=pooling if native.attn_pool is None else "attention",
            eps=native.ln_post.eps,
            device=self.device,
            dtype=self.dtype,
            image_size=tuple(native.image_size),
            patch_size=tuple(native.patch_size),
        )

    def check_input(self, x: Tensor) -> None:
        weight = self.native.conv1.weight
        size = tuple(self.native.image_size)
        check_pictures(x, size=size, dtype=weight.dtype, device=weight.device, channels=weight.shape[1])
        check_patch_dropout(self.native, self.native.patch_dropout)

    def native_forward(self, x: Tensor) -> Tensor:
        found = self.native(x)
        found = found[0] if isinstance(found, tuple) else found  # output_tokens
        return found[:, 0] if found.dim() == 3 else found  # two poolers keep the axis of their one query

    def embed(self, x: Tensor) -> Tensor:
        x = self.native.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        cls = self.native.class_embedding.view(1, 1, -1).expand(x.shape[0], -1, -1)
        return torch.cat([cls.to(x.dtype), x], dim=1)

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        return self.native.positional_embedding.to(embedded.dtype)

    def after_embedding(self, x: Tensor) -> Tensor:
        return self.native.patch_dropout(x)

    def before_norm(self, x: Tensor) -> Tensor:
        # With one attentional pooler its queries are what the final LayerNorm and the pooling see.
        return x if self.native.attn_pool is None or self._two_poolers else self.native.attn_pool(x)

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        native = self.native
        if self._two_poolers:
            return native.attn_pool_contrastive(x if native.attn_pool_type == "parallel" else native.attn_pool(x))[:, 0]
        return x[:, 0] if native.pool_type == "tok" else x[:, 1:].mean(dim=1)

    def pooled_token(self) -> Literal["cls"] | None:
        return "cls" if self.native.pool_type == "tok" and self.native.attn_pool is None else None

    def project(self, pooled: Tensor) -> Tensor:
        return pooled if self.native.proj is None else pooled @ self.native.proj

    def lens(self, rows: Tensor) -> Tensor:
        if self.native.attn_pool is None:
            return self.project(self.ln_final(rows))
        alone = rows.reshape(-1, 1, rows.shape[-1])  # each vector as the only token that the pooler sees
        pooled = self.ln_final(self.before_norm(alone))
        pooled = self.pool(pooled, None) if self._two_poolers else pooled[:, 0]
        return self.project(pooled).reshape(*rows.shape[:-1], -1)
