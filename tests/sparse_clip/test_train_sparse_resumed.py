"""A training that was stopped goes on to the same bits, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.models import build_clip
from oracles.sparse_training import CODE, QUICK, N, data, dense, same, sparse, tokenizer, weights
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.sparse_clip import add_sparse_heads, embed_pairs, load_sparse_clip, train_sparse_clip, trainer
from clip_lens_ext.sparse_clip.training_folder import STATE


@pytest.mark.parametrize("trained", ["heads", "all"])
@pytest.mark.parametrize(
    "how", ["stopped", "killed", "killed while the weights change", "killed while a checkpoint is written"]
)
def test_a_training_goes_on_where_it_was(
    trained: Any, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = add_sparse_heads(cle.HookedCLIP(build_clip(), tokenizer=tokenizer), CODE)
    settings = {**QUICK, "trained": trained, "checkpoints": (0.2, 0.5, 1.0)}
    whole = train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "whole")
    if how == "stopped":
        part = train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "parts", stop_after=5)
        assert not part.finished
        assert [one.step for one in part.checkpoints] == [2, 5]
    else:
        from clip_lens_ext.towers import from_sparse

        places: dict[str, tuple[Any, str, int]] = {
            "killed": (trainer, "contrastive_step", 6),
            "killed while the weights change": (torch.optim.AdamW, "step", 6),
            "killed while a checkpoint is written": (from_sparse, "save_file", 2),
        }
        owner, name, last = places[how]
        real, calls = getattr(owner, name), []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if owner is trainer and len(calls) == last:
                raise KeyboardInterrupt
            result = real(*args, **kwargs)
            if len(calls) == last:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, name, interrupted)
        often = {"checkpoint_every": 4} if owner is torch.optim.AdamW else {}
        with pytest.raises(KeyboardInterrupt):
            train_sparse_clip(start, *data(), **settings, **often, output_dir=tmp_path / "parts")
        monkeypatch.undo()
    again = train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "parts")
    same(whole, again)
    assert [(one.step, one.share) for one in again.checkpoints] == [(2, 2 / 9), (5, 5 / 9), (9, 1.0)]
    for one, other in zip(whole.checkpoints, again.checkpoints, strict=True):
        a, b = whole.open(one).native.state_dict(), again.open(other).native.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)
    end = again.open(again.checkpoints[-1]).native.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in weights(again).items())
    written = (tmp_path / "parts" / STATE).stat().st_mtime_ns
    same(train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "parts"), whole)
    assert (tmp_path / "parts" / STATE).stat().st_mtime_ns == written  # nothing was left to do


def test_pairs_are_embedded_once(tmp_path: Path) -> None:
    seen: list[int] = []
    for last in (4, 7, None):
        clip = sparse()
        native: Any = clip.native
        native.dense.visual.conv1.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        found = train_sparse_clip(clip, *data(), **QUICK, output_dir=tmp_path, stop_after=last)
        assert sum(seen) == N
    assert found.finished
    same(found, train_sparse_clip(sparse(), *data(), **QUICK))


@pytest.mark.parametrize(("trained", "n_workers", "most"), [("heads", 0, 1), ("all", 0, 1), ("all", 1, 3)])
def test_the_order_of_an_epoch_is_drawn_when_it_begins(
    trained: Any, n_workers: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = trainer.order_of
    monkeypatch.setattr(trainer, "order_of", lambda n, seed, epoch: drawn.append(epoch) or real(n, seed, epoch))

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "contrastive_step", stopped)
    settings = {**QUICK, "n_epochs": 50, "batch_size": 26, "trained": trained, "n_workers": n_workers}
    with pytest.raises(KeyboardInterrupt):
        train_sparse_clip(sparse(), *data(), **settings)
    assert drawn == list(range(len(drawn)))
    assert 1 <= len(drawn) <= most  # two batches are read ahead for each worker


@pytest.mark.parametrize("when", ["in the forward pass", "before it"])
def test_running_means_are_those_of_the_step(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Normalised(torch.nn.Module):
        """Batch normalisation of tokens: its means change before any weight does."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls, self.last = torch.nn.BatchNorm1d(48), 0, 0

        def forward(self, tokens: Tensor) -> Tensor:
            self.calls += self.training
            if self.calls == self.last and when == "before it":
                raise KeyboardInterrupt
            tokens = self.norm(tokens.transpose(1, 2)).transpose(1, 2)
            if self.calls == self.last:
                raise KeyboardInterrupt
            return tokens

    native = build_clip()
    native.visual.ln_pre = torch.nn.Sequential(native.visual.ln_pre, Normalised())  # type: ignore[assignment]
    start = add_sparse_heads(cle.HookedCLIP(native.eval(), tokenizer=tokenizer), CODE)
    settings = {**QUICK, "trained": "all", "checkpoint_every": 2}
    whole = train_sparse_clip(start, *data(), **settings)
    means = weights(whole)["dense.visual.ln_pre.1.norm.running_mean"]
    assert float(means.abs().max()) > 0
    norm: Any = start.native.get_submodule("dense.visual.ln_pre.1")
    norm.last = 6
    with pytest.raises(KeyboardInterrupt):
        train_sparse_clip(start, *data(), **settings, output_dir=tmp_path)
    norm.last = 0
    same(whole, train_sparse_clip(start, *data(), **settings, output_dir=tmp_path))


def test_dropout_is_that_of_the_step_and_the_part() -> None:
    native = build_clip()
    native.visual.patch_dropout = torch.nn.Dropout(0.5)  # type: ignore[assignment]
    start = add_sparse_heads(cle.HookedCLIP(native, tokenizer=tokenizer), CODE)
    dropped: list[Tensor] = []
    start.native.get_submodule("dense.visual.patch_dropout").register_forward_hook(
        lambda module, args, output: dropped.append(output == 0)
    )
    train_sparse_clip(start, *data(), **QUICK, trained="all", n_accumulated=2, stop_after=2)
    # Both passes over a part have to be of one function, or the gradient is that of neither.
    assert len(dropped) == 8
    for step in (0, 4):
        first, second, *again = dropped[step : step + 4]
        assert torch.equal(first, again[0])
        assert torch.equal(second, again[1])
        assert not torch.equal(first, second)
    assert not torch.equal(dropped[0], dropped[4])


def test_dropout_is_the_same_when_resumed(tmp_path: Path) -> None:
    native = build_clip()
    native.visual.patch_dropout = torch.nn.Dropout(0.5)  # type: ignore[assignment]
    start = add_sparse_heads(cle.HookedCLIP(native, tokenizer=tokenizer), CODE)
    settings = {**QUICK, "trained": "all"}
    whole = train_sparse_clip(start, *data(), **settings)
    train_sparse_clip(start, *data(), **settings, output_dir=tmp_path, stop_after=4)
    same(whole, train_sparse_clip(start, *data(), **settings, output_dir=tmp_path))
    native.visual.patch_dropout = torch.nn.Identity()  # type: ignore[assignment]
    other = train_sparse_clip(add_sparse_heads(cle.HookedCLIP(native, tokenizer=tokenizer), CODE), *data(), **settings)
    assert not np.allclose(whole.history.loss, other.history.loss, rtol=1e-3)  # it was on


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    train_sparse_clip(sparse(), *data(), **QUICK, output_dir=tmp_path, stop_after=2)
    for other, name in (
        ({"lr": 2e-2}, "lr was 0.01 and is now 0.02"), ({"n_epochs": 4}, "n_epochs"), ({"trained": "all"}, "trained"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"holds another training: .*{name}"):
            train_sparse_clip(sparse(), *data(), **{**QUICK, **other}, output_dir=tmp_path)
    with pytest.raises(InputError, match="begins_sha256"):
        train_sparse_clip(add_sparse_heads(dense(), CODE, seed=5), *data(), **QUICK, output_dir=tmp_path)
    images, captions = data()
    with pytest.raises(InputError, match="the checkpoint of a pass over other data"):
        train_sparse_clip(sparse(), -images, captions, **QUICK, output_dir=tmp_path)
    pairs = embed_pairs(dense(), -images, captions, progress=False)
    with pytest.raises(InputError, match="data_sha256"):
        train_sparse_clip(sparse(), pairs, **QUICK, output_dir=tmp_path)
    (tmp_path / STATE).write_bytes(b"half of it")
    with pytest.raises(LoadError, match="cannot be read"):
        train_sparse_clip(sparse(), *data(), **QUICK, output_dir=tmp_path)


def test_load_sparse_clip_finds_the_right_dense_model(tmp_path: Path) -> None:
    found = train_sparse_clip(sparse(), *data(), **QUICK, output_dir=tmp_path)
    again = load_sparse_clip(tmp_path, dense())
    x = data()[0][:3]
    with torch.no_grad():
        assert torch.equal(again.vision(x), found.clip.vision(x))
    other_name = cle.HookedCLIP(build_clip(), tokenizer=tokenizer, model_name="the same from another folder")
    with torch.no_grad():
        assert torch.equal(load_sparse_clip(tmp_path, other_name).vision(x), again.vision(x))
    with pytest.raises(LoadError, match="has other weights"):
        load_sparse_clip(tmp_path, dense(seed=1))
    with pytest.raises(LoadError, match=r"'tiny' under the heads .* pass dense="):
        load_sparse_clip(tmp_path)
    with pytest.raises(LoadError, match=r"load_sparse_clip"):
        cle.load_clip(tmp_path)
    with pytest.raises(LoadError, match="holds no Sparse CLIP"):
        load_sparse_clip(tmp_path / "checkpoints", dense())
