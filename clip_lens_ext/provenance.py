"""Where a result comes from: what went in, and the versions of what computed it."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

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
    digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
