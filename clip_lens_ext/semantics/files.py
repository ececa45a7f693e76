"""Results of this folder on disk: safetensors with the plain fields as JSON in the header, and long lists of texts.

A million file names would not fit into a header of safetensors, so lists of texts are bytes beside the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens_ext.errors import LoadError

_TEXTS = "texts/"


class Stored(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Any]
    fields: dict[str, Any]
    texts: dict[str, list[Any]]


def write(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor | None],
    fields: Mapping[str, Any],
    texts: Mapping[str, Sequence[Any]],
) -> None:
    """Write a result; a file is whole or not there, for it is renamed into its place.

    Args:
        path: where to; an existing file is replaced.
        kind: class of the result, for `read` to check.
        tensors: by name; those that are None are left out.
        fields: plain JSON values, for the header.
        texts: lists of JSON values that may be long.
    """
    path = Path(path)
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items() if value is not None}
    # The default escapes of JSON keep lone surrogates, which file names in an unknown encoding have.
    blobs = {
        name: np.frombuffer(json.dumps(list(value)).encode(), dtype=np.uint8).copy() for name, value in texts.items()
    }
    stored |= {_TEXTS + name: torch.from_numpy(blob) for name, blob in blobs.items()}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(stored, part, metadata={f"clip_lens_ext.{kind}": json.dumps(dict(fields))})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], kind: str) -> Stored:
    """Read what `write` wrote.

    Raises:
        LoadError: no such file, a damaged one, or one of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fields = json.loads(metadata[f"clip_lens_ext.{kind}"])
        blobs = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_TEXTS)}
        texts = {name[len(_TEXTS) :]: json.loads(blob.numpy().tobytes()) for name, blob in blobs.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise not_written(path, kind, error) from error
    return Stored(tensors, fields, texts)


def not_written(path: str | os.PathLike[str], kind: str, error: Exception | str) -> LoadError:
    """The error for a file that is no file of `kind.save`."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return LoadError(f"{os.fspath(path)} is no file of {kind}.save: {reason}")
