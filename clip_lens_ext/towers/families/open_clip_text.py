"""How open_clip's text towers are read: `TextTransformer`, and the text half that `CLIP` keeps in itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.attentions import Mask
from clip_lens_ext.towers.families.defaults import ReadingDefaults
from clip_lens_ext.towers.families.inputs import check_tokens
from clip_lens_ext.towers.families.open_clip_blocks import OpenClipBlock, read_blocks, sizes
from clip_lens_ext.towers.families.reading import PooledToken
from clip_lens_ext.towers.families.views import FlattenedText


class TextReading(ReadingDefaults):
    """How open_clip's text towers run: `TextTransformer`, or the text half of `CLIP`.

    CoCa's has a class token behind the prompt, which pooling takes, and a mask that depends on the prompt.
    """

    tower: Literal["text"] = "text"

    def __init__(self, native: TextTransformer | FlattenedText) -> None:
        if native.pool_type not in ("argmax", "eos", "first", "last"):
            raise UnsupportedModelError(f"pool_type {native.pool_type!r} gives no single vector per prompt")
        self.native: Any = native
        self._blocks = read_blocks(self._owner.transformer, "text tower")

    @property
    def _owner(self) -> Any:
        # Parameters are read where the native forward reads them; see FlattenedText.
        return self.native.model if isinstance(self.native, FlattenedText) else self.native

    @property
    def _cls(self) -> Tensor | None:
        return getattr(self.native, "cls_emb", None)

    @property
    def _masks_padding(self) -> bool:
        return self._cls is not None or getattr(self.native, "use_pad_mask", False)

    @property
    def needs_tokens(self) -> bool:
        return self._masks_padding or self.pooled_token() == "eot"

    @property
    def ln_after_pool(self) -> bool:
        return self._cls is not None

    @property
    def blocks(self) -> Sequence[OpenClipBlock]:
        return self._blocks

    @property
    def ln_final(self) -> nn.LayerNorm:
        return self._owner.ln_final

    @property
    def checkpointed(self) -> bool:
        return self._owner.transformer.grad_checkpointing

    @property
    def device(self) -> torch.device:
        return self._owner.ln_final.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._owner.transformer.get_cast_dtype()

    @property
    def _n_ids(self) -> int:
        return self._owner.positional_embedding.shape[0] - (self._cls is not None)

    def config(self, model_name: str) -> TowerConfig:
        projection = self._owner.text_projection
        if projection is None:
            d_embed = self._owner.transformer.width
        else:
            d_embed = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
        return TowerConfig(
            tower="text",
            model_name=model_name,
            family="open_clip",
            **sizes(self._owner.transformer),
            d_embed=d_embed,
            n_ctx=self._owner.positional_embedding.shape[0],
            pooling="class token, the last" if self._cls is not None else str(self.pooled_token()),
            eps=self._owner.ln_final.eps,
            device=self.device,
            dtype=self.dtype,
            vocab_size=self._owner.token_embedding.num_embeddings,
        )

    def check_input(self, x: Tensor) -> None:
        embedding = self._owner.token_embedding
        check_tokens(x, n_ctx=self._n_ids, vocab_size=embedding.num_embeddings, device=embedding.weight.device)

    def embed(self, x: Tensor) -> Tensor:
        embedded = self._owner.token_embedding(x).to(self._owner.transformer.get_cast_dtype())
        if self._cls is None:
            return embedded
        return torch.cat([embedded, self._cls.view(1, 1, -1).expand(len(x), -1, -1)], 1)

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        return self._owner.positional_embedding.to(embedded.dtype)

    def mask(self, tokens: Tensor | None) -> Mask:
        mask = self.native.attn_mask
        if not self._masks_padding or tokens is None:
            return mask
        n_ctx = self._owner.positional_embedding.shape[0]
        added = self.native._build_additive_mask(tokens, n_ctx, self.dtype)
        return added if mask is None else mask[:n_ctx, :n_ctx].unsqueeze(0) + added

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        if self._cls is not None:
            return text_global_pool(x, pool_type="last")
        return text_global_pool(x, tokens, self.native.pool_type, eos_token_id=self.native.eos_id)

    def pooled_token(self) -> PooledToken:
        if self._cls is not None:
            return "last"
        kinds: dict[str, PooledToken] = {"first": "first", "last": "last"}
        return kinds.get(self.native.pool_type, "eot")

    def eot_positions(self, tokens: Tensor) -> Tensor:
        if self.native.pool_type == "eos":
            eos_id = self.native.eos_id
            assert eos_id is not None  # open_clip's own pooling needs it as well
            return torch.eq(tokens, eos_id).int().argmax(dim=-1)
        return tokens.argmax(dim=-1)

    def project(self, pooled: Tensor) -> Tensor:
        projection = self._owner.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
