"""Embeddings that one of several processes has made, in all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip.pairs import EmbeddedPairs
from clip_lens_ext.sparse_clip.processes import Processes


def pairs_of_the_first(
    make: Callable[[], EmbeddedPairs], processes: Processes, device: torch.device
) -> EmbeddedPairs:
    """What process 0 makes; the others wait for it, and get it from there, whatever disks they see.

    Args:
        make: called in process 0 alone.
        processes: which this is.
        device: that rows go over: the model's.

    Raises:
        InputError: in every process, where process 0 could not.
    """
    if processes.n == 1:
        return make()
    if processes.rank:
        return _received(processes, device)
    try:
        made = make()
    except Exception as error:
        processes.told(f"{type(error).__name__}: {error}")  # or the others would wait in vain
        raise
    values = {one.name: getattr(made, one.name) for one in fields(made)}
    rows = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    sizes = {name: (tuple(value.shape), value.dtype) for name, value in rows.items()}
    processes.told((sizes, {name: value for name, value in values.items() if name not in rows}))
    for value in rows.values():
        processes.share_rows(value, device)
    return made


def _received(processes: Processes, device: torch.device) -> EmbeddedPairs:
    found = processes.told(None)
    if isinstance(found, str):
        raise InputError(f"process 0 could not embed the pairs: {found}")
    sizes, rest = found
    rows: dict[str, Any] = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
    for value in rows.values():
        processes.share_rows(value, device)
    return EmbeddedPairs(**rows, **rest)
