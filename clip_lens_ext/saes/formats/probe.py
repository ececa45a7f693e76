"""What a file holds, found out once: names and shapes, and no values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.unpickle import PickledConfig, load_torch

TORCH = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".gz")


@dataclass(frozen=True)
class Probe:
    """A file with weights.

    Attributes:
        path: the file.
        shapes: of every tensor, nested names joined by dots.
        plain: everything else, by its name.
        header: the first line, for files that begin with a line of JSON.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    plain: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] | None = None

    def has(self, *names: str) -> bool:
        """Whether all these tensors are there."""
        return all(name in self.shapes for name in names)


def probe(path: Path) -> Probe | None:
    """What a weight file holds, or None where it is none that can be read."""
    try:
        stat = path.stat()
        return _probe(path, stat.st_mtime_ns, stat.st_size) if path.is_file() else None
    except (LoadError, OSError):
        return None


@lru_cache(maxsize=64)
def _probe(path: Path, changed: int, size: int) -> Probe | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return Probe(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except SafetensorError:
            return None
    if path.suffix not in TORCH:
        return None
    header, data = split_header(path)
    found = load_torch(path, data=data, meta=True)
    tensors, plain = flatten(found)
    return Probe(path, {name: tuple(value.shape) for name, value in tensors.items()}, plain, header)


def split_header(path: Path) -> tuple[dict[str, Any] | None, bytes | None]:
    """The line of JSON that a file begins with, and the bytes after it; None and None where it does not."""
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return None, None
        file.seek(0)
        line = file.readline(1 << 20)
        try:
            header = json.loads(line)
        except ValueError:
            return None, None
        return header if isinstance(header, dict) else None, file.read()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and everything else in a weight file.

    Raises:
        LoadError: it cannot be read whole.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path), {}
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error
    header, data = split_header(path)
    tensors, plain = flatten(load_torch(path, data=data))
    return tensors, {**plain, **({} if header is None else {"header": header})}


def flatten(found: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested mappings as tensors and other values, by names joined with dots."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    if isinstance(found, PickledConfig):
        plain[f"{prefix}__class__"] = type(found).__name__
        found = dict(vars(found))
    if not isinstance(found, Mapping):
        return tensors, {**plain, prefix.rstrip(".") or "value": found}
    for name, value in found.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, Mapping | PickledConfig):
            inner, others = flatten(value, f"{prefix}{name}.")
            tensors |= inner
            plain |= others
        else:
            plain[f"{prefix}{name}"] = value
    return tensors, plain


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        LoadError: the file is missing or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise LoadError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise LoadError(f"{str(path)!r} holds a {type(found).__name__}, not the fields of an SAE")
    return found
