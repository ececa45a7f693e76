"""Where a result comes from: what went in, and the versions of what computed it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("clip-lens-ext", "torch", "transformer-lens", "sae-lens", "open-clip-torch")


def versions() -> dict[str, str]:
    """Installed versions of this package and of those that its numbers depend on.

    Example:
        >>> sorted(versions())[:2]
        ['clip-lens-ext', 'open-clip-torch']
    """
    return dict(_versions())


@cache  # a walk through the installed packages takes a hundredth of a second, and results are made one by one
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in PACKAGES)


def fingerprint(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of a hash of a tensor's shape, dtype and bytes.

    Example:
        >>> len({fingerprint(torch.zeros(2)), fingerprint(torch.zeros(2)), fingerprint(torch.ones(2))})
        2
    """
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def module_sha256(module: nn.Module, *, about: Mapping[str, Any] | None = None) -> str:
    """The sha256 of all weights and buffers of a module, the same on every device and in every order.

    Args:
        module: what has a `state_dict`.
        about: what the weights do not say (sizes of a head, an activation function, `k`): JSON values, and what is
            none as its text. None: the weights alone.

    Example:
        >>> layer = torch.nn.Linear(2, 2).bfloat16()
        >>> module_sha256(layer) == module_sha256(layer, about={"k": 2})
        False
    """
    return tensors_sha256(
        module.state_dict(), about="" if about is None else json.dumps(about, sort_keys=True, default=str)
    )


def tensors_sha256(tensors: Mapping[str, Any], *, about: str = "") -> str:
    """The sha256 of a text and of named tensors, in the order of their names: name, dtype, shape and bytes of each.

    One tensor at a time is brought to the CPU. What is no tensor, such as what a module keeps beside its weights,
    counts as its repr.

    Example:
        >>> one, other = torch.zeros(2), torch.ones(3)
        >>> tensors_sha256({"a": one, "b": other}) == tensors_sha256({"b": other, "a": one})
        True
    """
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}".encode())
            continue
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
