"""Steering by loops, its properties, a running model, and what it does to zero-shot and retrieval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import HookNameError, InputError, LoadError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.sparse_clip import (
    ConceptFeatures,
    SteeringData,
    SteeringEffect,
    features_of,
    steer,
    steered,
    steering_effect,
)
from clip_lens_ext.sparse_clip.steering_data import N_NEAREST, plan_steering

D = 12


def codes_of(n: int, seed: int, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_by_loops_and_properties(data: st.DataObject) -> None:
    codes = codes_of(data.draw(st.integers(1, 5)), data.draw(st.integers(0, 99)))
    shuffled = data.draw(st.permutations(range(D)))
    n_off, n_on = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    off, on, strength = shuffled[:n_off], shuffled[n_off : n_off + n_on], data.draw(st.floats(0.1, 9))
    before = codes.clone()
    found = steer(codes, off, on, strength)
    assert torch.equal(codes, before)
    for row, new in zip(codes.tolist(), found.tolist(), strict=True):
        assert new == [0.0 if i in off else strength if i in on else row[i] for i in range(D)]
    assert torch.equal(steer(found, off, on, strength), found)
    assert torch.equal(steer(steer(codes, off), (), on, strength), found)
    order = torch.tensor(data.draw(st.permutations(range(D))))
    place = {int(feature): new for new, feature in enumerate(order)}
    moved = steer(codes[:, order], [place[i] for i in off], [place[i] for i in on], strength)
    assert torch.equal(moved, found[:, order])
    own = steer(codes, torch.tensor([off] * len(codes)).long(), torch.tensor([on] * len(codes)).long(), strength)
    assert torch.equal(own, found)


def test_nothing_is_a_copy_and_gradients_pass() -> None:
    codes = codes_of(3, 0).requires_grad_()
    same = steer(codes)
    assert torch.equal(same, codes)
    assert same.data_ptr() != codes.data_ptr()
    steer(codes, [0], [1]).sum().backward()
    assert codes.grad is not None
    assert codes.grad.tolist() == [[0.0, 0.0] + [1.0] * (D - 2)] * 3
    assert steer(codes.detach().half(), [0], [1]).dtype == torch.float16


@pytest.mark.parametrize(("change", "words"), [
    ({"codes": torch.ones(3)}, "floats"),
    ({"codes": torch.ones(2, D, dtype=torch.long)}, "floats"),
    ({"codes": [[1.0]]}, "got a list"),
    ({"codes": torch.ones(0, D)}, "at least one"),
    ({"codes": torch.full((1, D), torch.nan)}, "sample 0"),
    ({"codes": -torch.ones(1, D)}, "negative"),
    ({"suppress": [D]}, "there is no 12"),
    ({"boost": [-1]}, "there is no -1"),
    ({"suppress": [1, 1]}, "named twice"),
    ({"suppress": [0.5]}, "whole numbers"),
    ({"suppress": ["dog"]}, "numbers of features"),
    ({"suppress": [1, 2], "boost": [2]}, "feature 2 is to be suppressed and boosted"),
    ({"suppress": torch.ones(3, 1, dtype=torch.long)}, "rows for 3"),
    ({"strength": 0}, "above zero"),
    ({"strength": float("nan")}, "above zero"),
    ({"strength": -1.0}, "above zero"),
])  # fmt: skip
def test_wrong_input(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        steer(**{"codes": torch.ones(2, D), "suppress": [0], "boost": [1], **change})


def test_features_of_words(planted_sparse: cle.HookedCLIP, tmp_path: Any) -> None:
    names = ["heart", "kite", "glass moth", "glass"]
    with torch.no_grad():
        codes = planted_sparse.embed_texts(names)
    found = features_of(planted_sparse, names, 3)
    for row, code in enumerate(codes.tolist()):
        best = sorted(range(len(code)), key=lambda i: -code[i])[:3]
        assert found.of(names[row]) == best
        assert found.activations[row].tolist() == [code[i] for i in best]
        assert found.share[row].tolist() == [sum(other[i] > 0 for other in codes.tolist()) / 4 for i in best]
    assert list(found.to_frame().feature[:3]) == found.of("heart")
    apart = features_of(planted_sparse, names, 3, max_share=0.25)
    assert apart.share.unique().tolist() == [0.25]
    assert set(apart.left_out.tolist()) == {i for i in range(512) if int((codes[:, i] > 0).sum()) > 1}
    against = features_of(planted_sparse, "heart", max_share=0.5, among=names)
    assert against.n_compared == 4
    found.save(tmp_path / "f.safetensors")
    assert ConceptFeatures.load(tmp_path / "f.safetensors").of("kite") == found.of("kite")
    for arguments, words in (
        ({"words": []}, "at least one"),
        ({"words": ["heart", " "]}, "got ' '"),
        ({"words": ["heart", "heart"]}, "there twice"),
        ({"words": "zebra"}, "zebra"),
        ({"k": 0}, "k is a whole number"),
        ({"k": 500}, "'heart' activates"),
        ({"template": "photo"}, "one {} for the word"),
        ({"max_share": 1.5}, r"share in \[0, 1\)"),
        ({"max_share": 0.5}, "no others to be compared"),
    ):
        with pytest.raises(InputError, match=words):
            features_of(planted_sparse, **{"words": "heart", **arguments})
    with pytest.raises(InputError, match="negative activation"):
        features_of(cle.planted_clip(), "heart")
    with pytest.raises(InputError, match="no features of 'hart'"):
        found.of("hart")


def test_a_running_model_is_steered_and_restored(planted_sparse: cle.HookedCLIP) -> None:
    clip, pixels = planted_sparse, normalise(PlantedWorld(0).sample(3, seed=2, split="test").images)
    hooks = {name: len(point._forward_hooks) for name, point in clip.vision.hook_dict.items()}
    with torch.no_grad():
        plain, text = clip.embed_images(pixels), clip.embed_texts("a heart")
        with steered(clip, suppress=[3, 4], boost=[5], strength=1.5) as other:
            assert other is clip
            assert torch.equal(clip.embed_images(pixels), steer(plain, [3, 4], [5], 1.5))
            assert torch.equal(clip.embed_texts("a heart"), text)
            with steered(clip, boost=[3]):
                assert torch.equal(clip.embed_images(pixels), steer(plain, [4], [5], 1.5).index_fill(
                    1, torch.tensor([3]), 2.0))  # fmt: skip
            assert torch.equal(clip.embed_images(pixels), steer(plain, [3, 4], [5], 1.5))
        assert torch.equal(clip.embed_images(pixels), plain)
        seen: list[Tensor] = []
        clip.vision.hook_dict["hook_embedding"].add_hook(
            lambda code, hook: seen.append(code.clone()), is_permanent=True
        )
        with pytest.raises(HookNameError), steered(clip, boost=[5]):
            clip.vision.run_with_hooks(pixels, fwd_hooks=[("hook_none", lambda code, hook: code)])
        assert torch.equal(clip.embed_images(pixels), plain)
        assert len(seen) == 1
        clip.vision.hook_dict["hook_embedding"].remove_hooks("fwd", including_permanent=True)
    assert hooks == {name: len(point._forward_hooks) for name, point in clip.vision.hook_dict.items()}
    for arguments, words in (
        ({"suppress": [512]}, "no 512"),
        ({"suppress": [1], "boost": [1]}, "suppressed and boosted"),
        ({"boost": torch.zeros(2, 1, dtype=torch.long)}, "same features for all"),
        ({"boost": [1], "strength": 0}, "above zero"),
    ):
        with pytest.raises(InputError, match=words), steered(clip, **arguments):
            pass
    dense = cle.planted_clip()
    with pytest.raises(InputError, match="negative activation"), steered(dense, boost=[1]):
        dense.embed_images(pixels)


def by_hand(n: int, n_class: int, seed: int, captions: bool = True) -> SteeringData:
    """Classes with two features of their own each, and pictures that have those of their class among others."""
    labels = torch.arange(n) % n_class
    d = 2 * n_class + 10
    features = torch.arange(2 * n_class).view(n_class, 2)
    classes = torch.zeros(n_class, d, dtype=torch.float64).scatter(1, features, 1.0)
    classes[:, 2 * n_class :] = codes_of(n_class, seed + 1, 10) / 2
    codes = classes[labels] + codes_of(n, seed, d) / 3
    concepts = ConceptFeatures(
        tuple(f"class {i}" for i in range(n_class)), features, torch.ones(n_class, 2), torch.ones(n_class, 2),
        torch.zeros(0), n_class, None, "{}", d, {"model": "by hand"},
    )  # fmt: skip
    texts = classes[labels] + codes_of(n, seed + 2, d) / 3 if captions else None
    return SteeringData(codes, labels, concepts, classes, texts)


def cosine_by_loops(z: Tensor, t: Tensor) -> float:
    a, b = z.tolist(), t.tolist()
    length = math.sqrt(math.fsum(v * v for v in a) * math.fsum(v * v for v in b))
    return math.fsum(v * w for v, w in zip(a, b, strict=True)) / length if length else 0.0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_effect_by_loops(seed: int) -> None:
    data, strengths = by_hand(9, 3, seed), (0.5, 3.0)
    assert data.caption_codes is not None
    codes, captions = data.codes.clone(), data.caption_codes.clone()
    codes[4] = codes[1]  # equally near to every caption
    captions[7] = 0  # and a caption to which all pictures are
    captions[5], captions[6] = captions[2], captions[0]  # captions of two pictures, of one class
    captions[8] = captions[3]  # and of two
    data = replace(data, codes=codes, caption_codes=captions)
    groups = [next(r for r in range(9) if torch.equal(captions[r], captions[q])) for q in range(9)]
    found = steering_effect(data, strengths=strengths, n_controls=2, seed=seed, progress=False)
    plan = plan_steering(data, n_controls=2, seed=seed)
    n, d = data.codes.shape
    for s, strength in enumerate(strengths):
        for arm in range(3):
            for p in range(n):
                off, on = plan.suppress[arm, p].tolist(), plan.boost[arm, p].tolist()
                code = torch.tensor([0.0 if i in off else strength if i in on else float(data.codes[p, i])
                                     for i in range(d)], dtype=torch.float64)  # fmt: skip
                cosines = [cosine_by_loops(code, row) for row in data.class_codes]
                assert int(found.predicted[s, arm, p]) == max(range(3), key=lambda i: cosines[i])
                pair = [cosines[int(data.labels[p])], cosines[int(plan.new_labels[p])]]
                assert found.cosine[s, arm, p].tolist() == pytest.approx(pair, abs=1e-12)
                for own, new, row in ((found.own_caption[s, arm], found.new_caption[s, arm], code),
                                      (found.own_caption_before, found.new_caption_before, codes[p])):  # fmt: skip
                    near = [cosine_by_loops(caption, row) for caption in captions]
                    assert bool(own[p]) == all(near[q] < near[p] for q in range(n) if groups[q] != groups[p])
                    there = [near[q] for q in range(n) if data.labels[q] == plan.new_labels[p]]
                    rest = [near[q] for q in range(n) if data.labels[q] != plan.new_labels[p]]
                    assert bool(new[p]) == (max(there) > max(rest))
                hits, harmed = 0, 0
                for q in set(range(n)) - {p}:
                    near = [cosine_by_loops(captions[q], codes[r]) for r in range(n)]
                    before = all(near[r] < near[q] for r in range(n) if groups[r] != groups[q])
                    near[p] = cosine_by_loops(captions[q], code)
                    after = all(near[r] < near[q] for r in range(n) if groups[r] != groups[q])
                    hits, harmed = hits + after, harmed + (before and not after)
                assert float(found.retrieval[s, arm, p]) == pytest.approx(hits / (n - 1))
                assert float(found.harmed[s, arm, p]) == pytest.approx(harmed / (n - 1))
                assert float(found.removed[arm, p]) == pytest.approx(float(data.codes[p, off].sum()))
    frame = found.to_frame()
    assert list(frame.arm) == ["as is", "concept", "control", "concept", "control"]
    assert frame.success[1] == float(found.success[0, 0].double().mean())
    assert frame.kept[4] == float(found.kept[1, 1:].double().mean())
    assert frame.change_new[3] == pytest.approx(float((found.cosine - found.cosine_before)[1, 0, :, 1].mean()))
    over = (found.success[1, 0].double() - found.success[1, 1:].double().mean(0)).mean()
    for name in ("own_caption", "new_caption"):
        assert frame[name][0] == pytest.approx(float(getattr(found, f"{name}_before").mean()))
        assert frame[name][3] == pytest.approx(float(getattr(found, name)[1, 0].mean()))
        assert frame[name][4] == pytest.approx(float(getattr(found, name)[1, 1:].mean()))
        assert bool((frame[f"{name}_low"] <= frame[name]).all())
    assert frame.success_over_control[3] == pytest.approx(float(over))
    assert bool((frame.success_low[1:] <= frame.success[1:]).all())


def test_the_plan() -> None:
    data = by_hand(40, 4, 3)
    plan = plan_steering(data, n_controls=3, seed=5)
    assert bool((plan.new_labels != data.labels).all())
    assert len(plan.new_labels.unique()) == 4
    assert torch.equal(plan.suppress[0], data.concepts.features[data.labels])
    assert torch.equal(plan.boost[0], data.concepts.features[plan.new_labels])
    live = (data.class_codes > 0).any(dim=0)
    for arm in range(1, 4):
        assert bool(live[plan.boost[arm]].all())
        for p in range(40):
            named = [*plan.suppress[arm, p].tolist(), *plan.boost[arm, p].tolist()]
            concept = [*plan.suppress[0, p].tolist(), *plan.boost[0, p].tolist()]
            assert len({*named, *concept}) == 8
            code = data.codes[p]
            first = float(code[plan.boost[0, p, 0]])
            nearest = sorted(abs(float(code[i]) - first) for i in range(len(code)) if i not in concept and live[i])
            assert abs(float(code[plan.boost[arm, p, 0]]) - first) <= nearest[N_NEAREST - 1]
    fewer = replace(data, codes=data.codes[:7], labels=data.labels[:7], caption_codes=None)
    assert torch.equal(plan_steering(fewer, n_controls=1, seed=5).suppress[1], plan.suppress[1, :7])
    assert not torch.equal(plan_steering(data, n_controls=1, seed=6).new_labels, plan.new_labels)


def test_an_emptied_code_says_nothing() -> None:
    data = by_hand(4, 2, 0, captions=False)
    codes = torch.zeros_like(data.codes).scatter(1, data.concepts.features[data.labels], 1.0)
    found = steering_effect(replace(data, codes=codes), strengths=1e-300, n_controls=0, progress=False)
    assert bool((found.predicted == found.new_labels).all())  # a direction, however short
    assert bool(found.retrieval.isnan().all())
    assert bool(found.own_caption.isnan().all())
    assert bool(found.new_caption_before.isnan().all())
    frame = found.to_frame()
    assert "success_over_control" not in frame
    assert math.isnan(frame.retrieval[1])
    tied = replace(data, codes=torch.zeros_like(codes))
    assert steering_effect(tied, n_controls=0, progress=False).predicted_before.tolist() == [-1] * 4


def test_on_a_planted_sparse_clip(planted_sparse: cle.HookedCLIP, tmp_path: Any) -> None:
    world = PlantedWorld(0)
    names = [entry.name for entry in world.unambiguous_classes]
    batch = world.sample(120, seed=5, split="test", classes=names)
    labels = [names.index(world.classes[int(label)].name) for label in batch.labels]
    data = SteeringData.from_clip(
        planted_sparse, normalise(batch.images), labels, names, captions=batch.captions, k=8, progress=False
    )
    assert 0.1 < data.typical_activation < 10
    found = steering_effect(data, strengths=[0.5, 8.0], n_controls=2, n_bootstrap=100, progress=False)
    frame = found.to_frame()
    weak, strong, control = frame.iloc[1], frame.iloc[3], frame.iloc[4]
    assert frame.kept[0] > 0.5
    assert strong.success > 0.8 > 0.1 > control.success
    assert strong.success_over_control_low > 0.6
    assert strong.change_new > weak.change_new > 0 > weak.change_old
    assert strong.kept < control.kept
    assert strong.own_caption < control.own_caption
    assert strong.new_caption > 0.5 > control.new_caption
    assert found.removed[0].mean() == pytest.approx(float(found.removed[1:].mean()), rel=0.4)
    found.save(tmp_path / "s.safetensors")
    again = SteeringEffect.load(tmp_path / "s.safetensors")
    assert again.to_frame().equals(frame)
    with pytest.raises(LoadError):
        ConceptFeatures.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize(("change", "words"), [
    (lambda data: {"labels": torch.tensor([0, 1])}, "one for each of 6"),
    (lambda data: {"labels": torch.tensor([0, 1, 2, 0, 1, 3])}, "labels are in 0..2"),
    (lambda data: {"labels": data.labels.float()}, "whole numbers"),
    (lambda data: {"labels": ["class 0"] * 6}, "whole numbers"),
    (lambda data: {"codes": data.codes[:, 1:]}, "codes of pictures are floats"),
    (lambda data: {"codes": -data.codes}, "negative"),
    (lambda data: {"class_codes": data.class_codes[:2]}, "there are 3 classes"),
    (lambda data: {"caption_codes": data.codes[:2]}, "6 pictures have 2 captions"),
    (lambda data: {"concepts": replace(data.concepts, features=torch.tensor([[0, 1], [1, 2], [0, 2]]))}, "'class 0'"),
])  # fmt: skip
def test_data_that_do_not_fit(change: Callable[[SteeringData], dict[str, Any]], words: str) -> None:
    data = by_hand(6, 3, 0)
    with pytest.raises(InputError, match=words):
        replace(data, **change(data))


def test_wrong_settings() -> None:
    data = by_hand(6, 3, 0)
    for arguments, words in (
        ({"strengths": []}, "above zero"),
        ({"strengths": [1.0, 0.0]}, "above zero"),
        ({"n_controls": -1}, "n_controls is a whole number, at least 0"),
        ({"n_bootstrap": 0}, "n_bootstrap"),
        ({"confidence": 1.0}, "confidence"),
    ):
        with pytest.raises(InputError, match=words):
            steering_effect(data, progress=False, **arguments)  # type: ignore[arg-type]
    few = replace(data, class_codes=data.class_codes * (torch.arange(16) < 5))
    with pytest.raises(InputError, match="too few other features"):
        steering_effect(few, n_controls=1, progress=False)
