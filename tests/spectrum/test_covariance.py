"""Streaming covariance against two exact passes, in any split, order and merge, on a mean of 60 times the spread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import spectrum as oracle
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.spectrum import covariance as module
from clip_lens_ext.spectrum.covariance import StreamingCovariance

N, D = 23, 4
EXACT = 1e-12  # float64 sums of some twenty products of unit size


def rows(n: int = N, d: int = D, *, seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(d, d, generator=generator).double()
    )
    return (mixed + mean * torch.arange(1, d + 1).double()).to(dtype)


def of(x: Tensor, cuts: list[int] | None = None) -> StreamingCovariance:
    found = StreamingCovariance(x.shape[1])
    for part in x.tensor_split(sorted(cuts or [])):
        found.update(part)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Greatest error of an entry in units of the standard deviations of its two coordinates."""
    spread = expected.diagonal().sqrt()
    return float(((found - expected).abs() / torch.outer(spread, spread)).max())


def test_against_two_exact_passes() -> None:
    x = rows(mean=3)
    mean, covariance = oracle.two_passes(x.tolist())
    found = of(x, [5, 6, 6])
    torch.testing.assert_close(found.mean(), torch.tensor(mean, dtype=torch.float64), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(
        found.covariance(), torch.tensor(covariance, dtype=torch.float64), rtol=EXACT, atol=EXACT
    )
    biased = torch.tensor(oracle.two_passes(x.tolist(), correction=0)[1], dtype=torch.float64)
    torch.testing.assert_close(found.covariance(correction=0), biased, rtol=EXACT, atol=EXACT)
    assert found.count == N


@pytest.mark.parametrize("room", [4, 2048])
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=5), order=st.permutations(range(N)), split=st.integers(0, N))
def test_any_split_order_and_merge(room: int, cuts: list[int], order: list[int], split: int) -> None:
    x, before = rows(mean=60), module._ROWS
    module._ROWS = room
    try:
        whole = of(x).covariance()
        assert torch.equal(of(x, cuts).covariance(), whole)  # where the batches are cut does not change a bit
        x = x[order]
        for one, other in ((x[:split], x[split:]), (x[split:], x[:split])):
            found, right = of(one, [c for c in cuts if c < len(one)]), of(other)
            merged = found.merge(right)
            assert merged is found
            assert merged.count == N
            # The mean is 240 times the spread: its square costs five of sixteen digits.
            assert relative(merged.covariance(), whole) < 1e-10
            torch.testing.assert_close(merged.mean(), rows(mean=60).mean(0), rtol=EXACT, atol=0)
            assert right.count == len(other)
    finally:
        module._ROWS = before


@pytest.mark.parametrize("batch", [64, 5000])
@pytest.mark.parametrize("drift", [0.0, 60.0])
def test_float32_with_a_mean_of_sixty_spreads(batch: int, drift: float) -> None:
    """The promise: 1e-6, where a plain float32 sum of squares less the squared mean has an error of order one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 200, generator=generator) * torch.logspace(-3, 3, 200)
    x = x + 60 * torch.logspace(-3, 3, 200)
    x[2500:] += drift * torch.logspace(-3, 3, 200)  # the mean moves while the data come in
    found = StreamingCovariance(200)
    for part in x.split(batch):
        found.update(part)
    expected = torch.cov(x.double().T)
    assert relative(found.covariance(), expected) < 1e-6
    plain = (x.T @ x / 5000 - torch.outer(x.mean(0), x.mean(0))).double()
    assert relative(plain, expected) > 1e-5
    torch.testing.assert_close(found.mean(), x.double().mean(0), rtol=1e-7, atol=0)


def test_symmetric_and_positive() -> None:
    covariance = of(rows(300, 150, dtype=torch.float32, mean=5)).covariance()
    assert torch.equal(covariance, covariance.T)
    values = torch.linalg.eigvalsh(covariance)
    assert float(values[0]) > -1e-7 * float(values[-1])


def test_a_first_row_far_off_and_a_constant_that_float32_rounds() -> None:
    """The mean is taken from the first row, which may be an outlier; a constant has no variance at all."""
    x = rows(5000, 6, dtype=torch.float32, mean=60)
    x[0] += 100  # further out, one square in float32 is all that is left of a sum
    x[:, 3] = 0.1
    expected = torch.cov(x.double().T)
    found = of(x).covariance()
    assert (found[3] == 0).all()
    kept = [0, 1, 2, 4, 5]
    assert relative(found[kept][:, kept], expected[kept][:, kept]) < 1e-6
    torch.testing.assert_close(of(x).mean(), x.double().mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e25, 2e37])  # of the last not even their sum
def test_float32_rows_whose_squares_float32_does_not_have(scale: float) -> None:
    x = rows(dtype=torch.float32) * scale
    x[:, 2] = 7 * scale
    expected = torch.cov(x.double().T)
    torch.testing.assert_close(of(x).covariance(), expected, rtol=1e-5, atol=1e-6 * scale**2)
    assert (of(x).covariance()[2] == 0).all()


def test_half_precision_mixed_dtypes_and_settings_of_torch() -> None:
    x = rows(64, dtype=torch.bfloat16)
    torch.testing.assert_close(of(x).covariance(), torch.cov(x.double().T), rtol=1e-6, atol=1e-6)
    mixed = of(rows().float())
    mixed.update(rows(seed=1))
    both = torch.cat([rows().float().double(), rows(seed=1)])
    torch.testing.assert_close(mixed.covariance(), torch.cov(both.T), rtol=1e-6, atol=1e-6)
    wide = rows(300, 150, dtype=torch.float32)
    expected = of(wide).covariance()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        low = of(wide).covariance()
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = of(wide).covariance()
    for found in (low, cast):
        assert relative(found, expected) < 1e-6


def test_state_goes_on_to_the_last_bit_and_results_stay() -> None:
    x = rows(mean=2)
    found = of(x[:9])
    state = found.state_dict()
    kept = found.result()
    again = StreamingCovariance(D)
    again.load_state_dict(state)
    for one in (found, again):
        one.update(x[9:])
    assert torch.equal(found.covariance(), again.covariance())
    assert torch.equal(found.covariance(), of(x).covariance())
    assert torch.equal(kept.covariance, of(x[:9]).covariance())
    on = StreamingCovariance.of(kept)
    on.update(x[9:])
    torch.testing.assert_close(on.covariance(), of(x).covariance(), rtol=EXACT, atol=EXACT)
    batch = x.clone()
    careful = of(batch[:3])
    batch.zero_()  # the caller reuses its buffer
    assert torch.equal(careful.mean(), of(x[:3]).mean())
    with pytest.raises(InputError, match="rows of length 4, the state of 3"):
        again.load_state_dict(StreamingCovariance(3).state_dict())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1.0] * D], "got a list"),
        (torch.ones(2, D + 1), rf"floats \[row {D}\], got torch.float32 \[2, 5\]"),
        (torch.ones(D), r"got torch.float32 \[4\]"),
        (torch.ones(2, D).long(), "got torch.int64"),
        (torch.tensor([[1.0] * D, [1.0, math.nan, 1.0, 1.0], [math.inf] * D]), "row 1 of this batch and 1 more"),
        (torch.full((1, D), 1e200, dtype=torch.float64), "overflow float64"),
    ],
)
def test_wrong_rows_leave_the_sums_alone(bad: Any, message: str) -> None:
    found = of(rows())
    before = found.covariance()
    with pytest.raises(InputError, match=message):
        found.update(bad)
    assert torch.equal(found.covariance(), before)
    assert found.count == N


def test_too_few_rows_and_wrong_merges() -> None:
    found = StreamingCovariance(3)
    with pytest.raises(InputError, match="no row was taken in"):
        found.mean()
    found.update(torch.ones(0, 3))
    found.update(torch.ones(1, 3))
    assert found.mean().tolist() == [1.0] * 3
    with pytest.raises(InputError, match="needs more than 1 rows, got 1"):
        found.covariance()
    assert (found.covariance(correction=0) == 0).all()
    with pytest.raises(InputError, match="rows of length 3 cannot take in one of rows of length 2"):
        found.merge(StreamingCovariance(2))
    for d in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="positive integer"):
            StreamingCovariance(d)  # type: ignore[arg-type]


def test_result_on_disk(tmp_path: Path) -> None:
    found = of(rows()).result()
    found.save(tmp_path / "c.safetensors")
    again = cle.Covariance.load(tmp_path / "c.safetensors")
    assert torch.equal(again.covariance, found.covariance)
    assert torch.equal(again.mean, found.mean)
    assert (again.count, again.hook_name, again.d) == (N, None, D)
    assert again.total_variance == pytest.approx(float(found.covariance.trace()))
    (tmp_path / "broken").write_bytes(b"no tensors")
    for name in ("broken", "missing"):
        with pytest.raises(LoadError, match=r"no file of Covariance\.save"):
            cle.Covariance.load(tmp_path / name)


def test_pairs_against_both_alone() -> None:
    x = rows(d=5)
    pairs, left = cle.StreamingPairCovariance(2, 3), cle.StreamingPairCovariance(2, 3)
    pairs.update(x[:9, :2], x[:9, 2:])
    left.update(x[9:, :2], x[9:, 2:])
    again = cle.StreamingPairCovariance(2, 3)
    again.load_state_dict(pairs.state_dict())
    found, expected = again.merge(left).result(), torch.cov(x.T)
    torch.testing.assert_close(found.cross, expected[:2, 2:], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.text.covariance, expected[2:, 2:], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.image.mean, x[:, :2].mean(0), rtol=EXACT, atol=EXACT)
    assert (found.count, pairs.count) == (N, 9)
    with pytest.raises(InputError, match="3 image rows and 2 text rows are no pairs"):
        pairs.update(x[:3, :2], x[:2, 2:])
    with pytest.raises(InputError, match=r"text rows are floats \[pair 3\]"):
        pairs.update(x[:3, :2], x[:3, :2])
    with pytest.raises(InputError, match="of the same lengths alone"):
        pairs.merge(cle.StreamingPairCovariance(3, 2))
