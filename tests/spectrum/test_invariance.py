"""The overlap of subsets' noise: planted the same, planted apart, and between the floor and the ceiling."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import spectrum as oracle
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError

D, RANK, N = 16, 10, 400
K = D - RANK


def rows(seed: int, *, rotation: int = 0) -> tuple[Tensor, Tensor]:
    found = oracle.planted(N, d=D, rank=RANK, noise=0.3, seed=seed, rotation_seed=rotation)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


GROUPS = {"photos": rows(1), "sketches": rows(2), "other": rows(3, rotation=9)}


def test_same_noise_and_other_noise_between_floor_and_ceiling() -> None:
    splits = cle.split_subgroups(GROUPS, rule="pooled", cut=K, n_bootstrap=20, progress=False)
    found = cle.subgroup_overlap(splits)
    bases = [split.basis.numpy() for split in splits.splits.values()]
    for g in range(3):
        for h in range(3):
            assert float(found.overlap[g, h]) == pytest.approx(oracle.mean_squared_cosine(bases[g], bases[h]))
    assert torch.allclose(found.overlap.diagonal(), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(found.by_chance, torch.full((3, 3), K / D).double())
    same, apart = float(found.overlap[0, 1]), float(found.overlap[0, 2])
    assert same > 0.95 > 0.7 > apart
    # Halves have half of the rows: their noise spaces lie about as far apart as these, a little further.
    assert 0.9 < float(found.split_half[0, 1]) <= same + 0.02
    low, high = found.interval[0, 1].tolist()
    assert same <= high <= 1
    assert high - low < 0.1
    assert found.interval[0, 0].isnan().all()
    assert torch.allclose(found.angles[0, 1].cos().square().mean(), found.overlap[0, 1])
    # The same squares summed in another order.
    assert torch.allclose(found.overlap, found.overlap.T, rtol=1e-12, atol=0)
    frame = found.to_frame()
    assert frame["first"].tolist() == ["photos", "photos", "sketches"]
    assert frame.greatest_angle[1] > 45 > frame.greatest_angle[0]
    assert float(found.excess[0, 1]) == pytest.approx(same - K / D)


def test_the_interval_holds_the_overlap_of_the_truth() -> None:
    """Both subsets have the same noise, so the true overlap is 1: the basic interval reaches nearer to it than the
    overlap itself, which the draws' percentiles would not."""
    found = cle.subgroup_overlap(cle.split_subgroups(GROUPS, rule="pooled", cut=K, n_bootstrap=30, progress=False))
    assert float(found.interval[0, 1, 1]) > float(found.overlap[0, 1])


def test_seeds_and_pairs() -> None:
    def once(seed: int) -> cle.SubgroupOverlap:
        two = {name: GROUPS[name] for name in ("photos", "sketches")}
        splits = cle.split_subgroups(two, rule="cross_covariance", cut=K, n_bootstrap=4, seed=seed, progress=False)
        # Drawn apart, image and text would have nothing in common, and the cross-covariance would be noise alone.
        assert all(split.overlap is not None and split.overlap > 0.5 for split in splits.draws["photos"])
        return cle.subgroup_overlap(splits)

    one, again, other = once(0), once(0), once(1)
    assert torch.equal(one.interval[0, 1], again.interval[0, 1])
    assert torch.equal(one.split_half, again.split_half)
    assert not torch.equal(one.split_half, other.split_half)
    assert (one.seed, other.seed) == (0, 1)


def test_splits_of_ones_own_have_no_ceiling() -> None:
    splits = [cle.split_noise(*GROUPS[name], rule="pooled", cut=k) for name, k in (("photos", K), ("sketches", 3))]
    for given in (splits, {"0": splits[0], "1": splits[1]}):
        found = cle.subgroup_overlap(given)
        assert found.names == ("0", "1")
        assert float(found.by_chance[0, 1]) == pytest.approx(K / D)
        assert found.split_half.isnan().all()
        assert found.interval.isnan().all()
        assert int((~found.angles[0, 1].isnan()).sum()) == 3
    empty = cle.split_noise(*GROUPS["photos"], cut=0)
    assert cle.subgroup_overlap([splits[0], empty]).overlap[0, 1].isnan()


def test_wrong_input_and_warnings() -> None:
    split = cle.split_noise(*GROUPS["photos"], cut=K)
    with pytest.raises(InputError, match="pass two or more, got 1"):
        cle.subgroup_overlap([split])
    with pytest.raises(InputError, match="pass two or more, got 1"):
        cle.split_subgroups({"one": GROUPS["photos"]})
    narrow = cle.split_noise(GROUPS["photos"][0][:, :5], cut=2)
    with pytest.raises(InputError, match="a split of 16 dimensions and '1' one of 5"):
        cle.subgroup_overlap([split, narrow])
    with pytest.raises(InputError, match=r"confidence is in \(0, 1\)"):
        cle.subgroup_overlap([split, split], confidence=1)
    with pytest.raises(InputError, match="subset 'b' has 3 rows"):
        cle.split_subgroups({"a": torch.randn(9, 4), "b": torch.randn(3, 4)})
    with pytest.raises(InputError, match="n_bootstrap is an integer"):
        cle.split_subgroups(GROUPS, n_bootstrap=-1)
    few = {name: (one[:100], other[:100]) for name, (one, other) in GROUPS.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cle.split_subgroups(few, cut=K, n_bootstrap=2, progress=False)
    assert len([one for one in caught if "rows are" in str(one.message)]) == 6  # two modalities of three subsets
