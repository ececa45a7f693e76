"""Words, pictures and agreement by loops; a killed pass, dead features and broken pictures; the planted world's key."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.resumed import Stopping
from PIL import Image
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.sparse_clip import ConceptNames, add_sparse_heads, name_concepts
from clip_lens_ext.sparse_clip.agreement import agreement
from clip_lens_ext.towers.clip import HookedCLIP

K_WORDS, K_IMAGES = 3, 4
WORLD = PlantedWorld(0)
WORDS = cle.Vocabulary.from_terms(dict.fromkeys(entry.name for entry in WORLD.classes))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return normalise(WORLD.sample(90, seed=4, split="test", overlay=None, word=None).images)


def name(clip: HookedCLIP, pixels: Any, vocabulary: cle.Vocabulary = WORDS, **settings: Any) -> ConceptNames:
    given = {"k_words": K_WORDS, "k_images": K_IMAGES, "progress": False, **settings}
    return name_concepts(clip, vocabulary, pixels, **given)


@pytest.fixture(scope="module")
def named(planted_sparse: HookedCLIP, pixels: Tensor) -> ConceptNames:
    return name(planted_sparse, pixels)


def with_heads(clip: HookedCLIP, change: Any) -> HookedCLIP:
    """A copy with other weights in both heads: `change(rows, which)` gives them."""
    native = copy.deepcopy(clip.native)
    with torch.no_grad():
        for which in ("image_head", "text_head"):
            head = getattr(native, which)
            head.weight.copy_(change(head.weight.clone(), which))
    return HookedCLIP(native, preprocess=clip.preprocess, tokenizer=clip.tokenizer, model_name=clip.model_name)


def same(one: ConceptNames, other: ConceptNames) -> None:
    for field in ("word", "word_activation", "n_words", "agreement", "control", "rank", "first", "text_energy"):
        assert torch.equal(getattr(one, field).nan_to_num(9), getattr(other, field).nan_to_num(9)), field
    for field in ("sample", "activation", "indexes"):
        assert torch.equal(getattr(one.images, field), getattr(other.images, field)), field
    assert torch.equal(one.images.activity.total, other.images.activity.total)
    assert one.images.names == other.images.names
    assert (one.names, one.terms, one.judge, one.n_texts) == (other.names, other.terms, other.judge, other.n_texts)
    assert one.images.skipped == other.images.skipped


@torch.no_grad()
def test_words_and_pictures_by_loops(planted_sparse: HookedCLIP, named: ConceptNames, pixels: Tensor) -> None:
    words, pictures = planted_sparse.embed_texts(WORDS.terms), planted_sparse.embed_images(pixels)
    for codes, number, activation, count in (
        (words, named.word, named.word_activation, named.n_words),
        (pictures, named.images.sample, named.images.activation, named.images.activity.n_active),
    ):
        rows, k = codes.double().tolist(), number.shape[1]
        for j in range(len(named)):
            active = [i for i in range(len(rows)) if rows[i][j] > 0]
            assert int(count[j]) == len(active)
            best = sorted(active, key=lambda i: -rows[i][j])[:k]
            values = [rows[i][j] for i in best]
            assert activation[j].tolist() == pytest.approx(values + [0.0] * (k - len(best)), rel=1e-4, abs=1e-5)
            for place, i in enumerate(number[j].tolist()):
                assert (i >= 0) == (place < len(best))
                if i >= 0:  # in another batch rounding may change the order of two that are as good as equal
                    assert rows[i][j] == pytest.approx(values[place], rel=1e-4, abs=1e-5)
    e_image, e_text = pictures.double().mean(dim=0), words.double().mean(dim=0)
    torch.testing.assert_close(named.density, (e_image + e_text) / 2, rtol=1e-4, atol=1e-6)
    expected = e_image / (e_image + e_text)
    torch.testing.assert_close(named.modality, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert (named.text_source, named.n_texts) == ("vocabulary", len(WORDS))


def slow_agreement(words: list[list[int]], t: Tensor, rows: list[list[int]], x: Tensor) -> list[list[float]]:
    """Score, control, rank and share of the first place: every pair of a word and a picture by itself."""

    def centred(vectors: Tensor) -> list[Tensor]:
        unit = [v.double() / math.sqrt(float(v.double() @ v.double())) for v in vectors]
        mean = sum(unit[1:], unit[0]) / len(unit)
        return [u - mean for u in unit]

    t_, x_ = centred(t), centred(x)

    def cos(a: Tensor, b: Tensor) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    def fit(i: int, j: int) -> float:
        return fmean(cos(t_[w], x_[p]) for w in words[i] for p in rows[j])

    found = []
    alive = [i for i in range(len(words)) if words[i] and rows[i]]
    for j in range(len(words)):
        if j not in alive:
            found.append([math.nan] * 4)
            continue
        own, others = fit(j, j), [fit(i, j) for i in alive if i != j]
        rank = 1 + sum(other > own + 1e-9 for other in others) + sum(abs(other - own) <= 1e-9 for other in others) / 2
        equal = 1 + sum(abs(other - own) <= 1e-9 for other in others)
        first = 0.0 if any(other > own + 1e-9 for other in others) else 1 / equal
        found.append([own, fmean(others) if others else math.nan, rank, first])
    return found


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), n=st.integers(1, 6))
def test_agreement_by_loops(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t, x = torch.randn(7, 5, generator=generator) + 1, 3 * torch.randn(9, 5, generator=generator) - 1
    words = [torch.randperm(7, generator=generator)[: int(k)] for k in torch.randint(0, 4, (n,), generator=generator)]
    rows = [torch.randperm(9, generator=generator)[: int(k)] for k in torch.randint(0, 5, (n,), generator=generator)]
    if n > 2:
        words[2] = words[0]  # two features with the same words: a tie
    padded = [torch.full((n, 4), -1) for _ in range(2)]
    for into, lists in zip(padded, (words, rows), strict=True):
        for i, one in enumerate(lists):
            into[i, : len(one)] = one
    found = torch.stack(list(agreement(padded[0], t, padded[1], x)), dim=1)
    expected = slow_agreement([w.tolist() for w in words], t, [r.tolist() for r in rows], x)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_chance_is_exact_where_words_are_shared() -> None:
    """Ten features and two words: the mean over all ways to deal five of them, and what a good naming reaches."""
    generator = torch.Generator().manual_seed(3)
    t, x = torch.randn(2, 5, generator=generator), torch.randn(10, 5, generator=generator)
    words, rows = torch.arange(10)[:, None] % 2, torch.arange(10)[:, None]
    deals = [agreement(words[list(order)], t, rows[:5], x).first.mean() for order in itertools.permutations(range(5))]
    assert float(torch.stack(deals).mean()) == pytest.approx(1 / 5, abs=1e-12)
    found = agreement(words, t, rows, t[words[:, 0]])
    assert not bool((found.rank == 1).any())
    assert found.first.tolist() == [0.2] * 10  # the best that two words can do


def test_agreement_without_a_direction() -> None:
    own = torch.zeros(2, 1, dtype=torch.int64)
    found = agreement(own, torch.ones(1, 3), torch.tensor([[0], [1]]), torch.eye(3)[:2])
    assert all(bool(one.isnan().all()) for one in found)


def test_agreement_of_the_planted_features(planted_sparse: HookedCLIP, named: ConceptNames, pixels: Tensor) -> None:
    judge = cle.planted_clip()
    with torch.no_grad():
        t, x = judge.embed_texts(WORDS.terms), judge.embed_images(pixels)
    used = sorted({i for i in named.images.sample.flatten().tolist() if i >= 0})
    words = [[w for w in row if w >= 0] for row in named.word.tolist()]
    rows = [[used.index(i) for i in row if i >= 0] for row in named.images.sample.tolist()]
    some = [j for j in range(len(named)) if words[j] and rows[j]][:25]
    picked = [[lists[j] for j in some] for lists in (words, rows)]
    scores = [one[0] for one in slow_agreement(picked[0], t, picked[1], x[used])]
    assert named.agreement[some].tolist() == pytest.approx(scores, abs=1e-5)


def test_the_planted_world_shows_what_the_names_say(planted_sparse: HookedCLIP) -> None:
    """The key, and no judge: are the class names of a feature the classes of its pictures?"""
    batch = WORLD.sample(300, seed=9, split="test", overlay=None, word=None)
    found = name(planted_sparse, normalise(batch.images), k_words=2, k_images=5)
    assert found.mean_agreement > found.mean_control + 0.2
    assert found.retrieval_accuracy > 5 * found.retrieval_chance
    shown = [WORLD.classes[label].name for label in batch.labels.tolist()]

    def right(names_of: int, pictures_of: int) -> float:
        words = {word.name for word in found.of(names_of).words}
        return fmean(shown[i] in words for i in found.images.of(pictures_of).sample.tolist())

    top = found.top(60, by="density")
    own = fmean(right(j, j) for j in top)
    dealt = fmean(right(i, j) for i in top for j in top if i != j)
    assert own > 3 * dealt
    # Where words and pictures agree by the judge, they agree by the key.
    order = found.top(len(found), by="agreement")
    half = len(order) // 2
    assert fmean(right(j, j) for j in order[:half]) > fmean(right(j, j) for j in order[half:])


def test_features_in_another_order(planted_sparse: HookedCLIP, named: ConceptNames, pixels: Tensor) -> None:
    order = torch.randperm(len(named), generator=torch.Generator().manual_seed(0))
    other = name(with_heads(planted_sparse, lambda rows, _: rows[order]), pixels)
    assert torch.equal(other.word, named.word[order])
    assert torch.equal(other.images.sample, named.images.sample[order])
    torch.testing.assert_close(other.agreement, named.agreement[order], equal_nan=True)
    torch.testing.assert_close(other.rank, named.rank[order], equal_nan=True)


def test_dead_features_have_no_name_and_no_pictures(
    planted_sparse: HookedCLIP, pixels: Tensor, named: ConceptNames
) -> None:
    # Which features a training leaves alive differs between machines: three that are, in both towers.
    alive = (named.n_words > 0) & (named.images.activity.n_active > 0)
    no_image, no_word, neither = alive.nonzero().flatten()[:3].tolist()

    def dead(rows: Tensor, which: str) -> Tensor:
        rows[{"image_head": [no_image, neither], "text_head": [no_word, neither]}[which]] = 0
        return rows

    found = name(with_heads(planted_sparse, dead), pixels)
    assert found.names[no_word] is None
    assert found.of(no_word).words == found.of(no_image).images == ()
    assert found.n_unnamed == named.n_unnamed + 2
    assert found.n_without_images == named.n_without_images + 2
    assert (float(found.modality[no_image]), float(found.modality[no_word])) == (0.0, 1.0)
    assert math.isnan(found.modality[neither])
    assert bool(found.agreement[[no_image, no_word, neither]].isnan().all())
    assert found.n_scored == int(((found.n_words > 0) & (found.images.activity.n_active > 0)).sum())
    assert {no_image, no_word, neither}.isdisjoint(found.top(len(found)))
    everything = name(with_heads(planted_sparse, lambda rows, which: rows * (which == "text_head")), pixels)
    assert everything.n_without_images == len(everything)
    assert everything.n_scored == 0
    assert math.isnan(everything.retrieval_accuracy)


def test_a_pass_that_was_stopped(planted_sparse: HookedCLIP, pixels: Tensor, tmp_path: Path) -> None:
    some, path = pixels[:30], tmp_path / "pass"
    whole = name(planted_sparse, Stopping(some, None), batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        name(planted_sparse, Stopping(some, 20), batch_size=8, checkpoint=path)
    read: list[int] = []
    with planted_sparse.vision.hooks(fwd_hooks=[("hook_embed", lambda value, hook: read.append(len(value)))]):
        same(name(planted_sparse, Stopping(some, None), batch_size=8, checkpoint=path), whole)
    assert sum(read) == 30 - 16  # what was there is not computed again
    assert (tmp_path / "pass.judge").exists()
    with pytest.raises(InputError, match="k_images was 4 and is now 5"):
        name(planted_sparse, Stopping(some, None), batch_size=8, checkpoint=path, k_images=5)


def test_a_folder_with_a_broken_picture(planted_sparse: HookedCLIP, tmp_path: Path) -> None:
    batch = WORLD.sample(6, seed=2, split="test")
    for number, picture in enumerate(batch.images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    found = name(planted_sparse, tmp_path)
    assert [skip.name for skip in found.images.skipped] == ["2.png"]
    assert found.images.n_samples == 5
    assert found.of(found.top(1)[0]).images[0].name.endswith(".png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in the folder"):
        name(planted_sparse, tmp_path / "empty")


@torch.no_grad()
def test_templates_texts_and_judges(planted_sparse: HookedCLIP, pixels: Tensor) -> None:
    some = pixels[:20]
    vocabulary = cle.Vocabulary.from_terms(["crown", "gear", "heart"], templates=["{}", "a photo of a {}"])
    plain = name(planted_sparse, some, vocabulary)
    codes = [planted_sparse.embed_texts([template.format(w) for w in vocabulary.terms])
             for template in ("{}", "a photo of a {}")]  # fmt: skip
    best = ((codes[0] + codes[1]) / 2).max(dim=0).values
    torch.testing.assert_close(plain.word_activation[:, 0], best, rtol=1e-4, atol=1e-6)
    captions = ["a photo of a gear", "a photo of a bow"]
    other = name(planted_sparse, some, vocabulary, texts=captions)
    torch.testing.assert_close(
        other.text_energy, planted_sparse.embed_texts(captions).double().mean(dim=0), rtol=1e-4, atol=1e-6
    )
    assert (other.text_source, other.n_texts) == ("texts", 2)
    # The dense model below the heads is the default judge; given by hand it says the same.
    dense = cle.planted_clip()
    by_hand = name(planted_sparse, some, vocabulary, judge=dense)
    torch.testing.assert_close(by_hand.agreement, plain.agreement, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert plain.judge == f"the dense part of {planted_sparse.model_name}"
    vectors = vocabulary.embed(dense, progress=False).vectors
    terms = cle.TermEmbeddings.from_vectors(vectors, vocabulary.terms, model=dense.model_name)
    blind = HookedCLIP(dense.native.visual, preprocess=dense.preprocess, model_name="blind to words")
    given = name(planted_sparse, some, vocabulary, judge=blind, judge_terms=terms)
    torch.testing.assert_close(given.agreement, by_hand.agreement, equal_nan=True, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="pass judge_terms="):
        name(planted_sparse, some, vocabulary, judge=blind)
    with pytest.raises(InputError, match="other words"):
        name(planted_sparse, some, WORDS, judge=blind, judge_terms=terms)
    narrow = cle.TermEmbeddings.from_vectors(vectors[:, :7], vocabulary.terms, model="narrow")
    with pytest.raises(InputError, match="7 numbers"):
        name(planted_sparse, some, vocabulary, judge=blind, judge_terms=narrow)


def test_in_words(named: ConceptNames, tmp_path: Path) -> None:
    frame = named.to_frame()
    assert len(frame) == len(named) == 512
    feature = named.top(1, by="lift")[0]
    concept = named.of(feature)
    assert frame.words[feature] == ", ".join(word.name for word in concept.words)
    assert frame.name[feature] == concept.name == concept.words[0].name
    assert [one.activation for one in concept.images] == sorted((o.activation for o in concept.images), reverse=True)
    assert concept.name is not None
    found = named.find(concept.name)
    assert feature in found
    first = [next(w.activation for w in named.of(j).words if w.name == concept.name) for j in found]
    assert first == sorted(first, reverse=True)
    lifts = named.lift[named.top(9, by="lift")].tolist()
    assert lifts == sorted(lifts, reverse=True)
    assert "agreement" in repr(named)
    named.save(tmp_path / "names")
    same(ConceptNames.load(tmp_path / "names"), named)
    with pytest.raises(LoadError, match="no file of ConceptNames"):
        ConceptNames.load(tmp_path / "nothing")
    for call, words in (
        (lambda: named.of(512), "features are 0 to 511"),
        (lambda: named.find("crwon"), "not one of the"),
        (lambda: named.top(0), "k is at least 1"),
        (lambda: named.top(3, by="rank"), "by one of"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_wrong_input(planted_sparse: HookedCLIP, pixels: Tensor) -> None:
    some, dense = pixels[:4], cle.planted_clip()
    for settings_, words in (
        ({"k_words": 0}, "k_words must be"),
        ({"k_images": True}, "k_images must be"),
        ({"texts": "one string"}, "texts is a list"),
        ({"texts": []}, "texts is a list"),
    ):
        with pytest.raises(InputError, match=words):
            name(planted_sparse, some, **settings_)
    with pytest.raises(InputError, match="no dense model below"):
        name(dense, some)
    with pytest.raises(InputError, match="is there a ReLU"):
        name(dense, some, judge=dense)
    with pytest.raises(InputError, match="is there a ReLU"):
        name(add_sparse_heads(dense, 64, activation="none"), some)
    with pytest.raises(InputError, match="vision tower alone"):
        name(HookedCLIP(dense.native.visual, model_name="eyes"), some)
    with pytest.raises(InputError, match="token ids"):
        name(planted_sparse, planted_sparse.tokenize(["crown", "gear"]))
