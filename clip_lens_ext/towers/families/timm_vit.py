"""timm's `VisionTransformer` inside open_clip's `TimmModel` (SigLIP, MobileCLIP-B, and others of the same block)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from open_clip.timm_model import TimmModel
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.attentions import FusedProjection, Mask, MLPReading
from clip_lens_ext.towers.families.defaults import ReadingDefaults
from clip_lens_ext.towers.families.inputs import check_patch_dropout, check_pictures
from clip_lens_ext.towers.families.reading import Reading

NAME = "timm"


def matches(native: nn.Module) -> bool:
    """Whether this family reads the module: a plain ViT whose blocks have the parts that are hooked."""
    if not isinstance(native, TimmModel) or type(native.trunk) is not VisionTransformer:
        return False
    trunk = native.trunk
    norms = [norm for norm in (trunk.norm, trunk.fc_norm) if not isinstance(norm, nn.Identity)]
    pooled = trunk.attn_pool is not None or trunk.global_pool in ("token", "avg")
    return (
        trunk.pos_embed is not None
        and not trunk.dynamic_img_size
        and pooled
        and len(norms) == 1
        and isinstance(norms[0], nn.LayerNorm)
        and isinstance(trunk.norm_pre, nn.LayerNorm | nn.Identity)
        and isinstance(native.head, nn.Module)
        and all(_is_plain(block) for block in trunk.blocks)
    )


def _is_plain(block: Any) -> bool:
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and block.attn.gate is None
        and type(block.mlp) is Mlp
        and isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.norm2, nn.LayerNorm)
    )


def read(native: nn.Module) -> Reading:
    """The reading of a vision tower."""
    return TimmReading(native)


class TimmMLP(MLPReading):
    """timm's `Mlp`, which drops out twice and may normalise in between."""

    def __init__(self, native: Any) -> None:
        super().__init__(native, "fc1", "act", "fc2")

    def out(self, x: Tensor) -> Tensor:
        return self.native.drop2(self.native.fc2(self.native.norm(self.native.drop1(x))))


class TimmBlock:
    """timm's `Block`."""

    def __init__(self, native: nn.Module) -> None:
        self.native: Any = native
        self.attention = FusedProjection(self.native.attn)
        self.mlp = TimmMLP(self.native.mlp)

    @property
    def ln1(self) -> nn.LayerNorm:
        return self.native.norm1

    @property
    def ln2(self) -> nn.LayerNorm:
        return self.native.norm2

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        return self.native(x)

    def scale_attn_out(self, x: Tensor) -> Tensor:
        return self.native.drop_path1(self.native.ls1(x))

    def scale_mlp_out(self, x: Tensor) -> Tensor:
        return self.native.drop_path2(self.native.ls2(x))


class TimmReading(ReadingDefaults):
    """`TimmModel` around a timm `VisionTransformer`."""

    tower: Literal["vision"] = "vision"

    def __init__(self, native: nn.Module) -> None:
        self.native: Any = native
        self._blocks = [TimmBlock(block) for block in self._trunk.blocks]

    @property
    def _trunk(self) -> Any:
        return self.native.trunk

    @property
    def ln_after_pool(self) -> bool:
        return isinstance(self._trunk.norm, nn.Identity)

    @property
    def blocks(self) -> Sequence[TimmBlock]:
        return self._blocks

    @property
    def ln_pre(self) -> nn.LayerNorm | None:
        return self._trunk.norm_pre if isinstance(self._trunk.norm_pre, nn.LayerNorm) else None

    @property
    def ln_final(self) -> nn.LayerNorm:
        return self._trunk.fc_norm if self.ln_after_pool else self._trunk.norm

    @property
    def checkpointed(self) -> bool:
        return self._trunk.grad_checkpointing

    @property
    def device(self) -> torch.device:
        return self._trunk.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self._trunk.pos_embed.dtype

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self._trunk.patch_embed.img_size
        return int(height), int(width)

    def config(self, model_name: str) -> TowerConfig:
        trunk, block = self._trunk, self._trunk.blocks[0]
        kind = type(block.mlp.act).__name__
        projections = [module.out_features for module in self.native.modules() if isinstance(module, nn.Linear)]
        headless = isinstance(trunk.head, nn.Identity) and len(self.native.head) == 0
        prefix = trunk.num_prefix_tokens
        poolings = {"token": "cls", "avg": "mean of patches" if not trunk.pool_include_prefix else "mean"}
        return TowerConfig(
            tower="vision",
            model_name=model_name,
            family="timm",
            n_layers=len(trunk.blocks),
            n_heads=block.attn.num_heads,
            d_model=trunk.embed_dim,
            d_head=block.attn.head_dim,
            d_mlp=block.mlp.fc1.out_features,
            d_embed=trunk.num_features if headless else projections[-1],
            n_ctx=trunk.patch_embed.num_patches + prefix,
            n_prefix_tokens=prefix,
            pooling="attention" if trunk.attn_pool is not None else poolings[trunk.global_pool],
            act_fn={"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(kind, kind),
            eps=self.ln_final.eps,
            device=self.device,
            dtype=self.dtype,
            image_size=self._size,
            patch_size=tuple(trunk.patch_embed.patch_size),
        )

    def check_input(self, x: Tensor) -> None:
        check_pictures(x, size=self._size, dtype=self.dtype, device=self.device)
        check_patch_dropout(self._trunk, self._trunk.patch_drop)

    def _prefix(self, batch: int) -> list[Tensor]:
        tokens = (self._trunk.cls_token, self._trunk.reg_token)
        return [token.expand(batch, -1, -1) for token in tokens if token is not None]

    def embed(self, x: Tensor) -> Tensor:
        patches = self._trunk.patch_embed(x)
        return torch.cat([*self._prefix(len(x)), patches], dim=1)

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        positions = self._trunk.pos_embed[0]
        missing = embedded.shape[1] - len(positions)
        if not missing:
            return positions
        # no_embed_class: the class token gets no position.
        return torch.cat([positions.new_zeros(missing, positions.shape[1]), positions])

    def after_embedding(self, x: Tensor) -> Tensor:
        return self._trunk.patch_drop(self._trunk.pos_drop(x))

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return self._trunk.pool(x)

    def pooled_token(self) -> Literal["cls"] | None:
        return "cls" if self._trunk.attn_pool is None and self._trunk.global_pool == "token" else None

    def project(self, pooled: Tensor) -> Tensor:
        trunk = self._trunk
        pooled = pooled if self.ln_after_pool else trunk.fc_norm(pooled)
        return self.native.head(trunk.head(trunk.head_drop(pooled)))

    def lens(self, rows: Tensor) -> Tensor:
        if self._trunk.attn_pool is None:
            return self.project(self.ln_final(rows))
        alone = self.ln_final(rows.reshape(-1, 1, rows.shape[-1]))  # each vector as the only token that is pooled
        return self.project(self._trunk.attn_pool(alone)).reshape(*rows.shape[:-1], -1)
