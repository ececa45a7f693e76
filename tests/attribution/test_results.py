"""An `Attribution` says the same thing dense, as a table, as its top entries, and after a trip to the disk."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

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
        "labels too few",
        "a latent too many",
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
        del tensors["texts/labels"]
        save_file(tensors, path, metadata={key: json.dumps(header)})
    elif fault == "another field":
        save_file(tensors, path, metadata={key: json.dumps({**header, "colour": "red"})})
    else:
        if fault == "labels too few":
            del tensors["texts/labels"]
            header["labels"] = ["a cat"]
        else:
            tensors["latent"][0] = 37
        save_file(tensors, path, metadata={key: json.dumps(header)})
    with pytest.raises(LoadError, match=r"no file of Attribution\.save"):
        Attribution.load(path)


def shard(part: slice, *, per_token: bool, batch: int = 5, method: Any = attribution_patching, **settings: Any) -> Any:
    model, x, sae, directions = make(SITE, batch=batch)
    tower = HookedTower(model, model_name="tiny")
    given = {} if method is random_attribution else {"per_token": per_token}
    found = method(tower, x[part], sae, direction_target(directions), **given, **settings)
    return replace(found, sample_names=tuple(f"{i}.png" for i in range(batch)[part]))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_merged_shards_are_one_result(cuts: tuple[int, ...], per_token: bool) -> None:
    whole = shard(slice(0, 5), per_token=per_token)
    several = [shard(slice(a, b), per_token=per_token) for a, b in pairwise(cuts)]
    gaps = [replace(one, completeness_gap=one.prediction * 2) for one in several]
    for kind, expected in ((several, whole), (gaps, replace(whole, completeness_gap=whole.prediction * 2))):
        merged = reduce(Attribution.merge, kind)
        for field in fields(Attribution):
            one, other = getattr(merged, field.name), getattr(expected, field.name)
            if field.name in ("sample", "latent", "token") and one is not None:
                assert torch.equal(one, other), field.name
            elif isinstance(one, torch.Tensor):
                # The same numbers in batches of other sizes: float64's rounding through the model.
                assert torch.allclose(one, other, rtol=0, atol=1e-12), field.name
            elif field.name != "provenance":
                assert one == other, field.name
        assert merged.provenance["data_fingerprint"] == "+".join(one.provenance["data_fingerprint"] for one in several)
        assert merged.to_frame()["name"].unique().tolist() == [f"{i}.png" for i in range(5)]
        if not per_token:
            assert torch.equal(merged.top(3).latents, whole.top(3).latents)


def test_merge_goes_through_the_disk(tmp_path: Path) -> None:
    first, second = (shard(part, per_token=True) for part in (slice(0, 2), slice(2, 5)))
    first.save(tmp_path / "1")
    second.save(tmp_path / "2")
    merged = Attribution.load(tmp_path / "1").merge(Attribution.load(tmp_path / "2"))
    merged.save(tmp_path / "both")
    again = Attribution.load(tmp_path / "both")
    assert torch.equal(again.dense(), first.merge(second).dense())
    assert again.sample_names == merged.sample_names == first.sample_names + second.sample_names


def test_results_that_are_no_shards() -> None:
    found, other = (shard(part, per_token=False) for part in (slice(0, 2), slice(2, 5)))
    changed = {"method": "x", "settings": {"n_steps": 3}, "seed": 3, "labels": ("a", "b", "c"), "unit": "logit",
               "hook_name": "h", "tower": "text", "token_scope": "cls", "error_term": "dropped", "d_sae": 38,
               "n_token": 3}  # fmt: skip
    for name, value in changed.items():
        with pytest.raises(InputError, match=f"two attributions do not belong together: they differ in {name}"):
            found.merge(replace(other, **{name: value}))
    for name in ("model", "sae_sha256", "target_fingerprint"):
        with pytest.raises(InputError, match=f"{name} .* and 'other'"):
            found.merge(replace(other, provenance={**other.provenance, name: "other"}))
    with pytest.raises(InputError, match="sample_names 'there' and 'missing'"):
        found.merge(replace(other, sample_names=()))
    with pytest.raises(InputError, match="completeness_gap None and 'there'"):
        found.merge(replace(other, completeness_gap=other.prediction))
    with pytest.raises(InputError, match="per_token False and True"):
        found.merge(shard(slice(2, 5), per_token=True))


def test_every_field_survives_the_disk(tmp_path: Path) -> None:
    found = attribution()
    found = replace(
        found, settings={"n_steps": 16, "baseline": None, "variant": "x"}, completeness_gap=found.prediction
    )
    found.save(tmp_path / "a")
    again = Attribution.load(tmp_path / "a")
    assert again.settings == found.settings
    assert torch.equal(again.completeness_gap, found.completeness_gap)
    assert Attribution.load(tmp_path / "a").token is None


def test_frozen() -> None:
    found = attribution()
    with pytest.raises(FrozenInstanceError):
        found.method = "other"  # type: ignore[misc]
    assert found != replace(found)
