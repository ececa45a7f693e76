"""SAEs at several hooks from one pass, and activations from a cache: each as if it were trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import HOOK, SMALL, Killed, make_tower, pictures, same_weights

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.run_folder import RunFolder
from clip_lens_ext.saes.train import train_sae, train_saes
from clip_lens_ext.towers.tower import HookedTower

pytestmark = pytest.mark.filterwarnings("ignore:the SAE at .* explains")  # nothing here is trained for long


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


HOOKS = ["blocks.1.hook_resid_post", HOOK]
SEVERAL = {name: value for name, value in SMALL.items() if name != "hook_name"}


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize("architecture", ["topk", "matryoshka", "jumprelu"])
def test_saes_that_are_trained_together_are_each_alone_to_the_bit(
    tower: HookedTower, architecture: str, memory_limit: int
) -> None:
    more = {"architecture": architecture, "memory_limit": memory_limit, "seed": 3, "buffer_images": 5}
    together = train_saes(tower, pictures(), hook_names=HOOKS, **SEVERAL, **more)
    assert list(together) == HOOKS
    for name, sae in together.items():
        alone = train_sae(tower, pictures(), **{**SMALL, **more, "hook_name": name})
        assert same_weights(sae, alone)
        assert sae.cfg.metadata.to_dict() == alone.cfg.metadata.to_dict()


def test_several_runs_that_are_killed_between_two_checkpoints_resume_to_the_same_bits(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_saes(tower, pictures(), hook_names=HOOKS, **SEVERAL)
    whole, calls = RunFolder.checkpoint, 0

    def checkpoint(self: RunFolder, trainer: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the second checkpoint of the second run: the first is six steps ahead
            raise Killed
        whole(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "checkpoint", checkpoint)
        with pytest.raises(Killed):
            train_saes(tower, pictures(), hook_names=HOOKS, output_dir=tmp_path, checkpoint_every=6, **SEVERAL)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/checkpoint*"))
    assert found == [f"{HOOK}/checkpoint-6", f"{HOOKS[0]}/checkpoint-12"]
    resumed = train_saes(tower, pictures(), hook_names=HOOKS, output_dir=tmp_path, checkpoint_every=6, **SEVERAL)
    assert all(same_weights(resumed[name], expected[name]) for name in HOOKS)
    # One of them is finished: it is loaded, and only the new one is trained.
    embed = "hook_full_embed"
    three = train_saes(tower, pictures(), hook_names=[HOOK, embed], output_dir=tmp_path, **SEVERAL)
    assert same_weights(three[HOOK], expected[HOOK])
    assert same_weights(three[embed], train_sae(tower, pictures(), **{**SMALL, "hook_name": embed}))
    assert all((tmp_path / name / "cfg.json").is_file() for name in [*HOOKS, embed])


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_a_cache_on_disk_changes_nothing_but_the_work(tower: HookedTower, tmp_path: Path, memory_limit: int) -> None:
    more: dict[str, Any] = {"memory_limit": memory_limit, "buffer_images": 5}
    expected = train_sae(tower, pictures(), **SMALL, **more)
    assert same_weights(expected, train_sae(tower, pictures(), cache_dir=tmp_path, **SMALL, **more))
    runs: list[int] = []
    with tower.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(len(value)))]):
        sae = train_sae(tower, pictures(), cache_dir=tmp_path, **SMALL, **more)
    assert same_weights(expected, sae)
    assert runs == [3]  # the first batch, for its shape
    with torch.no_grad():
        tower.native.conv1.weight.add_(1.0)
    with pytest.raises(InputError, match="other activations: tower_sha256 was"):
        train_sae(tower, pictures(), cache_dir=tmp_path, **SMALL, **more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_names": []}, "at least one"),
        ({"hook_names": [HOOK, HOOK]}, "must be different hooks"),
        ({"hook_names": [HOOK], "archtecture": "topk"}, "no keyword 'archtecture'; did you mean 'architecture'"),
        ({"hook_names": [HOOK], "hook_name": HOOK}, "no keyword 'hook_name'"),
        ({"hook_names": [HOOK, "hook_pooled"]}, "train them in two calls"),
    ],
)
def test_several_hooks_that_make_no_sense(tower: HookedTower, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_saes(tower, pictures(), **{**SEVERAL, **change})
