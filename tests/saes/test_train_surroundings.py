"""What training leaves alone, what it says, and the data that it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import HOOK, SMALL, Killed, kill_at, make_tower, pictures, same_weights
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.train import train_sae
from clip_lens_ext.towers.tower import HookedTower

pytestmark = pytest.mark.filterwarnings("ignore:the SAE at .* explains")  # nothing here is trained for long


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


def test_silence(tower: HookedTower, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    assert capsys.readouterr() == ("", "")
    train_sae(tower, pictures(), **{**SMALL, "progress": True})
    shown = capsys.readouterr()
    assert shown.out == ""
    for bar in (f"activations at {HOOK}: 100%", "training the SAE: 100%", "measuring the SAE: 100%"):
        assert bar in shown.err


def state(tower: HookedTower) -> tuple[dict[str, Tensor], list[bool], list[int], list[bool]]:
    return (
        {name: weight.clone() for name, weight in tower.state_dict().items()},
        [module.training for module in tower.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tower.modules()],
        [parameter.requires_grad for parameter in tower.parameters()],
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_tower_and_the_grad_mode_are_as_before(
    tower: HookedTower, monkeypatch: pytest.MonkeyPatch, fails: bool, around: Callable[[], Any]
) -> None:
    tower.native.ln_post.train()  # a mode that is not the same everywhere comes back as it was
    weights, *rest = state(tower)
    if fails:
        kill_at(monkeypatch, 3)
    with around():
        images = pictures()
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if fails:
            with pytest.raises(Killed):
                train_sae(tower, images, **SMALL)
        else:
            train_sae(tower, images, **SMALL)
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    after, *rest_after = state(tower)
    assert rest_after == rest
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_a_low_precision_tower_gives_a_float32_sae(tower: HookedTower) -> None:
    tower.native.to(torch.bfloat16)
    assert train_sae(tower, pictures(), **SMALL).W_dec.dtype == torch.float32
    tower.native.double()
    assert train_sae(tower, pictures().double(), **SMALL).W_dec.dtype == torch.float64


def test_poor_quality_is_one_warning(tower: HookedTower) -> None:
    with pytest.warns(UserWarning, match="the SAE at blocks.0.hook_resid_post explains") as caught:
        train_sae(tower, pictures(), lr=1e-12, **SMALL)
    assert [entry.filename for entry in caught if "explains" in str(entry.message)] == [__file__]


class Broken(Dataset):
    """Pictures of which some do not open, or from the second pass on do not."""

    def __init__(self, bad: set[int], later: set[int] | None = None) -> None:
        self.bad, self.later, self.n_read = bad, later or set(), 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        self.n_read += 1
        if index in self.bad or (index in self.later and self.n_read > 20):
            raise OSError("image file is truncated")
        return pictures()[index]


def test_what_cannot_be_read_is_left_out_counted_and_named(tower: HookedTower) -> None:
    with pytest.warns(UserWarning, match=r"2 samples could not be read .*\(3: image file is truncated; 17:") as caught:
        sae = train_sae(tower, Broken({3, 17}), **SMALL)
    assert [entry.filename for entry in caught if "could not be read" in str(entry.message)] == [__file__]
    assert (sae.cfg.metadata.n_skipped_images, sae.cfg.metadata.n_training_images) == (2, 16)
    good = [index for index in range(20) if index not in (3, 17)]
    assert same_weights(sae, train_sae(tower, pictures()[good], **SMALL))


def test_data_that_changes_under_way_is_an_error(tower: HookedTower) -> None:
    with pytest.raises(InputError, match="the data changed: '5' could be read before"):
        train_sae(tower, Broken(set(), {5}), memory_limit=0, held_out=0.01, **SMALL)


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_folders_data_sets_and_loaders_train_the_same_sae(
    tower: HookedTower, tmp_path: Path, memory_limit: int
) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    for index, pixels in enumerate(pictures(12)):
        array = (pixels.permute(1, 2, 0).clamp(-1, 1) * 127 + 127).numpy().astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{index:02}.png")
    (tmp_path / "99.png").write_bytes(b"junk")
    with pytest.warns(UserWarning, match=r"99\.png"):
        first = train_sae(tower, tmp_path, preprocess=preprocess, memory_limit=memory_limit, **SMALL)
    paths = sorted(tmp_path.glob("*.png"))[:12]
    tensors = torch.stack([preprocess(Image.open(path)) for path in paths])
    for data in (tensors, TensorDataset(tensors), DataLoader(TensorDataset(tensors, tensors), batch_size=5)):
        assert same_weights(first, train_sae(tower, data, memory_limit=memory_limit, **SMALL))
