"""Every rule and cut on planted noise, turned with the data, and refused where it says nothing."""

from __future__ import annotations

import warnings
from functools import cache
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
from clip_lens_ext.spectrum import cuts
from clip_lens_ext.spectrum.rules import Found, Rule

D, RANK, N, NOISE = 24, 9, 3000, 0.1
K = D - RANK
EXACT = 1e-10


@cache
def world(rotation: int = 0, seed: int = 0, n: int = N) -> tuple[Tensor, ...]:
    """Image rows, text rows, the noise, and controls that have noise alone."""
    found = oracle.planted(n, d=D, rank=RANK, noise=NOISE, seed=seed, rotation_seed=rotation)
    image, text, noise = (torch.from_numpy(x) for x in found)
    controls = oracle.planted(n, d=D, rank=0, noise=NOISE, seed=seed + 1, rotation_seed=rotation)[:2]
    return image, text, noise, *(torch.from_numpy(x) for x in controls)


def split(rule: str = "intersection", cut: Any = None, *, rotation: int = 0, **settings: Any) -> cle.NoiseSplit:
    image, text, _, *controls = world(rotation)
    given = {"control": tuple(controls)} if rule == "generalised" else {}
    return cle.split_noise(image, text, rule=rule, cut=cut, progress=False, **{**given, **settings})


# What each rule takes: the covariances every cut; the others those whose law is not about covariances.
ALL = ["marchenko_pastur", "marchenko_pastur_median", "gavish_donoho", "knee", "gap", "variance_share", K]
PAIRS = [
    *((rule, cut) for rule in ("intersection", "pooled", "max_rayleigh") for cut in ALL),
    *(("cross_covariance", cut) for cut in ("permutation", "knee", "gap", "variance_share", K)),
    *(("generalised", cut) for cut in ("marchenko_pastur", "knee", "gap", K)),
    ("spectral_gap", None),
]


@pytest.mark.parametrize(("rule", "cut"), PAIRS, ids=lambda value: str(value))
def test_planted_noise_is_found_and_turns_with_the_data(rule: str, cut: Any) -> None:
    found, noise = split(rule, cut), world()[2]
    # Variance share: fifteen of 24 directions with a hundredth to a ninehundredth of the rest's variance carry 0.4%.
    assert found.rank == K
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(K, dtype=torch.float64), atol=EXACT)
    # 3000 rows tilt a noise direction by about 0.1 / sqrt(3000) towards the weakest signal.
    assert oracle.mean_squared_cosine(found.basis.numpy(), noise.numpy()) > 0.999
    assert found.space_dimensions == (K, K)
    assert found.n_by_chance == max(0, 2 * K - D)
    assert found.overlap_by_chance == pytest.approx(K / D)
    assert found.excess_overlap == pytest.approx(1 - K / D, abs=2e-3)
    turned = split(rule, cut, rotation=5)
    turn = world(5)[2] @ noise.T + 0  # takes the old noise to the new; only its action on the noise is compared
    assert turned.rank == K
    moved = turn @ found.basis
    assert oracle.mean_squared_cosine(turned.basis.numpy(), torch.linalg.qr(moved).Q.numpy()) > 0.999
    assert torch.allclose(turned.eigenvalues, found.eigenvalues, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rule", ["intersection", "pooled", "max_rayleigh", "cross_covariance", "generalised"])
def test_a_rotation_of_the_rows_rotates_the_basis_exactly(rule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    image, text, _, *controls = world()
    plain = split(rule, K)
    control = tuple(rows @ turn.T for rows in controls) if rule == "generalised" else None
    turned = cle.split_noise(image @ turn.T, text @ turn.T, rule=rule, cut=K, control=control, progress=False)
    # The same subspace: single vectors may turn inside of it where eigenvalues are near to equal.
    expected = oracle.projector((turn @ plain.basis).numpy())
    assert abs(oracle.projector(turned.basis.numpy()) - expected).max() < 1e-9
    order = torch.randperm(N, generator=generator)
    mixed = cle.split_noise(image[order], text[order], rule=rule, cut=K, control=split_control(rule), progress=False)
    assert abs(oracle.projector(mixed.basis.numpy()) - oracle.projector(plain.basis.numpy())).max() < 1e-9


def split_control(rule: str) -> tuple[Tensor, ...] | None:
    return tuple(world()[3:]) if rule == "generalised" else None


def test_covariances_streams_and_rows_are_the_same() -> None:
    image, text = world()[:2]
    streams = []
    pairs = cle.StreamingPairCovariance(D, D)
    pairs.update(image, text)
    for rows in (image, text):
        stream = cle.StreamingCovariance(D)
        stream.update(rows)
        streams.append(stream)
    for sources in (streams, [stream.result() for stream in streams]):
        found = cle.split_noise(*sources)
        crossed = cle.split_noise(*sources, rule="cross_covariance", cut="knee", pairs=pairs)
        # The space, not its vectors: principal angles of zero leave those free to turn.
        for one, other in ((found, split()), (crossed, split("cross_covariance", "knee"))):
            assert abs(oracle.projector(one.basis.numpy()) - oracle.projector(other.basis.numpy())).max() < 1e-9
    assert (found.n, found.modalities, found.rule, found.cut) == ((N, N), ("image", "text"), "intersection",
                                                                   "marchenko_pastur")  # fmt: skip


def test_one_tower_alone() -> None:
    image = world()[0]
    for rule in ("intersection", "pooled", "max_rayleigh", "spectral_gap"):
        found = cle.split_noise(image, rule=rule)
        assert found.rank == K
        assert (found.n_by_chance, found.overlap, found.excess_overlap, found.modalities) == (
            None,
            None,
            None,
            ("image",),
        )
    assert cle.split_noise(image, rule="generalised", control=world()[3]).rank == K
    with pytest.raises(InputError, match="compares two modalities"):
        cle.split_noise(image, rule="cross_covariance")


@settings(max_examples=8, deadline=None)
@given(k=st.integers(1, D - 1), rule=st.sampled_from(["pooled", "max_rayleigh"]))
def test_a_number_is_the_number(k: int, rule: str) -> None:
    found = split(rule, k)
    assert found.rank == k
    assert found.n_noise[-1] == k
    smaller = split(rule, k - 1)
    # Noise of fewer dimensions lies inside of that of more.
    assert torch.allclose(found.basis @ (found.basis.T @ smaller.basis), smaller.basis, atol=1e-8)


def test_pooled_noise_is_what_varies_least() -> None:
    image, text = world()[:2]
    found = split("pooled", 4)
    mean = (torch.cov(image.T) + torch.cov(text.T)) / 2
    values, vectors = torch.linalg.eigh(mean)
    assert torch.allclose(found.eigenvalues[0], values.flip(0), atol=EXACT)
    assert abs(oracle.projector(found.basis.numpy()) - oracle.projector(vectors[:, :4].numpy())).max() < 1e-9


def test_the_least_maximum_and_not_the_least_minimum() -> None:
    """By hand, on the axes: one direction is silent in texts and loud in images, another is quiet in both."""
    image, text = ([3.0, 2.9, 0.5, 1.6], [3.1, 0.01, 0.6, 1.4])
    sources = [
        cle.Covariance(torch.zeros(4).double(), torch.tensor(values).double().diag(), 100) for values in (image, text)
    ]
    means = [sum(values) / 4 for values in (image, text)]
    maxima = [max(a / means[0], b / means[1]) for a, b in zip(image, text, strict=True)]
    for k in (1, 2, 3):
        found = cle.split_noise(*sources, rule="max_rayleigh", cut=k)
        quiet = sorted(range(4), key=lambda i: maxima[i])[:k]
        expected = torch.zeros(4, 4).double()
        expected[quiet, quiet] = 1
        assert torch.allclose(found.basis @ found.basis.T, expected, atol=EXACT)
        assert found.eigenvalues[-1].tolist() == pytest.approx(sorted(maxima, reverse=True))
    assert int(torch.tensor(text).argmin()) != quiet[0]


@pytest.mark.parametrize("rule", ["intersection", "cross_covariance", "generalised"])
def test_what_counts_as_shared_is_the_cosine_that_was_asked_for(rule: str) -> None:
    image, text, _, *controls = (part[:100] for part in world())
    control = tuple(controls) if rule == "generalised" else None

    def ranks(cosines: list[float]) -> list[int]:
        same: dict[str, Any] = {"rule": rule, "cut": K, "control": control, "progress": False}
        return [cle.split_noise(image, text, min_cosine=cosine, **same).rank for cosine in cosines]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a hundred rows tilt the spaces, which is what this is about
        found = ranks([0.1, 0.9, 0.99, 0.99999, 1.0])
        if rule == "intersection":
            spaces = [cle.split_noise(rows, cut=K).basis for rows in (image, text)]
            cosines = torch.linalg.svdvals(spaces[0].T @ spaces[1])
            assert found[:4] == [int((cosines >= cosine).sum()) for cosine in (0.1, 0.9, 0.99, 0.99999)]
    assert found[0] == K
    assert found[0] > found[3] >= found[4]
    assert found == sorted(found, reverse=True)


def test_noise_of_one_modality_alone_is_not_shared() -> None:
    """Texts that say something in three of the images' noise directions: the noise has three dimensions fewer."""
    image, text, noise = world()[:3]
    generator = torch.Generator().manual_seed(0)
    text = text + torch.randn(N, 3, generator=generator, dtype=torch.float64) @ noise[:, :3].T
    for rule in ("intersection", "pooled", "max_rayleigh"):
        found = cle.split_noise(image, text, rule=rule)
        assert found.rank == K - 3
        assert float((found.basis.T @ noise[:, :3]).square().sum()) < 0.01
    # It does not vary together, so it is no multi-modal signal.
    assert cle.split_noise(image, text, rule="cross_covariance", progress=False).rank == K


def test_the_modality_gap_without_centring() -> None:
    """A gap that lies in the noise is signal to a covariance that is not centred by modality."""
    image, text, noise = (torch.from_numpy(x) for x in oracle.planted(N, d=D, rank=RANK, noise=NOISE, seed=0, gap=2.0))
    gap = noise[:, -1]
    for centre, rank in (("each", K), ("pooled", K - 1), ("none", K - 1)):
        found = cle.split_noise(image, text, rule="pooled", cut="gavish_donoho", centre=centre)
        assert found.rank == rank
        assert float((found.basis.T @ gap).square().sum()) == pytest.approx(float(centre == "each"), abs=0.01)
    uncentred = cle.split_noise(image, text, rule="cross_covariance", cut="knee", centre="none", progress=False)
    assert float((uncentred.basis.T @ gap).square().sum()) < 0.01


@pytest.mark.parametrize("cut", ["marchenko_pastur", "marchenko_pastur_median", "gavish_donoho"])
def test_pure_noise_is_all_noise(cut: str) -> None:
    found = [cle.split_noise(world(seed=10 + s)[3], cut=cut).rank for s in range(8)]
    # The edge lies where one draw of a hundred exceeds it, or (without Tracy and Widom) well above.
    assert found.count(D) >= 7
    assert min(found) >= D - 1


def test_settings_of_the_cuts() -> None:
    image = world()[0]

    def rank(cut: Any) -> int:
        return cle.split_noise(image, cut=cut, progress=False).rank

    assert rank(cuts.MarchenkoPastur(variance=NOISE**2)) == K
    assert rank(cuts.MarchenkoPastur(variance=NOISE**2 / 4)) == 0
    assert rank(cuts.MarchenkoPastur(variance=4 * NOISE**2, edge="lower")) == K
    assert rank(cuts.MarchenkoPastur(alpha=None)) >= K - 2
    assert rank(cuts.GavishDonoho(variance=NOISE**2)) == K
    assert rank(cuts.VarianceShare(0)) == 0
    assert rank(cuts.VarianceShare(1)) == D
    assert rank(cuts.Gap(tail=1.0)) == K
    # With rows in their own axes nothing is rotated away from the permutation.
    straight = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    straight[:, 1] = straight[:, 0] + 0.1 * straight[:, 1]
    assert cle.split_noise(straight, cut="permutation", progress=False).rank == 5
    again = [cle.split_noise(straight, cut=cuts.Permutation(seed=s), progress=False).threshold for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert cle.split_noise(image, cut=cuts.VarianceShare(0.02)).settings["share"] == 0.02


def test_few_rows_warn_and_name_what_is_missing() -> None:
    image = world()[0]
    with pytest.warns(UserWarning, match=r"image: 10 rows do not fill 24 dimensions; the 15 directions"):
        found = cle.split_noise(image[:10], cut="knee")
    assert found.warnings[0].startswith("image: 10 rows")
    assert found.rank >= 15
    with pytest.warns(UserWarning, match=r"image: 48 rows are 2.0 to a dimension"):
        cle.split_noise(image[:48])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cle.split_noise(image).warnings == ()
        assert cle.split_noise(image, cut=0).warnings == ("No direction is noise by this rule and cut.",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "intersect"}, "no rule 'intersect'; there are .*did you mean 'intersection'"),
        ({"cut": "kne"}, "no cut 'kne'; there are .*did you mean 'knee'"),
        ({"cut": 2.5}, "a name, a number of noise directions or a function, got float"),
        ({"cut": D + 1}, "25 noise directions were asked for, and there are 24"),
        ({"cut": -1}, "0 or more; got -1"),
        ({"rule": "generalised"}, "needs control=: embeddings of inputs that mean nothing"),
        ({"rule": "generalised", "control": torch.ones(30, D)}, r"a pair \(image control, text control\)"),
        ({"rule": "cross_covariance", "cut": "gavish_donoho"}, "a law of eigenvalues of a covariance"),
        ({"rule": "cross_covariance", "text": torch.randn(50, D)}, "needs pairs, row i of image and of text"),
        ({"rule": "spectral_gap", "cut": "knee"}, "is its own cut"),
        ({"text": torch.randn(50, 7)}, "image rows have length 24 and text rows 7"),
        ({"text": torch.randn(50, 7, 2)}, r"text: float rows \[n d\], .* got torch.float32 \[50, 7, 2\]"),
        ({"text": torch.full((50, D), float("nan"))}, "text: row 0 of this batch and 49 more"),
        ({"text": torch.ones(1, D)}, "text: at least two rows"),
        ({"text": torch.ones(50, D)}, "text rows are all equal"),
        ({"centre": "both"}, "centre is one of each, pooled, none"),
        ({"text": None, "centre": "pooled"}, "the mean of two modalities, and there is one"),
        ({"min_cosine": 0.0}, r"a cosine in \(0, 1\]"),
        ({"cut": cuts.MarchenkoPastur(edge="lower", level="median"), "image": world()[0][:9]}, "no lower edge"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_input(settings: dict[str, Any], message: str) -> None:
    given = {"image": world()[0], "text": world()[1], "progress": False, **settings}
    with pytest.raises(InputError, match=message):
        cle.split_noise(given.pop("image"), given.pop("text"), **given)


def test_permutation_needs_rows_and_settings_are_checked() -> None:
    stream = cle.StreamingCovariance(D)
    stream.update(world()[0])
    with pytest.raises(InputError, match="needs the rows themselves"):
        cle.split_noise(stream, cut="permutation")
    for make in (
        lambda: cuts.MarchenkoPastur(edge="middle"),  # type: ignore[arg-type]
        lambda: cuts.MarchenkoPastur(edge="lower"),
        lambda: cuts.MarchenkoPastur(variance=0),
        lambda: cuts.MarchenkoPastur(alpha=1.0),
        lambda: cuts.GavishDonoho(variance=-1),
        lambda: cuts.VarianceShare(2),
        lambda: cuts.Gap(tail=0),
        lambda: cuts.Permutation(n_permutations=0),
        lambda: cuts.Permutation(alpha=0),
    ):
        with pytest.raises(InputError):
            make()


def test_rules_and_cuts_of_ones_own() -> None:
    def first(question: Any, cut: Any) -> Found:
        return Found(torch.eye(question.d, dtype=torch.float64)[:, :2], (), ())

    cle.RULES["axes"] = Rule("axes", first)
    cle.CUTS["half"] = lambda spectrum: cuts.Cutoff(spectrum.d // 2, 0.0)
    try:
        with pytest.raises(InputError, match="one cutoff for each of one or more spectra"):
            cle.split_noise(*world()[:2], rule="axes")
        crooked = Rule("crooked", lambda question, cut: Found(torch.ones(D, 2).double(), (None,), (None,)))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"an orthonormal float64 basis \[24 rank\]"):
            cle.split_noise(*world()[:2], rule=crooked)
        assert cle.split_noise(world()[0], cut="half").rank == D // 2
    finally:
        del cle.RULES["axes"], cle.CUTS["half"]


def test_removing_the_noise_of_rows() -> None:
    found = split()
    rows = world()[0]
    pruned = found.remove(rows)
    expected = rows - rows @ torch.from_numpy(oracle.projector(found.basis.numpy()))
    assert torch.allclose(pruned, expected, atol=EXACT)
    assert torch.allclose(found.remove(pruned), pruned, atol=EXACT)
    kept = found.remove(rows, mean=rows.mean(0))
    assert torch.allclose(kept.mean(0), rows.mean(0), atol=EXACT)
    assert torch.allclose(found.signal_basis.T @ found.basis, torch.zeros(RANK, K, dtype=torch.float64), atol=EXACT)
    share = float(torch.cov(rows.T).trace() - torch.cov(pruned.T).trace()) / float(torch.cov(rows.T).trace())
    assert found.variance_share(rows) == pytest.approx(share)
    with pytest.raises(InputError, match="rows of length 3"):
        found.remove(torch.ones(2, 3))


def test_result_on_disk_and_in_words(tmp_path: Path) -> None:
    found = split("cross_covariance", "knee")
    found.save(tmp_path / "s")
    again = cle.NoiseSplit.load(tmp_path / "s")
    for name in ("basis", "eigenvalues", "means"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    for name in (
        "labels",
        "threshold",
        "n_noise",
        "n",
        "settings",
        "space_dimensions",
        "overlap",
        "warnings",
        "provenance",
    ):
        assert getattr(again, name) == getattr(found, name)
    assert again.summary() == found.summary()
    assert "15 of 24 dimensions are noise" in found.summary()
    assert "6 would be shared by counting alone" in found.summary()
    (tmp_path / "broken").write_bytes(b"")
    with pytest.raises(LoadError, match=r"no file of NoiseSplit\.save"):
        cle.NoiseSplit.load(tmp_path / "broken")


def test_ten_rows_to_a_dimension_are_enough() -> None:
    rows = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    assert cle.split_noise(rows, cut=2).warnings == ()
    with pytest.warns(UserWarning, match="79 rows are 9.9 to a dimension"):
        assert len(cle.split_noise(rows[:79], cut=2).warnings) == 1
