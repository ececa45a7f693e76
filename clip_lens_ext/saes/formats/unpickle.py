"""Torch files read without running them: torch's restricted unpickler, and the one list of what else it may build.

A file can also lie about its size: a zip entry that is compressed, or a gzip stream, is refused beyond a bound.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from clip_lens_ext.errors import LoadError

MAX_EXPANDED = 32 * 2**30
"""Bytes that a file may hold once it is expanded."""
MAX_RATIO = 100
"""How many times larger than on disk it may be."""


class PickledConfig:
    """In the place of a training configuration that a file has pickled: its fields, and none of its code."""


# Names under which families pickle their configurations; the paths before the class differ between forks, and only
# Prisma's is sure. None is ever imported: a `PickledConfig` takes its place. Another name is an error that says it.
CONFIG_CLASSES = (
    "vit_prisma.sae.config.VisionModelSAERunnerConfig",
    "sae.config.VisionModelSAERunnerConfig",
    "sae_training.config.ViTSAERunnerConfig",
    "src.sae_training.config.Config",
    "src.sae_training.config.ViTSAERunnerConfig",
    "config.ViTSAERunnerConfig",
    "vit_sae_analysis.config.ViTSAERunnerConfig",
    "hugofry.sae_training.config.ViTSAERunnerConfig",
)


def load_torch(path: Path, *, data: bytes | None = None, meta: bool = False) -> Any:
    """What a torch file holds.

    Args:
        path: the file; `.gz` is expanded.
        data: its bytes, where they are a part of the file.
        meta: read shapes and not values; tensors are on the meta device.

    Raises:
        LoadError: a truncated or corrupt file, one with objects that are not on the list, or one that is too large.
    """
    raw = data
    try:
        if raw is None and path.suffix == ".gz":
            raw = _expand(path)
        if raw is None:
            _check_zip(path, path.stat().st_size)
        elif zipfile.is_zipfile(io.BytesIO(raw)):
            _check_zip(io.BytesIO(raw), len(raw))
        allowed: Any = [(type(name.split(".")[-1], (PickledConfig,), {}), name) for name in CONFIG_CLASSES]
        with torch.serialization.safe_globals([*allowed, *_plain()]):
            source: Any = path if raw is None else io.BytesIO(raw)
            return torch.load(source, map_location="meta" if meta else "cpu", weights_only=True)
    except LoadError:
        raise
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{str(path)!r} holds more than tensors and known configurations; nothing of it was run: {_first(error)}"
        ) from error
    except Exception as error:  # torch, zipfile and pickle each have their own for a broken file
        raise LoadError(
            f"{str(path)!r} is truncated or no torch file: {type(error).__name__}: {_first(error)}"
        ) from error


def _plain() -> list[Any]:
    return [torch.device]


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _expand(path: Path) -> bytes:
    limit = min(MAX_EXPANDED, MAX_RATIO * max(path.stat().st_size, 1))
    with gzip.open(path) as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise LoadError(f"{str(path)!r} expands to more than {MAX_RATIO} times its size: it is not read")
    return raw


def _check_zip(source: Any, size: int) -> None:
    if not zipfile.is_zipfile(source):
        return
    with zipfile.ZipFile(source) as archive:
        expanded = sum(entry.file_size for entry in archive.infolist())
    if expanded > min(MAX_EXPANDED, MAX_RATIO * max(size, 1)):
        raise LoadError(f"the archive says that it expands from {size} to {expanded} bytes: it is not read")
