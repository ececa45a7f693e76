"""Contrasts, classifiers and probabilities: by hand, differentiable, and errors for what explains nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from oracles.models import build_clip, pictures, prompts
from oracles.sites import make
from PIL import Image
from torch import Tensor

from clip_lens_ext.attribution import (
    ScoreTarget,
    Target,
    attribution_patching,
    contrast_target,
    direction_target,
    exact_ablation,
    image_target,
    probe_target,
    softmax_target,
)
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedCLIP, HookedTower

X = torch.tensor([[1.0, 2.0, 2.0], [10.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
WEIGHT = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -2.0], [1.0, 1.0, 1.0], [0.2, -0.1, 0.3]], dtype=torch.float64)
BIAS = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)


@pytest.fixture
def clip() -> HookedCLIP:
    def tokenize(texts: list[str]) -> Tensor:
        return torch.stack([prompts(1, seed=len(text))[0] for text in texts])

    def preprocess(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture.resize((32, 24)))).permute(2, 0, 1).float() / 255

    return HookedCLIP(build_clip(), tokenizer=tokenize, preprocess=preprocess)


def cosine(a: Tensor, b: Tensor) -> float:
    lengths = math.sqrt(float((a * a).sum())) * math.sqrt(float((b * b).sum()))
    return float((a * b).sum()) / lengths


def test_contrast(clip: HookedCLIP) -> None:
    target = contrast_target(clip, ["a cat", "a crane bird"], ["a dog!", "nothing at all"])
    vectors = clip.embed_texts(["a cat", "a crane bird", "a dog!", "nothing at all"]).detach()
    embedding = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for sample in range(3):
        cosines = [cosine(embedding[sample], vector) for vector in vectors]
        for index in range(2):
            expected = cosines[index] - (cosines[2] + cosines[3]) / 2
            assert float(target(embedding)[sample, index]) == pytest.approx(expected, abs=1e-6)
    assert target.labels == ("a cat - mean of 2 others", "a crane bird - mean of 2 others")
    assert contrast_target(clip, "a cat", "a dog!").labels == ("a cat - a dog!",)
    assert (target.unit, len(target)) == ("cosine difference", 2)
    assert not target.vectors.requires_grad


def test_a_contrast_of_itself(clip: HookedCLIP) -> None:
    with pytest.raises(InputError, match="'a cat' against itself is zero for every picture"):
        contrast_target(clip, ["a dog!", "a cat"], ["a cat", "a cat"])
    for texts in (("", "a cat"), ("a cat", " ")):
        with pytest.raises(InputError, match="a prompt is empty"):
            contrast_target(clip, *texts)
    with pytest.raises(InputError, match="no text given"):
        contrast_target(clip, "a cat", [])


@pytest.mark.parametrize("normalize", [True, False])
def test_probe_by_hand(normalize: bool) -> None:
    logit = probe_target(WEIGHT, BIAS, labels=list("abcd"), normalize=normalize)
    margin = probe_target(WEIGHT, BIAS, kind="margin", normalize=normalize)
    for sample in range(4):
        x = X[sample] / X[sample].norm() if normalize else X[sample]
        scores = [sum(float(WEIGHT[c, k] * x[k]) for k in range(3)) + float(BIAS[c]) for c in range(4)]
        for c in range(4):
            rest = max(scores[other] for other in range(4) if other != c)
            assert float(logit(X)[sample, c]) == pytest.approx(scores[c], abs=1e-13)
            assert float(margin(X)[sample, c]) == pytest.approx(scores[c] - rest, abs=1e-13)
    assert (logit.unit, margin.unit) == ("logit", "logit margin")
    assert (logit.labels, margin.labels) == (tuple("abcd"), tuple("0123"))


def test_probes_in_other_clothes() -> None:
    """A binary classifier's one row, NumPy's arrays, no bias, a linear layer's parameters."""
    assert torch.allclose(probe_target(WEIGHT[0], 2.0)(X), (X @ WEIGHT[0] + 2)[:, None])
    assert torch.allclose(probe_target(WEIGHT.numpy(), BIAS.numpy())(X), X @ WEIGHT.T + BIAS)
    assert torch.allclose(probe_target(WEIGHT)(X), X @ WEIGHT.T)
    linear = torch.nn.Linear(3, 4).double()
    target = probe_target(linear.weight, linear.bias)
    assert torch.allclose(target(X), linear(X))
    assert not target(X).requires_grad
    assert probe_target(WEIGHT, BIAS)(X.float()).dtype == torch.float32


def test_softmax(clip: HookedCLIP) -> None:
    texts = ["a cat", "a crane bird", "a dog!"]
    target = softmax_target(clip, texts)
    embedding = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    scale = math.exp(float(clip.logit_scale.detach()))
    vectors = clip.embed_texts(texts).detach()
    for sample in range(3):
        powers = [math.exp(scale * cosine(embedding[sample], vector)) for vector in vectors]
        for index in range(3):
            assert float(target(embedding)[sample, index]) == pytest.approx(powers[index] / sum(powers), abs=1e-5)
    assert target.unit == "probability"
    flat = softmax_target(clip, texts, logit_scale=1e-6)
    assert torch.allclose(flat(embedding), torch.full((3, 3), 1 / 3), atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("a cat", {}, "softmax over one prompt is 1"),
        (["a cat"], {}, "name at least two"),
        (["a cat", ""], {}, "a prompt is empty"),
        (["a cat", "a dog"], {"logit_scale": 0}, "positive factor on the cosines, got 0"),
        (["a cat", "a dog"], {"logit_scale": float("inf")}, "got inf"),
    ],
)
def test_probabilities_that_are_none(clip: HookedCLIP, texts: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        softmax_target(clip, texts, **settings)


def test_pictures(clip: HookedCLIP, tmp_path: Any) -> None:
    """What the text tower is explained towards: tensors, PIL pictures and files alike."""
    target = image_target(clip, pictures(3))
    expected = clip.embed_images(pictures(3), normalize=True).detach()
    assert torch.allclose(target.vectors, expected, atol=1e-6)
    assert target.labels == ("0", "1", "2")
    assert torch.allclose(image_target(clip, pictures(3)[1]).vectors, expected[1:2], atol=1e-5)
    picture = Image.new("RGB", (40, 30), (200, 30, 90))
    picture.save(tmp_path / "one.png")
    one, files = image_target(clip, picture, labels=["red"]), image_target(clip, tmp_path)
    assert one.labels == ("red",)
    assert torch.allclose(one.vectors, files.vectors, atol=1e-6)
    assert not target.vectors.requires_grad
    (tmp_path / "two.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot read the image"):
        image_target(clip, tmp_path)
    with pytest.raises(InputError, match="3 target vectors have 1 labels"):
        image_target(clip, pictures(3), labels=["red"])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((WEIGHT, BIAS[:3]), {}, "expected 4 finite biases"),
        ((WEIGHT, BIAS * torch.nan), {}, "finite biases"),
        ((WEIGHT[0],), {"kind": "margin"}, "a margin needs at least two classes"),
        ((WEIGHT,), {"kind": "loss"}, "kind is 'logit' or 'margin', got 'loss'"),
        ((WEIGHT,), {"labels": ["a"]}, "4 classes have 1 labels"),
        ((WEIGHT * torch.inf,), {}, "a probe's weights must be finite"),
        ((torch.zeros(2, 3, 4),), {}, r"expected a probe's weights \[target d_embed\], got \[2, 3, 4\]"),
    ],
)
def test_probes_that_are_none(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        probe_target(*arguments, **settings)


def all_targets() -> list[Target]:
    return [
        direction_target(WEIGHT),
        direction_target(WEIGHT, cosine=False),
        probe_target(WEIGHT, BIAS),
        probe_target(WEIGHT, BIAS, kind="margin"),
        probe_target(WEIGHT, BIAS, kind="margin", normalize=True),
        ScoreTarget(WEIGHT, tuple("abcd"), normalize=True, readout="probability", of=(0, 1, 2, 3)),
    ]


@pytest.mark.parametrize(
    "target", all_targets(), ids=lambda target: f"{target.unit}-{getattr(target, 'normalize', '')}"
)
def test_what_every_target_does(target: Target) -> None:
    assert len(target) == len(target.labels) == target(X).shape[1] == 4
    some = target.select([3, 1])
    assert torch.allclose(some(X), target(X)[:, [3, 1]], rtol=0, atol=1e-14)
    assert some.labels == (target.labels[3], target.labels[1])
    assert some.unit == target.unit
    assert torch.allclose(target.select(torch.tensor([2]))(X), target(X)[:, 2:3], rtol=0, atol=1e-14)
    assert len({target.fingerprint, some.fingerprint, target.select([1, 3]).fingerprint}) == 3
    assert target.select(range(4)).fingerprint == target.fingerprint
    length = X.norm(dim=-1, keepdim=True)
    assert torch.allclose(target.at_length(X, length), target(X), rtol=0, atol=1e-14)
    if target.unit in ("cosine", "score", "logit margin") and getattr(target, "normalize", target.cosine):
        assert not torch.allclose(target.at_length(X, 2 * length), target(X), atol=1e-3)
    x = X.clone().requires_grad_()
    for index in range(4):
        gradient = torch.autograd.grad(target(x)[:, index].sum(), x)[0]
        step = 1e-6 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        change = (target(X + step) - target(X - step))[:, index]
        assert torch.allclose((2 * step * gradient).sum(dim=-1), change, rtol=1e-5, atol=1e-12)
    for wrong in ([], [4], [-1]):
        with pytest.raises(InputError, match=r"the numbers 0\.\.3, got"):
            target.select(wrong)
    with pytest.raises(InputError, match="are they of the same model"):
        target(torch.zeros(2, 4))


@pytest.mark.parametrize(
    "target", all_targets(), ids=lambda target: f"{target.unit}-{getattr(target, 'normalize', '')}"
)
def test_half_precision_is_read_in_float32(target: Target) -> None:
    """Ablation is a difference of predictions: bfloat16's eight bits would leave little of it."""
    for dtype in (torch.bfloat16, torch.float16):
        low = X.to(dtype)
        assert torch.equal(target(low), target(low.float()))
        length = low.float().norm(dim=-1, keepdim=True)
        assert torch.equal(target.at_length(low, length), target.at_length(low.float(), length))
        assert target(low).dtype == torch.float32


def test_fingerprints_tell_targets_apart() -> None:
    marks = [target.fingerprint for target in all_targets()]
    assert len(set(marks)) == len(marks)
    assert probe_target(WEIGHT, BIAS).fingerprint != probe_target(WEIGHT, BIAS + 1).fingerprint
    assert probe_target(WEIGHT, BIAS).fingerprint == probe_target(WEIGHT.clone(), BIAS.clone()).fingerprint


def test_scores_have_no_cosine() -> None:
    with pytest.raises(InputError, match="no cosine=True"):
        ScoreTarget(WEIGHT, tuple("abcd"), cosine=True, of=(0, 1, 2, 3))
    with pytest.raises(InputError, match="2 targets have 4 labels"):
        ScoreTarget(WEIGHT, tuple("abcd"), of=(0, 1))


def test_attributions_of_a_difference_are_the_difference(clip: HookedCLIP) -> None:
    """Gradients and exact ablation are linear in the target: a contrast's are those of its parts, subtracted."""
    model, x, sae, _ = make(("vision", "plain", "blocks.0.hook_resid_post", "patches", 48))
    tower = HookedTower(model)
    texts = ["a cat", "a crane bird", "a dog!"]
    vectors = clip.embed_texts(texts).detach().double()
    contrast = contrast_target(clip, texts[0], texts[1:])
    for method in (attribution_patching, exact_ablation):
        parts = method(tower, x, sae, direction_target(vectors)).value
        expected = parts[:, 0] - (parts[:, 1] + parts[:, 2]) / 2
        assert torch.allclose(method(tower, x, sae, contrast).value[:, 0], expected, rtol=0, atol=1e-7)
