"""Results on disk: the tensors in one safetensors file, everything else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens_ext.errors import LoadError

Result = TypeVar("Result")


def save_result(result: Any, path: str | Path) -> None:
    """Write every field of a frozen result: a tensor as a tensor, the rest as plain JSON values."""
    given = {field.name: getattr(result, field.name) for field in fields(result)}
    # Copies: two fields may be views of one tensor, which a safetensors file cannot be.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in given.items()
        if isinstance(value, Tensor)
    }
    rest = {name: value for name, value in given.items() if name not in tensors}
    save_file(tensors, path, metadata={_key(type(result)): json.dumps(rest, default=_plain)})


def load_result(kind: type[Result], path: str | Path, **restore: Callable[[Any], Any]) -> Result:
    """Read a file that `save_result` wrote.

    Args:
        kind: the class of the result; lists become tuples where it says so.
        path: the file.
        restore: for some fields, what makes the value again from its JSON form.

    Raises:
        LoadError: no such file, or it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rest = json.loads(metadata[_key(kind)])
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name in rest and str(field.type).startswith("tuple["):
                rest[field.name] = tuple(rest[field.name])
        for name, make in restore.items():
            rest[name] = make(rest[name])
        return kind(**rest, **tensors)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} is no file of {kind.__name__}.save: {type(error).__name__}: {error}") from error


def _key(kind: type[Any]) -> str:
    return f"clip_lens_ext.{kind.__name__}"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"a {type(value).__name__} is no plain JSON value")
