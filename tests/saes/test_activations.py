"""Activations for training: those of the tower, at several hooks in one pass, in memory, streamed and from disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.zoo import BY_NAME, model_of
from tiny_training import HOOK, make_tower, pictures
from torch import Tensor
from torch.utils.data import IterableDataset

import clip_lens_ext.saes.activation_cache as activation_cache
from clip_lens_ext.data import image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.activations import ActivationRows
from clip_lens_ext.saes.shuffled_rows import ShuffledRows
from clip_lens_ext.towers.tower import HookedTower

HOOKS = ["blocks.1.hook_resid_mid", HOOK, "blocks.0.mlp.hook_post", "hook_full_embed", "blocks.1.hook_mlp_out"]


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


def rows_of(
    tower: HookedTower, images: Any, memory_limit: int, scope: Any = "all", hooks: Sequence[str] = (HOOK,), **more: Any
) -> ActivationRows:
    batches = image_batches(images, batch_size=3)
    return ActivationRows(
        tower, batches, hook_names=hooks, token_scope=scope, memory_limit=memory_limit, progress=False, **more
    )  # fmt: skip


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize(("scope", "tokens"), [("all", slice(None)), ("cls", slice(0, 1)), ("patches", slice(1, None))])
def test_rows_are_the_activations_of_the_tower(
    tower: HookedTower, memory_limit: int, scope: str, tokens: slice
) -> None:
    rows = rows_of(tower, pictures(7), memory_limit, scope)
    assert (rows.stored is None) == (memory_limit == 0)
    expected = tower.run_to(pictures(7), HOOK)[:, tokens]
    torch.testing.assert_close(rows.take([4, 0, 6])[HOOK], expected[[4, 0, 6]])


@pytest.mark.parametrize("scope", ["cls", "all"])
def test_rows_keep_no_other_tokens_alive(tower: HookedTower, scope: str) -> None:
    batch = next(iter(image_batches(pictures(3), batch_size=3)))
    rows = rows_of(tower, pictures(3), 0, scope).rows(batch, [HOOK])[HOOK]
    assert rows.shape[1] == (1 if scope == "cls" else 5)
    assert rows.untyped_storage().nbytes() == rows.nbytes


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_several_hooks_in_one_pass_are_each_alone_to_the_bit(tower: HookedTower, memory_limit: int) -> None:
    runs = 0

    def count(value: Tensor, hook: Any) -> None:
        nonlocal runs
        runs += 1

    with tower.hooks(fwd_hooks=[("hook_embed", count)]):
        rows = rows_of(tower, pictures(7), memory_limit, hooks=HOOKS)
        assert runs == (3 if memory_limit else 1)  # three batches of the tower, or the first alone
        runs = 0
        together = rows.take([6, 1])
        assert runs == (0 if memory_limit else 1)
    assert list(together) == HOOKS
    for name in HOOKS:
        alone = rows_of(tower, pictures(7), memory_limit, hooks=[name])
        assert together[name].equal(alone.take([6, 1])[name])
        torch.testing.assert_close(together[name], tower.run_to(pictures(7), name)[[6, 1]])
    assert rows.d == {HOOKS[0]: 16, HOOK: 16, HOOKS[2]: 32, HOOKS[3]: 16, HOOKS[4]: 16}
    assert not any(point.fwd_hooks for point in tower.hook_dict.values())


@pytest.mark.parametrize("name", BY_NAME)
def test_every_family_gives_its_hooks_together_as_alone(name: str) -> None:
    """To rounding in float64: with hooks live inside a block other kernels may run than without."""
    tower, x = HookedTower(model_of(name)), BY_NAME[name].inputs(2)
    x = x.double() if x.is_floating_point() else x
    alone = {hook: tower.run_to(x, hook) for hook in tower.hook_names()}
    by_tokens: dict[int, list[str]] = {}
    for hook, value in alone.items():
        if value.dim() == 3:
            by_tokens.setdefault(value.shape[1], []).append(hook)
    for hooks in by_tokens.values():
        rows = rows_of(tower, x, 1 << 30, hooks=hooks[::-1]).take([1, 0])
        for hook in hooks:
            torch.testing.assert_close(rows[hook], alone[hook][[1, 0]], rtol=1e-12, atol=1e-12)


def test_hooks_of_unlike_tokens_do_not_go_together(tower: HookedTower) -> None:
    with pytest.raises(InputError, match=r"hook_pooled has 1 tokens and blocks.0.hook_resid_post has 5"):
        rows_of(tower, pictures(7), 0, hooks=[HOOK, "hook_pooled"])


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_an_epoch_gives_every_row_once_in_a_new_order(tower: HookedTower, memory_limit: int, batch_size: int) -> None:
    """Whatever the batches and chunks, the stream of rows is a shuffled epoch after another, the same for all hooks."""
    samples = [0, 2, 3, 6]
    rows = rows_of(tower, pictures(7), memory_limit, hooks=HOOKS[:2])
    provider = ShuffledRows(rows, samples, batch_size=batch_size, seed=4, buffer_images=3)
    n = provider.n_rows
    assert n == 4 * rows.n_tokens
    batches = [provider.batch(i) for i in range(2 * n // batch_size + 1)]
    orders = []
    for hook in HOOKS[:2]:
        stream = torch.cat([batch[hook] for batch in batches])[: 2 * n]
        expected = rows.take(samples)[hook].flatten(0, 1)
        epochs = [torch.cdist(part.double(), expected.double()).argmin(1).tolist() for part in (stream[:n], stream[n:])]
        for ids in epochs:
            assert sorted(ids) == list(range(n))
            assert ids != list(range(n))
        assert epochs[0] != epochs[1]
        orders.append(epochs)
    assert orders[0] == orders[1]


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_a_batch_depends_on_seed_and_number_alone(tower: HookedTower, memory_limit: int) -> None:
    def provider(seed: int = 4) -> ShuffledRows:
        rows = rows_of(tower, pictures(7), memory_limit)
        return ShuffledRows(rows, [0, 1, 2, 5], batch_size=9, seed=seed, buffer_images=3)

    forwards = provider()
    batches = [forwards.batch(i)[HOOK] for i in range(6)]
    backwards = provider()
    for i in reversed(range(6)):
        assert torch.equal(backwards.batch(i)[HOOK], batches[i])
    assert not torch.equal(provider(seed=5).batch(0)[HOOK], batches[0])


def test_statistics_are_those_of_the_transformed_rows(tower: HookedTower) -> None:
    rows = rows_of(tower, pictures(7), 2 << 30)
    provider = ShuffledRows(rows, [0, 2, 3], batch_size=4, seed=0, buffer_images=3)
    mean, norm = provider.statistics(HOOK, lambda x: 3 * x - 1, slice_rows=4)
    expected = 3 * rows.take([0, 2, 3])[HOOK].double().flatten(0, 1) - 1
    torch.testing.assert_close(mean, expected.mean(0))
    assert norm == pytest.approx(expected.norm(dim=1).mean().item())


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(pictures(1100))


def test_rows_grow_with_data_of_unknown_length(tower: HookedTower) -> None:
    def stream(memory_limit: int) -> ActivationRows:
        batches = image_batches(Stream(), batch_size=64)
        return ActivationRows(
            tower, batches, hook_names=[HOOK], token_scope="cls", memory_limit=memory_limit, progress=False
        )

    rows = stream(1 << 20)
    assert rows.stored is not None
    assert rows.stored[HOOK].shape == (1100, 1, 16)
    torch.testing.assert_close(rows.stored[HOOK][:, 0], tower.run_to(pictures(1100), HOOK)[:, 0])
    small = stream(1 << 14)
    assert small.stored is None
    with pytest.raises(InputError, match="one order only"):
        small.take([0])


# --- on disk

ROW = 5 * 16 * 4  # bytes of a sample at HOOK


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_cache, "SHARD_BYTES", 2 * ROW)


def n_runs(tower: HookedTower, call: Any) -> tuple[Any, int]:
    """What a call gives, and how many samples the tower ran on meanwhile."""
    seen: list[int] = []
    with tower.hooks(fwd_hooks=[("hook_embed", lambda value, hook: seen.append(len(value)))]):
        return call(), sum(seen)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_a_cache_gives_the_same_rows_and_spares_the_tower(
    tower: HookedTower, tmp_path: Path, memory_limit: int
) -> None:
    fresh = rows_of(tower, pictures(7), 2 << 30, hooks=HOOKS[:2]).take(range(7))
    _, first = n_runs(tower, lambda: rows_of(tower, pictures(7), 0, hooks=HOOKS[:2], cache_dir=tmp_path))
    assert first == 7
    assert len(list((tmp_path / HOOK).glob("shard-*.safetensors"))) == 4  # 7 samples, two in a shard
    again, runs = n_runs(tower, lambda: rows_of(tower, pictures(7), memory_limit, hooks=HOOKS[:2], cache_dir=tmp_path))
    assert runs == 3  # the first batch, whose shape is asked for
    assert (again.stored is None) == (memory_limit == 0)
    for name in HOOKS[:2]:
        assert again.take([6, 0, 3])[name].equal(fresh[name][[6, 0, 3]])
    _, more = n_runs(tower, lambda: rows_of(tower, pictures(7), 0, hooks=HOOKS[:3], cache_dir=tmp_path))
    assert more == 7  # one hook is new
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(HOOKS[:3])


def test_small_samples_do_not_wait_for_a_large_shard(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_cache, "SHARD_SAMPLES", 3)  # of one token each: nowhere near SHARD_BYTES
    rows = rows_of(tower, pictures(7), 0, "cls", cache_dir=tmp_path)
    assert len(list((tmp_path / HOOK).glob("shard-*.safetensors"))) == 3
    assert rows.take(range(7))[HOOK].equal(rows_of(tower, pictures(7), 2 << 30, "cls").take(range(7))[HOOK])


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("at", [1, 2])
def test_a_pass_that_is_killed_goes_on_after_its_last_shard(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    class Killed(BaseException):
        pass

    fresh = rows_of(tower, pictures(10), 2 << 30).take(range(10))[HOOK]
    whole = ActivationRows.rows
    calls = 0

    def rows(self: ActivationRows, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise Killed
        return whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationRows, "rows", rows)
        with pytest.raises(Killed):
            rows_of(tower, pictures(10), 0, cache_dir=tmp_path)
    assert len(list((tmp_path / HOOK).glob("shard-*"))) == 3 * at // 2
    again, runs = n_runs(tower, lambda: rows_of(tower, pictures(10), 0, cache_dir=tmp_path))
    # A batch runs again if any of it is missing; the first one always, for its shape.
    assert runs == {1: 10, 2: 7}[at]
    assert again.take(range(10))[HOOK].equal(fresh)


@pytest.mark.usefixtures("small_shards")
def test_a_cache_of_other_activations_is_never_read(tower: HookedTower, tmp_path: Path) -> None:
    same = {"identity": {"model_name": "tiny", "tower_sha256": "1"}, "cache_dir": tmp_path}
    rows_of(tower, pictures(7), 0, **same)
    changed = pictures(7)
    changed[5] += 1e-6
    with pytest.raises(InputError, match=r"is of other images: sample 5 there is not '5'"):
        rows_of(tower, changed, 0, **same)
    with pytest.raises(InputError, match="is of 7 images, and there are 6 now"):
        rows_of(tower, pictures(7)[:6], 0, **same)
    with pytest.raises(InputError, match="is of 7 images, and there are more now"):
        rows_of(tower, torch.cat([pictures(7), pictures(2, seed=1)]), 0, **same)
    with pytest.raises(InputError, match=r"other activations: token_scope was 'all' and is now 'cls'"):
        rows_of(tower, pictures(7), 0, "cls", **same)
    with pytest.raises(InputError, match=r"tower_sha256 was '1' and is now '2'"):
        rows_of(tower, pictures(7), 0, cache_dir=tmp_path, identity={"model_name": "tiny", "tower_sha256": "2"})
    assert rows_of(tower, pictures(7), 0, **same).take([2])[HOOK].shape == (1, 5, 16)  # and nothing was spoilt


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_cache_is_named(tower: HookedTower, tmp_path: Path) -> None:
    rows = rows_of(tower, pictures(7), 0, cache_dir=tmp_path)
    shard = tmp_path / HOOK / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"shard-00001.safetensors' is damaged"):
        rows_of(tower, pictures(7), 0, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"the activation cache lost '.*shard-00001"):
        rows.take([2])
    shard.unlink()
    with pytest.raises(InputError, match=r"has lost a shard before shard-00002"):
        rows_of(tower, pictures(7), 0, cache_dir=tmp_path)
    shard.write_bytes(content)
    (tmp_path / HOOK / "shard-00003.safetensors").unlink()
    with pytest.raises(InputError, match="has lost a shard at its end"):
        rows_of(tower, pictures(7), 0, cache_dir=tmp_path)
    index = tmp_path / HOOK / "activations.json"
    index.write_text("{")
    with pytest.raises(InputError, match=r"activations.json' is damaged"):
        rows_of(tower, pictures(7), 0, cache_dir=tmp_path)
    index.write_text(json.dumps({"n_samples": 7}))
    with pytest.raises(InputError, match=r"activations.json' is damaged"):
        rows_of(tower, pictures(7), 0, cache_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, not a folder"):
        rows_of(tower, pictures(7), 0, cache_dir=tmp_path / "file", hooks=["hook_embed"])
