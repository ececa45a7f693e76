"""How Hugging Face's vision towers are read: CLIP's with its class token, SigLIP's with its attention pooling head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.defaults import ReadingDefaults
from clip_lens_ext.towers.families.hugging_face_blocks import HuggingFaceBlock, sizes
from clip_lens_ext.towers.families.inputs import check_pictures
from clip_lens_ext.towers.families.views import HuggingFaceVision


class HuggingFaceVisionReading(ReadingDefaults):
    """`CLIPVisionModel`, `SiglipVisionModel`, with their projection where the class or the whole model has one."""

    tower: Literal["vision"] = "vision"

    def __init__(self, native: nn.Module) -> None:
        self.native: Any = native
        if self._is_siglip and not self._model.use_head:
            raise UnsupportedModelError("a SiglipVisionModel without its pooling head gives no vector per image")
        self._blocks = [HuggingFaceBlock(layer) for layer in self._model.encoder.layers]

    @property
    def _owner(self) -> Any:
        return self.native.model if isinstance(self.native, HuggingFaceVision) else self.native

    @property
    def _model(self) -> Any:
        return getattr(self._owner, "vision_model", self._owner)

    @property
    def _projection(self) -> nn.Linear | None:
        return getattr(self._owner, "visual_projection", None)

    @property
    def _is_siglip(self) -> bool:
        return not hasattr(self._model.embeddings, "class_embedding")

    @property
    def ln_after_pool(self) -> bool:
        return not self._is_siglip

    @property
    def blocks(self) -> Sequence[HuggingFaceBlock]:
        return self._blocks

    @property
    def ln_pre(self) -> nn.LayerNorm | None:
        return getattr(self._model, "pre_layrnorm", None)  # spelt so

    @property
    def ln_final(self) -> nn.LayerNorm:
        return self._model.post_layernorm

    @property
    def device(self) -> torch.device:
        return self.ln_final.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.embeddings.patch_embedding.weight.dtype

    def config(self, model_name: str) -> TowerConfig:
        config = self._model.config
        return TowerConfig(
            tower="vision",
            model_name=model_name,
            family="hugging_face",
            **sizes(config),
            d_embed=config.hidden_size if self._projection is None else self._projection.out_features,
            n_ctx=self._model.embeddings.num_positions,
            n_prefix_tokens=0 if self._is_siglip else 1,
            pooling="attention" if self._is_siglip else "cls",
            device=self.device,
            dtype=self.dtype,
            image_size=(config.image_size, config.image_size),
            patch_size=(config.patch_size, config.patch_size),
        )

    def check_input(self, x: Tensor) -> None:
        config = self._model.config
        size = (config.image_size, config.image_size)
        check_pictures(x, size=size, dtype=self.dtype, device=self.device, channels=config.num_channels)

    def native_forward(self, x: Tensor) -> Tensor:
        if isinstance(self.native, HuggingFaceVision):
            return self.native(x)
        found = self.native(pixel_values=x)
        return found.pooler_output if self._projection is None else found.image_embeds

    def embed(self, x: Tensor) -> Tensor:
        embeddings = self._model.embeddings
        x = embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
        if self._is_siglip:
            return x
        return torch.cat([embeddings.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        embeddings = self._model.embeddings
        return embeddings.position_embedding(embeddings.position_ids)[0]

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return self._model.head(x) if self._is_siglip else x[:, 0, :]

    def pooled_token(self) -> Literal["cls"] | None:
        return None if self._is_siglip else "cls"

    def project(self, pooled: Tensor) -> Tensor:
        return pooled if self._projection is None else self._projection(pooled)

    def lens(self, rows: Tensor) -> Tensor:
        rows = self.ln_final(rows)
        if self._is_siglip:  # each vector as the only token that the pooling head sees
            return self.project(self._model.head(rows.reshape(-1, 1, rows.shape[-1]))).reshape(*rows.shape[:-1], -1)
        return self.project(rows)
