"""A tiny random CLIP in float64 with both towers, an SAE on its patches, and what was collected on random pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.models import pictures
from oracles.saes import build_sae
from tiny_clips import tiny_clip
from torch import Tensor

from clip_lens_ext.semantics import References, collect_references
from clip_lens_ext.towers import HookedCLIP

HOOK, D_SAE = "blocks.0.hook_resid_post", 37


@pytest.fixture(scope="session")
def clip() -> HookedCLIP:
    return tiny_clip()


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    return pictures(23, dtype=torch.float64)


@pytest.fixture(scope="session")
def sae() -> Any:
    return build_sae("topk", 48, HOOK, "patches", tower="vision", d_sae=D_SAE)


@pytest.fixture(scope="session")
def references(clip: HookedCLIP, pixels: Tensor, sae: Any) -> References:
    return collect_references(clip.vision, pixels[:7], sae, k=4, progress=False)
