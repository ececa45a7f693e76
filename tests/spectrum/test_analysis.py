"""The whole question at one place: what goes into it, what it leaves out, and that it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError

HOOK = "blocks.2.hook_resid_post"
QUIET: dict[str, Any] = {"progress": False, "n_bootstrap": 10}


@pytest.fixture(scope="module")
def clip() -> cle.HookedCLIP:
    return cle.planted_clip()


@pytest.fixture(scope="module")
def data() -> cle.EvaluationData:
    batch = cle.PlantedWorld(0).sample(320, seed=5, split="test")
    captions = [[caption, " ".join(caption.split()[-2:])] for caption in batch.captions]
    return cle.EvaluationData(cle.planted.normalise(batch.images), labels=batch.labels % 4, captions=captions)


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=-1)


@torch.no_grad()
def test_splits_are_made_of_the_training_half_alone(clip: cle.HookedCLIP, data: cle.EvaluationData) -> None:
    found = cle.analyse_spectrum(clip, data, rules=["pooled", "cross_covariance"], cut=90, **QUIET)
    train = (~data.test).nonzero().flatten().tolist()
    image = unit(clip.embed_images(data.images[train]))
    captions: Any = data.captions
    texts = list(dict.fromkeys(text for i in train for text in captions[i]))
    text = unit(clip.embed_texts(texts))
    assert (found.image.count, found.text.count if found.text else 0) == (len(train), len(set(texts)))
    torch.testing.assert_close(found.image.covariance, torch.cov(image.T), rtol=1e-9, atol=1e-9)
    expected = cle.split_noise(image, text, rule="pooled", cut=90, progress=False)
    assert overlap(found.splits[0], expected) > 1 - 1e-6
    # Each caption of a picture is a pair of its own.
    pairs = [(row, texts.index(one)) for row, i in enumerate(train) for one in dict.fromkeys(captions[i])]
    rows, columns = zip(*pairs, strict=True)
    paired = cle.split_noise(image[list(rows)], text[list(columns)], rule="cross_covariance", cut=90, progress=False)
    # Singular values: the vectors of those near zero turn with the last bit of a float32 embedding.
    torch.testing.assert_close(found.splits[1].eigenvalues, paired.eigenvalues, rtol=1e-4, atol=1e-8)
    assert found.splits[0].hook_name == "hook_embedding"
    assert found.evaluation is not None
    assert found.evaluation.ranks == tuple(sorted({split.rank for split in found.splits}))


def overlap(a: cle.NoiseSplit, b: cle.NoiseSplit) -> float:
    return float((a.basis.T @ b.basis).square().sum()) / a.rank


def test_every_rule_is_tried_or_says_why_not(clip: cle.HookedCLIP, data: cle.EvaluationData) -> None:
    found = cle.analyse_spectrum(clip, data, evaluate=False, **QUIET)
    assert {split.rule for split in found.splits} | set(found.not_split) == set(cle.RULES)
    assert "control" in found.not_split["generalised"]
    assert "No split by 'generalised'" in found.summary()
    assert list(found.to_frame().rule) == [split.rule for split in found.splits]
    assert found.evaluation is None
    with pytest.raises(InputError, match="control"):
        cle.analyse_spectrum(clip, data, rules=["generalised"], **QUIET)


def test_every_cut_of_the_pooled_covariance(clip: cle.HookedCLIP, data: cle.EvaluationData) -> None:
    found = cle.analyse_spectrum(clip, data, rules="pooled", cut=5, evaluate=False, **QUIET)
    assert {split.cut for split in found.cuts} == set(cle.CUTS)
    assert {split.rule for split in found.cuts} == {"pooled"}
    by_cut = {split.cut: split for split in found.cuts}
    alone = cle.split_noise(found.image, found.text, rule="pooled", cut="knee")
    assert by_cut["knee"].rank == alone.rank > 0
    stream = cle.analyse_spectrum(
        clip, data, hook_name=HOOK, token_scope="cls", rules="pooled", evaluate=False, **QUIET
    )
    assert set(cle.CUTS) - {split.cut for split in stream.cuts} == {"permutation"}  # there are no rows to permute


def test_a_curve_is_of_the_first_rule(clip: cle.HookedCLIP, data: cle.EvaluationData) -> None:
    found = cle.analyse_spectrum(clip, data, rules=["pooled", "spectral_gap"], ranks=[8, 40, 100], **QUIET)
    assert found.evaluation is not None
    assert found.evaluation.ranks == (8, 40, 100)
    assert found.evaluation.settings["rules"] == ["pooled"] * 3
    assert [split.rule for split in found.splits] == ["pooled", "spectral_gap"]


def test_subsets_are_classes_where_they_are_few(clip: cle.HookedCLIP, data: cle.EvaluationData) -> None:
    found = cle.analyse_spectrum(clip, data, rules="pooled", cut=90, evaluate=False, **QUIET)
    assert found.overlap is not None
    assert found.overlap.names == ("0", "1", "2", "3")
    assert "Noise of 4 subsets: overlap 0." in found.summary()
    many = cle.EvaluationData(data.images, labels=torch.arange(320) % 9)
    found = cle.analyse_spectrum(clip, many, rules="pooled", cut=90, evaluate=False, **QUIET)
    assert found.overlap is None
    assert "No overlap of subsets: 9 classes" in found.summary()


def test_a_residual_stream(clip: cle.HookedCLIP, data: cle.EvaluationData) -> None:
    found = cle.analyse_spectrum(clip, data, hook_name=HOOK, token_scope="patches", rules="pooled", cut=100, **QUIET)
    assert found.text is None
    assert found.image.count == 64 * int((~data.test).sum())
    assert found.evaluation is not None
    assert found.evaluation.settings["hook_name"] == HOOK
    assert "rows of a residual stream are not kept" in found.summary()
    assert float(found.evaluation.difference[0, found.evaluation.pruned.index("top variance")].max()) > 0.05


def test_the_control_means_nothing(clip: cle.HookedCLIP, data: cle.EvaluationData) -> None:
    captions: Any = data.captions
    control = cle.EvaluationData(
        cle.shuffled_pixels(data.images), captions=cle.shuffled_words([texts[0] for texts in captions])
    )
    with pytest.raises(InputError, match="collect more rows"):
        cle.analyse_spectrum(clip, data, rules=["generalised"], control=control, **QUIET)
    stream = cle.analyse_spectrum(
        clip,
        data,
        hook_name=HOOK,
        token_scope="patches",
        rules=["generalised"],
        control=control,
        evaluate=False,
        **QUIET,
    )
    assert 0 < stream.splits[0].rank < 128


def test_shuffled_inputs_are_by_seed() -> None:
    pictures = torch.randn(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    mixed = cle.shuffled_pixels(pictures, seed=1)
    assert torch.equal(mixed, cle.shuffled_pixels(pictures, seed=1))
    assert not torch.equal(mixed, cle.shuffled_pixels(pictures, seed=2))
    for before, after in zip(pictures, mixed, strict=True):
        colours = {tuple(colour) for colour in before.flatten(1).T.tolist()}
        assert {tuple(colour) for colour in after.flatten(1).T.tolist()} == colours  # a pixel keeps its colour
    texts = ["a b c", "d", "e f"]
    assert [len(text.split()) for text in cle.shuffled_words(texts)] == [3, 1, 2]
    assert {word for text in cle.shuffled_words(texts * 50) for word in text.split()} == set("abcdef")
    assert cle.shuffled_words(texts, seed=1) != cle.shuffled_words(texts, seed=2)
    for wrong in ("a b", [], [" "]):
        with pytest.raises(InputError, match="texts with words"):
            cle.shuffled_words(wrong)
    with pytest.raises(InputError, match="pictures"):
        cle.shuffled_pixels(pictures[0])
