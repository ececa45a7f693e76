"""Models of Hugging Face: a folder, or a snapshot in the hub's cache, with `config.json` and its weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipModel,
    SiglipVisionModel,
)

from clip_lens_ext.errors import LoadError, UnsupportedModelError
from clip_lens_ext.towers.clip import Preprocess, Tokenizer
from clip_lens_ext.towers.source import LazyTokenizer, Loaded
from clip_lens_ext.towers.weights import check_finite, some

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")
_BY_TYPE: dict[str, Any] = {
    "clip": CLIPModel,
    "siglip": SiglipModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
_BY_ARCHITECTURE: dict[str, Any] = {
    kind.__name__: kind
    for kind in (CLIPModel, SiglipModel, CLIPVisionModel, CLIPVisionModelWithProjection, SiglipVisionModel)
}


def from_folder(folder: Path, model_name: str) -> Loaded:
    """A CLIP or SigLIP model, or its vision tower, from a folder.

    Raises:
        LoadError: the config or the weights are missing, broken, or do not fit each other.
        UnsupportedModelError: the config is of another kind of model.
    """
    config = folder / CONFIG
    try:
        stated = json.loads(config.read_text(encoding="utf-8"))
        named = [_BY_ARCHITECTURE[name] for name in stated.get("architectures") or () if name in _BY_ARCHITECTURE]
        kind = named[0] if named else _BY_TYPE.get(stated.get("model_type"))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise LoadError(f"{config} is no config of transformers: {type(error).__name__}: {error}") from error
    if kind is None:
        known = ", ".join([*_BY_TYPE, *_BY_ARCHITECTURE])
        raise UnsupportedModelError(
            f"{config} is of a {stated.get('model_type')!r} model ({stated.get('architectures')}); known are {known}. "
            "A text tower alone can be hooked live: HookedTower(model)"
        )
    # transformers fills what a file lacks with random numbers, and only warns.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        native, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and pickle each have their own
        raise LoadError(f"{folder} could not be loaded: {type(error).__name__}: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = sorted(report["missing_keys"])
    wrong = sorted(str(entry) for entry in report["mismatched_keys"])
    extra = sorted(key for key in report["unexpected_keys"] if not key.endswith("position_ids"))
    if issubclass(kind, CLIPVisionModel | CLIPVisionModelWithProjection | SiglipVisionModel):
        extra = [key for key in extra if not key.startswith(("text_", "logit_"))]  # a vision tower of a whole model
    if missing or wrong or extra:
        raise LoadError(
            f"{folder} does not hold a {kind.__name__}: {len(missing)} weights are missing ({some(missing)}), "
            f"{len(wrong)} have another shape ({some(wrong)}), {len(extra)} are unknown ({some(extra)})"
        )
    check_finite(native.state_dict(), folder)
    vision_only = not hasattr(native, "text_model")
    tokenizer = None if vision_only else LazyTokenizer(partial(_tokenizer, folder, native), model_name)
    return Loaded(native.eval(), model_name, _preprocess(folder), tokenizer)


class HuggingFacePreprocess:
    """A checkpoint's image processor as a function of one picture.

    Args:
        processor: of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, picture: Image.Image) -> Tensor:
        """`[3 height width]`."""
        return self.processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]


class HuggingFaceTokenizer:
    """A checkpoint's tokenizer as a function of strings, padded to the length that the tower takes.

    Args:
        tokenizer: of transformers.
        n_ctx: the length.
    """

    def __init__(self, tokenizer: Any, n_ctx: int) -> None:
        self.tokenizer, self.n_ctx = tokenizer, n_ctx

    def __call__(self, texts: list[str]) -> Tensor:
        """`[batch n_ctx]`; what is longer is cut off."""
        found = self.tokenizer(
            texts, padding="max_length", max_length=self.n_ctx, truncation=True, return_tensors="pt"
        )
        return found["input_ids"]


def _preprocess(folder: Path) -> Preprocess | None:
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        return HuggingFacePreprocess(AutoImageProcessor.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise LoadError(f"the preprocessing in {folder} cannot be read: {type(error).__name__}: {error}") from error


def _tokenizer(folder: Path, native: Any) -> Tokenizer:
    # Without its files transformers would make one with an empty vocabulary.
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise LoadError(f"none of {', '.join(TOKENIZERS)} is in {folder}")
    n_ctx = native.config.text_config.max_position_embeddings
    return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True), n_ctx)
