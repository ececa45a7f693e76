"""How Hugging Face's text towers are read: CLIP's causal one, SigLIP's that sees the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.attentions import CAUSAL, Mask
from clip_lens_ext.towers.families.defaults import ReadingDefaults
from clip_lens_ext.towers.families.hugging_face_blocks import HuggingFaceBlock, sizes
from clip_lens_ext.towers.families.inputs import check_tokens
from clip_lens_ext.towers.families.reading import PooledToken
from clip_lens_ext.towers.families.views import HuggingFaceText


class HuggingFaceTextReading(ReadingDefaults):
    """`CLIPTextModel`, `SiglipTextModel`, with their projection where the class or the whole model has one."""

    tower: Literal["text"] = "text"

    def __init__(self, native: nn.Module) -> None:
        self.native: Any = native
        self._blocks = [HuggingFaceBlock(layer) for layer in self._model.encoder.layers]

    @property
    def _owner(self) -> Any:
        return self.native.model if isinstance(self.native, HuggingFaceText) else self.native

    @property
    def _model(self) -> Any:
        return getattr(self._owner, "text_model", self._owner)

    @property
    def _projection(self) -> nn.Linear | None:
        return getattr(self._owner, "text_projection", None)

    @property
    def _is_siglip(self) -> bool:
        return hasattr(self._model, "head")

    @property
    def needs_tokens(self) -> bool:
        return not self._is_siglip

    @property
    def blocks(self) -> Sequence[HuggingFaceBlock]:
        return self._blocks

    @property
    def ln_final(self) -> nn.LayerNorm:
        return self._model.final_layer_norm

    @property
    def device(self) -> torch.device:
        return self.ln_final.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.embeddings.token_embedding.weight.dtype

    def config(self, model_name: str) -> TowerConfig:
        config = self._model.config
        if self._is_siglip:
            d_embed = self._model.head.out_features
        else:
            d_embed = config.hidden_size if self._projection is None else self._projection.out_features
        return TowerConfig(
            tower="text",
            model_name=model_name,
            family="hugging_face",
            **sizes(config),
            d_embed=d_embed,
            n_ctx=config.max_position_embeddings,
            pooling=str(self.pooled_token()),
            device=self.device,
            dtype=self.dtype,
            vocab_size=config.vocab_size,
        )

    def check_input(self, x: Tensor) -> None:
        config = self._model.config
        check_tokens(x, n_ctx=config.max_position_embeddings, vocab_size=config.vocab_size, device=self.device)

    def native_forward(self, x: Tensor) -> Tensor:
        if isinstance(self.native, HuggingFaceText):
            return self.native(x)
        found = self.native(input_ids=x)
        return found.pooler_output if self._projection is None else found.text_embeds

    def embed(self, x: Tensor) -> Tensor:
        return self._model.embeddings.token_embedding(x)

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        embeddings = self._model.embeddings
        return embeddings.position_embedding(embeddings.position_ids[:, : embedded.shape[1]])[0]

    def mask(self, tokens: Tensor | None) -> Mask:
        config = self._model.config
        # The same for every prompt: the native call without an attention mask of the user's.
        like = torch.empty(1, config.max_position_embeddings, 1, dtype=self.dtype, device=self.device)
        if self._is_siglip:
            return create_bidirectional_mask(config=config, inputs_embeds=like, attention_mask=None)
        mask = create_causal_mask(config=config, inputs_embeds=like, attention_mask=None, past_key_values=None)
        return CAUSAL if mask is None else mask

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        if self._is_siglip:
            return x[:, -1, :]
        assert tokens is not None  # needs_tokens
        return x[torch.arange(len(x), device=x.device), self.eot_positions(tokens)]

    def pooled_token(self) -> PooledToken:
        return "last" if self._is_siglip else "eot"

    def eot_positions(self, tokens: Tensor) -> Tensor:
        if self._is_siglip:
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        ids = tokens.to(torch.int)
        # The wrong end-of-text id of old configs stands for: the highest id of the prompt.
        if self._model.eos_token_id == 2:
            return ids.argmax(dim=-1)
        return (ids == self._model.eos_token_id).int().argmax(dim=-1)

    def project(self, pooled: Tensor) -> Tensor:
        if self._is_siglip:
            return self._model.head(pooled)
        return pooled if self._projection is None else self._projection(pooled)
