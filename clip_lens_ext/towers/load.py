"""`load_clip`: a name, a path or a live model becomes a `HookedCLIP`; weights are loaded whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from clip_lens_ext.errors import LoadError, near
from clip_lens_ext.towers import from_hugging_face, from_open_clip, from_sparse
from clip_lens_ext.towers.clip import HookedCLIP, Preprocess, Tokenizer
from clip_lens_ext.towers.from_hub import fetch
from clip_lens_ext.towers.source import Loaded
from clip_lens_ext.towers.weights import SUFFIXES

OPENAI_VOCAB_SIZE = 49408  # of the byte-pair encoding that open_clip's SimpleTokenizer has
HUB = "hf-hub:"


def load_clip(
    model: str | Path | nn.Module,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    preprocess: Preprocess | None = None,
    tokenizer: Tokenizer | None = None,
) -> HookedCLIP:
    """A CLIP model with hooked towers.

    Args:
        model: one of

            - an open_clip model name with its tag or weight file, as two arguments or as one:
              `"ViT-B-32", "laion2b_s34b_b79k"`, `"ViT-B-32/laion2b_s34b_b79k"`, `"ViT-B-32/weights.safetensors"`;
            - `"hf-hub:org/name"` or `"org/name"`: a repository of the Hugging Face hub, from the local cache or
              fetched. With `hf-hub:` the config of open_clip is preferred where there are two, else transformers';
            - a local folder with `open_clip_config.json`, or with `config.json` of a CLIP or SigLIP of transformers;
              or of a Sparse CLIP, as `train_sparse_clip` writes it;
            - a live model: open_clip's `CLIP`, `CustomTextCLIP`, `CoCa`, transformers' `CLIPModel`, `SiglipModel`, or
              a vision tower of one of them.
        pretrained: the tag, or the path of a weight file: safetensors, or a torch file that loads with
            `weights_only=True`. A file with the vision tower alone gives a model whose `text` is None.
        device: where to put it; None leaves a live model where it is, and means the CPU for a loaded one.
        dtype: floating type of the weights; None leaves them as they are.
        preprocess: instead of the checkpoint's own preprocessing.
        tokenizer: instead of the checkpoint's own tokenizer.

    Returns:
        `HookedCLIP` in evaluation mode; a live model keeps the mode it is in.

    Raises:
        LoadError: an unknown name or tag, a missing, broken or unfitting weight file, the wrong activation for a tag,
            or weights that cannot be fetched; it lists what was tried. Nothing is left at its random initial values.
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
        loaded = Loaded(model, type(model).__name__)
    else:
        loaded = _resolve(str(model), None if pretrained is None else str(pretrained))
    clip = HookedCLIP(
        loaded.native,
        preprocess=preprocess or loaded.preprocess or _native_preprocess(loaded.native),
        tokenizer=tokenizer or loaded.tokenizer,
        model_name=loaded.model_name,
    )
    if clip.tokenizer is None and clip.text is not None and _is_openai_text(clip):
        clip.tokenizer = open_clip.SimpleTokenizer(context_length=clip.text.cfg.n_ctx)
    return clip.to(device=device, dtype=dtype)


def _resolve(model: str, pretrained: str | None) -> Loaded:
    """Find out what a string means, and load that; there is one meaning, or an error that lists what was tried."""
    names = open_clip.list_models()
    name, _, rest = model.partition("/")
    if model in names and pretrained is not None:
        return _named(model, pretrained)
    if name in names and rest and pretrained is None:
        return _named(name, rest)
    if model in names:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise LoadError(
            f"which weights of {model}? Pass a tag ({', '.join(tags) or 'none is published'}) or the path of a "
            "weight file; without weights the model would be random"
        )
    if pretrained is not None:
        raise LoadError(f"no open_clip model is called {model!r}{near(model, names)}; see open_clip.list_models()")
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return _from_folder(folder)
    if folder.is_file():
        raise LoadError(
            f"{model} is a weight file, and does not say of which model: pass load_clip(NAME, {model!r}) with the name "
            "of an open_clip model, or the folder that also has its config"
        )
    repo = model.removeprefix(HUB)
    if repo.count("/") == 1 and not model.startswith((".", "/", "~")) and not repo.endswith(SUFFIXES):
        try:
            found, config = fetch(repo, open_clip_first=model.startswith(HUB))
        except LoadError as error:
            hint = near(name, names)
            raise LoadError(f"{error}" + (f"\nAs an open_clip model{hint}" if hint else "")) from error
        library = from_open_clip if config == from_open_clip.CONFIG else from_hugging_face
        return library.from_folder(found, repo)
    raise LoadError(
        f"no open_clip model is called {name!r}{near(name, names)}; see open_clip.list_models(). Tried as well: a "
        f"folder or file at {folder} (there is none), a hub repository (its name is 'org/name')"
    )


def _named(name: str, source: str) -> Loaded:
    is_file = source.endswith(SUFFIXES) or "/" in source or Path(source).exists()
    return from_open_clip.from_file(name, Path(source)) if is_file else from_open_clip.from_tag(name, source)


def _from_folder(folder: Path) -> Loaded:
    if (folder / from_sparse.CONFIG).is_file():
        return _sparse(folder)
    for library in (from_open_clip, from_hugging_face):
        if (folder / library.CONFIG).is_file():
            return library.from_folder(folder, folder.resolve().name)
    found = sorted(path.name for path in folder.iterdir())[:5]
    raise LoadError(
        f"{folder} holds no model: looked for {from_open_clip.CONFIG} and {from_hugging_face.CONFIG}, "
        f"found {', '.join(found) or 'nothing'}"
    )


def _sparse(folder: Path) -> Loaded:
    """A Sparse CLIP, whose folder names the dense model under its heads."""
    found = from_sparse.read(folder)
    try:
        dense = load_clip(found.dense)
    except LoadError as error:
        raise LoadError(
            f"{folder} holds the heads of a Sparse CLIP on {found.dense!r}, which cannot be opened by that name: "
            f"{error}\nOpen it with load_sparse_clip({str(folder)!r}, dense=...) and the dense model"
        ) from error
    clip = from_sparse.load(found, dense)
    return Loaded(clip.native, clip.model_name, clip.preprocess, clip.tokenizer)


def _native_preprocess(native: nn.Module) -> Preprocess | None:
    """What open_clip says of a model of its own; transformers' models say nothing of their pictures."""
    visual: Any = getattr(native, "visual", native)
    if not hasattr(visual, "image_size"):
        return None
    settings = PreprocessCfg(**{"size": visual.image_size, **getattr(visual, "preprocess_cfg", {})})
    return image_transform_v2(settings, is_train=False)


def _is_openai_text(clip: HookedCLIP) -> bool:
    assert clip.text is not None
    return clip.text.cfg.family == "open_clip" and clip.text.cfg.vocab_size == OPENAI_VOCAB_SIZE
