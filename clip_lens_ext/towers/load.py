"""`load_clip`: a name, a weight file or a live model becomes a `HookedCLIP`; weights are loaded whole or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import load_state_dict
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from clip_lens_ext.errors import LoadError, near
from clip_lens_ext.towers.clip import HookedCLIP, Preprocess, Tokenizer

OPENAI_VOCAB_SIZE = 49408  # of the byte-pair encoding that open_clip's SimpleTokenizer has
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def load_clip(
    model: str | nn.Module,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    preprocess: Preprocess | None = None,
    tokenizer: Tokenizer | None = None,
) -> HookedCLIP:
    """A CLIP model with hooked towers.

    Args:
        model: an open_clip model name (`"ViT-B-32"`), a name with its tag (`"ViT-B-32/laion2b_s34b_b79k"`) or with a
            weight file (`"ViT-B-32/weights.safetensors"`), or a live open_clip `CLIP` or `VisionTransformer`.
        pretrained: the tag, or the path of a weight file: safetensors, or a torch file that loads with
            `weights_only=True`. A file with the vision tower alone gives a model whose `text` is None.
        device: where to put it; None leaves a live model where it is, and means the CPU for a loaded one.
        dtype: floating type of the weights; None leaves them as they are.
        preprocess: instead of the model's own preprocessing.
        tokenizer: instead of the model's own tokenizer.

    Returns:
        `HookedCLIP` in evaluation mode; a live model keeps the mode it is in.

    Raises:
        LoadError: an unknown name or tag, a missing, broken or unfitting weight file, or weights that cannot be
            fetched. Nothing is ever left at its random initial values.
        UnsupportedModelError: a live module of a kind that no family reads.

    Example:
        >>> live = open_clip.model.CLIP(
        ...     32, dict(image_size=32, patch_size=16, width=64, layers=2, head_width=16),
        ...     dict(context_length=8, vocab_size=100, width=64, heads=4, layers=2),
        ... ).eval()
        >>> load_clip(live).vision.cfg.n_layers
        2
    """
    if isinstance(model, HookedCLIP):
        return model.to(device=device, dtype=dtype)
    if isinstance(model, nn.Module):
        if pretrained is not None:
            raise LoadError("a live model has its weights already: pass pretrained= only with a model name")
        clip = _wrap(model, type(model).__name__, preprocess, tokenizer)
    else:
        name, source = _split_name(str(model), None if pretrained is None else str(pretrained))
        native = _from_file(name, Path(source)) if _is_file_name(source) else _from_tag(name, source)
        if tokenizer is None and isinstance(native, CLIP):
            tokenizer = open_clip.get_tokenizer(name)
        clip = _wrap(native.eval(), f"{name}/{Path(source).name}", preprocess, tokenizer)
    return clip.to(device=device, dtype=dtype)


def _wrap(native: nn.Module, model_name: str, preprocess: Preprocess | None, tokenizer: Tokenizer | None) -> HookedCLIP:
    clip = HookedCLIP(native, preprocess=preprocess, tokenizer=tokenizer, model_name=model_name)
    if preprocess is None:
        visual: Any = clip.vision.native
        settings = PreprocessCfg(**{"size": visual.image_size, **getattr(visual, "preprocess_cfg", {})})
        clip.preprocess = image_transform_v2(settings, is_train=False)
    if tokenizer is None and clip.text is not None and clip.text.cfg.vocab_size == OPENAI_VOCAB_SIZE:
        clip.tokenizer = open_clip.SimpleTokenizer(context_length=clip.text.cfg.n_ctx)
    return clip


def _split_name(model: str, pretrained: str | None) -> tuple[str, str]:
    """The open_clip model name, and the tag or weight file."""
    names = open_clip.list_models()
    if pretrained is None and "/" in model:
        model, pretrained = model.split("/", 1)
    if model not in names:
        raise LoadError(f"no open_clip model is called {model!r}{near(model, names)}; see open_clip.list_models()")
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise LoadError(
            f"which weights of {model}? Pass a tag ({', '.join(tags) or 'none is published'}) or the path of a "
            "weight file; without weights the model would be random"
        )
    return model, pretrained


def _is_file_name(source: str) -> bool:
    return source.endswith(WEIGHT_SUFFIXES) or "/" in source or Path(source).exists()


def _from_tag(name: str, tag: str) -> CLIP:
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        raise LoadError(
            f"open_clip has no weights {tag!r} for {name}{near(tag, tags)}; it has: {', '.join(tags) or 'none'}; "
            "a weight file is passed by its path"
        )
    _check_activation(name, tag, known)
    try:
        return open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise LoadError(
            f"the weights of {name}/{tag} could not be loaded: {error}\nThey are in no local cache, or the "
            f"cache is broken. Fetch them once where there is a network: open_clip.create_model({name!r}, "
            f"pretrained={tag!r}); or pass the path of a weight file"
        ) from error


def _check_activation(name: str, tag: str, published: dict[str, Any]) -> None:
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


def _from_file(name: str, path: Path) -> nn.Module:
    if not path.is_file():
        raise LoadError(f"no weight file at {path}" + (": it is a folder" if path.is_dir() else ""))
    weights = _read_weights(path)
    random_model: Any = _build(name)
    vision_keys = set(random_model.visual.state_dict())
    if set(weights) == vision_keys:
        return _filled(random_model.visual, weights, path, f"{name}'s vision tower")
    if {key.removeprefix("visual.") for key in weights} == vision_keys and all(
        key.startswith("visual.") for key in weights
    ):
        stripped = {key.removeprefix("visual."): value for key, value in weights.items()}
        return _filled(random_model.visual, stripped, path, f"{name}'s vision tower")
    weights = convert_state_dict(random_model, weights)
    scale = weights.get("logit_scale")
    if scale is not None and scale.numel() == 1:  # scalar in some files, one element in others: the same number
        weights["logit_scale"] = scale.reshape(random_model.logit_scale.shape)
    return _filled(random_model, weights, path, name)


def _build(name: str) -> nn.Module:
    # open_clip warns that nothing is pretrained: here the weights come next, and strictly.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(name, pretrained=None, pretrained_text=False)
    finally:
        logging.disable(level)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights: Any = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each have their own; none of them is ours
        raise LoadError(f"{path} is no readable weight file: {type(error).__name__}: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise LoadError(f"{path} holds no state dict of tensors")
    return weights


def _filled(module: nn.Module, weights: dict[str, Tensor], path: Path, what: str) -> nn.Module:
    """The module with all of its weights from the file: every key, every shape, every value finite."""
    expected = module.state_dict()
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or extra:
        raise LoadError(
            f"{path} does not hold {what}: {len(missing)} weights are missing ({_some(missing)}), "
            f"{len(extra)} are unknown ({_some(extra)})"
        )
    wrong = [
        f"{key} is {list(weights[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if weights[key].shape != value.shape
    ]
    if wrong:
        raise LoadError(f"{path} does not hold {what}: {_some(wrong)}")
    broken = [key for key, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise LoadError(f"{path} holds NaN or infinite weights: {_some(broken)}")
    module.load_state_dict(weights, strict=True)
    return module


def _some(items: list[str], n: int = 3) -> str:
    return ", ".join(items[:n]) + (", ..." if len(items) > n else "") if items else "none"
