"""A CLIP model as two hooked towers that share its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.towers.families import split_model
from clip_lens_ext.towers.tower import HookedTower

Preprocess = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


class HookedCLIP(nn.Module):
    """A dual encoder whose towers are hooked; `load_clip` makes it.

    The native model is registered once, as `native`; `vision` and `text` are views on it, so `clip.to(...)` moves both.

    Args:
        native: an open_clip `CLIP`, or a `VisionTransformer` alone (then `text` is None).
        preprocess: PIL picture to the tensor `[3 height width]` that the vision tower was trained on.
        tokenizer: list of strings to token ids `[batch n_ctx]`.
        model_name: goes into results and SAE metadata.

    Attributes:
        native: the model, as it was.
        vision: `HookedTower` of pictures.
        text: `HookedTower` of prompts, or None.
        preprocess: as passed in.
        tokenizer: as passed in.
        model_name: as passed in.

    Raises:
        UnsupportedModelError: a tower is of a kind that no family reads.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip = cle.planted_clip()
        >>> pictures = torch.zeros(2, 3, 48, 48)
        >>> clip.similarity(pictures, cle.PlantedWorld(0).prompts()[:3]).shape
        torch.Size([2, 3])
    """

    vision: HookedTower
    text: HookedTower | None

    def __init__(
        self,
        native: nn.Module,
        *,
        preprocess: Preprocess | None = None,
        tokenizer: Tokenizer | None = None,
        model_name: str = "unnamed",
    ) -> None:
        super().__init__()
        self.native = native
        visual, text = split_model(native)
        # Towers are views on `native`: registered here too, every weight would stand in state_dict three times.
        self.__dict__["vision"] = HookedTower(visual, model_name=model_name)
        self.__dict__["text"] = None if text is None else HookedTower(text, model_name=model_name)
        if self.vision.cfg.tower != "vision":
            raise UnsupportedModelError(f"a {type(native).__name__} has no vision tower: wrap it in HookedTower alone")
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.model_name = model_name

    @property
    def logit_scale(self) -> nn.Parameter:
        """Natural logarithm of the factor on the cosines, the native parameter as open_clip keeps it."""
        scale = getattr(self.native, "logit_scale", None)
        if scale is None:
            raise InputError("this model is a vision tower alone: it has no logit scale")
        return scale

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids `[batch n_ctx]` on the text tower's device.

        Raises:
            InputError: no text, something that is no string, or a model without a text tower or tokenizer.
        """
        strings = [texts] if isinstance(texts, str) else list(texts)
        if not strings:
            raise InputError("no text given: pass at least one string")
        wrong = [type(text).__name__ for text in strings if not isinstance(text, str)]
        if wrong:
            raise InputError(f"texts must be strings, got {wrong[0]}")
        if self.text is None:
            raise InputError(
                f"{self.model_name} is a vision tower alone: it embeds no text. Explain it with "
                "direction_target(vectors), from text embeddings of the same model"
            )
        if self.tokenizer is None:
            raise InputError("the tokenizer of this live model is not known: pass load_clip(model, tokenizer=...)")
        return self.tokenizer(strings).to(self.text.cfg.device)

    def embed_images(self, images: Tensor | Image.Image | Sequence[Image.Image], *, normalize: bool = False) -> Tensor:
        """Embeddings `[batch d_embed]` of pictures.

        Args:
            images: a tensor `[batch 3 height width]` that is preprocessed, or PIL pictures.
            normalize: L2-normalise each embedding.
        """
        if not isinstance(images, Tensor):
            images = self.pixels(images)
        embedding = self.vision(images)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def pixels(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL pictures as the tensor `[batch 3 height width]` that the vision tower takes."""
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        if not pictures:
            raise InputError("no picture given: pass at least one")
        if self.preprocess is None:
            raise InputError("the preprocessing of this live model is not known: pass load_clip(model, preprocess=...)")
        cfg = self.vision.cfg
        return torch.stack([self.preprocess(picture) for picture in pictures]).to(cfg.device, cfg.dtype)

    def embed_texts(self, texts: str | Sequence[str], *, normalize: bool = False) -> Tensor:
        """Embeddings `[batch d_embed]` of strings; the empty string is a prompt as any other here."""
        tokens = self.tokenize(texts)
        assert self.text is not None  # tokenize has refused a model without a text tower
        embedding = self.text(tokens)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def similarity(self, images: Tensor | Image.Image | Sequence[Image.Image], texts: str | Sequence[str]) -> Tensor:
        """Cosines `[image text]`, without the logit scale."""
        return self.embed_images(images, normalize=True) @ self.embed_texts(texts, normalize=True).T

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Same as `similarity`."""
        return self.similarity(images, texts)

    def extra_repr(self) -> str:
        """Name and depth, for `repr`."""
        text: Any = "none" if self.text is None else f"{self.text.cfg.n_layers} blocks"
        return f"model_name={self.model_name!r}, vision: {self.vision.cfg.n_layers} blocks, text: {text}"
