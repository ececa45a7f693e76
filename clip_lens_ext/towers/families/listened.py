"""Towers whose blocks are not taken apart: ResNet, ConvNeXt, FastViT, Swin, ViTamin, EVA, PE, Hugging Face encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.inputs import check_pictures, check_tokens

NAME = "residual"


def matches(native: nn.Module) -> bool:
    """Whether this family reads the module."""
    return isinstance(native, TimmModel | ModifiedResNet | HFTextEncoder) and len(find_blocks(native)) > 0


def read(native: nn.Module) -> ListenedReading:
    """The reading of a vision or a text tower."""
    return ListenedReading(native)


def find_blocks(native: nn.Module) -> list[nn.Module]:
    """The blocks of a native tower in the order in which they run; empty where none are found."""
    body: Any = native
    if isinstance(native, TimmModel):
        body = native.trunk
    elif isinstance(native, HFTextEncoder):
        body = getattr(native.transformer, "encoder", native.transformer)
    names = ("stages", "blocks", "layers", "layer", "block")
    lists = [getattr(body, name) for name in names if isinstance(getattr(body, name, None), nn.Module)]
    if isinstance(native, ModifiedResNet):
        lists = [nn.ModuleList([native.layer1, native.layer2, native.layer3, native.layer4])]
    if not lists:
        return []
    blocks: list[nn.Module] = []
    for stage in lists[0].children():
        inner = stage if isinstance(stage, nn.Sequential) else getattr(stage, "blocks", None)
        blocks += list(inner.children()) if isinstance(inner, nn.Module) else [stage]
    return blocks


class ListenedReading:
    """A tower that runs as it is; what its blocks take and give is seen as `[batch token d]`."""

    def __init__(self, native: nn.Module) -> None:
        self.native: Any = native
        self.blocks: Sequence[nn.Module] = find_blocks(native)
        self.tower: Literal["vision", "text"] = "text" if isinstance(native, HFTextEncoder) else "vision"
        self._shapes: list[tuple[int, ...]] | None = None

    @property
    def _trunk(self) -> Any:
        return getattr(self.native, "trunk", self.native)

    @property
    def device(self) -> torch.device:
        return next(self.native.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.native.parameters()).dtype

    @property
    def needs_tokens(self) -> bool:
        return self.tower == "text"

    @property
    def _size(self) -> tuple[int, int]:
        size = self.native.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def _n_ids(self) -> int:
        # Positions of RoBERTa and its kin start behind the padding id.
        config = self.native.config
        longest = int(getattr(config, "max_position_embeddings", 0) or 0)
        starts_late = "roberta" in config.model_type
        return min(longest - (config.pad_token_id + 1 if starts_late else 0), 77) if longest else 77

    def config(self, model_name: str) -> TowerConfig:
        shapes = self.shapes()
        last = shapes[-2]
        vision = self.tower == "vision"
        return TowerConfig(
            tower=self.tower,
            model_name=model_name,
            family=f"residual ({type(self._trunk).__name__})",
            n_layers=len(self.blocks),
            n_heads=None,
            d_model=last[-1],
            d_head=None,
            d_mlp=None,
            d_embed=shapes[-1][-1],
            n_ctx=last[0],
            n_prefix_tokens=int(getattr(self._trunk, "num_prefix_tokens", 0)),
            pooling="cls" if self.pooled_token() == "cls" else "the native head",
            act_fn=None,
            eps=None,
            device=self.device,
            dtype=self.dtype,
            image_size=self._size if vision else None,
            vocab_size=None if vision else int(self.native.vocab_size),
            normalization_type="native",
            positional_embedding_type="native",
            hooks="residual",
        )

    def check_input(self, x: Tensor) -> None:
        if self.tower == "vision":
            check_pictures(x, size=self._size, dtype=self.dtype, device=self.device)
        else:
            check_tokens(x, n_ctx=self._n_ids, vocab_size=self.native.vocab_size, device=self.device)

    def native_forward(self, x: Tensor) -> Tensor:
        found = self.native(x)
        return found[0] if isinstance(found, tuple) else found

    def pooled_token(self) -> Literal["cls"] | None:
        one = getattr(self._trunk, "attn_pool", None) is None and getattr(self._trunk, "global_pool", None) == "token"
        return "cls" if one else None

    def eot_positions(self, tokens: Tensor) -> None:
        return None

    def empty_input(self, batch: int) -> Tensor:
        """An input that a pass can run on where its values do not matter."""
        if self.tower == "vision":
            return torch.zeros(batch, 3, *self._size, dtype=self.dtype, device=self.device)
        padding = int(self.native.config.pad_token_id or 0)
        ids = torch.full((batch, self._n_ids), padding + 1, device=self.device)
        return ids.clamp_max(self.native.vocab_size - 1)

    def to_tokens(self, found: Tensor) -> Tensor:
        """`[batch token d]` of what a native block takes or gives."""
        if found.dim() == 3:
            return found
        if self._channels_last:
            return found.flatten(1, 2)
        return found.flatten(2).transpose(1, 2)

    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse of `to_tokens`, laid out in memory as `like`, so that the same kernels run on it."""
        if like.dim() == 3:
            return tokens
        if self._channels_last:
            return tokens.reshape(tokens.shape[0], *like.shape[1:])
        image = tokens.transpose(1, 2).reshape(tokens.shape[0], *like.shape[1:])
        kept = like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last)
        return image.contiguous(memory_format=torch.contiguous_format if kept else torch.channels_last)

    @property
    def _channels_last(self) -> bool:
        return str(getattr(self._trunk, "output_fmt", "NCHW")).endswith("NHWC")

    def shapes(self) -> list[tuple[int, ...]]:
        """Shape before and after each block and of the embedding, without the batch axis; found once by one pass."""
        if self._shapes is None:
            found: dict[tuple[int, str], tuple[int, ...]] = {}
            handles = []
            for layer, block in enumerate(self.blocks):

                def note(module: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
                    first = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
                    out = output if isinstance(output, Tensor) else output[0]
                    found[layer, "pre"] = tuple(self.to_tokens(first).shape[1:])
                    found[layer, "post"] = tuple(self.to_tokens(out).shape[1:])

                handles.append(block.register_forward_hook(note, with_kwargs=True))
            modes = [(module, module.training) for module in self.native.modules()]
            try:
                self.native.eval()  # a pass in training mode would move the running statistics
                with torch.no_grad():
                    embedding = self.native_forward(self.empty_input(1))
            finally:
                for module, mode in modes:
                    module.training = mode
                for handle in handles:
                    handle.remove()
            missing = [layer for layer in range(len(self.blocks)) if (layer, "post") not in found]
            if missing:
                raise UnsupportedModelError(f"block {missing[0]} of the {type(self._trunk).__name__} does not run")
            splits = [found[layer, part] for layer in range(len(self.blocks)) for part in ("pre", "post")]
            self._shapes = [*splits, tuple(embedding.shape[1:])]
        return self._shapes
