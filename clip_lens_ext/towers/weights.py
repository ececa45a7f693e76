"""Weights into a module: read without running anything, and loaded whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from open_clip.factory import load_state_dict
from torch import Tensor, nn

from clip_lens_ext.errors import LoadError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a safetensors file, or of a torch file that loads with `weights_only=True`.

    Raises:
        LoadError: no such file, a broken one, or one that holds something else.
    """
    if not path.is_file():
        raise LoadError(f"no weight file at {path}" + (": it is a folder" if path.is_dir() else ""))
    try:
        weights: Any = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each have their own; none of them is ours
        raise LoadError(f"{path} is no readable weight file: {type(error).__name__}: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise LoadError(f"{path} holds no state dict of tensors")
    return weights


def fill(module: nn.Module, weights: dict[str, Tensor], path: Path, what: str) -> nn.Module:
    """The module with all of its weights from the file: every key, every shape, every value finite.

    Raises:
        LoadError: a key is missing or unknown, a shape differs, or a value is NaN or infinite.
    """
    expected = module.state_dict()
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or extra:
        raise LoadError(
            f"{path} does not hold {what}: {len(missing)} weights are missing ({some(missing)}), "
            f"{len(extra)} are unknown ({some(extra)})"
        )
    wrong = [
        f"{key} is {list(weights[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if weights[key].shape != value.shape
    ]
    if wrong:
        raise LoadError(f"{path} does not hold {what}: {some(wrong)}")
    check_finite(weights, path)
    module.load_state_dict(weights, strict=True)
    return module


def check_finite(weights: dict[str, Tensor], path: Path) -> None:
    """Raise `LoadError` where a weight is NaN or infinite."""
    broken = [key for key, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise LoadError(f"{path} holds NaN or infinite weights: {some(broken)}")


def some(items: list[str], n: int = 3) -> str:
    """The first few of a list, for a message."""
    return ", ".join(items[:n]) + (", ..." if len(items) > n else "") if items else "none"
