"""What ships for seed 0: it knows its world, the plants have taken, and a damaged file is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from clip_lens_ext.errors import HookNameError, InputError, LoadError
from clip_lens_ext.planted import (
    PlantedReport,
    PlantedWorld,
    load,
    measure_clip,
    normalise,
    planted_clip,
    planted_sae,
    preprocess,
)
from clip_lens_ext.planted.store import MANIFEST, check_sha256, read_clip, vocabulary_hash, write_manifest
from clip_lens_ext.planted.train_saes import SAES
from clip_lens_ext.towers import HookedCLIP


@pytest.fixture(scope="module")
def world() -> PlantedWorld:
    return PlantedWorld(0)


@pytest.fixture(scope="module")
def clip() -> HookedCLIP:
    return planted_clip()


@pytest.fixture(scope="module")
def report(world: PlantedWorld, clip: HookedCLIP) -> PlantedReport:
    return measure_clip(clip.native, world, clip.tokenizer, n_per_class=40, seed=5)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped folder, which loading reads instead."""
    folder = tmp_path / "weights"
    shutil.copytree(load.WEIGHTS, folder)
    monkeypatch.setattr(load, "WEIGHTS", folder)
    return folder


def test_zero_shot_accuracy(world: PlantedWorld, clip: HookedCLIP) -> None:
    """On held-out pictures without drawn words; 60 of each class leave one standard error below 0.01."""
    labels = [entry.index for entry in world.unambiguous_classes]
    batch = world.sample(60 * len(labels), seed=2**50 + 1, classes=labels, word=None)
    names = list(dict.fromkeys(entry.name for entry in world.classes))
    with torch.no_grad():
        nearest = clip.similarity(normalise(batch.images), [f"a photo of a {name}" for name in names]).argmax(dim=1)
    right = [names[index] == world.classes[label].name for index, label in zip(nearest, batch.labels, strict=True)]
    assert sum(right) / len(right) >= 0.9


def test_report_agrees_with_the_figures_in_the_file(report: PlantedReport) -> None:
    figures = read_clip(load.WEIGHTS / "clip.safetensors")[2]["training"]["figures"]
    assert report.unambiguous == pytest.approx(figures["unambiguous"], abs=0.05)
    for kind, accuracy in figures["accuracy"].items():
        assert report.accuracy[kind] == pytest.approx(accuracy, abs=0.16), kind
    # Where a plant was learnt, the class suffers without it.
    for kind in ("artifact", "spurious"):
        assert report.decorrelated[kind] < report.accuracy[kind] - 0.1


def test_both_senses_are_found(report: PlantedReport) -> None:
    assert len(report.senses) == 4
    assert min(share for senses in report.senses.values() for share in senses.values()) > 0.7


def test_drawn_words_are_read(report: PlantedReport) -> None:
    assert report.signs > 0.8
    assert min(change.lift for change in report.reading) > 0.1
    assert min(change.lift - change.elsewhere for change in report.reading) > 0.3
    undrawn = [change.lift for change in report.undrawn]
    assert sum(undrawn) / len(undrawn) < 0.1


def test_overlays_and_background_raise_their_class_alone(report: PlantedReport) -> None:
    planted = [*report.artifacts, *report.spurious]
    assert min(change.lift for change in planted) > 0.05
    assert all(change.lift - change.elsewhere > 0.05 for change in planted)
    assert max(abs(change.lift) for change in report.control_overlays) < min(change.lift for change in planted)


def test_compounds_name_their_own_object(report: PlantedReport) -> None:
    for cosines in report.compounds.values():
        assert cosines["own object"] > cosines["part's object"] + 0.2 > cosines["all others"]


def test_metadata_say_where_the_weights_come_from(world: PlantedWorld) -> None:
    _, tokenizer, metadata = read_clip(load.WEIGHTS / "clip.safetensors")
    assert tokenizer.vocabulary == world.vocabulary
    assert metadata["vocabulary_sha256"] == vocabulary_hash(world.vocabulary)
    assert metadata["training"]["world_seed"] == load.SHIPPED_SEED
    assert metadata["training"]["n_steps"] > 1000
    assert metadata["training"]["figures"]["unambiguous"] >= 0.9
    assert {"torch", "open_clip_torch", "numpy", "python"} <= set(metadata["versions"])


def test_manifest_names_every_shipped_file(clip: HookedCLIP) -> None:
    shipped = {path.relative_to(load.WEIGHTS).as_posix() for path in load.WEIGHTS.rglob("*") if path.is_file()}
    manifest = json.loads((load.WEIGHTS / MANIFEST).read_text())
    assert shipped == {MANIFEST, *manifest}
    for name in manifest:
        assert check_sha256(load.WEIGHTS, name).is_file()


def test_size_budget() -> None:
    assert sum(path.stat().st_size for path in load.WEIGHTS.rglob("*") if path.is_file()) < 5e6


def test_towers_give_what_the_native_model_gives(world: PlantedWorld, clip: HookedCLIP) -> None:
    batch = world.sample(5, seed=3, split="test")
    pixels, prompts = normalise(batch.images), world.prompts()
    with torch.no_grad():
        image = clip.native.encode_image(pixels, normalize=True)
        text = clip.native.encode_text(clip.tokenizer(prompts), normalize=True)
        assert torch.equal(clip.similarity(pixels, prompts), image @ text.T)
        assert clip.similarity(pixels, "").shape == (5, 1)
    assert clip.vision.cfg.n_layers == 4
    assert not clip.training
    assert not clip.native.training


def test_dtype_is_applied() -> None:
    assert {weight.dtype for weight in planted_clip(dtype=torch.float64).native.parameters()} == {torch.float64}
    assert {weight.dtype for weight in planted_clip(device="cpu").native.parameters()} == {torch.float32}


def test_preprocess_keeps_the_pixels_of_a_small_picture(world: PlantedWorld) -> None:
    images = world.sample(3, seed=2).images
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        assert torch.equal(preprocess(picture), normalise(image))


def test_preprocess_takes_the_middle_square_of_any_picture() -> None:
    wide = np.zeros((60, 180, 3), np.uint8)
    wide[:, 60:120] = 255
    for mode in ("RGB", "RGBA", "L", "P"):
        prepared = preprocess(Image.fromarray(wide).convert(mode))
        assert prepared.shape == (3, 48, 48)
        assert (prepared == 2).all()
    assert preprocess(Image.fromarray(wide.transpose(1, 0, 2))).min() == 2


def test_normalise_refuses_what_is_no_picture() -> None:
    with pytest.raises(InputError, match="uint8"):
        normalise(torch.zeros(2, 3, 48, 48))
    with pytest.raises(InputError, match="uint8"):
        normalise(torch.zeros(2, 48, 48, 3, dtype=torch.uint8))


@pytest.mark.parametrize("config", SAES, ids=lambda config: f"{config.tower}-{config.hook_name}")
def test_saes_reconstruct_fresh_activations(config, world: PlantedWorld, clip: HookedCLIP) -> None:  # type: ignore[no-untyped-def]
    sae = planted_sae(config.hook_name, tower=config.tower)
    tower = clip.vision if config.tower == "vision" else clip.text
    batch = world.sample(100, seed=5, split="test")
    x = normalise(batch.images) if config.tower == "vision" else clip.tokenize(batch.captions)
    with torch.no_grad():
        activation = tower.run_to(x, config.hook_name)
        if config.token_scope == "cls":
            activation = activation[:, :1]
        rows = activation.flatten(0, 1)
        codes = sae.encode(rows)
        left = (rows - sae.decode(codes)).pow(2).sum() / (rows - rows.mean(dim=0)).pow(2).sum()
    assert left < 0.25
    assert codes.shape == (len(rows), config.d_sae)
    assert (codes != 0).sum(dim=1).max() <= config.k
    assert sae.cfg.metadata.token_scope == config.token_scope
    assert sae.cfg.metadata.tower == config.tower
    assert sae.cfg.metadata.model_name == clip.model_name


def test_unknown_hooks_are_named() -> None:
    with pytest.raises(HookNameError, match=r"did you mean 'blocks.2.hook_resid_post'.*text blocks.1.hook_resid_post"):
        planted_sae("blocks.2.hook_resid_pots")
    with pytest.raises(HookNameError, match=r"no planted SAE at 'blocks.2.hook_resid_post' of the text tower"):
        planted_sae(tower="text")
    with pytest.raises(InputError, match="'vision' and 'text'"):
        planted_sae(tower="audio")  # type: ignore[arg-type]


def test_one_changed_byte_is_refused(copied: Path) -> None:
    expected = json.loads((copied / MANIFEST).read_text())["clip.safetensors"]
    path = copied / "clip.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match=expected):
        planted_clip()
    path = copied / "saes/vision/blocks.2.hook_resid_post/sae_weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match="is expected"):
        planted_sae()


def test_missing_files_are_refused(copied: Path) -> None:
    (copied / "clip.safetensors").unlink()
    with pytest.raises(LoadError, match=r"clip\.safetensors"):
        planted_clip()
    (copied / "saes/vision/blocks.2.hook_resid_post/cfg.json").unlink()
    with pytest.raises(LoadError, match=r"cfg\.json"):
        planted_sae()
    (copied / MANIFEST).unlink()
    with pytest.raises(LoadError, match="install the package again"):
        planted_sae()


def test_weights_that_do_not_fit_are_refused(copied: Path) -> None:
    """A whole file with the right sha256, of which one tensor is missing: nothing random takes its place."""
    path = copied / "clip.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = safetensors.torch.load_file(path)
    del weights["visual.proj"]
    safetensors.torch.save_file(weights, path, metadata)
    write_manifest(copied)
    with pytest.raises(LoadError, match=r"visual\.proj"):
        planted_clip()
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    write_manifest(copied)
    with pytest.raises(LoadError, match="not a dual encoder"):
        planted_clip()
    path.write_bytes(path.read_bytes()[:20])
    write_manifest(copied)
    with pytest.raises(LoadError, match="not a dual encoder"):
        planted_clip()
