"""A tiny tower, its pictures, and settings under which an SAE is trained in a blink."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from clip_lens_ext.saes.shuffled_rows import ShuffledRows
from clip_lens_ext.towers.tower import HookedTower

HOOK = "blocks.0.hook_resid_post"
SMALL: dict[str, Any] = {
    "hook_name": HOOK,
    "d_sae": 24,
    "k": 3,
    "n_training_tokens": 40 * 16,
    "batch_size": 16,
    "image_batch_size": 3,
    "progress": False,
}


def make_tower() -> HookedTower:
    torch.manual_seed(0)
    native = open_clip.transformer.VisionTransformer(8, 4, 16, 2, 2, mlp_ratio=2.0, output_dim=12).eval()
    return HookedTower(native, model_name="tiny")


def pictures(n: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def same_weights(a: Any, b: Any) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Killed(BaseException):
    """The process is gone; nothing may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    whole = ShuffledRows.batch

    def batch(self: ShuffledRows, at: int) -> dict[str, Tensor]:
        if at == number:
            raise Killed
        return whole(self, at)

    monkeypatch.setattr(ShuffledRows, "batch", batch)
