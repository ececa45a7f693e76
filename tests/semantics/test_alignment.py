"""`align` against loops over latents and terms, with every scorer; labels, margins and queries."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import semantics as oracle
from oracles.saes import SAEFormula, build_sae
from tiny_clips import tiny_clip
from torch import Tensor

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics import (
    Alignment,
    DecoderProjection,
    EmptyPrompt,
    ReferenceEmbeddings,
    References,
    SoftWPMI,
    TermEmbeddings,
    Vocabulary,
    align,
    collect_references,
    embed_references,
    label_uniqueness,
)
from clip_lens_ext.semantics.alignment import _best, _TopTerms
from clip_lens_ext.semantics.scorers import ScoreBlock
from clip_lens_ext.towers import HookedCLIP

TERMS = ["dog", "cat", "cow", "a b", "xyz", "q", "lamp"]
# Cosines of float64 vectors of 20 numbers.
EXACT = 1e-12


@pytest.fixture(scope="module")
def embeddings(clip: HookedCLIP, pixels: Tensor, references: References) -> ReferenceEmbeddings:
    return embed_references(references, pixels[:7], clip, progress=False)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.from_terms(TERMS)


def run(references: Any, vocabulary: Vocabulary, judge: HookedCLIP, **settings: Any) -> Alignment:
    return align(references, vocabulary, judge, progress=False, **settings)


def own_rows(embeddings: ReferenceEmbeddings, latent: int) -> list[list[float]]:
    return [embeddings.vectors[row].tolist() for row in embeddings.row[latent].tolist() if row >= 0]


def assert_labels(found: Alignment, expected: dict[int, list[float]], n_labels: int = 5, abs: float = EXACT) -> None:
    """Labels, order and scores are those of whole rows of scores; latents without a row have none."""
    for latent in range(found.d_sae):
        if latent not in expected:
            assert found.labels[latent] is None
            assert found.of(latent) == ()
            assert found.score[latent].isnan().all()
            continue
        best = oracle.ranked(expected[latent], n_labels)
        assert found.term[latent].tolist() == best
        assert found.score[latent].tolist() == pytest.approx([expected[latent][t] for t in best], abs=abs)
        assert found.labels[latent] == TERMS[best[0]]
        assert float(found.margin[latent]) == pytest.approx(
            expected[latent][best[0]] - expected[latent][best[1]], abs=2 * abs
        )
    assert found.n_unlabelled == found.d_sae - len(expected) > 0


def cosine_rows(embeddings: ReferenceEmbeddings, clip: HookedCLIP, *, unit: bool = False) -> dict[int, list[float]]:
    terms = [clip.embed_texts(term)[0].tolist() for term in TERMS]
    empty = clip.embed_texts("")[0].tolist()
    expected = {}
    for latent in range(embeddings.d_sae):
        rows = own_rows(embeddings, latent)
        if unit:
            rows = [[x / math.sqrt(oracle.dot(row, row)) for x in row] for row in rows]
        if rows:
            expected[latent] = [oracle.empty_prompt(rows, term, empty) for term in terms]
    return expected


@pytest.mark.parametrize("mean", ["raw", "unit"])
def test_empty_prompt_against_loops(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary, mean: Any
) -> None:
    scorer = "empty_prompt" if mean == "raw" else EmptyPrompt(mean="unit")
    found = run(embeddings, vocabulary, clip, scorer=scorer)
    assert_labels(found, cosine_rows(embeddings, clip, unit=mean == "unit"))
    assert (found.scorer, found.unit, found.settings) == ("empty_prompt", "difference of cosines", {"mean": mean})
    assert torch.equal(found.n_references, embeddings.n_references)


def test_raw_and_unit_means_are_not_the_same(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary
) -> None:
    raw = run(embeddings, vocabulary, clip)
    unit = run(embeddings, vocabulary, clip, scorer=EmptyPrompt(mean="unit"))
    assert not torch.allclose(raw.score, unit.score, equal_nan=True)


@pytest.mark.parametrize("latents", [1, 5, 1000])
@pytest.mark.parametrize("terms", [1, 2, 1000])
@pytest.mark.parametrize("n_labels", [1, 3, 50])
def test_blocks_change_nothing(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch,
    latents: int, terms: int, n_labels: int,
) -> None:  # fmt: skip
    whole = {scorer: run(embeddings, vocabulary, clip, scorer=scorer) for scorer in ("empty_prompt", "soft_wpmi")}
    monkeypatch.setattr("clip_lens_ext.semantics.scorers._LATENTS_AT_ONCE", latents)
    monkeypatch.setattr("clip_lens_ext.semantics.scorers.TERMS_AT_ONCE", terms)
    monkeypatch.setattr("clip_lens_ext.semantics.soft_wpmi.TERMS_AT_ONCE", terms)
    for scorer, one in whole.items():
        found = run(embeddings, vocabulary, clip, scorer=scorer, n_labels=n_labels)
        assert found.term.shape == (embeddings.d_sae, min(n_labels, len(TERMS)))
        shared = min(n_labels, 5)
        assert torch.equal(found.term[:, :shared], one.term[:, :shared])
        torch.testing.assert_close(found.score[:, :shared], one.score[:, :shared], rtol=0, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "weight": 0.5, "first": 0.9, "last": 0.5, "floor": 0.0}])
def test_soft_wpmi_against_loops(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary, settings: dict[str, float]
) -> None:
    found = run(embeddings, vocabulary, clip, scorer=SoftWPMI(**settings) if settings else "soft_wpmi")
    rows = {latent: own_rows(embeddings, latent) for latent in range(embeddings.d_sae)}
    rows = {latent: own for latent, own in rows.items() if own}
    assert len({len(own) for own in rows.values()}) > 1  # some latents have padding
    terms = [clip.embed_texts(term)[0].tolist() for term in TERMS]
    scores = oracle.soft_wpmi(list(rows.values()), terms, 4, **settings)
    # log(1 + m (p - 1)) amplifies rounding up to 1 / (1 - m) = 500 times.
    assert_labels(found, dict(zip(rows, scores, strict=True)), abs=1e-10)
    assert found.unit == "nats"


def test_a_latent_with_few_references_leaves_the_scores_of_the_others(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary
) -> None:
    counts = (embeddings.row >= 0).sum(dim=1)
    full = counts == counts.max()
    assert bool(full.any())
    assert bool((~full & (counts > 0)).any())
    alone = replace(embeddings, row=embeddings.row.masked_fill(~full[:, None], -1))
    found, without = (run(one, vocabulary, clip, scorer="soft_wpmi") for one in (embeddings, alone))
    assert torch.equal(found.term[full], without.term[full])
    torch.testing.assert_close(found.score[full], without.score[full], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kind", ["topk", "topk rescaled"])
def test_decoder_against_the_lens_of_each_row(
    clip: HookedCLIP, pixels: Tensor, vocabulary: Vocabulary, kind: str
) -> None:
    sae = build_sae(kind, 48, "blocks.0.hook_resid_post", "patches", tower="vision")
    references = collect_references(clip.vision, pixels[:7], sae, k=2, progress=False)
    found = run(references, vocabulary, clip, scorer="decoder", sae=sae)
    native = clip.native.visual
    terms = [clip.embed_texts(term)[0].tolist() for term in TERMS]
    formula, zero = SAEFormula(sae), torch.zeros(48, dtype=torch.float64)
    expected = {}
    for latent in range(37):
        if references.sample[latent, 0] < 0:
            continue
        one = torch.zeros(37, dtype=torch.float64)
        base = formula.decode(one, zero)
        one[latent] = 1.0
        row = formula.decode(one, zero) - base
        lens = (native.ln_post(row) @ native.proj).tolist()
        expected[latent] = [oracle.cosine(lens, term) for term in terms]
    assert_labels(found, expected)
    assert (found.unit, found.baseline.nan_to_num().abs().max().item()) == ("cosine", 0.0)
    again = run(references, vocabulary, clip, scorer=DecoderProjection(sae))
    assert torch.equal(again.term, found.term)


def test_decoder_of_the_wrong_sae(clip: HookedCLIP, pixels: Tensor, references: References, vocabulary: Any) -> None:
    with pytest.raises(InputError, match="pass sae="):
        run(references, vocabulary, clip, scorer="decoder")
    small = build_sae("topk", 48, "blocks.0.hook_resid_post", "patches", tower="vision", d_sae=20)
    with pytest.raises(InputError, match="of another SAE"):
        run(references, vocabulary, clip, scorer="decoder", sae=small)
    own = build_sae("topk", 48, "blocks.0.hook_resid_post", "patches", tower="vision")
    with pytest.raises(InputError, match="the SAE's own model, 'tiny': it cannot be judged by 'other'"):
        run(references, vocabulary, tiny_clip(name="other"), scorer="decoder", sae=own)
    pooled = build_sae("topk", 48, "hook_pooled", "pooled", tower="vision")
    found = collect_references(clip.vision, pixels[:4], pooled, k=2, progress=False)
    with pytest.raises(InputError, match="reads residual-stream vectors"):
        run(found, vocabulary, clip, scorer="decoder", sae=pooled)


def test_references_and_their_embeddings_align_alike(
    clip: HookedCLIP, pixels: Tensor, references: References, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary
) -> None:
    one = run(references, vocabulary, clip, images=pixels[:7])
    other = run(embeddings, vocabulary, clip)
    assert torch.equal(one.term, other.term)
    few = run(references, vocabulary, clip, images=pixels[:7], k=1)
    assert int(few.n_references.max()) == 1
    assert not torch.allclose(few.score, one.score, equal_nan=True)
    assert one.provenance["data_fingerprint"] == references.provenance["data_fingerprint"]
    assert one.provenance["judge"] == one.judge == "tiny"
    assert one.provenance["vocabulary"] == one.vocabulary == vocabulary.fingerprint


def test_another_judge(pixels: Tensor, references: References, vocabulary: Vocabulary) -> None:
    judge = tiny_clip(seed=4, name="judge")
    found = run(references, vocabulary, judge, images=pixels[:7])
    expected = cosine_rows(embed_references(references, pixels[:7], judge, progress=False), judge)
    assert_labels(found, expected)
    assert found.judge == "judge"


def test_equal_terms_go_to_the_first(clip: HookedCLIP, embeddings: ReferenceEmbeddings) -> None:
    # Only the first seven letters reach this tokenizer, so these are equal but for rounding, which may depend on the
    # place of a row in its batch.
    terms = ["elephants one", "dog", "elephants two", "elephants three", "cat", "elephants four"]
    found = run(embeddings, Vocabulary.from_terms(terms), clip, n_labels=6)
    n_equal = 0
    for row, score in zip(found.term.tolist(), found.score.tolist(), strict=True):
        for (first, value), (second, next_value) in pairwise(zip(row, score, strict=True)):
            if first >= 0 and value == next_value:
                assert first < second
                n_equal += 1
    assert n_equal >= found.d_sae - found.n_unlabelled > 0


def test_best_against_a_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 5, 9):
        score = torch.randint(0, 4, (50, 9), generator=generator).float()  # ties everywhere
        value, column = _best(score, k)
        expected = [oracle.ranked(row, k) for row in score.tolist()]
        assert column.tolist() == expected
        assert torch.equal(value, score.gather(1, column))
        top = _TopTerms(50, k, torch.float32)
        for first in range(0, 9, 4):
            top.update(ScoreBlock(torch.arange(50), first, score[:, first : first + 4]))
        assert top.term.tolist() == expected


def test_queries(clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary) -> None:
    found = run(embeddings, vocabulary, clip, n_labels=2)
    expected = cosine_rows(embeddings, clip)
    latent = next(iter(expected))
    for t, term in enumerate(TERMS):
        assert found.score_of(latent, term) == pytest.approx(expected[latent][t], abs=EXACT)
    silent = next(i for i in range(found.d_sae) if i not in expected)
    assert math.isnan(found.score_of(silent, "dog"))
    assert [label.term for label in found.of(latent)] == [TERMS[t] for t in oracle.ranked(expected[latent], 2)]
    best = sorted(expected, key=lambda i: -expected[i][1])[:4]
    assert found.find("cat", 4) == best
    assert len(found.find("cat", 999)) == len(expected)
    outside = found.score_vectors(3 * clip.embed_texts(["cat", "house"]))
    assert float(outside[latent, 0]) == pytest.approx(expected[latent][1], abs=EXACT)
    assert outside.isnan().any(dim=1).tolist() == [i not in expected for i in range(found.d_sae)]
    with pytest.raises(InputError, match="'cats' is not one of the 7 terms of this vocabulary; did you mean 'cat'"):
        found.score_of(latent, "cats")
    with pytest.raises(InputError, match="latents are 0 to 36, got 37"):
        found.score_of(37, "cat")
    with pytest.raises(InputError, match="latents are 0 to 36, got -1"):
        found.of(-1)
    with pytest.raises(InputError, match=r"\[text 20\], got \[2, 3\]"):
        found.score_vectors(torch.ones(2, 3))


def test_queries_of_a_score_that_is_no_cosine(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary
) -> None:
    found = run(embeddings, vocabulary, clip, scorer="soft_wpmi", n_labels=2)
    latent = int((found.term[:, 0] >= 0).nonzero()[0])
    best, second = found.of(latent)
    assert found.score_of(latent, second.term) == second.score
    other = next(term for term in TERMS if term not in (best.term, second.term))
    with pytest.raises(InputError, match="keeps the 2 best terms"):
        found.score_of(latent, other)
    for call in (lambda: found.find("cat"), lambda: found.score_vectors(torch.ones(1, 20))):
        with pytest.raises(InputError, match="soft_wpmi"):
            call()
    silent = int((found.term[:, 0] < 0).nonzero()[0])
    assert math.isnan(found.score_of(silent, "cat"))


def test_frame(clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary) -> None:
    found = run(embeddings, vocabulary, clip)
    frame = found.to_frame()
    assert list(frame.columns) == ["latent", "label", "score", "margin", "second", "n_references"]
    assert frame.label.tolist() == list(found.labels)
    assert frame.score.isna().tolist() == [label is None for label in found.labels]
    alone = run(embeddings, Vocabulary.from_terms(["dog"]), clip)
    assert alone.margin.isnan().all()
    assert alone.to_frame().second.isna().all()
    assert set(alone.labels) == {"dog", None}


def test_one_huge_embedding_does_not_unlabel_the_others(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary
) -> None:
    vectors = embeddings.vectors.float()
    vectors[0] *= 1e9
    found = run(replace(embeddings, vectors=vectors), vocabulary, clip)
    assert [label is not None for label in found.labels] == (embeddings.n_references > 0).tolist()
    latent = int((found.n_references > 0).nonzero()[0])
    assert math.isfinite(found.score_of(latent, "cat"))  # embeddings in float32, terms in float64


@pytest.mark.parametrize("scorer", ["empty_prompt", "soft_wpmi"])
def test_save_and_load(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary, tmp_path: Path, scorer: Any
) -> None:
    found = run(embeddings, vocabulary, clip, scorer=scorer)
    found.save(tmp_path / "a")
    again = Alignment.load(tmp_path / "a")
    for name in ("term", "score", "n_references", "directions", "baseline", "term_vectors"):
        one, other = getattr(found, name), getattr(again, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert torch.equal(one.nan_to_num(9), other.nan_to_num(9)), name
            assert one.dtype == other.dtype, name
    for name in (
        "scorer",
        "unit",
        "terms",
        "judge",
        "vocabulary",
        "hook_name",
        "token_scope",
        "settings",
        "provenance",
    ):
        assert getattr(again, name) == getattr(found, name), name
    assert repr(again) == repr(found)
    assert again.labels == found.labels
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-9])
    with pytest.raises(LoadError, match=r"no file of Alignment\.save"):
        Alignment.load(tmp_path / "a")


def test_references_that_cancel_have_no_label(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary
) -> None:
    vectors = embeddings.vectors.clone()
    latent = int((embeddings.n_references == 1).nonzero()[0]) if (embeddings.n_references == 1).any() else 0
    row = embeddings.row.clone()
    row[latent] = torch.tensor([0, 1, -1, -1])
    vectors[1] = -vectors[0]
    changed = replace(embeddings, vectors=vectors, row=row)
    found = run(changed, vocabulary, clip)
    assert found.labels[latent] is None
    assert int(found.n_references[latent]) == 2
    vectors[0] = torch.nan
    for scorer in ("empty_prompt", "soft_wpmi"):
        spoilt = run(changed, vocabulary, clip, scorer=scorer)
        tainted = (row == 0).any(dim=1)
        kept = ~tainted & (changed.n_references > 0)
        if scorer == "empty_prompt":
            kept[latent] = False
        assert [label is not None for label in spoilt.labels] == kept.tolist()


def test_label_uniqueness(clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary) -> None:
    found = run(embeddings, vocabulary, clip)
    score = label_uniqueness(found)
    given = [label for label in found.labels if label is not None]
    assert score.counts == {label: given.count(label) for label in set(given)}
    assert list(score.counts.values()) == sorted(score.counts.values(), reverse=True)
    assert score.n_labelled == len(given)
    assert score.n_labels == len(set(given))
    assert score.share == sum(given.count(label) == 1 for label in given) / len(given)
    term = torch.tensor([[0, 1], [2, 0], [0, 2], [-1, -1], [1, 0]])
    by_hand = replace(found, term=term)
    assert label_uniqueness(by_hand).share == 0.5
    assert label_uniqueness(by_hand).counts == {"dog": 2, "cat": 1, "cow": 1}
    nothing = replace(found, term=torch.full((3, 2), -1))
    assert math.isnan(label_uniqueness(nothing).share)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "soft_wmpi"}, "no scorer 'soft_wmpi': .*; did you mean 'soft_wpmi'"),
        ({"n_labels": 0}, "n_labels must be a positive integer"),
        ({"k": 2}, "are embedded already"),
    ],
)
def test_wrong_arguments(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(embeddings, vocabulary, clip, **settings)


def test_what_does_not_go_together(
    clip: HookedCLIP, references: References, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary
) -> None:
    with pytest.raises(InputError, match="pass images="):
        run(references, vocabulary, clip)
    with pytest.raises(InputError, match="embedded by 'tiny', and the judge is 'other'"):
        run(embeddings, vocabulary, tiny_clip(seed=2, name="other"))
    with pytest.raises(InputError, match=r"vocabulary is a list.*from_terms"):
        run(embeddings, TERMS, clip)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'raw' or of 'unit'"):
        EmptyPrompt(mean="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="last <= first"):
        SoftWPMI(first=0.5, last=0.9)
    with pytest.raises(InputError, match="logarithm of 0"):
        SoftWPMI(first=1.0, floor=0.0)


@pytest.mark.parametrize("scorer", ["empty_prompt", "soft_wpmi", "decoder"])
def test_embeddings_from_elsewhere_stand_for_a_vocabulary(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, vocabulary: Vocabulary, sae: Any, scorer: Any
) -> None:
    own = vocabulary.embed(clip, progress=False)
    given = TermEmbeddings.from_vectors(5 * own.vectors, own.terms, model=clip.model_name, empty=2 * own.empty)
    found = run(embeddings, given, clip, scorer=scorer, sae=sae)
    expected = run(embeddings, vocabulary, clip, scorer=scorer, sae=sae)
    assert torch.equal(found.term, expected.term)
    torch.testing.assert_close(found.score, expected.score, rtol=0, atol=EXACT, equal_nan=True)
    assert (found.terms, found.provenance["vocabulary_source"]) == (expected.terms, "embeddings")


def test_embeddings_from_elsewhere_are_checked(
    clip: HookedCLIP, embeddings: ReferenceEmbeddings, sae: Any, tmp_path: Path
) -> None:
    vectors = torch.eye(20, dtype=torch.float64)[:3]
    bare = TermEmbeddings.from_vectors(vectors, ["a", "b", "c"], model=clip.model_name)
    assert run(embeddings, bare, clip, scorer="decoder", sae=sae).terms == ("a", "b", "c")
    with pytest.raises(InputError, match="came without it"):
        run(embeddings, bare, clip)
    with pytest.raises(InputError, match="one model"):
        run(embeddings, replace(bare, model="other"), clip)
    for rows, terms, empty, message in [
        (vectors, ["a", "b"], None, "a name for each"),
        (vectors, ["a", "b", "b"], None, "each once"),
        (vectors, ["a", "b", "c"], vectors[0, :4], "a name for each"),
        (vectors * 0, ["a", "b", "c"], None, "zero or not finite"),
        (vectors, ["a", "b", "c"], vectors[0] * torch.nan, "zero or not finite"),
    ]:
        with pytest.raises(InputError, match=message):
            TermEmbeddings.from_vectors(rows, terms, model="m", empty=empty)
    other = TermEmbeddings.from_vectors(vectors.flip(0), ["a", "b", "c"], model=clip.model_name)
    assert len({bare.vocabulary, other.vocabulary}) == 2
    for terms in (bare, TermEmbeddings.from_vectors(vectors, ["a", "b", "c"], model="m", empty=vectors[0])):
        terms.save(tmp_path / "terms")
        loaded = TermEmbeddings.load(tmp_path / "terms")
        assert torch.equal(loaded.vectors, terms.vectors)
        assert (loaded.empty is None) == (terms.empty is None)
