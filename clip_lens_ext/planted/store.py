"""The dual encoder on disk: half-precision safetensors, whose metadata say where the weights come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from open_clip.model import CLIP

from clip_lens_ext.errors import LoadError
from clip_lens_ext.planted.model import CONTEXT_LENGTH, ClipConfig, build_clip
from clip_lens_ext.planted.tokenizer import WordTokenizer

__all__ = ["MANIFEST", "check_sha256", "read_clip", "sha256_of", "vocabulary_hash", "write_clip", "write_manifest"]

MANIFEST: Final = "manifest.json"
"""The file beside the weights that gives the sha256 of every other file."""

_KEY: Final = "clip_lens_ext.planted"


def vocabulary_hash(vocabulary: tuple[str, ...]) -> str:
    """The sha256 of the words in their order, one on each line."""
    return hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_clip(
    path: str | os.PathLike[str],
    clip: CLIP,
    config: ClipConfig,
    *,
    vocabulary: tuple[str, ...],
    training: dict[str, Any],
) -> None:
    """Writes a dual encoder in half precision.

    Args:
        path: The file.
        clip: The model.
        config: Its sizes.
        vocabulary: The words of its tokenizer, in order.
        training: Seed, steps, figures: whatever is to be known about the weights, as JSON types.
    """
    metadata = {
        "config": dataclasses.asdict(config),
        "vocabulary": list(vocabulary),
        "vocabulary_sha256": vocabulary_hash(vocabulary),
        "training": training,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "open_clip_torch", "numpy")},
    }
    weights = {name: weight.detach().to(torch.float16).contiguous() for name, weight in clip.state_dict().items()}
    Path(path).write_bytes(safetensors.torch.save(weights, metadata={_KEY: json.dumps(metadata)}))


def read_clip(
    path: str | os.PathLike[str], *, vocabulary: tuple[str, ...] | None = None
) -> tuple[CLIP, WordTokenizer, dict[str, Any]]:
    """Reads a dual encoder whole, or not at all.

    Args:
        path: A file from `write_clip`.
        vocabulary: The words that it must have been trained with; None: those in the file.

    Returns:
        The model in evaluation mode in float32, its tokenizer, and the metadata.

    Raises:
        LoadError: If the file is missing, is no such file, or does not fit its own config or the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"there is no file {path}: install the package again, or make the weights anew")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[_KEY])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        found = tuple(metadata["vocabulary"])
        config = ClipConfig(**metadata["config"])
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} is not a dual encoder of a planted world: {error!r}") from error
    if vocabulary_hash(found) != metadata["vocabulary_sha256"] or vocabulary not in (None, found):
        raise LoadError(f"{path} was trained on other words than those of this planted world: make the weights anew")
    tokenizer = WordTokenizer(found, CONTEXT_LENGTH)
    clip = build_clip(config, tokenizer)
    try:
        clip.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise LoadError(f"the weights in {path} do not fit its config: {error}") from error
    return clip.eval(), tokenizer, metadata


def write_manifest(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Writes the sha256 of every file below a folder into its manifest, and gives them by relative path."""
    folder = Path(folder)
    files = sorted(
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.name != MANIFEST
    )
    digests = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n")
    return digests


def check_sha256(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of a file whose bytes are those that the manifest expects.

    Args:
        folder: Where the manifest is.
        name: The file's path below the folder.

    Raises:
        LoadError: If the manifest or the file is missing, or the file's sha256 is another.
    """
    folder = Path(folder)
    path = folder / name
    try:
        expected = json.loads((folder / MANIFEST).read_text())[name]
        found = sha256_of(path)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise LoadError(f"cannot check {path} against {MANIFEST}: {error!r}; install the package again") from error
    if found != expected:
        raise LoadError(f"{path} has sha256 {found}, and {expected} is expected: install the package again")
    return path
