"""The laws of noise eigenvalues against their formulas, published values and simulation; subspaces too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import spectrum as oracle

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum import principal_angles, subspaces
from clip_lens_ext.spectrum import random_matrices as laws


def noise_eigenvalues(n: int, p: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, p))
    return np.linalg.eigvalsh(rows.T @ rows / n)


def basis(d: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_edges_and_median_against_formula_and_simulation(ratio: float) -> None:
    low, high = laws.marchenko_pastur_edges(ratio, variance=2.0)
    assert low == pytest.approx(2 * (1 - math.sqrt(ratio)) ** 2)
    assert high == pytest.approx(2 * (1 + math.sqrt(ratio)) ** 2)
    median = laws.marchenko_pastur_median(ratio)
    # The midpoint rule on a root-shaped density with 2e5 steps.
    assert oracle.marchenko_pastur_share_below(median, ratio) == pytest.approx(0.5, abs=1e-6)
    values = noise_eigenvalues(int(400 / ratio), 400)
    # Fluctuations: edges of order n^(-2/3), the median of order 1/n.
    assert values[0] == pytest.approx(low / 2, abs=0.03)
    assert values[-1] == pytest.approx(high / 2, abs=0.06)
    assert np.median(values) == pytest.approx(median, abs=0.01)


def test_gavish_donoho_against_the_published_values() -> None:
    """arXiv 1305.5870: omega is near 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43 to 0.02, and omega(1) = 2.858."""
    assert laws.gavish_donoho_factor(1.0) == pytest.approx(2.858, abs=5e-4)
    for b in np.linspace(0.05, 1, 20):
        assert laws.gavish_donoho_factor(float(b)) == pytest.approx(
            0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43, abs=0.02
        )
    # lambda*(1) = 4 / sqrt(3)
    assert laws.gavish_donoho_factor(1.0) * math.sqrt(laws.marchenko_pastur_median(1.0)) == pytest.approx(4 / 3**0.5)


def test_greatest_noise_eigenvalue_against_simulation() -> None:
    """Exceeded with the chance that was asked for: 400 draws, so 0.10 +- 0.045 at three standard errors."""
    level = laws.greatest_noise_eigenvalue(30, 120, variance=1.0, alpha=0.1)
    above = [noise_eigenvalues(120, 30, seed)[-1] > level for seed in range(400)]
    assert np.mean(above) == pytest.approx(0.1, abs=0.045)


def test_wachter_edges_against_simulation() -> None:
    a, b = (np.random.default_rng(seed).normal(size=(n, 200)) for seed, n in ((0, 800), (1, 1000)))
    values = np.linalg.eigvals(np.linalg.solve(b.T @ b / 1000, a.T @ a / 800)).real
    low, high = laws.wachter_edges(200 / 800, 200 / 1000)
    assert values.min() == pytest.approx(low, abs=0.02)
    # The greatest of 200 lies a twentieth within the edge, of order n^(-2/3).
    assert values.max() == pytest.approx(high, abs=0.25)


def test_haar_overlap_and_dimension_against_simulation() -> None:
    found = [subspaces.overlap(basis(30, 6, 2 * s), basis(30, 9, 2 * s + 1)) for s in range(300)]
    # Standard error of the mean of 300 draws: their spread is 0.06.
    assert np.mean(found) == pytest.approx(subspaces.overlap_by_chance(6, 9, 30), abs=0.012)
    assert subspaces.overlap_by_chance(6, 9, 30) == pytest.approx(0.3)
    one, other = basis(10, 7, 0), basis(10, 6, 1)
    shared = principal_angles(one, other).angle < 1e-6
    assert int(shared.sum()) == subspaces.dimension_by_chance(7, 6, 10) == 3
    assert subspaces.dimension_by_chance(3, 4, 10) == 0
    assert math.isnan(subspaces.overlap(basis(10, 3, 0), torch.zeros(10, 0, dtype=torch.float64)))


def test_angles_and_shared_directions() -> None:
    one, other = basis(12, 4, 0), basis(12, 5, 1)
    assert subspaces.overlap(one, other) == pytest.approx(oracle.mean_squared_cosine(one.numpy(), other.numpy()))
    found = principal_angles(one, other)
    assert torch.allclose(found.angle.cos().square().mean(), torch.tensor(subspaces.overlap(one, other)).double())
    assert bool((found.angle.diff() >= 0).all())
    assert torch.allclose(found.first.T @ found.second, found.angle.cos().diag())
    # A turn by 1e-9 in one plane: an arc cosine of 1 - 5e-19 would say 0.
    turned = one.clone()
    turned[:, 0] = one[:, 0] * math.cos(1e-9) + subspaces.complement(one)[:, 0] * math.sin(1e-9)
    assert float(principal_angles(one, turned).angle[-1]) == pytest.approx(1e-9, rel=1e-5)
    mixed = torch.linalg.qr(torch.cat([one[:, :2], subspaces.complement(one)[:, :2]], dim=1)).Q @ basis(4, 4, 3)
    shared = subspaces.shared_subspace(one, mixed, min_cosine=0.999)
    assert shared.shape == (12, 2)
    assert oracle.mean_squared_cosine(shared.numpy(), one[:, :2].numpy()) == pytest.approx(1)
    assert torch.allclose(shared.T @ shared, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(subspaces.complement(one).T @ one, torch.zeros(8, 4, dtype=torch.float64), atol=1e-12)
    with pytest.raises(InputError, match="subspaces of one space"):
        principal_angles(one, basis(11, 2, 0))


def test_wrong_ratios() -> None:
    with pytest.raises(InputError, match="positive and finite, got 0"):
        laws.marchenko_pastur_edges(0)
    with pytest.raises(InputError, match="turn rows and dimensions around"):
        laws.marchenko_pastur_median(1.5)
    with pytest.raises(InputError, match=r"more rows than dimensions, got a ratio of 1\.2"):
        laws.wachter_edges(0.5, 1.2)
