"""Models of open_clip: by name and tag, by name and weight file, from a folder with `open_clip_config.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from torch import nn

from clip_lens_ext.errors import LoadError, near
from clip_lens_ext.towers.source import LazyTokenizer, Loaded
from clip_lens_ext.towers.weights import fill, read_weights

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip


def from_tag(name: str, tag: str) -> Loaded:
    """A model with the published weights of a tag.

    Raises:
        LoadError: an unknown tag, one that was trained with another activation, or weights that cannot be fetched.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        raise LoadError(
            f"open_clip has no weights {tag!r} for {name}{near(tag, tags)}; it has: {', '.join(tags) or 'none'}; "
            "a weight file is passed by its path"
        )
    check_activation(name, tag, known)
    try:
        native = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise LoadError(
            f"the weights of {name}/{tag} could not be loaded: {error}\nThey are in no local cache, or the "
            f"cache is broken. Fetch them once where there is a network: open_clip.create_model({name!r}, "
            f"pretrained={tag!r}); or pass the path of a weight file"
        ) from error
    return Loaded(native.eval(), f"{name}/{tag}", tokenizer=_tokenizer(name))


def check_activation(name: str, tag: str, published: dict[str, Any]) -> None:
    """Raise `LoadError` where a tag was trained with the other one of GELU and QuickGELU."""
    quick = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    # A tag without the word is of GELU, but for architectures that exist with QuickGELU alone.
    stated = published.get("quick_gelu", quick and not name.endswith("-quickgelu"))
    if quick != bool(stated):
        other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        advice = (
            f"Use {other!r}"
            if other in open_clip.list_models()
            else f"open_clip has no {other!r}: build it with open_clip.create_model({name!r}, pretrained={tag!r}, "
            f"force_quick_gelu={not quick}) and pass the live model"
        )
        raise LoadError(
            f"{tag!r} was trained with {'GELU' if quick else 'QuickGELU'}, and {name} has "
            f"{'QuickGELU' if quick else 'GELU'}: every score would be off without a word. {advice}"
        )


def from_file(name: str, path: Path) -> Loaded:
    """A model of a known name with the weights of a file; a file of the vision tower alone gives that tower.

    Raises:
        LoadError: the file is missing, broken, or of another model.
    """
    weights = read_weights(path)
    with _quiet():
        random_model: Any = open_clip.create_model(name, pretrained=None, pretrained_text=False)
    native = _filled(random_model, weights, path, name)
    tokenizer = _tokenizer(name) if native is random_model else None  # else the vision tower alone
    return Loaded(native.eval(), f"{name}/{path.name}", tokenizer=tokenizer)


def from_folder(folder: Path, model_name: str) -> Loaded:
    """A model from a folder with `open_clip_config.json` and a weight file.

    Raises:
        LoadError: the config or the weights are missing, broken, or do not fit each other.
    """
    config = folder / CONFIG
    try:
        stated = json.loads(config.read_text(encoding="utf-8"))["model_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{config} is no config of open_clip: {type(error).__name__}: {error}") from error
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise LoadError(f"no weights in {folder}: looked for {', '.join(WEIGHTS)}")
    weights = read_weights(path)
    where = f"local-dir:{folder}"
    try:
        with _quiet():
            random_model: Any = open_clip.create_model(where, load_weights=False, pretrained_text=False)
    except Exception as error:  # whatever a wrong config breaks
        raise LoadError(f"no model can be built from {config}: {type(error).__name__}: {error}") from error
    what = f"the model that {CONFIG} describes (width {stated.get('vision_cfg', {}).get('width', 'unknown')})"
    native = _filled(random_model, weights, path, what)
    return Loaded(native.eval(), model_name, tokenizer=_tokenizer(where) if native is random_model else None)


def _filled(random_model: Any, weights: dict[str, Any], path: Path, what: str) -> nn.Module:
    vision_keys = set(random_model.visual.state_dict())
    if set(weights) == vision_keys:
        return fill(random_model.visual, weights, path, f"{what}'s vision tower")
    if {key.removeprefix("visual.") for key in weights} == vision_keys and all(
        key.startswith("visual.") for key in weights
    ):
        stripped = {key.removeprefix("visual."): value for key, value in weights.items()}
        return fill(random_model.visual, stripped, path, f"{what}'s vision tower")
    weights = convert_state_dict(random_model, weights)
    scale = weights.get("logit_scale")
    if scale is not None and scale.numel() == 1:  # scalar in some files, one element in others: the same number
        weights["logit_scale"] = scale.reshape(random_model.logit_scale.shape)
    return fill(random_model, weights, path, what)


def _tokenizer(name: str) -> LazyTokenizer:
    return LazyTokenizer(partial(open_clip.get_tokenizer, name), name)


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns that nothing is pretrained: here the weights come next, and strictly."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
