"""A pruned model on trial: every measure against its definition, every control, and words that follow from numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import evaluation as oracle
from oracles.models import EMBED_DIM, build_clip, pictures
from PIL import Image
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.controls import projector_basis, random_bases
from clip_lens_ext.spectrum.measures import best_rank
from clip_lens_ext.towers import HookedCLIP

D, N, N_CLASS = 12, 60, 7
QUIET: dict[str, Any] = {"progress": False, "n_bootstrap": 50}


def tokenize(texts: list[str]) -> Tensor:
    """Letters as ids, and the greatest id, where the text ends, behind them."""
    return torch.stack([torch.tensor([1 + ord(letter) % 47 for letter in text.ljust(8)[-8:]] + [49]) for text in texts])


def clip_of(**variant: Any) -> HookedCLIP:
    return HookedCLIP(build_clip(**variant).double(), tokenizer=tokenize, preprocess=as_pixels)


def as_pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.resize((32, 24)))).permute(2, 0, 1).double() / 255


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(*, n: int = N, signal: float = 1.0, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings with classes in the first axes and loud noise in the last four, labels, and class embeddings."""
    labels = torch.arange(n) % N_CLASS
    clean = some(N_CLASS, D, seed=9) * torch.tensor([1.0] * 8 + [0.0] * 4)
    centres = clean + noise * some(N_CLASS, D, seed=8) * torch.tensor([0.0] * 8 + [1.0] * 4)
    rows = signal * clean[labels] + 0.7 * some(n, D, seed=seed) * torch.tensor([1.0] * 8 + [0.0] * 4)
    rows = rows + noise * some(n, D, seed=seed + 1) * torch.tensor([0.0] * 8 + [1.0] * 4)
    return rows, labels, centres


def split_at(axes: list[int], d: int = D, **fields: Any) -> cle.NoiseSplit:
    found = cle.split_noise(some(40 * d, d), cut=max(1, len(axes)))
    return replace(found, basis=torch.eye(d, dtype=torch.float64)[:, axes], **fields)


def part(rows: Tensor, where: Tensor) -> list[list[float]]:
    found: list[list[float]] = rows[where].tolist()
    return found


@pytest.mark.parametrize("pruned", [False, True])
def test_every_measure_against_its_definition(pruned: bool) -> None:
    rows, labels, centres = rows_of(signal=0.5, noise=1.0)
    classes = torch.stack([centres + 0.5 * some(N_CLASS, D, seed=3), centres + 2 * some(N_CLASS, D, seed=4)], dim=1)
    captions = rows + 1.5 * some(N, D, seed=5)
    data = cle.EvaluationData(rows, labels=labels, classes=classes, captions=captions)
    split = split_at([8, 9, 3])
    found = cle.evaluate_pruning(None, split, data, n_random=0, n_neighbors=3, probe_c=2.0, **QUIET)
    x, c, t = (oracle.without(one.reshape(-1, D), split.basis if pruned else torch.zeros(D, 0))
               for one in (rows, classes, captions))  # fmt: skip
    test = data.test.numpy()
    y, yt = labels[~data.test].tolist(), labels[data.test].tolist()
    own = [{i} for i in range(int(test.sum()))]
    hits = {
        "zero-shot top-1": oracle.zero_shot(x[test], yt, c.reshape(N_CLASS, 2, D), 1),
        "zero-shot top-5": oracle.zero_shot(x[test], yt, c.reshape(N_CLASS, 2, D), 5),
        "image to text R@1": oracle.retrieval(x[test], t[test], own, 1),
        "image to text R@5": oracle.retrieval(x[test], t[test], own, 5),
        "text to image R@1": oracle.retrieval(t[test], x[test], own, 1),
        "text to image R@5": oracle.retrieval(t[test], x[test], own, 5),
        "kNN": oracle.neighbours(x[~test], y, x[test], yt, 3),
        "linear probe": oracle.probe(x[~test], y, x[test], yt, 2.0),
    }
    assert found.measures == tuple(hits)
    row = found.score[0, found.pruned.index("noise" if pruned else "none")]
    for name, score in zip(found.measures, row.tolist(), strict=True):
        assert score == pytest.approx(np.mean(hits[name]), abs=1e-12), name
        assert 0.1 < score < 1, name  # neither chance nor perfect: the measure has something to be wrong about
    interval = found.interval[0, found.pruned.index("noise" if pruned else "none"), 0]
    np.testing.assert_allclose(interval, oracle.percentiles(hits["zero-shot top-1"], 50, 0, 0.95), atol=1e-12)
    assert found.n == (len(yt),) * 8


def test_differences_are_paired_and_signed() -> None:
    rows, labels, centres = rows_of(noise=4.0)
    data = cle.EvaluationData(rows, labels=labels, classes=centres)
    split = split_at([8, 9, 10, 11])
    found = cle.evaluate_pruning(None, split, data, n_random=3, **QUIET)
    assert found.pruned == ("none", "noise", "random", "top variance", "lowest variance")
    bases = {"none": torch.zeros(D, 0), "noise": split.basis}
    test, yt = data.test.numpy(), labels[data.test].tolist()
    hits = {
        name: np.array(
            oracle.zero_shot(oracle.without(rows, basis)[test], yt, oracle.without(centres, basis)[:, None], 1)
        )
        for name, basis in bases.items()
    }
    paired = hits["noise"] - hits["none"]
    assert float(found.difference[0, 0, 0]) == pytest.approx(paired.mean(), abs=1e-12)
    assert paired.mean() > 0.1  # the noise drowns the cosine
    np.testing.assert_allclose(found.difference_interval[0, 0, 0], oracle.percentiles(paired, 50, 0, 0.95), atol=1e-12)
    torch.testing.assert_close(found.score[0, 2], found.draws[0].mean(dim=0))
    assert torch.equal(found.difference[0, 1], torch.zeros(len(found.measures), dtype=torch.float64))


def test_the_variance_controls_are_those_of_the_training_pictures() -> None:
    rows, labels, _ = rows_of(n=700, noise=3.0)
    data = cle.EvaluationData(rows, labels=labels)
    train = np.array([oracle.unit(row) for row in rows[~data.test].numpy()])
    vectors = np.linalg.eigh(np.cov(train.T))[1]
    lowest = replace(split_at([0, 1]), basis=torch.from_numpy(vectors[:, :2].copy()))
    found = cle.evaluate_pruning(None, lowest, data, n_random=0, **QUIET)
    assert not found.difference[0, found.pruned.index("lowest variance")].any()
    assert not found.difference_interval[0, found.pruned.index("lowest variance")].any()
    assert "Pruning the dimensions of lowest variance does just as well, +0.0 points (-0.9 to +0.9)." in found.verdict()
    top = replace(lowest, basis=torch.from_numpy(vectors[:, -2:].copy()))
    found = cle.evaluate_pruning(None, top, data, n_random=0, **QUIET)
    assert not found.difference[0, found.pruned.index("top variance")].any()
    given = cle.evaluate_pruning(None, lowest, data, n_random=0, covariance=some(200, D), **QUIET)
    assert given.difference[0, given.pruned.index("lowest variance")].any()


@torch.no_grad()
def test_the_variance_controls_of_a_stream_are_at_its_hook_and_tokens() -> None:
    clip, x, hook = clip_of(), pictures(120, dtype=torch.float64), "blocks.0.hook_resid_post"
    data = cle.EvaluationData(x, labels=torch.arange(120) % 3, classes=["a", "b", "c"])
    kept = clip.vision.run_to(x[~data.test], hook)[:, 1:].flatten(0, 1)
    vectors = torch.from_numpy(np.linalg.eigh(np.cov(kept.numpy().T))[1])
    place: dict[str, Any] = {"hook_name": hook, "token_scope": "patches", "tower": "vision"}
    mean = kept.mean(dim=0)[None]
    for name, basis in (("lowest variance", vectors[:, :40]), ("top variance", vectors[:, -40:])):
        split = replace(split_at([0], 48), basis=basis.clone(), means=mean, **place)
        found = cle.evaluate_pruning(clip, split, data, n_random=0, **QUIET)
        assert found.difference[0, found.pruned.index("none")].any()
        assert not found.difference[0, found.pruned.index(name)].any()


@torch.no_grad()
def test_a_stream_of_the_text_tower_needs_its_covariance() -> None:
    clip, hook = clip_of(), "blocks.2.hook_resid_post"
    names = [f"{a}{b}" for a in "abc" for b in "xyz"]
    prompts = tokenize([f"a {name}" for name in names] * 12)  # of few prompts a covariance is singular, which is enough
    covariance = cle.collect_covariance(clip.text, prompts, hook, token_scope="eot", progress=False)[hook]
    with pytest.warns(UserWarning, match="to a dimension"):
        split = cle.split_noise(covariance, cut=34)
    centres = clip.embed_texts([f"a {name}" for name in names])
    images = centres[torch.arange(90) % 9] + 0.3 * some(90, EMBED_DIM) * centres.std()
    data = cle.EvaluationData(images, labels=torch.arange(90) % 9, classes=names, templates="a {}")
    with pytest.raises(InputError, match="pass covariance="):
        cle.evaluate_pruning(clip, split, data, **QUIET)
    found = cle.evaluate_pruning(clip, split, data, n_random=1, covariance=covariance, **QUIET)
    with cle.prune(clip, split):
        classes = clip.embed_texts([f"a {name}" for name in names]).numpy()[:, None]
    hits = oracle.zero_shot(images[data.test].numpy(), (torch.arange(90) % 9)[data.test].tolist(), classes, 1)
    assert float(found.score[0, 1, 0]) == pytest.approx(np.mean(hits), abs=1e-12)
    assert float(found.difference[0, found.pruned.index("top variance"), 0]) > 0.05


def test_random_controls_are_nested_and_uniform() -> None:
    first, second = random_bases(5, 2, seed=3)
    for basis in (first, second):
        torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.allclose(first, second)
    # Uniform: every entry has mean 0 and variance 1/d. Of 2000 draws the mean is within 5 standard errors.
    many = torch.stack(random_bases(5, 2000, seed=0))
    assert float(many.mean(dim=0).abs().max()) < 5 * (1 / 5 / 2000) ** 0.5
    torch.testing.assert_close(many.square().mean(dim=0), torch.full((5, 5), 0.2).double(), rtol=0, atol=0.03)


@torch.no_grad()
def test_the_projector_control_reads_weights_alone() -> None:
    clip = clip_of()
    basis = projector_basis(clip)
    torch.testing.assert_close(basis.T @ basis, torch.eye(EMBED_DIM).double(), rtol=0, atol=1e-10)
    native: Any = clip.native
    grams = []
    for projection, norm in ((native.visual.proj, native.visual.ln_post), (native.text_projection, native.ln_final)):
        w = projection.numpy() * norm.weight.numpy()[:, None]
        grams.append(w.T @ w / np.sum(w * w))
    values = np.diag(basis.T.numpy() @ (grams[0] + grams[1]) / 2 @ basis.numpy())
    uneven = np.abs(np.log(values / np.sort(values)[(EMBED_DIM - 1) // 2]))  # torch's median is the lower one
    assert (np.diff(uneven) <= 1e-12).all()
    off = basis.T.numpy() @ (grams[0] + grams[1]) / 2 @ basis.numpy() - np.diag(values)
    assert np.abs(off).max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("where", ["embedding", "stream"])
def test_pictures_and_texts_go_through_the_pruned_model(where: str) -> None:
    n, names = 96, ["heart", "crane"]
    labels = torch.arange(n) % 2
    clip, x = clip_of(), pictures(n, dtype=torch.float64) + 0.7 * pictures(2, dtype=torch.float64)[labels]
    captions = [[f"one {i % 8}", "two"] for i in range(n)]
    data = cle.EvaluationData(x, labels=labels, classes=names, captions=captions, templates=["a {}", "the {}"])
    hook = "hook_embedding" if where == "embedding" else "blocks.1.hook_resid_post"
    covariance = cle.collect_covariance(clip.vision, x, hook, token_scope="cls", progress=False)[hook]
    loud = torch.linalg.eigh(covariance.covariance).eigenvectors[:, -16:].contiguous()
    with pytest.warns(UserWarning, match="to a dimension"):
        split = replace(cle.split_noise(covariance, cut=1), basis=loud)
    before = clip.embed_images(x)
    found = cle.evaluate_pruning(clip, split, data, n_random=1, n_neighbors=2, **QUIET)
    assert torch.equal(clip.embed_images(x), before)
    assert ("projector weights" in found.pruned) == (where == "embedding") == (not found.left_out)
    with cle.prune(clip, split, towers=["vision", "text"] if where == "embedding" else None):
        train = clip.embed_images(x)[~data.test].numpy()
        images = clip.embed_images(x)[data.test].numpy()
        classes = torch.stack([clip.embed_texts([t.format(n) for t in ("a {}", "the {}")]) for n in names]).numpy()
        texts = [f"one {i}" for i in range(8)] + ["two"]
        embedded = clip.embed_texts(texts).numpy()
    test = data.test.nonzero().flatten().tolist()
    used = [*sorted({i % 8 for i in test}), 8]
    own_of_image = [{used.index(i % 8), len(used) - 1} for i in test]
    own_of_text = [{row for row, i in enumerate(test) if i % 8 == k or k == 8} for k in used]
    expected = {
        "zero-shot top-1": oracle.zero_shot(images, labels[data.test].tolist(), classes, 1),
        "image to text R@1": oracle.retrieval(images, embedded[used], own_of_image, 1),
        "text to image R@1": oracle.retrieval(embedded[used], images, own_of_text, 1),
        "kNN": oracle.neighbours(train, labels[~data.test].tolist(), images, labels[data.test].tolist(), 2),
    }
    for name, hits in expected.items():
        k = found.measures.index(name)
        assert float(found.score[0, 1, k]) == pytest.approx(np.mean(hits), abs=1e-12), name
        assert found.n[k] == len(hits)
    assert float(found.difference[0, 0, found.measures.index("kNN")]) < -0.05  # what is not pruned would show
    assert "zero-shot top-5" not in found.measures  # of two classes the best five are all


def test_a_curve_over_the_rank() -> None:
    rows, labels, centres = rows_of(noise=2.0)
    data = cle.EvaluationData(rows, labels=labels, classes=centres)
    splits = [split_at([11, 10, 9]), split_at([11]), split_at([11, 10, 9, 8])]
    found = cle.evaluate_pruning(None, splits, data, n_random=2, **QUIET)
    assert found.ranks == (1, 3, 4)
    for row, split in zip(found.score, (splits[1], splits[0], splits[2]), strict=True):
        alone = cle.evaluate_pruning(None, split, data, n_random=2, **QUIET)
        torch.testing.assert_close(row, alone.score[0], rtol=0, atol=0)
    frame = found.to_frame()
    assert len(frame) == 3 * 5 * len(found.measures)
    assert set(frame[frame.pruned == "none"]["rank"]) == {0}
    picked = frame[(frame.of_rank == 3) & (frame.pruned == "noise") & (frame.measure == "kNN")].iloc[0]
    assert picked["rank"] == 3
    assert picked.score == float(found.score[1, 1, found.measures.index("kNN")])


def test_the_words_follow_from_the_intervals() -> None:
    rows, labels, centres = rows_of(n=400, noise=4.0)
    data = cle.EvaluationData(rows, labels=labels, classes=centres)
    found = cle.evaluate_pruning(None, split_at([8, 9, 10, 11]), data, n_random=3, **QUIET)
    line = found.verdict().splitlines()[0]
    assert line.startswith("4 of 12 dimensions pruned, zero-shot top-1: pruning the noise helps, +")
    assert "It is better than pruning as many random dimensions, +" in line
    assert "It is better than pruning the dimensions of lowest variance, +" in line
    lucky = replace(found, draws=torch.ones_like(found.draws))  # each draw does as well, whatever their mean
    assert "Random dimensions are not shown to be worse (3 of 3 draws do at least as well)" in lucky.verdict()
    rows, labels, centres = rows_of(n=400)
    data = cle.EvaluationData(rows, labels=labels, classes=centres)
    worse = cle.evaluate_pruning(None, split_at([0, 1, 2, 3]), data, n_random=3, **QUIET)
    assert "pruning the noise costs something, -" in worse.verdict().splitlines()[0]
    harmless = cle.evaluate_pruning(None, split_at([11]), data, n_random=3, **QUIET)
    assert not harmless.difference[0, 0, 0]  # no sample changes, and of 200 that does not exclude 1.5 points
    unseen = 100 * (1 - 0.05 ** (1 / 200))
    line = harmless.verdict().splitlines()[0]
    assert f"within 1 point is not decided, +0.0 points ({-unseen:+.1f} to {unseen:+.1f})." in line
    assert "harmless within 2 points, +0.0 points" in harmless.verdict(margin=0.02).splitlines()[0]
    line = replace(harmless, n=(299,) * len(harmless.n)).verdict().splitlines()[0]
    assert "pruning the noise is harmless within 1 point, +0.0 points (-1.0 to +1.0)." in line
    line = replace(harmless, n=(298,) * len(harmless.n)).verdict().splitlines()[0]
    assert "within 1 point is not decided" in line
    few, labels, centres = rows_of(n=28)
    data = cle.EvaluationData(few, labels=labels, classes=centres)
    undecided = cle.evaluate_pruning(None, split_at([5, 11]), data, n_random=0, **QUIET)
    low, high = undecided.difference_interval[0, 0, 0].tolist()
    assert low < -0.01 <= 0 <= high
    line = undecided.verdict().splitlines()[0]
    assert "within 1 point is not decided" in line
    assert "It is not told apart from pruning the dimensions of lowest variance" in line
    assert "harmless within 90 points" in undecided.verdict(margin=0.9).splitlines()[0]
    assert "No random: n_random is 0." in undecided.summary()


def test_what_is_alike_is_never_right() -> None:
    similarity = torch.ones(2, 3)
    assert best_rank(similarity, torch.eye(3, dtype=torch.bool)[:2]).tolist() == [3, 3]
    rows, labels, centres = rows_of()
    everything = split_at(list(range(8)))  # all that varies is pruned: nothing is left of any row
    data = cle.EvaluationData(rows, labels=labels, classes=centres)
    found = cle.evaluate_pruning(None, everything, data, n_random=0, **QUIET)
    assert float(found.score[0, 1, 0]) == 0


def test_a_broken_picture_takes_its_label_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    clip, labels = clip_of(), torch.tensor([0, 1] * 6)
    test = torch.arange(12) % 4 < 2
    kwargs: dict[str, Any] = {"classes": ["heart", "crane"], "preprocess": as_pixels}
    (tmp_path / "05.png").write_bytes(b"no picture")
    data = cle.EvaluationData(tmp_path, labels=labels, is_test=test, captions=[f"c{i}" for i in range(12)], **kwargs)
    with pytest.warns(UserWarning, match="1 pictures could not be read"):
        found = cle.evaluate_pruning(clip, split_at([1], EMBED_DIM), data, n_random=0, n_neighbors=1, **QUIET)
    assert found.skipped == ("05.png",)
    assert "1 pictures could not be read" in found.summary()
    kept = [i for i in range(12) if i != 5]
    readable = [tmp_path / f"{i:02}.png" for i in kept]
    data = cle.EvaluationData(
        readable, labels=labels[kept], is_test=test[kept], captions=[f"c{i}" for i in kept], **kwargs
    )
    same = cle.evaluate_pruning(clip, split_at([1], EMBED_DIM), data, n_random=0, n_neighbors=1, **QUIET)
    assert torch.equal(found.score, same.score)
    assert found.n == same.n


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    rows, labels, _ = rows_of()
    found = cle.evaluate_pruning(None, split_at([3]), cle.EvaluationData(rows, labels=labels), n_random=2, **QUIET)
    found.save(tmp_path / "x.safetensors")
    again = cle.PruningEvaluation.load(tmp_path / "x.safetensors")
    assert again.summary() == found.summary()
    assert again.left_out == found.left_out
    assert torch.equal(again.draws, found.draws)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "nothing to evaluate on"),
        ({"labels": torch.zeros(N)}, "labels are integers"),
        ({"labels": ["heart"] * N}, "labels are integers"),
        ({"labels": -torch.ones(N, dtype=torch.long)}, "labels count from 0"),
        ({"labels": torch.arange(N) % 2, "captions": ["a"] * 3}, "unequal length: 60 labels, 3 captions"),
        ({"labels": torch.arange(N) % 2, "captions": "a"}, "got one string"),
        ({"labels": torch.arange(N) % 3, "classes": ["a", "b"]}, "label 2 has no class"),
        ({"captions": ["a"] * N, "classes": ["a", "b"]}, "classes without labels"),
        ({"labels": torch.arange(N) % 2, "templates": "a photo"}, "one {} for the name"),
        ({"labels": torch.arange(N) % 2, "test_share": 1.0}, "test_share is in"),
        ({"labels": torch.arange(N) % 2, "is_test": torch.ones(N)}, "every picture is on one side"),
        ({"labels": torch.arange(N) % 2, "is_test": torch.zeros(N)}, "every picture is on one side"),
        ({"labels": torch.tensor([0, 1])}, "at least four"),
    ],
)
def test_wrong_data(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        cle.EvaluationData(some(N, D), **fields)


def test_every_class_is_halved_and_a_single_picture_is_for_training() -> None:
    labels = torch.tensor([0] * 10 + [1] * 7 + [2])
    data = cle.EvaluationData(some(18, D), labels=labels, test_share=0.3)
    assert [int(data.test[labels == k].sum()) for k in range(3)] == [3, 2, 0]
    assert torch.equal(data.test, cle.EvaluationData(some(18, D), labels=labels, test_share=0.3).test)
    assert not torch.equal(data.test, cle.EvaluationData(some(18, D), labels=labels, test_share=0.3, seed=1).test)


def test_classes_of_one_picture_each_are_for_zero_shot_alone() -> None:
    rows, _, _ = rows_of()
    data = cle.EvaluationData(rows, labels=torch.arange(N), classes=rows + 0.5 * some(N, D, seed=2))
    assert int(data.test.sum()) == N // 2
    found = cle.evaluate_pruning(None, split_at([11]), data, n_random=0, **QUIET)
    assert found.measures == ("zero-shot top-1", "zero-shot top-5")
    assert "No kNN and linear probe: 30 classes of the test have no training picture." in found.summary()
    with pytest.raises(InputError, match="nothing can be measured"):
        cle.evaluate_pruning(None, split_at([11]), cle.EvaluationData(rows, labels=torch.arange(N)), **QUIET)


def test_wrong_questions() -> None:
    rows, labels, centres = rows_of()
    data, split = cle.EvaluationData(rows, labels=labels, classes=centres), split_at([1])
    for wrong, words in (
        ([], "no split"),
        ([split, split], "two splits of one rank"),
        ([split, split_at([1, 2], hook_name="hook_pooled")], "different hooks"),
        (split_at([]), "nothing to prune"),
        (split_at(list(range(D))), "leave nothing"),
        (split_at([0], d=5), "dimensions"),
        (split_at([0], hook_name="blocks.1.hook_resid_post", tower="vision"), "needs the model"),
    ):
        with pytest.raises(InputError, match=words):
            cle.evaluate_pruning(None, wrong, data, **QUIET)
    for setting in ({"n_random": -1}, {"n_neighbors": 0}, {"confidence": 1.0}, {"probe_c": 0.0}, {"n_bootstrap": True}):
        with pytest.raises(InputError, match=next(iter(setting))):
            cle.evaluate_pruning(None, split, data, **{**QUIET, **setting})
    with pytest.raises(InputError, match="fewer than n_neighbors"):
        cle.evaluate_pruning(None, split, data, n_neighbors=100, **QUIET)
    with pytest.raises(InputError, match="number 3 of the images is NaN"):
        cle.evaluate_pruning(None, split, replace(data, images=rows.index_fill(0, torch.tensor(3), torch.nan)), **QUIET)
    with pytest.raises(InputError, match="need a model"):
        cle.evaluate_pruning(None, split, cle.EvaluationData(rows, labels=labels, classes=list("abcdefg")), **QUIET)
    with pytest.raises(InputError, match="one space is needed"):
        cle.evaluate_pruning(None, split, cle.EvaluationData(rows, labels=labels, classes=centres[:, :5]), **QUIET)
    with pytest.raises(InputError, match="covariance is of 5"):
        cle.evaluate_pruning(None, split, data, covariance=some(40, 5), **QUIET)
    with pytest.raises(InputError, match="margin"):
        cle.evaluate_pruning(None, split, data, **QUIET).verdict(margin=-1)
