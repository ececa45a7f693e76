"""How open_clip's text towers are read: `TextTransformer`, and the text half that `CLIP` keeps in itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.open_clip_blocks import check_blocks, sizes


class FlattenedText(nn.Module):
    """The text half of an open_clip `CLIP` as one module: it shares the model's own modules and parameters.

    `CLIP` takes its text tower apart and keeps the parts beside `visual`. This view registers exactly those parts, so
    that `parameters()`, `to()` and `requires_grad_()` of the text tower mean the text tower. Values are always read
    from the model, so that a parameter or a buffer which is replaced there is the one that runs.
    """

    MODULES = ("token_embedding", "transformer", "ln_final")
    PARAMETERS = ("positional_embedding", "text_projection")

    model: Any  # torch types every attribute of a Module as Tensor | Module

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.training = model.training
        self._share()

    def _share(self) -> None:
        """Register what the model has now: `load_state_dict(assign=True)`, for one, puts new Parameters into it."""
        for name in (*self.MODULES, *self.PARAMETERS):
            setattr(self, name, getattr(self.model, name))

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As any module's; every walk over modules or parameters begins here."""
        self._share()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, of the weights that the model has now."""
        self._share()
        return super().state_dict(*args, **kwargs)

    @property
    def attn_mask(self) -> Tensor | None:
        return self.model.attn_mask

    @property
    def pool_type(self) -> str:
        return self.model.text_pool_type

    @property
    def eos_id(self) -> int | None:
        return getattr(self.model, "text_eos_id", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlattenedText:
        self._share()
        super()._apply(fn, recurse)
        for name in self.PARAMETERS:
            if name in self._parameters:  # where torch made a new Parameter, the model must run on that one too
                self.model._parameters[name] = self._parameters[name]
        if self.model.attn_mask is not None:
            self.model._buffers["attn_mask"] = fn(self.model.attn_mask)
        return self

    def forward(self, text: Tensor) -> Tensor:
        """The native forward: `model.encode_text(text)`."""
        return self.model.encode_text(text)


class TextReading:
    """How open_clip's text towers run: `TextTransformer`, or the text half of `CLIP`."""

    tower: Literal["text"] = "text"
    ln_after_pool = False

    def __init__(self, native: TextTransformer | FlattenedText) -> None:
        check_blocks(native.transformer, "text tower")
        if getattr(native, "cls_emb", None) is not None or getattr(native, "use_pad_mask", False):
            raise UnsupportedModelError("a text tower with a class token or a padding mask (CoCa) is not read")
        if native.pool_type not in ("argmax", "eos", "first", "last"):
            raise UnsupportedModelError(f"pool_type {native.pool_type!r} gives no single vector per prompt")
        self.native = native

    @property
    def _owner(self) -> Any:
        # Parameters are read where the native forward reads them; see FlattenedText.
        return self.native.model if isinstance(self.native, FlattenedText) else self.native

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self._owner.transformer.resblocks

    @property
    def ln_pre(self) -> None:
        return None

    @property
    def ln_final(self) -> nn.LayerNorm:
        return self._owner.ln_final

    @property
    def checkpointed(self) -> bool:
        return self._owner.transformer.grad_checkpointing

    @property
    def dtype(self) -> torch.dtype:
        return self._owner.transformer.get_cast_dtype()

    def config(self, model_name: str) -> TowerConfig:
        projection = self._owner.text_projection
        if projection is None:
            d_embed = self._owner.transformer.width
        else:
            d_embed = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
        pooling = {"argmax": "eot", "eos": "eot"}.get(self.native.pool_type, self.native.pool_type)
        return TowerConfig(
            tower="text",
            model_name=model_name,
            family="open_clip",
            **sizes(self._owner.transformer),
            d_embed=d_embed,
            n_ctx=self._owner.positional_embedding.shape[0],
            pooling=pooling,
            eps=self._owner.ln_final.eps,
            device=self._owner.ln_final.weight.device,
            dtype=self.dtype,
            vocab_size=self._owner.token_embedding.num_embeddings,
        )

    def check_input(self, x: Tensor) -> None:
        n_ctx = self._owner.positional_embedding.shape[0]
        vocab_size = self._owner.token_embedding.num_embeddings
        if not isinstance(x, Tensor):
            raise InputError(
                f"expected token ids as a tensor [batch {n_ctx}], got {type(x).__name__}: use clip.tokenize(texts)"
            )
        if x.dim() != 2 or x.shape[1] != n_ctx or x.shape[0] == 0:
            raise InputError(f"expected token ids [batch {n_ctx}], got {list(x.shape)}: use clip.tokenize(texts)")
        if x.dtype not in (torch.int64, torch.int32):
            raise InputError(f"expected token ids of an integer type, got {x.dtype}: use clip.tokenize(texts)")
        device = self._owner.token_embedding.weight.device
        if x.device != device:
            raise InputError(f"the token ids are on {x.device}, the tower is on {device}: use x.to('{device}')")
        if not x.is_meta and not torch.compiler.is_compiling() and (x.min() < 0 or x.max() >= vocab_size):
            raise InputError(
                f"token ids must be in [0, {vocab_size}), got {int(x.min())} to {int(x.max())}: "
                "were they made by another model's tokenizer?"
            )

    def embed(self, x: Tensor) -> Tensor:
        return self._owner.token_embedding(x).to(self._owner.transformer.get_cast_dtype())

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        return self._owner.positional_embedding.to(embedded.dtype)

    def after_embedding(self, x: Tensor) -> Tensor:
        return x

    def mask(self, tokens: Tensor | None) -> Tensor | None:
        return self.native.attn_mask

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return text_global_pool(x, tokens, self.native.pool_type, eos_token_id=self.native.eos_id)

    def pooled_token(self) -> Literal["eot", "first", "last"]:
        return {"first": "first", "last": "last"}.get(self.native.pool_type, "eot")  # type: ignore[return-value]

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
