"""Events and overlaps by loops over sets, on names made by hand and on a head between two states."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.semantics.activity import LatentActivity
from clip_lens_ext.semantics.references import References
from clip_lens_ext.sparse_clip import ConceptDrift, ConceptNames, concept_drift, name_concepts
from clip_lens_ext.towers.clip import HookedCLIP

pytestmark = pytest.mark.filterwarnings("ignore:the top pictures of other features")  # sets this small share much

TERMS = tuple("abcdefgh")
N_PICTURES, K_WORDS, K_IMAGES = 9, 2, 3


def names_of(words: list[list[int]], pictures: list[list[int]], **changed: Any) -> ConceptNames:
    """Names with these words and these pictures; every activation is 1."""

    def padded(rows: list[list[int]], k: int) -> Tensor:
        return torch.tensor([row + [-1] * (k - len(row)) for row in rows])

    word, sample = padded(words, K_WORDS), padded(pictures, K_IMAGES)
    n, n_active = len(words), (sample >= 0).sum(dim=1)
    ones = (sample >= 0).float()
    images = References(
        sample, ones, torch.full_like(sample, -1), N_PICTURES, tuple(map(str, range(N_PICTURES))),
        torch.arange(N_PICTURES), "hook_embedding", "pooled", (), None,
        {"model": "by hand", "sae_sha256": "", "data_fingerprint": "the same"},
        LatentActivity(n_active, n_active.double(), ones[:, 0], ones[:, 0], N_PICTURES),
    )  # fmt: skip
    nothing = torch.full((n,), torch.nan, dtype=torch.float64)
    n_words = (word >= 0).sum(dim=1)
    made = ConceptNames(
        word, (word >= 0).float(), n_words, images, *(nothing,) * 4, n_words.double() / len(TERMS),
        len(TERMS), "vocabulary", TERMS, ("{}",), "fingerprint", "judge", {},
    )  # fmt: skip
    return replace(made, **changed)


def random_names(seed: int, n: int) -> ConceptNames:
    generator = torch.Generator().manual_seed(seed)

    def some(k: int, of: int) -> list[list[int]]:
        sizes = torch.randint(0, k + 1, (n,), generator=generator).tolist()
        return [torch.randperm(of, generator=generator)[:size].tolist() for size in sizes]

    return names_of(some(K_WORDS, 4), some(K_IMAGES, 5))


def sets(rows: Tensor) -> list[set[int]]:
    return [{i for i in row if i >= 0} for row in rows.tolist()]


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a and b else math.nan


def slow_events(names: list[ConceptNames], most: float, least: float, n_min: int) -> set[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = set()
    n = len(names[0])
    words, pictures = [sets(one.word) for one in names], [sets(one.images.sample) for one in names]
    alive = [[bool(words[t][i] and pictures[t][i]) for i in range(n)] for t in range(len(names))]

    def pairs(t: int) -> set[tuple[int, int]]:
        large = [i for i in range(n) if len(pictures[t][i]) >= n_min]
        near = {i: max((jaccard(pictures[t][i], pictures[t][j]) for j in large if j != i), default=0) for i in large}
        overlaps = {(i, j): jaccard(pictures[t][i], pictures[t][j]) for i in large for j in large if i < j}
        return {(i, j) for (i, j), value in overlaps.items() if value >= least and value == near[i] == near[j]}

    for t in range(1, len(names)):
        for i in range(n):
            if alive[t][i] and not alive[t - 1][i]:
                found.add(("revival" if any(alive[s][i] for s in range(t)) else "birth", t, i, -1))
            if alive[t - 1][i] and not alive[t][i]:
                found.add(("death", t, i, -1))
            if alive[t - 1][i] and alive[t][i] and names[t].names[i] != names[t - 1].names[i] \
                    and jaccard(pictures[t - 1][i], pictures[t][i]) < most:  # fmt: skip
                found.add(("switch", t, i, -1))
        found |= {("merge", t, i, j) for i, j in pairs(t) - pairs(t - 1)}
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999), n=st.integers(2, 7), steps=st.integers(2, 4), n_min=st.integers(1, 2),
    least=st.sampled_from([0.2, 0.5, 1.0]), most=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
)  # fmt: skip
def test_by_loops(seed: int, n: int, steps: int, n_min: int, least: float, most: float) -> None:
    names = [random_names(7 * seed + t, n) for t in range(steps)]
    found = concept_drift(list(enumerate(names)), max_overlap=most, min_overlap=least, n_min=n_min)
    events = [(event.kind, event.step, event.feature, event.other) for event in found.events]
    assert set(events) == slow_events(names, most, least, n_min)
    assert len(set(events)) == len(events)
    assert int(found.counts().to_numpy().sum()) == len(events) == len(found.events_frame())
    for kind, of in (("word", lambda one: sets(one.word)), ("image", lambda one: sets(one.images.sample))):
        last = of(names[-1])
        for t, one in enumerate(names):
            now = of(one)
            for i in range(n):
                if not (found.alive[t, i] and found.alive[-1, i]):
                    own = control = math.nan
                else:
                    own = jaccard(now[i], last[i])
                    others = [jaccard(now[i], last[j]) for j in range(n) if j != i and last[j]]
                    control = fmean(others) if others else math.nan
                assert float(getattr(found, f"{kind}_stability")[t, i]) == pytest.approx(own, nan_ok=True)
                assert float(getattr(found, f"{kind}_control")[t, i]) == pytest.approx(control, nan_ok=True)
    for field in ("modality", "density"):
        expected = torch.stack([getattr(one, field) for one in names])
        torch.testing.assert_close(getattr(found, field), expected, equal_nan=True)


def test_each_event_by_hand() -> None:
    before = names_of([[0], [1], [2], [], [4, 5], [6]], [[0, 1, 2], [3, 4, 5], [6, 7], [1], [8, 0], []])
    after = names_of([[3], [1], [7], [3], [5, 4], []], [[6, 7, 8], [3, 4, 6], [6, 7], [1], [6, 7], [5]])
    again = names_of([[0], [1], [2], [], [4, 5], [6]], [[0, 1, 2], [3, 4, 5], [6, 7], [1], [8, 0], [5]])
    found = concept_drift({"1%": before, "10%": after, "100%": again})
    assert found.labels == ("1%", "10%", "100%")
    kinds = [(event.kind, event.step, event.feature, event.before, event.after) for event in found.events]
    assert kinds == [
        ("birth", 1, 3, None, "d"),
        ("switch", 1, 0, "a", "d"),
        ("switch", 1, 4, "e", "f"),  # feature 2 has another word, and the same pictures: no switch
        ("merge", 1, 2, "h", "f"),
        ("birth", 2, 5, None, "g"),
        ("death", 2, 3, "d", None),
        ("switch", 2, 0, "d", "a"),
        ("switch", 2, 4, "f", "e"),
    ]
    assert found.names(0) == ("a", "d", "a")
    assert [event.kind for event in found.of(4)] == ["switch", "merge", "switch"]
    assert found.of(4)[1].overlap == 1.0
    assert bool((found.image_stability[-1][found.alive[-1]] == 1).all())
    alive_again = concept_drift([("a", again), ("b", before), ("c", again)])
    assert [(e.kind, e.step) for e in alive_again.of(5)] == [("death", 1), ("revival", 2)]


def test_features_in_another_order() -> None:
    names = [random_names(seed, 6) for seed in (1, 2, 3)]
    order = [4, 2, 5, 0, 1, 3]

    def moved(one: ConceptNames) -> ConceptNames:
        words, pictures = ([sorted_row(row) for row in rows.tolist()] for rows in (one.word, one.images.sample))
        return names_of([words[i] for i in order], [pictures[i] for i in order])

    def sorted_row(row: list[int]) -> list[int]:
        return [i for i in row if i >= 0]

    plain, other = concept_drift(list(enumerate(names))), concept_drift(list(enumerate(map(moved, names))))
    torch.testing.assert_close(other.image_control, plain.image_control[:, order], equal_nan=True)
    torch.testing.assert_close(other.word_stability, plain.word_stability[:, order], equal_nan=True)

    def told(found: ConceptDrift, number: list[int]) -> set[tuple[Any, ...]]:
        return {
            (e.kind, e.step, *sorted(number[i] for i in (e.feature, e.other) if i >= 0)) for e in found.events
        }  # fmt: skip

    assert told(other, order) == told(plain, list(range(6)))


def test_a_head_that_is_replaced(planted_sparse: HookedCLIP) -> None:
    """Some features of a trained head get the weights of others: those switch, the rest stays as it was."""
    words = cle.Vocabulary.from_terms(dict.fromkeys(entry.name for entry in PlantedWorld(0).classes))
    pixels = normalise(PlantedWorld(0).sample(80, seed=4, split="test", overlay=None, word=None).images)

    def named(native: Any) -> ConceptNames:
        clip = HookedCLIP(native, preprocess=planted_sparse.preprocess, tokenizer=planted_sparse.tokenizer)
        return name_concepts(clip, words, pixels, k_images=5, progress=False)

    last = named(planted_sparse.native)
    one, two = last.top(2, by="agreement")
    chosen = [one, next(j for j in last.top(200, by="agreement") if last.names[j] != last.names[one])]
    native = copy.deepcopy(planted_sparse.native)
    with torch.no_grad():
        for head in (native.image_head, native.text_head):
            head.weight[chosen] = head.weight[chosen[::-1]].clone()
    found = concept_drift({0.1: named(native), 1.0: last})
    assert {event.feature for event in found.events if event.kind == "switch"} <= set(chosen)
    assert found.names(chosen[0]) == (last.names[chosen[1]], last.names[chosen[0]])
    others = [j for j in range(len(last)) if j not in chosen]
    stable = found.image_stability[0][others]
    assert bool((stable[stable.isfinite()] == 1).all())
    assert float(found.image_stability[0].nanmean()) > 3 * float(found.image_control[0].nanmean())
    assert two != one


def test_too_few_pictures_for_a_switch() -> None:
    """Where unrelated features overlap as much, nothing falls below the threshold; that is said."""
    crowded = names_of([[0]] * 4, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
    with pytest.warns(UserWarning, match="other features overlap by 0.5"):
        concept_drift([("a", crowded), ("b", crowded)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept_drift([("a", crowded), ("b", crowded)], max_overlap=0.6)


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = concept_drift([(t, random_names(t, 5)) for t in range(3)])
    found.save(tmp_path / "drift")
    again = ConceptDrift.load(tmp_path / "drift")
    assert repr(again) == repr(found)
    assert str(again.events) == str(found.events)  # NaN is not equal to itself
    assert again.to_frame().equals(found.to_frame())
    assert len(found.to_frame()) == 15
    assert (again.labels, again.settings, again.terms) == (found.labels, found.settings, found.terms)
    with pytest.raises(LoadError, match="no file of ConceptDrift"):
        ConceptDrift.load(tmp_path / "nothing")


def test_wrong_input() -> None:
    good = random_names(0, 4)
    others = References(**{**vars(good.images), "provenance": {**good.images.provenance, "data_fingerprint": "other"}})
    for given_, words in (
        ([("a", good)], "two or more"),
        ([("a", good), ("a", good)], "the label 'a'"),
        ([(1, good), ("1", good)], "the label '1'"),
        ([good, good], "pairs of a label"),
        ([("a", good), ("b", random_names(1, 5))], "other features"),
        ([("a", good), ("b", replace(good, vocabulary="another"))], "other vocabulary"),
        ([("a", good), ("b", replace(good, images=others))], "other pictures: "),
        ([("a", good), ("b", replace(good, word=good.word[:, :1]))], "other words of a feature"),
    ):
        with pytest.raises(InputError, match=words):
            concept_drift(given_)
    for settings_, words in (
        ({"max_overlap": 0.0}, "max_overlap is"),
        ({"min_overlap": 1.1}, "min_overlap is"),
        ({"n_min": 0}, "n_min must be"),
    ):
        with pytest.raises(InputError, match=words):
            concept_drift([("a", good), ("b", good)], **settings_)
    found = concept_drift([("a", good), ("b", good)])
    assert [event for event in found.events if event.kind != "merge"] == []
    with pytest.raises(InputError, match="features are 0 to 3"):
        found.of(4)
