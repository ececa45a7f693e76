"""Training: batches are pure functions of the step, and a killed run ends as one that ran through."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.planted import PlantedWorld, WordTokenizer, normalise
from clip_lens_ext.planted.measure import measure_clip
from clip_lens_ext.planted.model import ClipConfig
from clip_lens_ext.planted.store import read_clip, write_clip
from clip_lens_ext.planted.train_clip import TrainConfig, train_clip

SMALL = ClipConfig(
    embed_dim=16, patch_size=12, head_width=8, vision_layers=2, vision_width=16, text_layers=2, text_width=24
)
CONFIG = TrainConfig(n_steps=6, batch_size=8, n_warmup=2, model=SMALL)


def equal_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    weights, others = first.state_dict(), second.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_killed_and_resumed_is_bit_equal(tmp_path: Path) -> None:
    world = PlantedWorld(1)
    through = train_clip(world, CONFIG, progress=False)
    path = tmp_path / "deep" / "clip.pt"
    # A run that is killed between two checkpoints loses the steps since the last one, and makes them again.
    train_clip(world, CONFIG, checkpoint=path, checkpoint_every=3, stop_after=3, progress=False)
    torch.manual_seed(123)
    resumed = train_clip(world, CONFIG, checkpoint=path, checkpoint_every=2, progress=False)
    assert equal_weights(through, resumed)
    assert equal_weights(through, train_clip(world, CONFIG, checkpoint=path, progress=False))
    assert not equal_weights(through, train_clip(world, CONFIG, stop_after=5, progress=False))


def test_interrupt_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """An interrupt in the midst of a step: the last periodic checkpoint stays, and the run goes on from it."""

    class Interrupted(PlantedWorld):
        def sample(self, n: int, *, seed: int, **asked: object):  # type: ignore[no-untyped-def, override]
            if seed == 4:
                raise KeyboardInterrupt
            return super().sample(n, seed=seed, **asked)  # type: ignore[arg-type]

    path = tmp_path / "clip.pt"
    with pytest.raises(KeyboardInterrupt):
        train_clip(Interrupted(1), CONFIG, checkpoint=path, checkpoint_every=3, progress=False)
    assert torch.load(path, weights_only=True)["done"] == 3
    resumed = train_clip(PlantedWorld(1), CONFIG, checkpoint=path, progress=False)
    assert equal_weights(resumed, train_clip(PlantedWorld(1), CONFIG, progress=False))


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_clip(PlantedWorld(1), dataclasses.replace(CONFIG, n_steps=1), progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    train_clip(PlantedWorld(1), CONFIG, checkpoint=path, stop_after=1, progress=False)
    with pytest.raises(LoadError, match="delete it"):
        train_clip(PlantedWorld(2), CONFIG, checkpoint=path, progress=False)
    with pytest.raises(LoadError, match="delete it"):
        train_clip(PlantedWorld(1), dataclasses.replace(CONFIG, lr=0.5), checkpoint=path, progress=False)


def test_stored_model_is_the_trained_one_in_half_precision(tmp_path: Path) -> None:
    world = PlantedWorld(1)
    clip = train_clip(world, CONFIG, progress=False)
    path = tmp_path / "clip.safetensors"
    write_clip(path, clip, SMALL, vocabulary=world.vocabulary, training={"steps": 6})
    stored, tokenizer, metadata = read_clip(path, vocabulary=world.vocabulary)
    assert metadata["training"] == {"steps": 6}
    assert not stored.training
    for name, weight in clip.state_dict().items():
        assert torch.equal(stored.state_dict()[name], weight.half().float()), name
    batch = world.sample(4, seed=0)
    with torch.no_grad():
        image, text, _ = stored(normalise(batch.images), tokenizer(batch.captions))
    assert image.shape == text.shape == (4, 16)
    with pytest.raises(LoadError, match="other words"):
        read_clip(path, vocabulary=PlantedWorld(2).vocabulary)


def test_report_of_a_model_that_knows_nothing() -> None:
    world = PlantedWorld(1)
    clip = train_clip(world, dataclasses.replace(CONFIG, n_steps=1), progress=False)
    report = measure_clip(clip, world, WordTokenizer(world.vocabulary), n_per_class=2)
    assert report.unambiguous < 0.3
    assert set(report.accuracy) == {entry.kind for entry in world.classes}
    assert len(report.reading) == 5
    assert max(abs(change.lift) for change in report.reading) < 0.2
    with pytest.raises(InputError, match="evaluation mode"):
        measure_clip(clip.train(), world, WordTokenizer(world.vocabulary))


@pytest.mark.parametrize("wrong", [{"n_steps": 0}, {"batch_size": 1}])
def test_wrong_configs(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="training takes"):
        train_clip(PlantedWorld(1), dataclasses.replace(CONFIG, **wrong), progress=False)
