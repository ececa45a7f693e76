"""Tiny random CLIPs in float64 with both towers, a tokenizer and a preprocessing."""

from __future__ import annotations

from typing import Any

import torch
from oracles.models import TEXT, build_clip
from PIL import Image
from torch import Tensor

from clip_lens_ext.towers import HookedCLIP


def tokenizer(texts: list[str]) -> Tensor:
    """Letters as tokens, then the end-of-text id; other strings give other tokens."""
    ids = torch.zeros(len(texts), TEXT["context_length"], dtype=torch.int64)
    for row, text in enumerate(texts):
        letters = [10 + (ord(letter) * 7) % 37 for letter in text][: TEXT["context_length"] - 2]
        ids[row, : len(letters) + 2] = torch.tensor([8, *letters, TEXT["vocab_size"] - 1])
    return ids


def preprocess(picture: Image.Image) -> Tensor:
    values = torch.tensor(list(picture.resize((32, 24)).tobytes()), dtype=torch.float64)
    return values.reshape(24, 32, 3).permute(2, 0, 1) / 64 - 2


def tiny_clip(*, seed: int = 0, name: str = "tiny", **settings: Any) -> HookedCLIP:
    native = build_clip(seed=seed).double()
    return HookedCLIP(native, **{"preprocess": preprocess, "tokenizer": tokenizer, "model_name": name, **settings})
