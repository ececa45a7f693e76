"""An `Attribution` says the same thing dense, as a table, as its top entries, and after a trip to the disk."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.sites import make
from safetensors.torch import load_file, save_file

from clip_lens_ext.attribution import Attribution, attribution_patching, direction_target, random_attribution
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.towers import HookedTower

SITE = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)


def attribution(*, per_token: bool = False, dtype: torch.dtype = torch.float64) -> Attribution:
    model, x, sae, directions = make(SITE, dtype=dtype)
    target = direction_target(directions, labels=["a cat", "Käse, 'quoted'", "z"])
    return attribution_patching(HookedTower(model, model_name="tiny"), x, sae, target, per_token=per_token)


def by_hand(pairs: dict[tuple[int, int], list[float]], n_sample: int, n_target: int) -> Attribution:
    keys = sorted(pairs)
    return Attribution(
        "by hand",
        torch.tensor([k[0] for k in keys], dtype=torch.int64),
        torch.tensor([k[1] for k in keys], dtype=torch.int64),
        torch.tensor([pairs[k] for k in keys], dtype=torch.float64).reshape(-1, n_target),
        torch.ones(len(keys)),
        torch.zeros(n_sample, n_target),
        tuple(map(str, range(n_target))),
        n_sample,
        9,
        "h",
        "vision",
        "cls",
        "kept",
        "cosine",
    )


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 2), st.integers(0, 8)), st.lists(st.integers(-3, 3), min_size=2, max_size=2)
    ),
    st.integers(1, 6),
    st.booleans(),
)
def test_top_against_a_loop(pairs: dict, k: int, absolute: bool) -> None:
    found = by_hand({key: [float(v) for v in value] for key, value in pairs.items()}, 3, 2)
    top = found.top(k, absolute=absolute)
    assert top.values.shape == top.latents.shape == (3, 2, k)
    for sample in range(3):
        for target in range(2):
            own = [(pairs[s, i][target], i) for s, i in sorted(pairs) if s == sample]
            own.sort(key=lambda pair: -abs(pair[0]) if absolute else -pair[0])  # stable: the lower latent first
            own = own[:k]
            assert top.latents[sample, target].tolist() == [i for _, i in own] + [-1] * (k - len(own))
            values = top.values[sample, target]
            assert values[: len(own)].tolist() == [v for v, _ in own]
            assert values[len(own) :].isnan().all()


def test_top_of_nothing() -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        attribution().top(0)
    with pytest.raises(InputError, match="per_token=False"):
        attribution(per_token=True).top(3)


def test_dense() -> None:
    for per_token in (False, True):
        found = attribution(per_token=per_token)
        dense = found.dense()
        assert dense.shape == ((2, 3, 12, 37) if per_token else (2, 3, 37))
        expected = torch.zeros_like(dense)
        for pair in range(len(found)):
            for target in range(3):
                where = (
                    int(found.sample[pair]),
                    target,
                    *([int(found.token[pair])] if per_token else []),
                    int(found.latent[pair]),
                )
                expected[where] = found.value[pair, target]
        assert torch.equal(dense, expected)
    assert torch.allclose(attribution(per_token=True).dense().sum(dim=2), attribution().dense(), atol=1e-14)


@pytest.mark.parametrize("per_token", [False, True])
def test_frame(per_token: bool) -> None:
    found = replace(attribution(per_token=per_token), sample_names=("one.png", "two.png"))
    frame = found.to_frame()
    token = ["token"] if per_token else []
    assert sorted(frame.columns) == sorted(["sample", "name", *token, "target", "latent", "activation", "attribution"])
    assert len(frame) == 3 * len(found)
    dense = found.dense()
    for row in frame.iloc[:: max(1, len(frame) // 40)].itertuples():
        where = (row.sample, found.labels.index(row.target), *([row.token] if per_token else []), row.latent)
        assert row.attribution == pytest.approx(float(dense[where]), abs=1e-6)  # the table is float32
        assert row.name == ("one.png", "two.png")[row.sample]
    own = frame[frame.target == "a cat"]
    assert own.activation.tolist() == pytest.approx(found.activation.float().tolist())


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(tmp_path: Path, per_token: bool, dtype: torch.dtype) -> None:
    found = replace(attribution(per_token=per_token, dtype=dtype), sample_names=("ä.png", "b.png"), seed=5)
    found.save(tmp_path / "a.safetensors")
    again = Attribution.load(tmp_path / "a.safetensors")
    for field in fields(Attribution):
        one, other = getattr(found, field.name), getattr(again, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), field.name
            assert one.dtype == other.dtype
        else:
            assert one == other, field.name
            assert type(one) is type(other), field.name
    assert repr(again) == repr(found)
    assert "2 samples, 3 targets" in repr(found)


def test_save_of_a_random_one_and_of_several_targets(tmp_path: Path) -> None:
    model, x, sae, directions = make(SITE)
    found = random_attribution(HookedTower(model), x, sae, direction_target(directions), seed=11)
    found.save(str(tmp_path / "r"))
    again = Attribution.load(str(tmp_path / "r"))
    assert (again.seed, again.method) == (11, "random")
    assert torch.equal(again.value, found.value)


@pytest.mark.parametrize(
    "fault",
    [
        "gone",
        "folder",
        "empty",
        "truncated",
        "text",
        "another file",
        "no JSON",
        "no tensors",
        "no labels",
        "another field",
    ],
)
def test_broken_files(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.safetensors"
    attribution().save(path)
    content, tensors = path.read_bytes(), load_file(path)
    key = "clip_lens_ext.Attribution"
    size = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][key])
    if fault == "gone":
        path.unlink()
    elif fault == "folder":
        path.unlink()
        path.mkdir()
    elif fault in ("empty", "truncated", "text"):
        path.write_bytes({"empty": b"", "truncated": content[:-20], "text": b"<html>" * 40}[fault])
    elif fault == "another file":
        save_file(tensors, path)
    elif fault == "no JSON":
        save_file(tensors, path, metadata={key: "{"})
    elif fault == "no tensors":
        save_file({"x": torch.zeros(1)}, path, metadata={key: json.dumps(header)})
    elif fault == "no labels":
        header.pop("labels")
        save_file(tensors, path, metadata={key: json.dumps(header)})
    else:
        save_file(tensors, path, metadata={key: json.dumps({**header, "colour": "red"})})
    with pytest.raises(LoadError, match=r"no file of Attribution\.save"):
        Attribution.load(path)


def test_frozen() -> None:
    found = attribution()
    with pytest.raises(FrozenInstanceError):
        found.method = "other"  # type: ignore[misc]
    assert found != replace(found)
