"""Every measure and every chance by loops over samples, pairs and subsets; any cut into batches gives the same."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.data import ImageBatch, image_batches
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.saes.codes import SparseCodes
from clip_lens_ext.sparse_clip import CodeBatch, CodeMeasures, StreamingCodeMeasures, code_measures
from clip_lens_ext.towers.clip import HookedCLIP

D, D_EMBED, TAU, LOW, HIGH = 6, 3, 0.001, 0.25, 0.75


def codes_of(n: int, seed: int) -> Tensor:
    rows = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).relu()
    rows[:, 4] = 0  # never active
    rows[:, 5] *= 1e-4  # active below the threshold alone
    rows[1:, 3] = 0  # active on one sample at most
    return rows


def embeddings_of(n: int, seed: int) -> Tensor:
    return torch.randn(n, D_EMBED, generator=torch.Generator().manual_seed(1000 + seed)) + torch.tensor([0.5, 0, 0])


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def pairs_mean(samples: list[int], rows: Tensor) -> float:
    return fmean(cosine(rows[i], rows[j]) for i in samples for j in samples if i != j)


def assert_same(one: CodeMeasures, other: CodeMeasures) -> None:
    for name in ("clarity", "clarity_error", "image_energy", "text_energy", "modality_error"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True, rtol=1e-9, atol=1e-7)
    assert torch.equal(one.image_count, other.image_count)
    assert torch.equal(one.text_count, other.text_count)
    assert (one.n_images, one.n_texts, one.threshold, one.n_min, one.band) == (
        other.n_images, other.n_texts, other.threshold, other.n_min, other.band
    )  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(n=st.integers(2, 12), n_texts=st.integers(1, 9), seed=st.integers(0, 99))
def test_by_loops(n: int, n_texts: int, seed: int) -> None:
    images, texts, judge = codes_of(n, seed), codes_of(n_texts, seed + 500), embeddings_of(n, seed)
    found = code_measures(images, texts, judge)
    assert found.clarity_baseline == pytest.approx(pairs_mean(list(range(n)), judge), abs=1e-9)
    clarities = []
    for j in range(D):
        active = [i for i in range(n) if images[i, j] > TAU]
        if len(active) >= 2:
            clarities.append(pairs_mean(active, judge))
            assert float(found.clarity[j]) == pytest.approx(clarities[-1], abs=1e-9)
        else:
            assert math.isnan(found.clarity[j])
            assert math.isnan(found.clarity_error[j])
        e_image, e_text = fmean(map(float, images[:, j].double())), fmean(map(float, texts[:, j].double()))
        assert float(found.density[j]) == pytest.approx((e_image + e_text) / 2, abs=1e-12)
        score = e_image / (e_image + e_text) if e_image + e_text else math.nan
        assert float(found.modality[j]) == pytest.approx(score, nan_ok=True)
    assert found.mean_clarity == pytest.approx(fmean(clarities) if clarities else math.nan, nan_ok=True)
    assert found.active_share == pytest.approx(len(clarities) / D)
    assert found.l0_image == pytest.approx(sum(float(v) > TAU for v in images.flatten()) / n)
    assert found.l0_text == pytest.approx(sum(float(v) > TAU for v in texts.flatten()) / n_texts)
    scores = [float(s) for s in found.modality if not math.isnan(s)]
    bimodal = fmean(LOW <= s <= HIGH for s in scores) if scores else math.nan
    assert found.bimodal_share == pytest.approx(bimodal, nan_ok=True)
    assert len(found) == len(found.to_frame()) == D


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_the_error_of_clarity_is_that_of_every_subset(n: int) -> None:
    whole = 7
    judge = embeddings_of(whole, 3)
    means = [pairs_mean(list(subset), judge) for subset in itertools.combinations(range(whole), n)]
    images = torch.zeros(whole, 1)
    images[:n] = 1
    found = code_measures(images, None, judge)
    assert fmean(means) == pytest.approx(found.clarity_baseline)
    spread = math.sqrt(fmean((one - fmean(means)) ** 2 for one in means))
    assert float(found.clarity_error[0]) == pytest.approx(spread, abs=1e-7)


@pytest.mark.parametrize("n", [2, 3])
def test_the_error_of_clarity_on_few_pictures(n: int) -> None:
    found = code_measures(torch.ones(n, 1), None, embeddings_of(n, 0))
    assert float(found.clarity_error[0]) == 0
    assert float(found.clarity[0]) == pytest.approx(found.clarity_baseline)


def test_the_error_of_modality_is_that_of_every_shuffle() -> None:
    n = 5
    images, texts = codes_of(n, 0)[:, :2], codes_of(n, 1)[:, :2]
    both = torch.cat([images, texts]).double()
    found = code_measures(images, texts, embeddings_of(n, 0))
    for j in range(2):
        scores = []
        for subset in itertools.combinations(range(2 * n), n):
            one = float(both[list(subset), j].mean())
            scores.append(one / (2 * float(both[:, j].mean())))
        assert fmean(scores) == pytest.approx(0.5)
        assert float(found.modality_error[j]) == pytest.approx(math.sqrt(fmean((s - 0.5) ** 2 for s in scores)))


def test_the_error_of_modality_with_more_pictures_than_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.rand(600, 1, generator=generator)
    found = code_measures(both[:450], both[450:], torch.rand(450, 2, generator=generator))
    drawn = []
    for _ in range(2000):
        order = torch.randperm(600, generator=generator)
        one, other = float(both[order[:450]].mean()), float(both[order[450:]].mean())
        drawn.append(one / (one + other))
    spread = math.sqrt(fmean((s - 0.5) ** 2 for s in drawn))
    assert float(found.modality_error[0]) == pytest.approx(spread, rel=0.08)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), low=st.floats(0.05, 0.5), high=st.floats(0.5, 0.95))
def test_energies_dealt_anew_by_every_pair(seed: int, low: float, high: float) -> None:
    images, texts = codes_of(4, seed), codes_of(3, seed + 1)
    texts[:, 0] = 0
    found = code_measures(images, texts, embeddings_of(4, seed), band=(low, high))
    e_image, e_text = found.image_energy.tolist(), found.text_energy.tolist()
    alive = [j for j in range(D) if e_image[j] + e_text[j] > 0]
    scores = [e_image[i] / (e_image[i] + e_text[j]) for i in alive for j in alive if e_image[i] + e_text[j] > 0]
    share = fmean(low <= s <= high for s in scores) if scores else math.nan
    assert found.bimodal_share_by_chance == pytest.approx(share, nan_ok=True)


@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(0, 20), min_size=2, max_size=2), seed=st.integers(0, 99), backwards=st.booleans())
def test_streaming_and_merging_in_any_order(cuts: list[int], seed: int, backwards: bool) -> None:
    images, texts, judge = codes_of(20, seed), codes_of(20, seed + 1), embeddings_of(20, seed)
    first, last = sorted(cuts)
    parts = []
    for part in (slice(0, first), slice(first, last), slice(last, 20)):
        one = StreamingCodeMeasures(D, D_EMBED)
        one.update(CodeBatch(images[part], judge[part]))
        one.update(CodeBatch(texts=texts[part]))
        again = StreamingCodeMeasures(D, D_EMBED)
        again.load_state_dict(one.state_dict())
        parts.append(again)
    if backwards:
        parts.reverse()
    assert parts[0].merge(parts[1]).merge(parts[2]) is parts[0]
    assert_same(parts[0].result(), code_measures(images, texts, judge))


def test_features_in_another_order() -> None:
    images, texts, judge = codes_of(20, 0), codes_of(15, 1), embeddings_of(20, 0)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    plain, other = code_measures(images, texts, judge), code_measures(images[:, order], texts[:, order], judge)
    torch.testing.assert_close(other.clarity, plain.clarity[order], equal_nan=True)
    torch.testing.assert_close(other.modality_error, plain.modality_error[order], equal_nan=True)
    assert other.bimodal_share_by_chance == plain.bimodal_share_by_chance


def test_codes_of_an_sae() -> None:
    dense = torch.stack([codes_of(700, 0), codes_of(700, 1)], dim=1)  # [sample token d_code], more than one chunk
    judge = embeddings_of(700, 0)
    found = code_measures(SparseCodes.from_dense(dense), None, judge)
    assert_same(found, code_measures(dense.amax(dim=1), None, judge))
    in_parts = StreamingCodeMeasures(D, D_EMBED)
    for start in range(0, 700, 70):
        in_parts.update(CodeBatch(dense.amax(dim=1)[start : start + 70], judge[start : start + 70]))
    assert_same(found, in_parts.result())
    assert math.isnan(found.l0_text)
    assert math.isnan(found.bimodal_share)
    assert math.isnan(found.bimodal_share_by_chance)
    assert bool(found.modality.isnan().all() and found.modality_error.isnan().all())


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = code_measures(codes_of(9, 0), codes_of(8, 1), embeddings_of(9, 0))
    found.save(tmp_path / "m")
    again = CodeMeasures.load(tmp_path / "m")
    assert_same(again, found)
    assert repr(again) == repr(found)
    assert again.provenance == found.provenance
    with pytest.raises(LoadError, match="no file of CodeMeasures"):
        CodeMeasures.load(tmp_path / "nothing")


def test_wrong_input() -> None:
    good, judge = codes_of(4, 0), embeddings_of(4, 0)
    measures = StreamingCodeMeasures(D, D_EMBED)
    negative = SparseCodes.from_dense(torch.tensor([[[0.0] * D], [[-1.0] * D]]))
    for batch, words in (
        (CodeBatch(good), "beside them"),
        (CodeBatch(judge=judge), "beside them"),
        (CodeBatch(good[:, :2], judge), "codes are floats"),
        (CodeBatch(good.long(), judge), "codes are floats"),
        (CodeBatch(texts=good[0]), "codes are floats"),
        (CodeBatch(SparseCodes.from_dense(torch.ones(4, 1, 2)), judge), "SparseCodes of 2"),
        (CodeBatch(-good, judge), "negative activation"),
        (CodeBatch(negative, judge[:2]), "sample 1 of the batch"),
        (CodeBatch(texts=good * math.nan), "NaN, infinite"),
        (CodeBatch(good, judge[:3]), "4 pictures and a judge's embeddings of 3"),
        (CodeBatch(good, judge[:, :2]), "embeddings are floats"),
        (CodeBatch(good, judge * 0), "embedding of sample 0"),
        (CodeBatch(good, judge, good * math.inf), "NaN, infinite"),
    ):
        with pytest.raises(InputError, match=words):
            measures.update(batch)
    assert measures.image.n == measures.text.n == measures.pairs.n == 0  # nothing of a bad batch stays
    with pytest.raises(InputError, match="no picture yet"):
        measures.result()
    for band in ((0.0, 0.5), (0.6, 0.4), (0.5, 1.0)):
        with pytest.raises(InputError, match="band is"):
            StreamingCodeMeasures(D, D_EMBED, band=band)
    with pytest.raises(InputError, match="n_min is at least 2"):
        StreamingCodeMeasures(D, D_EMBED, n_min=1)
    other = StreamingCodeMeasures(D, D_EMBED, band=(0.4, 0.6))
    with pytest.raises(InputError, match="do not merge"):
        measures.merge(other)
    with pytest.raises(InputError, match="has the band"):
        measures.load_state_dict(other.state_dict())
    with pytest.raises(InputError, match="another threshold or n_min"):
        measures.load_state_dict(StreamingCodeMeasures(D, D_EMBED, n_min=3).state_dict())
    with pytest.raises(InputError, match="different threshold"):
        measures.merge(StreamingCodeMeasures(D, D_EMBED, threshold=0.5))
    with pytest.raises(InputError, match=r"\[sample d_code\]"):
        code_measures(good[0], None, judge)
    with pytest.raises(InputError, match=r"\[sample d_embed\]"):
        code_measures(good, None, judge[0])


def test_a_sparse_clip_and_a_pass_that_was_stopped(planted_sparse: HookedCLIP, tmp_path: Path) -> None:
    batch = PlantedWorld(0).sample(120, seed=7, split="test", overlay=None, word=None)
    pixels, judge = normalise(batch.images), cle.planted_clip()
    left = [2]

    @torch.no_grad()
    def step(part: ImageBatch) -> CodeBatch:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        captions = [batch.captions[i] for i in part.indexes]
        texts = planted_sparse.embed_texts(captions)
        return CodeBatch(planted_sparse.embed_images(part.pixels), judge.embed_images(part.pixels), texts)

    d_code = planted_sparse.vision.cfg.d_embed

    def run() -> CodeMeasures:
        found = StreamingCodeMeasures(d_code, judge.vision.cfg.d_embed)
        batches = image_batches(pixels, batch_size=40)
        run_pass(batches, step, found, checkpoint=tmp_path / "pass", progress=False)
        return found.result()

    with pytest.raises(KeyboardInterrupt):
        run()
    left[0] = 99
    found = run()
    with torch.no_grad():
        codes = planted_sparse.embed_images(pixels), planted_sparse.embed_texts(batch.captions)
        whole = code_measures(*codes, judge.embed_images(pixels))
    torch.testing.assert_close(found.clarity, whole.clarity, equal_nan=True, rtol=1e-4, atol=1e-4)
    # Trained features go with what the judge holds alike, and the two towers share them.
    assert found.mean_clarity > found.clarity_baseline + 0.05
    assert found.bimodal_share > found.bimodal_share_by_chance
