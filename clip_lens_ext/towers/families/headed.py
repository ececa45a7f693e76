"""A tower with a head behind its embedding, and a dual encoder of two such towers.

`embedding = head(trunk(x))`: what a Sparse CLIP is. The trunk is a tower of any family that is taken apart into blocks;
every hook of it stays, and `hook_embedding` is what the head gives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.towers.config import TowerConfig
from clip_lens_ext.towers.families.reading import Reading

NAME = "headed"


class HeadedTower(nn.Module):
    """A tower and the module that reads its embedding.

    Args:
        trunk: the tower, of any family that is taken apart into blocks.
        head: `[batch d_embed of the trunk]` to `[batch out_features]`, with the attribute `out_features`.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        width = getattr(head, "out_features", None)
        if not isinstance(width, int):
            raise InputError(f"the head, a {type(head).__name__}, has to say its width as `out_features`")
        self.trunk, self.head, self.d_embed = trunk, head, width
        self.training = trunk.training

    def forward(self, x: Tensor) -> Tensor:
        """The code `[batch out_features]`."""
        found = self.trunk(x)
        return self.head(found[0] if isinstance(found, tuple) else found)


class HeadedCLIP(nn.Module):
    """A dual encoder with a head behind each tower; it runs where an open_clip model does.

    The dense model and the heads are its parts; `visual` and `text` are views on them, so that no weight stands in
    `state_dict` twice.

    Args:
        dense: the dual encoder.
        visual, text: its two towers.
        image_head, text_head: what reads their embeddings.
        logit_scale: natural logarithm of the factor on the cosines.
        dense_name: what the dense model is called, for `load_clip` where it can open it.
    """

    visual: HeadedTower  # not registered: its parts are
    text: HeadedTower

    def __init__(
        self, dense: nn.Module, visual: nn.Module, text: nn.Module, image_head: nn.Module, text_head: nn.Module, *,
        logit_scale: nn.Parameter, dense_name: str = "unnamed",
    ) -> None:  # fmt: skip
        super().__init__()
        self.dense_name = dense_name
        self.dense, self.image_head, self.text_head, self.logit_scale = dense, image_head, text_head, logit_scale
        self.__dict__["visual"] = HeadedTower(visual, image_head)
        self.__dict__["text"] = HeadedTower(text, text_head)
        self.training = dense.training

    def train(self, mode: bool = True) -> HeadedCLIP:
        """As any module's, of the views too."""
        super().train(mode)
        for view in (self.visual, self.text):
            view.train(mode)
        return self

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Codes `[batch d_code]` of pictures."""
        code = self.visual(image)
        return F.normalize(code, dim=-1) if normalize else code

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Codes `[batch d_code]` of token ids."""
        code = self.text(text)
        return F.normalize(code, dim=-1) if normalize else code

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length codes of pictures and texts, and the factor on their cosines, as open_clip's `CLIP` gives."""
        return self.encode_image(image, normalize=True), self.encode_text(text, normalize=True), self.logit_scale.exp()


def matches(native: nn.Module) -> bool:
    """Whether it is a tower with a head."""
    return isinstance(native, HeadedTower)


class HeadedReading:
    """The trunk's own reading, with the head after its projection."""

    def __init__(self, native: HeadedTower, trunk: Any) -> None:
        self.native, self._trunk = native, trunk

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_trunk":
            raise AttributeError(name)
        return getattr(self._trunk, name)

    def config(self, model_name: str) -> TowerConfig:
        """The trunk's, with the width of the code."""
        cfg = self._trunk.config(model_name)
        return replace(cfg, family=f"{cfg.family} with a head", d_embed=self.native.d_embed)

    def native_forward(self, x: Tensor) -> Tensor:
        """By the modules' own forward."""
        return self.native.head(self._trunk.native_forward(x))

    def project(self, pooled: Tensor) -> Tensor:
        """The trunk's projection, and the head."""
        return self.native.head(self._trunk.project(pooled))

    def lens(self, rows: Tensor) -> Tensor:
        """Vectors of the stream through all that follows the last block."""
        return self.native.head(self._trunk.lens(rows))


def read(native: nn.Module) -> Any:
    """The reading of a tower with a head.

    Raises:
        UnsupportedModelError: the trunk is not taken apart into blocks.
    """
    from clip_lens_ext.towers.families.registry import read_tower  # which knows this family in turn

    assert isinstance(native, HeadedTower)
    trunk = read_tower(native.trunk)
    if not isinstance(trunk, Reading):
        raise UnsupportedModelError(
            f"a head behind a {type(native.trunk).__name__} cannot be hooked: that tower is run as it is, and not "
            "taken apart into blocks"
        )
    return HeadedReading(native, trunk)
