"""Planted noise in worlds that keep and that break what the theory assumes: found where it does, and not where not."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from oracles import spectrum as oracle
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.spectrum import cuts

D, RANK, NOISE = 24, 9, 0.1
PLACE = np.arange(1, D + 1)
LEVELS = np.where(PLACE <= RANK, 0.2, 2.0 / PLACE)  # noise that goes on falling where the signal ends

SCENES: dict[str, dict[str, Any]] = {
    "theory": {},
    "even": {"strength": np.full(RANK, 2.0)},
    "weak beside strong": {"strength": np.linspace(3, 0.3, RANK)},
    "a quarter": {"rank": 18},
    "slow": {"rank": 18, "strength": 3.0 / PLACE[:18]},
    "slow, below the edge": {"rank": 18, "strength": 3.0 / PLACE[:18] ** 2.5},
    "slow, noise too": {"strength": 2.0 / PLACE[:RANK], "noise": LEVELS},
    "few rows": {"n": 40},
    "fewer rows than dimensions": {"n": 16},
    "unequal rows": {"n_text": 600},
    "loud texts": {"loud": 30.0, "own": 3},
    "gap": {"gap": 2.0},
    "own": {"own": 3},
}


@cache
def rows(scene: str) -> tuple[Tensor, ...]:
    """Image rows, text rows and the noise, and the controls: the same noise alone, as loud."""
    given = {"n": 3000, "d": D, "rank": RANK, "noise": NOISE, "seed": 0, **SCENES[scene]}
    found = oracle.planted(given.pop("n"), **given)
    empty = {**given, "rank": 0, "strength": None, "seed": 1, "own": 0, "gap": 0.0, "n_text": None}
    controls = oracle.planted(3000, **empty)[:2]
    return tuple(torch.from_numpy(np.asarray(x)) for x in (*found, *controls))


def found(scene: str, rule: str, cut: Any, **settings: Any) -> tuple[int, float, int]:
    """Dimension found, mean squared cosine of it with the planted noise, planted dimension."""
    image, text, noise, *controls = rows(scene)
    control = tuple(controls) if rule == "generalised" else None
    split = cle.split_noise(image, text, rule=rule, cut=cut, control=control, progress=False, **settings)
    agreement = float((noise.T @ split.basis).square().sum()) / max(split.rank, 1)
    return split.rank, agreement, noise.shape[1]


COVARIANCES = ("intersection", "pooled", "max_rayleigh")
LAWS = ("marchenko_pastur", "marchenko_pastur_median", "gavish_donoho")
RIGHT = [
    *(("even", rule, "permutation") for rule in (*COVARIANCES, "cross_covariance")),
    ("weak beside strong", "cross_covariance", "permutation"),  # deflated: what was found no longer hides the rest
    *(("a quarter", rule, cut) for rule in COVARIANCES for cut in ("marchenko_pastur", "knee", "gap")),
    ("a quarter", "generalised", "marchenko_pastur"),
    ("a quarter", "cross_covariance", "gap"),
    *(("slow", rule, "marchenko_pastur") for rule in (*COVARIANCES, "generalised")),
    ("slow, noise too", "generalised", "marchenko_pastur"),
    *(("unequal rows", rule, cut) for rule in COVARIANCES for cut in (*LAWS, "knee", "gap")),
    ("unequal rows", "generalised", "marchenko_pastur"),
    *(("gap", rule, cut) for rule in COVARIANCES for cut in (*LAWS, "knee", "gap")),
    # Twelve of 24 are noise: too few for what goes by the median.
    *(("own", rule, cut) for rule in COVARIANCES for cut in ("marchenko_pastur", "knee", "gap")),
    ("own", "generalised", "marchenko_pastur"),
    *(("loud texts", rule, "marchenko_pastur") for rule in ("intersection", "max_rayleigh", "generalised")),
]


@pytest.mark.parametrize(("scene", "rule", "cut"), RIGHT, ids=lambda value: str(value))
def test_within_its_assumptions_a_rule_recovers_the_noise(scene: str, rule: str, cut: str) -> None:
    rank, agreement, planted = found(scene, rule, cut)
    assert rank == planted
    # Weak signals pull at the noise: 0.17 beside 0.1 by an angle of 1 / sqrt(3000) / 1.7 each.
    assert agreement > 0.99


MORE, FEWER = 1, -1  # than are planted
WRONG = [
    # Weak signals hide: permuted rows keep the variance of the strong ones.
    *(("weak beside strong", rule, "permutation", MORE) for rule in COVARIANCES),
    ("weak beside strong", "cross_covariance", cuts.Permutation(deflate=False), MORE),
    # The median is no noise where noise fills less than half.
    *(("a quarter", rule, cut, MORE) for rule in COVARIANCES for cut in LAWS[1:]),
    # Slow decay: no bend and no fall; below the edge a signal cannot be told from noise at all.
    *(("slow", rule, "knee", MORE) for rule in (*COVARIANCES, "generalised", "cross_covariance")),
    *(("slow, below the edge", rule, "gap", MORE) for rule in (*COVARIANCES, "generalised")),
    *(("slow, below the edge", rule, "marchenko_pastur", MORE) for rule in (*COVARIANCES, "generalised")),
    *(("slow, noise too", rule, "marchenko_pastur", FEWER) for rule in COVARIANCES),
    # Too few rows: the two noise spaces are off by more than 0.99 allows.
    *(("few rows", "intersection", cut, FEWER) for cut in ("marchenko_pastur", "knee")),
    # One modality louder: what the quieter one says alone drowns.
    *(("loud texts", "pooled", cut, MORE) for cut in ("marchenko_pastur_median", "gavish_donoho", "knee", "gap")),
    # Signal of one modality alone does not vary together.
    ("own", "cross_covariance", "gap", MORE),
    # Of a cross-covariance the noise goes down to zero, and bends there.
    ("own", "cross_covariance", "knee", FEWER),
]


@pytest.mark.parametrize(("scene", "rule", "cut", "sign"), WRONG, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_where_the_page_says_that_it_fails_it_does(scene: str, rule: str, cut: str, sign: int) -> None:
    rank, _, planted = found(scene, rule, cut)
    assert (rank - planted) * sign > 0


@pytest.mark.parametrize("rule", COVARIANCES)
def test_fewer_rows_than_dimensions_find_too_little_and_say_so(rule: str) -> None:
    image, text, noise, *_ = rows("fewer rows than dimensions")
    with pytest.warns(UserWarning, match="do not fill 24 dimensions"):
        split = cle.split_noise(image, text, rule=rule, cut="marchenko_pastur")
    assert split.rank < noise.shape[1]
    assert oracle.mean_squared_cosine(split.basis.numpy(), noise.numpy()) > 0.97


@pytest.mark.parametrize("rule", COVARIANCES)
@pytest.mark.parametrize("cut", ["marchenko_pastur", "gavish_donoho", "gap"])
def test_a_gap_that_is_not_centred_takes_a_dimension(rule: str, cut: str) -> None:
    rank, agreement, planted = found("gap", rule, cut, centre="none")
    assert (rank, planted) == (D - RANK - 1, D - RANK)
    assert agreement > 0.99
    assert found("gap", rule, cut)[0] == planted


def test_a_loud_modality_drowns_the_other_at_the_right_number() -> None:
    """The dimension alone would not show it: what was found is not what was planted."""
    rank, agreement, planted = found("loud texts", "pooled", "marchenko_pastur")
    assert rank != planted or agreement < 0.95
    assert found("loud texts", "max_rayleigh", "marchenko_pastur")[1] > 0.99


def test_what_is_found_is_taken_out_of_both_sides_of_a_pair() -> None:
    """One strong signal a hundred times the weak: left in on either side it would hide the weak ones behind it."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([30.0, 0.3, 0.3, 0.3] + [0.0] * 8, dtype=torch.float64)
    signal = torch.randn(3000, 12, generator=generator, dtype=torch.float64) * scale
    noise = 0.1 * torch.randn(2, 3000, 12, generator=generator, dtype=torch.float64)
    for image, text in (
        (signal + noise[0], signal.clamp(-1, 1) + noise[1]),
        (signal.clamp(-1, 1) + noise[0], signal + noise[1]),
    ):
        split = cle.split_noise(image, text, rule="cross_covariance", progress=False)
        assert split.rank == 8
        assert float(split.basis[4:].square().sum()) > 8 * 0.99
