"""Settings, images and activations that no SAE can be trained with, each with its own words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import SMALL, make_tower, pictures

from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.saes.train import train_sae
from clip_lens_ext.towers.tower import HookedTower

pytestmark = pytest.mark.filterwarnings("ignore:the SAE at .* explains")  # nothing here is trained for long


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topkk"}, "unknown SAE architecture 'topkk'.*did you mean 'topk'"),
        ({"d_sae": 0}, "d_sae must be a positive integer"),
        ({"d_sae": -4}, "d_sae must be a positive integer"),
        ({"d_sae": 8.0}, "d_sae must be a positive integer"),
        ({"k": 25}, "k must be at most d_sae = 24"),
        ({"k": 0}, "k must be a positive integer"),
        ({"k": True}, "k must be a positive integer"),
        ({"n_training_tokens": 0}, "n_training_tokens must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"image_batch_size": 0}, "image_batch_size must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"dead_feature_window": 0}, "dead_feature_window must be"),
        ({"memory_limit": -1}, "memory_limit must be"),
        ({"held_out": 0}, "held_out must lie between"),
        ({"held_out": 1.0}, "held_out must lie between"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"token_scope": "some"}, "token_scope must be one of"),
        ({"normalize_activations": "l2"}, "normalize_activations must be one of"),
        ({"sae_kwargs": {"matryoshka_widths": [8, 4]}, "architecture": "matryoshka"}, "SAELens refuses this"),
        ({"sae_kwargs": {"l0_coeficient": 1.0}, "architecture": "jumprelu"}, "did you mean 'l0_coefficient'"),
        ({"sae_kwargs": {"d_in": 1}}, "'d_in' is no field"),
        ({"token_scope": "patches", "hook_name": "hook_pooled"}, "use 'pooled'"),
        ({"token_scope": "pooled"}, "without a token axis"),
        ({"token_scope": "eot"}, "end-of-text"),
        ({"hook_name": "blocks.0.attn.hook_pattern"}, r"gives \[3, 2, 5, 5\]"),
        ({"held_out": 0.99}, "too few"),
        ({"lr": 1e30, "normalize_activations": "none"}, "the loss at blocks.0.hook_resid_post is"),
    ],
)
def test_settings_that_make_no_sense(tower: HookedTower, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_sae(tower, pictures(), **{**SMALL, **change})


def test_an_unknown_hook_names_the_near_ones(tower: HookedTower) -> None:
    with pytest.raises(HookNameError, match=r"did you mean 'blocks.0.hook_resid_post'"):
        train_sae(tower, pictures(), **{**SMALL, "hook_name": "blocks.0.hook_resid_pots"})


def test_too_few_images(tower: HookedTower) -> None:
    with pytest.raises(InputError, match="1 readable images are too few"):
        train_sae(tower, pictures(1), **SMALL)
    with pytest.raises(InputError, match="2 readable images are too few"):
        train_sae(tower, pictures(2), token_scope="cls", **SMALL)


def test_an_activation_that_is_nan_names_its_image(tower: HookedTower) -> None:
    images = pictures()
    images[7] = 1e30  # finite pixels whose LayerNorm overflows
    with pytest.raises(InputError, match=r"image '7' at blocks.0.hook_resid_post is NaN"):
        train_sae(tower, images, **SMALL)


def test_activations_that_are_all_zero(tower: HookedTower) -> None:
    with torch.no_grad():
        tower.native.proj.zero_()
    with pytest.raises(InputError, match="every activation at hook_embedding is zero"):
        train_sae(tower, pictures(), **{**SMALL, "hook_name": "hook_embedding"})
