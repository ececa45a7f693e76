"""Results on disk: one safetensors file, whole or not there, that says what it is and is checked when it is read.

Tensors are tensors; lists of texts, which may be a million file names and would not fit into a header of safetensors,
are JSON bytes beside them, under `texts/`; the plain fields are JSON in the header, under the name of the class. A
sha256 of all of it is in the header too. Files without that hash, with lists in the header, or with tensors left out
that are None, are those of earlier versions, and read as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.provenance import tensors_sha256

Result = TypeVar("Result")
_OWN, _TEXTS, _HASH = "clip_lens_ext.", "texts/", "sha256"


class Parts(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    texts: dict[str, list[Any]]


def save_result(result: Any, path: str | os.PathLike[str]) -> None:
    """Write every field of a frozen result; those of a result inside of it stand beside its own.

    Args:
        result: a dataclass of tensors, `tuple[..., ...]` and plain JSON values.
        path: where to; an existing file is replaced.

    Raises:
        InputError: there is no such folder.
    """
    write_parts(path, type(result).__name__, *_taken_apart(result))


def load_result(
    kind: type[Result], path: str | os.PathLike[str], *, fits: Callable[[Result], bool] | None = None
) -> Result:
    """Read a file that `save_result` wrote.

    Args:
        kind: the class of the result.
        path: the file.
        fits: whether the parts of a result go together.

    Raises:
        LoadError: no such file, a damaged one, or one that holds something else; it says which and why.
    """
    return put_together(kind, read_parts(path, kind.__name__), path, fits=fits)


def write_parts(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    texts: Mapping[str, Sequence[Any]],
) -> None:
    """Write a file; it is whole or not there, for it is renamed into its place.

    Args:
        path: where to; an existing file is replaced.
        kind: name of what is in it, for `read_parts` to check.
        tensors: by name.
        fields: plain JSON values, for the header.
        texts: lists of JSON values that may be long.

    Raises:
        InputError: there is no such folder.
    """
    # Copies: two fields may be views of one tensor, which a safetensors file cannot be.
    stored = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    # The default escapes of JSON keep lone surrogates, which file names in an unknown encoding have.
    stored |= {_TEXTS + name: _bytes(json.dumps(list(value), default=_plain)) for name, value in texts.items()}
    header = json.dumps(dict(fields), default=_plain)
    metadata = {_OWN + kind: header, _HASH: tensors_sha256(stored, about=header)}
    with staged(path) as part:
        save_file(stored, part, metadata=metadata)


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside a file's own to write to, which is renamed to it at the end, and removed where that fails.

    Raises:
        InputError: there is no such folder, or the path is one.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{str(path)!r} is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_parts(path: str | os.PathLike[str], kind: str) -> Parts:
    """Read what `write_parts` wrote.

    Raises:
        LoadError: no such file, a damaged one, or one of another kind; it says which and why.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = _header(metadata, kind)
        if _HASH in metadata and metadata[_HASH] != tensors_sha256(tensors, about=header):
            raise ValueError("its content is not what was written")
        fields = json.loads(header)
        if not isinstance(fields, dict):
            raise ValueError("its header holds no fields")
        blobs = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_TEXTS)}
        texts = {name[len(_TEXTS) :]: json.loads(blob.numpy().tobytes()) for name, blob in blobs.items()}
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise not_written(path, kind, error) from error
    return Parts(tensors, fields, texts)


def put_together(
    kind: type[Result], parts: Parts, path: str | os.PathLike[str], *, fits: Callable[[Result], bool] | None = None
) -> Result:
    """The result that a file's parts are of; arguments and errors as in `load_result`."""
    values = {**parts.fields, **parts.texts, **parts.tensors}
    known: set[str] = set()
    try:
        found = _built(kind, values, known)
    except (TypeError, ValueError) as error:
        raise not_written(path, kind.__name__, error) from error
    if unknown := sorted(values.keys() - known):
        raise not_written(path, kind.__name__, f"it has {', '.join(unknown)}, which this version does not know")
    if fits is not None and not fits(found):
        raise not_written(path, kind.__name__, "its parts do not fit together")
    return found


def not_written(path: str | os.PathLike[str], kind: str, error: Exception | str) -> LoadError:
    """The error for a file that is no file of `kind.save`."""
    said = isinstance(error, str) or type(error) is ValueError
    return LoadError(
        f"{os.fspath(path)} is no file of {kind}.save: {error if said else f'{type(error).__name__}: {error}'}"
    )


def _header(metadata: Mapping[str, str], kind: str) -> str:
    if _OWN + kind in metadata:
        return metadata[_OWN + kind]
    if metadata.get("kind") == _OWN + kind:  # how sparse codes were written before
        return metadata.get("facts", "")
    there = [name.removeprefix(_OWN) for name in (*metadata, metadata.get("kind", "")) if name.startswith(_OWN)]
    raise ValueError(f"it holds {' and '.join(there)}" if there else "it says of nothing what it holds")


def _taken_apart(result: Any) -> Parts:
    parts = Parts({}, {}, {})
    hints = get_type_hints(type(result))
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Tensor):
            parts.tensors[field.name] = value
        elif is_dataclass(value):
            for mine, inner in zip(parts, _taken_apart(value), strict=True):
                mine.update(inner)
        elif get_origin(hints[field.name]) is tuple:
            parts.texts[field.name] = list(value)
        else:
            parts.fields[field.name] = value
    return parts


def _built(kind: type[Result], values: Mapping[str, Any], known: set[str]) -> Result:
    """A result from the values of its fields by name; `known` takes in the names that belong to it."""
    hints: Mapping[str, Any] = get_type_hints(kind)
    wanted = _wanted(kind)
    known.update(wanted)
    if lacks := [name for name, needed in wanted.items() if needed and name not in values]:
        raise ValueError(f"it lacks {', '.join(lacks)}")
    given: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name, hint = field.name, hints[field.name]
        if is_dataclass(hint):
            given[name] = _built(hint, values, known)  # type: ignore[arg-type]
        elif name in values:
            if hint is Tensor and not isinstance(values[name], Tensor):
                raise ValueError(f"its {name} is no tensor")
            given[name] = _restored(hint, values[name])
        elif field.default is MISSING:
            given[name] = None
    return kind(**given)


def _wanted(kind: type[Any]) -> dict[str, bool]:
    """The names in a file of a result, and whether they must be there: not with a default, nor where None may be."""
    hints = get_type_hints(kind)
    wanted: dict[str, bool] = {}
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            wanted |= _wanted(hint)  # type: ignore[arg-type]
        else:
            wanted[field.name] = field.default is MISSING and NoneType not in get_args(hint)
    return wanted


def _restored(hint: Any, value: Any) -> Any:
    """A value as its annotation has it: JSON knows neither tuples nor dataclasses."""
    if get_origin(hint) is not tuple:
        return value
    entry = get_args(hint)[0]
    if not is_dataclass(entry):
        return tuple(value)
    return tuple(entry(**one) if isinstance(one, dict) else entry(*one) for one in value)  # type: ignore[operator]


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"a {type(value).__name__} is no plain JSON value")
