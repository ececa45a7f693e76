"""L0, active share and modality by loops over samples; any cut into batches gives the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip import StreamingActivity, modality_score

D = 6


def codes_of(n: int, seed: int) -> Tensor:
    rows = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).relu()
    rows[:, 4] = 0  # never active
    rows[:, 5] *= 1e-4 * (torch.arange(n) % 2)  # active, and mostly below the threshold
    return rows


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 30), cut=st.integers(0, 30), seed=st.integers(0, 99))
def test_by_loops_and_in_parts(n: int, cut: int, seed: int) -> None:
    codes = codes_of(n, seed)
    one, other = StreamingActivity(D), StreamingActivity(D)
    one.update(codes[:cut])
    other.update(codes[cut:])
    resumed = StreamingActivity(D)
    resumed.load_state_dict(one.state_dict())
    found = resumed.merge(other).result()
    rows = codes.tolist()
    for j in range(D):
        assert float(found.mean[j]) == pytest.approx(math.fsum(row[j] for row in rows) / n, abs=1e-12)
        assert int(found.count[j]) == sum(row[j] > 0.001 for row in rows)
    assert found.l0 == pytest.approx(sum(value > 0.001 for row in rows for value in row) / n)
    active = sum(sum(row[j] > 0.001 for row in rows) >= 2 for j in range(D))
    assert found.active_share() == pytest.approx(active / D)
    assert list(found.to_frame()["count"]) == found.count.tolist()


def test_modality() -> None:
    image, text = codes_of(40, 0), codes_of(50, 1)
    score = modality_score(image, text)
    for j in range(D):
        e_image, e_text = image[:, j].double().mean(), text[:, j].double().mean()
        expected = float(e_image / (e_image + e_text))
        assert float(score[j]) == pytest.approx(expected, nan_ok=True)
    assert bool(score[4].isnan())
    torch.testing.assert_close(
        score + modality_score(text, image), torch.ones(D).double().where(~score.isnan(), torch.nan), equal_nan=True
    )
    activities = [StreamingActivity(D), StreamingActivity(D)]
    for one, codes in zip(activities, (image, text), strict=True):
        one.update(codes)
    torch.testing.assert_close(modality_score(*(one.result() for one in activities)), score, equal_nan=True)


def test_wrong_input() -> None:
    activity = StreamingActivity(D)
    with pytest.raises(InputError, match="no sample yet"):
        activity.result()
    for codes, words in (
        (torch.ones(2, D + 1), "codes are floats"),
        (torch.ones(2, D, dtype=torch.long), "codes are floats"),
        (torch.ones(D), "codes are floats"),
        (torch.tensor([[1.0] * D, [-1.0] * D]), "sample 1 of the batch"),
        (torch.full((1, D), torch.nan), "sample 0 of the batch"),
    ):
        with pytest.raises(InputError, match=words):
            activity.update(codes)
    assert activity.n == 0
    with pytest.raises(InputError, match="do not merge"):
        activity.merge(StreamingActivity(D, threshold=0.1))
    with pytest.raises(InputError, match="other width"):
        activity.load_state_dict(StreamingActivity(D + 1).state_dict())
    with pytest.raises(InputError, match="at least 1"):
        StreamingActivity(0)
    with pytest.raises(InputError, match="no common score"):
        modality_score(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"codes are \[sample d_code\]"):
        modality_score(torch.ones(3), torch.ones(2, 3))
