"""A training run that is repeated or resumed comes to the same bits, and a folder is of one run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import SMALL, Killed, kill_at, make_tower, pictures, same_weights

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.load import load_sae
from clip_lens_ext.saes.train import train_sae
from clip_lens_ext.towers.tower import HookedTower

pytestmark = pytest.mark.filterwarnings("ignore:the SAE at .* explains")  # nothing here is trained for long


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


def test_the_seed_decides_and_the_global_generator_is_left_alone(tower: HookedTower) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = train_sae(tower, pictures(), seed=1, **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    assert same_weights(first, train_sae(tower, pictures(), seed=1, **SMALL))
    assert not same_weights(first, train_sae(tower, pictures(), seed=2, **SMALL))


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_a_killed_run_resumes_to_the_same_bits(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, memory_limit: int
) -> None:
    """Also with every schedule in play: warm-up, decay, dead latents, the sparsity coefficient."""
    extra: dict[str, Any] = {"jumprelu": {"l0_warm_up_steps": 25}, "batchtopk": {"topk_threshold_lr": 0.1}}
    arguments = {
        **SMALL,
        "architecture": architecture,
        "memory_limit": memory_limit,
        "sae_kwargs": extra.get(architecture),
        "dead_feature_window": 3,
        "buffer_images": 5,
        "lr": 0.01,
    }
    expected = train_sae(tower, pictures(), **arguments)
    for number in (9, 26, 39):  # before, amid and after several checkpoints
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                train_sae(tower, pictures(), output_dir=tmp_path, checkpoint_every=6, **arguments)
        checkpoints = [path.name for path in tmp_path.glob("checkpoint*")]
        assert checkpoints == [f"checkpoint-{number // 6 * 6}"]
        assert not (tmp_path / "cfg.json").exists()
        (tmp_path / ".train_sae-part-x").mkdir()  # as a kill amid a checkpoint leaves it
    (tmp_path / "checkpoint-1").mkdir()  # as a kill leaves it before an older checkpoint is removed
    with monkeypatch.context() as patch:
        kill_at(patch, 35)  # a step that is behind it is not taken again
        sae = train_sae(tower, pictures(), output_dir=tmp_path, checkpoint_every=6, **arguments)
    assert same_weights(sae, expected)
    assert sae.cfg.metadata.to_dict() == expected.cfg.metadata.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cfg.json", "sae_weights.safetensors", "training_settings.json",
    ]  # fmt: skip


def test_a_finished_run_is_loaded_and_not_trained_again(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    kill_at(monkeypatch, 0)
    with caplog.at_level("INFO"):
        again = train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    assert same_weights(first, again)
    assert again.cfg.metadata.to_dict() == first.cfg.metadata.to_dict()
    assert "finished" in caplog.text
    assert same_weights(first, load_sae(tmp_path))


def test_other_settings_in_the_same_folder_are_named(tower: HookedTower, tmp_path: Path) -> None:
    train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"lr": 0.5}, "lr was 0.001 and is now 0.5"),
        ({"d_sae": 30, "seed": 3}, "d_sae was 24 and is now 30; seed was 0 and is now 3"),
        ({"sae_kwargs": {"aux_loss_coefficient": 0.5}}, "sae_kwargs was"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            train_sae(tower, pictures(), output_dir=tmp_path, **{**SMALL, **change})
    with pytest.raises(InputError, match="data_fingerprint was"):
        train_sae(tower, pictures(seed=1), output_dir=tmp_path, **SMALL)
    other = make_tower()
    with torch.no_grad():
        next(other.native.parameters()).add_(1e-3)
    with pytest.raises(InputError, match="tower_sha256 was"):
        train_sae(other, pictures(), output_dir=tmp_path, **SMALL)


def test_an_sae_of_somebody_else_is_not_overwritten(tower: HookedTower, tmp_path: Path) -> None:
    train_sae(tower, pictures(), **SMALL).save_model(tmp_path)
    with pytest.raises(InputError, match="did not make"):
        train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        train_sae(tower, pictures(), output_dir=tmp_path / "file", **SMALL)
