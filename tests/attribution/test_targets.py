"""What is explained: cosines and inner products with directions, and errors for what has no direction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles.models import build_clip, build_vision, prompts
from torch import Tensor

from clip_lens_ext.attribution import Target, direction_target, text_target
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedCLIP

VECTORS = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -2.0]], dtype=torch.float64)
X = torch.tensor([[1.0, 2.0, 2.0], [10.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.5, 0.0, 0.5]], dtype=torch.float64)


def test_cosines_and_inner_products_by_hand() -> None:
    cosine, inner = direction_target(VECTORS)(X), direction_target(VECTORS, cosine=False)(X)
    assert cosine.shape == inner.shape == (4, 2)
    for i in range(4):
        for j in range(2):
            product = sum(float(X[i, k] * VECTORS[j, k]) for k in range(3))
            lengths = math.sqrt(sum(float(a) ** 2 for a in X[i])) * math.sqrt(sum(float(a) ** 2 for a in VECTORS[j]))
            assert float(inner[i, j]) == pytest.approx(product, abs=1e-14)
            assert float(cosine[i, j]) == pytest.approx(product / lengths, abs=1e-14)
    assert (direction_target(VECTORS).unit, direction_target(VECTORS, cosine=False).unit) == ("cosine", "inner product")


def test_one_direction_and_its_labels() -> None:
    target = direction_target(VECTORS[0])
    assert len(target) == 1
    assert target.labels == ("0",)
    assert target(X).shape == (4, 1)
    assert direction_target(VECTORS, labels=["x", "y"]).labels == ("x", "y")
    assert direction_target(VECTORS.tolist()).vectors.shape == (2, 3)


def test_predictions_are_differentiable_and_targets_are_not() -> None:
    vectors, x = VECTORS.clone().requires_grad_(), X.clone().requires_grad_()
    target = direction_target(vectors)
    gradient = torch.autograd.grad(target(x).sum(), x)[0]
    # A cosine does not change along its argument.
    assert torch.allclose((gradient * X).sum(dim=-1), torch.zeros(4, dtype=torch.float64), atol=1e-14)
    assert not target.vectors.requires_grad


def test_dtype_of_the_embedding_wins() -> None:
    assert direction_target(VECTORS)(X.float()).dtype == torch.float32
    assert direction_target(VECTORS.float())(X).dtype == torch.float64


@pytest.mark.parametrize(
    ("vectors", "settings", "message"),
    [
        (torch.zeros(2, 3, 4), {}, r"\[target d_embed\], got \[2, 3, 4\]"),
        (torch.zeros(0, 3), {}, r"got \[0, 3\]"),
        (torch.tensor(1.0), {}, r"got \[\]"),
        (torch.tensor([[1, 2]]), {}, "floating-point"),
        (torch.tensor([[1.0, torch.nan]]), {}, "finite"),
        (torch.tensor([[1.0, torch.inf]]), {}, "finite"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), {}, "zero vector has no direction"),
        (VECTORS, {"labels": ["one"]}, "2 target vectors have 1 labels"),
    ],
)
def test_directions_that_are_none(vectors: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        direction_target(vectors, **settings)


def test_a_zero_vector_has_an_inner_product() -> None:
    assert (direction_target(torch.zeros(1, 3), cosine=False)(X.float()) == 0).all()


def test_embeddings_of_another_model() -> None:
    with pytest.raises(InputError, match="vectors have 3 numbers, the embeddings 4: are they of the same model"):
        direction_target(VECTORS)(torch.zeros(2, 4))
    with pytest.raises(InputError, match="labels"):
        Target(VECTORS, ("one",))


@pytest.fixture
def clip() -> HookedCLIP:
    def tokenize(texts: list[str]) -> Tensor:
        return torch.stack([prompts(1, seed=len(text))[0] for text in texts])

    return HookedCLIP(build_clip(), tokenizer=tokenize)


def test_texts(clip: HookedCLIP) -> None:
    target = text_target(clip, ["a cat", "a crane"])
    assert target.labels == ("a cat", "a crane")
    assert target.cosine
    expected = clip.native.encode_text(clip.tokenize(["a cat", "a crane"]), normalize=True)
    embedding = torch.randn(3, 20)
    assert torch.allclose(target(embedding), torch.nn.functional.normalize(embedding, dim=-1) @ expected.T, atol=1e-6)
    assert not target.vectors.requires_grad
    assert text_target(clip, "a cat").labels == ("a cat",)
    assert torch.allclose(text_target(clip, "a cat").vectors, target.vectors[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", "a prompt is empty"),
        ("  \n", "a prompt is empty"),
        (["a cat", ""], "a prompt is empty"),
        ([], "no text given"),
        (["a cat", None], "must be strings, got NoneType"),
    ],
)
def test_texts_that_are_none(clip: HookedCLIP, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_target(clip, texts)


def test_a_model_without_text_tower() -> None:
    with pytest.raises(InputError, match="direction_target"):
        text_target(HookedCLIP(build_vision()), "a cat")
