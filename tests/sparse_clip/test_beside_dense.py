"""A Sparse CLIP beside its dense model, by loops, also where codes are all zeros."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.sparse_clip import BesideDense, add_sparse_heads, beside_dense

WORLD = PlantedWorld(0)
N, CLASSES = 16, [entry.name for entry in WORLD.classes[:4]]


def pairs() -> tuple[Tensor, Tensor, list[str]]:
    """Pictures of four classes, the class of each, and captions of which no two are equal."""
    batch = WORLD.sample(4 * N, seed=3, split="test", classes=CLASSES)
    rows = [batch.captions.index(caption) for caption in dict.fromkeys(batch.captions)][:N]
    labels = torch.tensor([CLASSES.index(WORLD.classes[int(batch.labels[row])].name) for row in rows])
    return normalise(batch.images[rows]), labels, [batch.captions[row] for row in rows]


@torch.no_grad()
def emptied(clip: cle.HookedCLIP, pictures: Tensor, captions: list[str]) -> cle.HookedCLIP:
    """Heads under which one picture and one caption activate nothing: their own direction is turned to below zero."""
    sparse = add_sparse_heads(clip, 64, seed=2)
    rows = clip.embed_images(pictures)[0], clip.embed_texts(captions)[0]
    for head, row in zip((sparse.native.image_head, sparse.native.text_head), rows, strict=True):
        weight = head.weight
        weight -= (weight @ row + 0.01 * row.norm())[:, None] * row / (row @ row)
    return sparse


def cosines(a: Tensor, b: Tensor) -> list[list[float]]:
    def cosine(x: list[float], y: list[float]) -> float:
        length = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
        return math.fsum(v * w for v, w in zip(x, y, strict=True)) / length if length else 0.0

    return [[cosine(x, y) for y in b.double().tolist()] for x in a.double().tolist()]


def first(row: list[float], own: int) -> bool:
    return all(value < row[own] for place, value in enumerate(row) if place != own)


@torch.no_grad()
@pytest.mark.parametrize("with_zeros", [False, True])
def test_by_loops(with_zeros: bool, tmp_path: Path) -> None:
    pictures, labels, captions = pairs()
    clip = cle.planted_clip()
    sparse = emptied(clip, pictures, captions) if with_zeros else add_sparse_heads(clip, 64, seed=2)
    test = torch.arange(N) % 2 == 0
    labels[1] = labels[0]  # the first neighbour, where all are equally far
    data = cle.EvaluationData(pictures, labels=labels, classes=CLASSES, captions=captions, is_test=test)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = beside_dense(sparse, data, n_neighbors=1, n_bootstrap=20, progress=False)
    said = [str(one.message) for one in caught if "all zeros" in str(one.message) and one.filename == __file__]
    assert len(said) == int(with_zeros)
    assert found.n_empty == 2 * with_zeros
    assert ("2 codes are all zeros" in str(found)) == with_zeros
    for values, model in ((found.sparse, sparse), (found.dense, clip)):
        codes, texts = model.embed_images(pictures), model.embed_texts(captions)
        prompts = model.embed_texts([f"a photo of a {name}" for name in CLASSES])
        rows = [i for i in range(N) if test[i]]
        between, classes = cosines(codes[rows], texts[rows]), cosines(codes[rows], prompts)
        neighbours = cosines(codes[rows], codes[~test])
        expected = {
            "zero-shot top-1": [first(classes[i], int(labels[row])) for i, row in enumerate(rows)],
            "image to text R@1": [first(between[i], i) for i in range(len(rows))],
            "text to image R@1": [first([row[i] for row in between], i) for i in range(len(rows))],
            "kNN": [
                max(near) > 0 and int(labels[~test][near.index(max(near))]) == int(labels[row])
                for near, row in zip(neighbours, rows, strict=True)
            ],
        }
        for name, hits in expected.items():
            assert float(values[found.measures.index(name)]) == pytest.approx(sum(hits) / len(hits)), name
        if with_zeros and model is sparse:
            assert said == ["the codes of 1 pictures and 1 texts are all zeros: they have no direction, and are like "
                            "nothing"]  # fmt: skip
            assert not any(expected[name][0] for name in expected)
    found.save(tmp_path / "beside")
    assert BesideDense.load(tmp_path / "beside").n_empty == found.n_empty


@torch.no_grad()
def test_zeros_of_a_dense_model_are_refused() -> None:
    pictures, labels, captions = pairs()
    broken = cle.planted_clip()
    broken.native.visual.proj.zero_()
    data = cle.EvaluationData(pictures, captions=captions)
    with pytest.raises(InputError, match="number 0 of the images is NaN, infinite or zero"):
        beside_dense(add_sparse_heads(cle.planted_clip(), 64), data, dense=broken, progress=False)
    with pytest.raises(InputError, match="pass the pictures"):
        beside_dense(add_sparse_heads(broken, 64), cle.EvaluationData(torch.eye(8), labels=labels[:8]), progress=False)
