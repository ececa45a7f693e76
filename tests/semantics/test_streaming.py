"""Clarity and monosemanticity over all images: against pairs, and in any split, order and merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import semantics as oracle
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.data import ImageBatch
from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.saes.codes import SparseCodes
from clip_lens_ext.semantics import StreamingClarity, StreamingMonosemanticity
from clip_lens_ext.towers import HookedCLIP

N, D_SAE, D = 13, 7, 5
# Sums over thirteen images in float64, and a difference of two that are up to a hundred times larger.
EXACT = 1e-11


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations `[sample latent]`: mostly zero; latents always active, never, negative, once, always the same."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.rand(N, D_SAE, generator=generator, dtype=torch.float64)
    activations[torch.rand(N, D_SAE, generator=generator) < 0.5] = 0
    activations[:4, :] += 0.1
    activations[:, 1] = 2 + torch.rand(N, generator=generator, dtype=torch.float64)
    activations[:, 2] = 0
    activations[5, 3] = -0.7
    activations[:, 4] = 0
    activations[3, 4] = 1.5
    activations[:, 6] = 0.7
    embeddings = torch.randn(N, D, generator=generator, dtype=torch.float64) + 0.4
    return activations, embeddings * torch.linspace(0.5, 4, N, dtype=torch.float64)[:, None]


def passed(make: Any, activations: Tensor, embeddings: Tensor, cuts: list[int]) -> Any:
    score = make(D_SAE, D)
    for part, own in zip(activations.tensor_split(cuts), embeddings.tensor_split(cuts), strict=True):
        score.update(part, own)
    return score


def test_clarity_against_pairs() -> None:
    activations, embeddings = data()
    found = passed(lambda *sizes: StreamingClarity(*sizes, threshold=0.3, n_min=3), activations, embeddings, [4, 5])
    result = found.result()
    for latent in range(D_SAE):
        own = [embeddings[i].tolist() for i in range(N) if float(activations[i, latent]) > 0.3]
        assert int(result.n_samples[latent]) == len(own)
        if len(own) < 3:
            assert result.value[latent].isnan()
        else:
            assert float(result.value[latent]) == pytest.approx(oracle.clarity(own), abs=EXACT)
    assert result.undefined == {"fewer than 3 images above the threshold": int(result.value.isnan().sum())}
    assert 2 <= result.n_undefined < D_SAE
    assert result.settings == {"images": "all that activate the latent", "threshold": 0.3, "n_min": 3}
    assert result.mean == pytest.approx(float(result.value[~result.value.isnan()].mean()))


def test_monosemanticity_against_pairs() -> None:
    activations, embeddings = data()
    result = passed(StreamingMonosemanticity, activations, embeddings, [1, 9]).result()
    for latent in range(D_SAE):
        own = activations[:, latent].tolist()
        if latent in (2, 4, 6):  # never active; all weight on one image; no weight on any
            assert result.value[latent].isnan()
            continue
        expected = oracle.monosemanticity(embeddings.tolist(), own)
        assert float(result.value[latent]) == pytest.approx(expected, abs=EXACT)
    assert result.undefined == {
        "no image activates it": 1, "its activation is the same on all images": 1,
        "one sample carries all of the weight": 1,
    }  # fmt: skip
    # One pass over all images is what the score of whole rows says.
    whole = cle.monosemanticity(embeddings.expand(D_SAE, -1, -1), activations.T.contiguous())
    torch.testing.assert_close(result.value, whole.value, rtol=0, atol=EXACT, equal_nan=True)


@pytest.mark.parametrize("make", [StreamingClarity, StreamingMonosemanticity])
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=4), order=st.permutations(range(N)), split=st.integers(0, N))
def test_any_split_order_and_merge(make: Any, cuts: list[int], order: list[int], split: int) -> None:
    activations, embeddings = data()
    whole = passed(make, activations, embeddings, []).result()
    activations, embeddings = activations[order], embeddings[order]
    left = passed(make, activations[:split], embeddings[:split], sorted(cuts))
    right = passed(make, activations[split:], embeddings[split:], [])
    for first, second in ((left, right), (right, left)):
        copy = make(D_SAE, D).merge(first)
        merged = copy.merge(second)
        assert merged is copy
        result = merged.result()
        torch.testing.assert_close(result.value, whole.value, rtol=0, atol=EXACT, equal_nan=True)
        assert torch.equal(result.n_samples, whole.n_samples)
        assert result.undefined == whole.undefined


@pytest.mark.parametrize("make", [StreamingClarity, StreamingMonosemanticity])
def test_a_result_is_a_picture_of_its_moment(make: Any) -> None:
    activations, embeddings = data()
    score = passed(make, activations, embeddings, [])
    before = score.result()
    values, counts = before.value.clone(), before.n_samples.clone()
    score.update(activations.flip(0), embeddings)
    assert torch.equal(before.value.nan_to_num(9), values.nan_to_num(9))
    assert torch.equal(before.n_samples, counts)


@pytest.mark.parametrize("make", [StreamingClarity, StreamingMonosemanticity])
def test_codes_count_with_their_greatest_token(make: Any, clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    codes = cle.encode(clip.vision, pixels, sae)
    embeddings = clip.embed_images(pixels).detach()
    score, dense = make(37, 20), make(37, 20)
    for part in (slice(0, 10), slice(10, 23)):
        batch = cle.encode(clip.vision, pixels[part], sae)
        score.update(batch, embeddings[part])
        dense.update(batch.dense().amax(dim=1), embeddings[part])
    found = score.result()
    assert found.n_undefined < 30
    # Codes are pooled in float32.
    torch.testing.assert_close(found.value, dense.result().value, rtol=0, atol=1e-6, equal_nan=True)
    assert codes.n_token == 12


def test_a_latent_far_from_zero_keeps_its_precision() -> None:
    """Activations of 1000 with a spread of one: the least is subtracted after the sums."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    activations = 1000 + torch.rand(200, 1, generator=generator, dtype=torch.float64)
    score = StreamingMonosemanticity(1, 4)
    score.update(activations, embeddings)
    whole = cle.monosemanticity(embeddings[None], activations.T.contiguous())
    torch.testing.assert_close(score.result().value, whole.value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [0.1, 0.7, 3.3, 1e-9, 1e9, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_latent_has_no_score(size: float, dtype: torch.dtype) -> None:
    """Weights come by subtraction at the end, and of equal activations that leaves rounding, not zero."""
    generator = torch.Generator().manual_seed(4)
    embeddings = torch.randn(100, 6, generator=generator, dtype=torch.float64)
    activations = torch.full((100, 4), size, dtype=dtype)
    activations[::2, 1] = 0  # weights of 0 and 1: as good as any
    activations[::2, 2] *= 1 + 3e-6
    activations[::2, 3] *= 1 + 3e-7  # a score of this would be off by hundredths
    scores = [StreamingMonosemanticity(4, 6) for _ in range(3)]
    for score, part in zip(scores, (slice(0, 100), slice(0, 37), slice(37, 100)), strict=True):
        score.update(activations[part], embeddings[part])
    whole = cle.monosemanticity(embeddings.expand(4, -1, -1), activations.T.contiguous()).value
    assert whole.isnan().tolist() == [True, False, False, False]
    for found in (scores[0].result(), scores[1].merge(scores[2]).result()):
        assert found.value.isnan().tolist() == [True, False, False, True]
        assert float(found.value[1]) == pytest.approx(float(whole[1]), abs=EXACT)
        assert float(found.value[2]) == pytest.approx(float(whole[2]), abs=1e-4)
        assert found.undefined == {"its activation is the same on all images": 2}


def test_nothing_was_seen() -> None:
    for make in (StreamingClarity, StreamingMonosemanticity):
        result = make(3, 2).result()
        assert result.value.isnan().all()
        assert result.n_undefined == 3
        assert math.isnan(result.mean)


@pytest.mark.parametrize("make", [StreamingClarity, StreamingMonosemanticity])
@pytest.mark.parametrize(
    ("activations", "embeddings", "message"),
    [
        (torch.ones(2, D_SAE), torch.ones(3, D), "do not go together"),
        (torch.ones(2, D_SAE + 1), torch.ones(2, D), "do not go together"),
        (torch.ones(2, D_SAE), torch.ones(2, D + 1), rf"\[sample {D}\]"),
        (torch.ones(2, D_SAE), torch.ones(2, D).long(), "floats"),
        (torch.ones(2, D_SAE), torch.tensor([[1.0] * D, [0.0] * D]), "sample 1 of the batch is zero"),
        (torch.ones(2, D_SAE), torch.full((2, D), math.nan), "sample 0 of the batch is zero or not finite"),
        (torch.full((2, D_SAE), math.nan), torch.ones(2, D), "NaN"),
        (torch.ones(2, 3, D_SAE), torch.ones(2, D), r"SparseCodes or floats \[sample latent\]"),
        (SparseCodes.from_dense(torch.ones(3, 2, D_SAE)), torch.ones(2, D), "do not go together"),
    ],
)
def test_wrong_input_leaves_the_sums_alone(make: Any, activations: Any, embeddings: Tensor, message: str) -> None:
    good, vectors = data()
    score = passed(make, good, vectors, [])
    before = score.result().value
    with pytest.raises(InputError, match=message):
        score.update(activations, embeddings)
    assert torch.equal(score.result().value.nan_to_num(9), before.nan_to_num(9))


class Pair:
    """One score as an accumulator of batches of activations and embeddings."""

    def __init__(self, score: Any) -> None:
        self.score = score
        self.merge, self.state_dict = score.merge, score.state_dict
        self.load_state_dict, self.result = score.load_state_dict, score.result

    def update(self, batch: tuple[Tensor, Tensor], /) -> None:
        self.score.update(*batch)


@pytest.mark.parametrize("make", [StreamingClarity, StreamingMonosemanticity])
@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_a_resumed_pass_is_the_whole_one(make: Any, at: int, tmp_path: Path) -> None:
    activations, embeddings = data()
    batches = cle.image_batches(embeddings[:, None, None, :].expand(-1, 3, 1, -1), batch_size=3)
    left = [at]

    def step(batch: ImageBatch) -> tuple[Tensor, Tensor]:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return activations[batch.indexes], batch.pixels[:, 0, 0]

    path = tmp_path / "pass"
    with pytest.raises(KeyboardInterrupt):
        run_pass(batches, step, Pair(make(D_SAE, D)), checkpoint=path, progress=False)
    assert path.exists() == (at > 0)
    left[0] = 5 - at
    resumed = make(D_SAE, D)
    run_pass(batches, step, Pair(resumed), checkpoint=path, progress=False)
    left[0] = 5
    whole = make(D_SAE, D)
    run_pass(batches, step, Pair(whole), progress=False)
    one, other = resumed.result(), whole.result()
    assert torch.equal(one.value.nan_to_num(9), other.value.nan_to_num(9))
    assert torch.equal(one.n_samples, other.n_samples)
    assert one.undefined == other.undefined
    state = whole.state_dict()
    with pytest.raises(InputError, match="other sizes"):
        make(D_SAE, D + 1).load_state_dict(state)
    whole.update(activations, embeddings)
    before = make(D_SAE, D)
    before.load_state_dict(state)  # a copy: what was taken in after it is not there
    assert torch.equal(before.result().value.nan_to_num(9), other.value.nan_to_num(9))


def test_wrong_settings_and_merges() -> None:
    with pytest.raises(InputError, match="n_min is at least 2, got 1"):
        StreamingClarity(3, 2, n_min=1)
    with pytest.raises(InputError, match="are positive, got 0 and 2"):
        StreamingMonosemanticity(0, 2)
    with pytest.raises(InputError, match=r"\[3, 2\] and \[3, 4\] do not merge"):
        StreamingClarity(3, 2).merge(StreamingClarity(3, 4))
    with pytest.raises(InputError, match=r"\[3, 2\] and \[4, 2\] do not merge"):
        StreamingMonosemanticity(3, 2).merge(StreamingMonosemanticity(4, 2))
    with pytest.raises(InputError, match="different threshold or n_min"):
        StreamingClarity(3, 2, threshold=0.5).merge(StreamingClarity(3, 2))
