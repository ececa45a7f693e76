"""Cosines as sums over features, and without one of them: by loops in float64, and through a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.sparse_clip.additive import ablated_cosines, additive_attribution, contributions, feature_ablation


def codes_of(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()


def cosine_by_loops(z: list[float], t: list[float]) -> float:
    length = math.sqrt(math.fsum(v * v for v in z)) * math.sqrt(math.fsum(v * v for v in t))
    return math.fsum(a * b for a, b in zip(z, t, strict=True)) / length if length else 0.0


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 5), n_text=st.integers(1, 4), d=st.integers(1, 9), seed=st.integers(0, 999))
def test_by_loops(n: int, n_text: int, d: int, seed: int) -> None:
    codes, texts = codes_of(n, d, seed), codes_of(n_text, d, seed + 1000)
    added, without = contributions(codes, texts), ablated_cosines(codes, texts)
    assert added.sample.tolist() == without.sample.tolist()
    assert added.feature.tolist() == without.feature.tolist()
    expected = [(s, i) for s in range(n) for i in range(d) if codes[s, i] > 0]
    assert list(zip(added.sample.tolist(), added.feature.tolist(), strict=True)) == expected
    for t in range(n_text):
        text = texts[t].tolist()
        total = [0.0] * n
        for pair, (s, i) in enumerate(expected):
            z = codes[s].tolist()
            alone = [v if j == i else 0.0 for j, v in enumerate(z)]
            lengths = math.sqrt(math.fsum(v * v for v in z)) * math.sqrt(math.fsum(v * v for v in text))
            term = math.fsum(a * b for a, b in zip(alone, text, strict=True)) / lengths if lengths else 0.0
            assert float(added.value[pair, t]) == pytest.approx(term, abs=1e-12)
            rest = [0.0 if j == i else v for j, v in enumerate(z)]
            assert float(without.value[pair, t]) == pytest.approx(cosine_by_loops(rest, text), abs=1e-12)
            total[s] += float(added.value[pair, t])
        for s in range(n):
            y = cosine_by_loops(codes[s].tolist(), text)
            assert total[s] == pytest.approx(y, abs=1e-12)
            assert float(added.cosine[s, t]) == float(without.cosine[s, t]) == pytest.approx(y, abs=1e-12)


@pytest.mark.parametrize("small", [1e-2, 1e-5, 1e-9, 1e-150])
def test_a_feature_that_outweighs_all_others(small: float) -> None:
    codes = torch.tensor([[1e3, small, 2 * small, 0.0]], dtype=torch.float64)
    texts = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    found = ablated_cosines(codes, texts)
    assert float(found.value[0]) == pytest.approx(1 / math.sqrt(5) / math.sqrt(3), rel=1e-9)


def test_a_code_with_one_feature_or_none() -> None:
    codes = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    texts = torch.tensor([[1.0, 1.0, 0.0]])
    found = ablated_cosines(codes, texts)
    assert found.value.tolist() == [[0.0]]
    torch.testing.assert_close(found.cosine, torch.tensor([[0.5**0.5], [0.0]], dtype=torch.float64))


def test_features_in_another_order() -> None:
    codes, texts = codes_of(4, 30, 0), codes_of(3, 30, 1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for function in (contributions, ablated_cosines):
        plain, moved = function(codes, texts), function(codes[:, order], texts[:, order])
        dense = torch.zeros(2, 4, 30, 3, dtype=torch.float64)
        dense[0][plain.sample, plain.feature] = plain.value
        dense[1][moved.sample, order[moved.feature]] = moved.value
        torch.testing.assert_close(dense[0], dense[1])


@pytest.mark.parametrize("logit_scale", [False, True])
def test_of_a_planted_sparse_clip(planted_sparse: cle.HookedCLIP, logit_scale: bool) -> None:
    world = PlantedWorld(0)
    pixels = normalise(world.sample(7, seed=3, split="test").images)
    prompts = [f"a photo of a {name}" for name in ("heart", "kite", "glass moth")]
    factor = float(planted_sparse.logit_scale.detach().exp()) if logit_scale else 1.0
    with torch.no_grad():
        y = factor * planted_sparse.similarity(pixels, prompts)
        codes = planted_sparse.embed_images(pixels)
    added = additive_attribution(planted_sparse, pixels, prompts, logit_scale=logit_scale, batch_size=3)
    assert (added.dense().sum(dim=-1) - y).abs().max() < 1e-6 * factor
    assert bool((added.value >= 0).all())
    assert (added.unit, added.hook_name) == ("logit" if logit_scale else "cosine", "hook_embedding")
    removed = feature_ablation(planted_sparse, pixels, prompts, logit_scale=logit_scale)
    sample, feature = int(removed.sample[40]), int(removed.latent[40])
    with torch.no_grad(), planted_sparse.vision.hooks(
        fwd_hooks=[("hook_embedding", lambda code, hook: code.index_fill(1, torch.tensor([feature]), 0.0))]
    ):
        expected = y[sample] - factor * planted_sparse.similarity(pixels[sample : sample + 1], prompts)[0]
    torch.testing.assert_close(removed.value[40], expected, atol=2e-6 * factor, rtol=1e-4)
    assert torch.equal(removed.activation, codes[removed.sample, removed.latent])
    halves = [additive_attribution(planted_sparse, part, prompts, logit_scale=logit_scale)
              for part in (pixels[:3], pixels[3:])]  # fmt: skip
    torch.testing.assert_close(halves[0].merge(halves[1]).dense(), added.dense())


def test_targets_and_files(planted_sparse: cle.HookedCLIP, tmp_path: Any) -> None:
    pixels = normalise(PlantedWorld(0).sample(3, seed=3, split="test").images)
    found = additive_attribution(planted_sparse, pixels[:2], cle.image_target(planted_sparse, pixels[2:]))
    found.save(tmp_path / "a.safetensors")
    again = cle.Attribution.load(tmp_path / "a.safetensors")
    assert torch.equal(again.value, found.value)
    assert again.error_term == "none"
    assert float(found.dense().sum(-1).max()) <= 1 + 1e-6


def test_wrong_input(planted_sparse: cle.HookedCLIP) -> None:
    pixels = torch.zeros(2, 3, 48, 48)
    with pytest.raises(InputError, match="negative activation"):
        additive_attribution(cle.planted_clip(), pixels, "a heart")
    with pytest.raises(InputError, match="inner product"):
        additive_attribution(planted_sparse, pixels, cle.direction_target(torch.ones(1, 512), cosine=False))
    with pytest.raises(InputError, match="finite"):
        feature_ablation(planted_sparse, pixels, cle.direction_target(torch.ones(1, 128)))
    with pytest.raises(InputError, match="negative activation"):
        contributions(torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    zero = cle.HookedCLIP(planted_sparse.native, preprocess=planted_sparse.preprocess,
                          tokenizer=planted_sparse.tokenizer)  # fmt: skip
    zero.vision.add_hook("hook_embedding", lambda code, hook: code * 0)
    with pytest.warns(UserWarning, match="2 pictures have a code of zeros"):
        empty = additive_attribution(zero, pixels, "a heart")
    assert len(empty) == 0
    assert empty.prediction.tolist() == [[0.0], [0.0]]
