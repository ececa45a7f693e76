"""train_sae: what comes back, what was measured, and that it is saved as it was measured."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import HOOK, SMALL, make_tower, pictures, same_weights
from torch import Tensor

from clip_lens_ext.data import image_batches
from clip_lens_ext.saes.load import load_sae
from clip_lens_ext.saes.shuffled_rows import split_samples
from clip_lens_ext.saes.train import train_sae
from clip_lens_ext.saes.trainer import layer_norm
from clip_lens_ext.towers.tower import HookedTower

pytestmark = pytest.mark.filterwarnings("ignore:the SAE at .* explains")  # nothing here is trained for long


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


@pytest.fixture(scope="module")
def structured() -> tuple[HookedTower, Tensor]:
    """A tower, and pictures that are sums of few of 30 fixed patterns: something that an SAE can find."""
    generator = torch.Generator().manual_seed(3)
    weights = (torch.rand(400, 30, generator=generator) < 0.1) * torch.rand(400, 30, generator=generator)
    patterns = torch.randn(30, 3, 8, 8, generator=generator)
    return make_tower(), torch.einsum("np,pchw->nchw", weights, patterns)


@pytest.mark.parametrize(
    ("architecture", "exported"),
    [("topk", "topk"), ("batchtopk", "jumprelu"), ("matryoshka", "jumprelu"), ("jumprelu",) * 2],
)
def test_an_sae_learns_and_its_measures_are_those_of_its_held_out_images(
    structured: tuple[HookedTower, Tensor], architecture: str, exported: str
) -> None:
    tower, images = structured
    sae = train_sae(
        tower, images, hook_name=HOOK, d_sae=96, architecture=architecture, k=6, lr=3e-3, held_out=0.2,
        n_training_tokens=400 * 128, batch_size=128, progress=False,
    )  # fmt: skip
    metadata = sae.cfg.metadata
    assert sae.cfg.architecture() == exported
    assert not sae.training
    assert sae.cfg.normalize_activations == "none"

    train, held = split_samples(400, 0.2, seed=0)
    x = tower.run_to(images[held], HOOK).flatten(0, 1)
    with torch.no_grad():
        codes = sae.encode(x)
        x_hat = sae(x)
    rows, hats = x.double().numpy(), x_hat.double().numpy()
    explained = 1 - ((rows - hats) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    cosine = np.mean([r @ h / np.linalg.norm(r) / np.linalg.norm(h) for r, h in zip(rows, hats, strict=True)])
    assert metadata.explained_variance == pytest.approx(explained, abs=1e-6)
    assert metadata.cosine == pytest.approx(cosine, abs=1e-6)
    assert metadata.l0 == pytest.approx((codes != 0).sum(1).double().mean().item())
    assert metadata.dead_latents == pytest.approx((codes == 0).all(0).double().mean().item())
    assert (metadata.n_held_out_images, metadata.n_training_images) == (80, 320) == (len(held), len(train))

    assert explained > 0.6
    if architecture == "topk":
        assert ((codes != 0).sum(1) <= 6).all()
        assert metadata.l0 == pytest.approx(6, abs=0.01)
    else:
        assert 3 < metadata.l0 < 16


def test_metadata_say_what_it_is(tower: HookedTower) -> None:
    metadata = train_sae(tower, pictures(), seed=5, **SMALL).cfg.metadata
    expected = {
        "model_name": "tiny",
        "tower": "vision",
        "hook_name": HOOK,
        "token_scope": "all",
        "format": "sae_lens",
        "n_training_images": 18,
        "n_held_out_images": 2,
        "n_skipped_images": 0,
        "n_training_tokens": 640,
        "seed": 5,
        "training_architecture": "topk",
    }
    assert {name: metadata[name] for name in expected} == expected
    batches = image_batches(pictures())
    list(batches)
    assert metadata.data_fingerprint == batches.fingerprint
    assert metadata.versions["torch"] == importlib.metadata.version("torch")
    json.dumps(metadata.to_dict(), allow_nan=False)


def test_it_is_saved_and_loaded_as_it_was_measured(tower: HookedTower, tmp_path: Path) -> None:
    for architecture in ("topk", "batchtopk", "jumprelu"):
        sae = train_sae(tower, pictures(), architecture=architecture, **SMALL)
        sae.save_model(tmp_path / architecture)
        loaded = load_sae(tmp_path / architecture)
        assert same_weights(loaded, sae)
        assert loaded.cfg.metadata.to_dict() == sae.cfg.metadata.to_dict()
        assert loaded.cfg.to_dict() == sae.cfg.to_dict()


def test_codes_times_decoder_rows_are_the_reconstruction(tower: HookedTower) -> None:
    for architecture in ("topk", "batchtopk", "jumprelu"):
        sae = train_sae(tower, pictures(), architecture=architecture, **SMALL)
        x = tower.run_to(pictures(), HOOK)
        torch.testing.assert_close(sae.encode(x) @ sae.W_dec + sae.b_dec, sae(x))


def test_folding_the_input_scale_changes_nothing(tower: HookedTower) -> None:
    """With a learning rate that moves nothing, what is left is the start: the mean as bias, in unscaled units."""
    train, _ = split_samples(20, 0.1, seed=0)
    mean = tower.run_to(pictures()[train], HOOK).flatten(0, 1).mean(0)
    for normalize in ("expected_average_only_in", "none"):
        sae = train_sae(tower, pictures(), normalize_activations=normalize, lr=1e-12, **SMALL)
        torch.testing.assert_close(sae.b_dec.detach(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_layer_norm_of_the_inputs_stays_with_the_sae(
    structured: tuple[HookedTower, Tensor], tmp_path: Path, architecture: str
) -> None:
    tower, images = make_tower(), structured[1]
    with torch.no_grad():
        tower.native.ln_pre.weight.mul_(20)  # rows that are far from normalised
    sae = train_sae(
        tower, images, hook_name=HOOK, d_sae=96, k=6, lr=3e-3, n_training_tokens=400 * 128, batch_size=128,
        normalize_activations="layer_norm", architecture=architecture, output_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert sae.cfg.normalize_activations == "layer_norm"
    assert sae.cfg.metadata.explained_variance > 0.6
    x = tower.run_to(images[:4], HOOK)
    with torch.no_grad():
        # SAELens' layer norm: centred, over the sample standard deviation. Codes do not see shift and scale.
        torch.testing.assert_close(sae.encode(3 * x + 1), sae.encode(x), atol=1e-3, rtol=1e-3)
        assert layer_norm(x).equal(sae.run_time_activation_norm_fn_in(x))
        assert load_sae(tmp_path)(x).equal(sae(x))
