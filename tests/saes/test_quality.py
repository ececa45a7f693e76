"""The accumulator of reconstruction quality, in any split and order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.quality import Reconstruction


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 1000), st.sampled_from([1.0, 1e4]))
def test_reconstruction_in_any_split_and_order_is_that_of_all_rows(sizes: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes) + 2
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64) + offset
    x_hat = x + 0.3 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    codes = torch.rand(n, 6, generator=generator) * (torch.rand(n, 6, generator=generator) < 0.2)
    order = torch.randperm(n, generator=generator)
    shards = []
    for ids in order.split([*sizes, 2]):
        shards.append(Reconstruction(6))
        half = len(ids) // 2
        shards[-1].update(x[ids[:half]], x_hat[ids[:half]], codes[ids[:half]])
        shards[-1].update(x[ids[half:]], x_hat[ids[half:]], codes[ids[half:]])
    merged = shards[0]
    for shard in shards[1:]:
        assert merged.merge(shard) is merged
    quality = merged.result()
    rows, hats, z = x.numpy(), x_hat.numpy(), codes.numpy()
    assert quality.n_rows == n
    assert quality.explained_variance == pytest.approx(
        1 - ((rows - hats) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum(), rel=1e-6
    )
    assert quality.cosine == pytest.approx(
        sum(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(rows, hats, strict=True)) / n
    )
    assert quality.l0 == pytest.approx(sum(sum(value != 0 for value in row) for row in z) / n)
    assert quality.dead_latents == pytest.approx(sum(not column.any() for column in z.T) / 6)


def test_reconstruction_refuses_what_does_not_fit() -> None:
    seen = Reconstruction(4)
    with pytest.raises(InputError, match="no rows"):
        seen.result()
    with pytest.raises(InputError, match=r"\[row 4\]"):
        seen.update(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"\[row d\]"):
        seen.update(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="cannot merge"):
        seen.merge(Reconstruction(5))
    seen.update(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 4))
    assert np.isnan(seen.result().explained_variance)
