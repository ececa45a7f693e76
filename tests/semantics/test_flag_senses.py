"""Groups of pictures: 2-means against all partitions, discriminants against scipy, and the senses that come of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import flags as oracle
from oracles.models import pictures
from PIL import Image
from torch import Tensor

from clip_lens_ext.attribution import direction_target
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics import PictureSenses, Sense, find_picture_senses, find_word_senses
from clip_lens_ext.semantics.picture_senses import _chance
from clip_lens_ext.semantics.two_groups import (
    Discriminants,
    auroc,
    bimodality,
    principal_components,
    purity,
    split_in_two,
    welch_t,
)
from clip_lens_ext.towers import HookedCLIP

NAMES = ["crane", "duck", "paper stool", "stool", "heart"]
BARE = "{}"  # the tiny text tower reads seven letters: under a longer template all prompts would be one


def points(n: int, seed: int, gap: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    found[: n // 3] += gap
    return found


@given(n=st.integers(4, 9), seed=st.integers(0, 50), gap=st.sampled_from([0.0, 2.0, 6.0]))
@settings(max_examples=40, deadline=None)
def test_two_means_explain_no_more_than_the_best_partition(n: int, seed: int, gap: float) -> None:
    cloud = points(n, seed, gap)
    found, best = split_in_two(cloud, seed=0, n_init=20), oracle.best_separation(cloud.tolist())
    # A local optimum may be missed; what is told is never more than can be.
    assert found.separation <= best + 1e-12
    assert found.separation >= 0.9 * best
    assert 2 * int(found.group.sum()) <= n
    sides = [cloud[found.group == number].tolist() for number in (0, 1)]
    rest = sum(oracle.squares(side) for side in sides)
    assert found.separation == pytest.approx(1 - rest / oracle.squares(cloud.tolist()), abs=1e-12)


def test_groups_far_apart_are_found() -> None:
    found = split_in_two(points(30, 3, gap=9.0), seed=0)
    assert found.group.tolist() == [1] * 10 + [0] * 20
    assert found.separation > 0.85
    assert purity(found.group, 1 - found.group) == 1
    assert purity(found.group, torch.arange(30) % 2) == 0.5


def test_points_that_are_one() -> None:
    found = split_in_two(torch.ones(5, 2, dtype=torch.float64), seed=0)
    assert found.separation == 0
    assert found.group.sum() == 0


@given(first=st.integers(2, 9), second=st.integers(2, 9), seed=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_welch(first: int, second: int, seed: int) -> None:
    one, two = points(first, seed), points(second, seed + 1) + 1
    expected = [oracle.welch(one[:, i].tolist(), two[:, i].tolist()) for i in range(3)]
    torch.testing.assert_close(welch_t(one, two), torch.tensor(expected, dtype=torch.float64))


def test_welch_where_nothing_varies() -> None:
    same = torch.ones(4, 2, dtype=torch.float64)
    assert welch_t(same, same).tolist() == [0, 0]
    assert welch_t(same[:1], same).tolist() == [0, 0]


def test_discriminants_solve_the_generalised_eigenproblem() -> None:
    features = points(40, 7) @ torch.tensor([[1.0, 0.2, 0.0], [0.0, 2.0, 0.1], [0.3, 0.0, 0.5]], dtype=torch.float64)
    sets = torch.arange(40).reshape(5, 8)
    found = Discriminants(features, sets, n_dims=2).without(1, 3)
    within, between = np.zeros((3, 3)), np.zeros((3, 3))
    for number in (0, 2, 4):
        rows = features[sets[number]].numpy()
        own = rows - rows.mean(0)
        within += own.T @ own / len(rows) / 3
        apart = rows.mean(0) - features.numpy().mean(0)
        between += np.outer(apart, apart) / 3
    within += 0.01 * np.trace(within) / 3 * np.eye(3)
    _, vectors = scipy.linalg.eigh(between, within)
    # Directions are determined up to their sign.
    expected = torch.from_numpy(vectors[:, -2:])
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """More than elsewhere, so that prompts retrieve different ones."""
    return pictures(60, dtype=torch.float64)


def of_retrieved(latent: Tensor, senses: PictureSenses) -> tuple[Tensor, Tensor]:
    """Principal components by numpy's SVD, of the pictures that some prompt retrieves; and each sample's row there."""
    rows = senses.sample.unique()
    some = latent[rows].double().numpy()
    left, values, _ = np.linalg.svd(some - some.mean(0), full_matrices=False)
    return torch.from_numpy(left * values), torch.searchsorted(rows, senses.sample.contiguous())


def test_bimodality_knows_one_cloud_from_two() -> None:
    generator = torch.Generator().manual_seed(1)
    cloud = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    within = torch.eye(5, dtype=torch.float64)
    # Of a normal cloud two means explain 2/pi whichever way it was split; 4000 points leave a per cent.
    one = bimodality(cloud, split_in_two(cloud, seed=0).group, within, seed=0)
    assert one == pytest.approx(2 / torch.pi, abs=0.02)
    flat = torch.rand(4000, 1, generator=generator, dtype=torch.float64)
    assert bimodality(flat, (flat[:, 0] > 0.5).long(), within[:1, :1], seed=0) == pytest.approx(0.75, abs=0.02)
    apart = cloud.clone()
    apart[:1000] += 8.0
    assert bimodality(apart, split_in_two(apart, seed=0).group, within, seed=0) > 0.97
    # Groups that are drawn by lot have no line that others would be on two sides of.
    lot = (torch.rand(4000, generator=generator) < 0.5).long()
    assert bimodality(cloud, lot, within, seed=0) == pytest.approx(2 / torch.pi, abs=0.02)
    assert math.isnan(bimodality(cloud, torch.zeros(4000).long(), within, seed=0))  # nothing to tell apart
    assert bimodality(torch.ones(9, 2).double(), (torch.arange(9) % 2), within[:2, :2], seed=0) == 0


@given(n=st.integers(8, 14), seed=st.integers(0, 30), gap=st.sampled_from([0.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_bimodality_by_every_cut(n: int, seed: int, gap: float) -> None:
    cloud = points(n, seed, gap)
    group = split_in_two(cloud, seed=0).group
    within = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    expected = oracle.bimodality(cloud.numpy(), group.numpy(), within.numpy(), 7, 3)
    assert bimodality(cloud, group, within, seed=7, n_splits=3) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(seed=st.integers(0, 30), levels=st.sampled_from([2, 5, 1000]))
@settings(max_examples=20, deadline=None)
def test_auroc_counts_pairs(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (11, 3), generator=generator).double()
    sets = torch.rand(2, 11, generator=generator) < 0.5
    sets[:, 0], sets[:, 1] = True, False
    expected = [[oracle.auroc(column[one].tolist(), column[~one].tolist()) for column in values.T] for one in sets]
    torch.testing.assert_close(auroc(values, sets), torch.tensor(expected, dtype=torch.float64))
    assert auroc(values, torch.ones(1, 11).bool()).isnan().all()


def test_sets_of_the_same_points_give_no_direction() -> None:
    features = points(40, 7)
    sets = torch.stack([torch.arange(8), torch.arange(8, 16), torch.arange(8, 16), torch.arange(8, 16)])
    space = Discriminants(features - features[sets[:3]].mean((0, 1)), sets, n_dims=2)
    assert space.without().shape == (3, 2)
    # The mean is that of all points, which lies on no line with the two sets' own.
    assert space.without(0).shape == (3, 1)
    assert split_in_two(torch.zeros(5, 0, dtype=torch.float64), seed=0).separation == 0


def distances(points: Tensor) -> Tensor:
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def test_principal_components_keep_distances_or_the_most_of_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(30, 900, generator=generator, dtype=torch.float64)
    found = principal_components(few, seed=0)
    assert found.shape == (30, 30)
    torch.testing.assert_close(distances(found), distances(few), rtol=1e-9, atol=1e-9)
    spread = torch.cat([torch.full((20,), 5.0), torch.full((980,), 0.01)]).double()
    many = torch.randn(400, 1000, generator=generator, dtype=torch.float64) * spread
    found = principal_components(many, seed=0)
    assert found.shape == (400, 256)
    torch.testing.assert_close(found, principal_components(many, seed=0), rtol=0, atol=0)
    # 980 directions of 1e-4 of variance are left beside 20 of 25: the square distances miss 2e-4 of themselves at most.
    torch.testing.assert_close(distances(found), distances(many), rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def senses(clip: HookedCLIP, pixels: Tensor, sae: Any) -> PictureSenses:
    return find_picture_senses(
        clip, pixels, sae, NAMES, template=BARE, n=8, n_dims=3, n_controls=5, batch_size=7, progress=False
    )


def test_what_is_retrieved_and_split(clip: HookedCLIP, pixels: Tensor, sae: Any, senses: PictureSenses) -> None:
    assert senses.texts == (*NAMES, "paper")
    assert (senses.part_of.tolist(), senses.part_words) == ([2, 2], ("paper", "stool"))
    with torch.no_grad():
        cosine = clip.similarity(pixels, list(senses.prompts))
    for row in range(len(senses.texts)):
        expected = cosine[:, row].topk(8)
        assert senses.sample[row].tolist() == expected.indices.tolist()
        torch.testing.assert_close(senses.cosine[row], expected.values.double(), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        activation = clip.vision.run_to(pixels, sae.cfg.metadata.hook_name)[:, 1:]
    latent = sae.encode(activation).amax(1).clamp(min=0).detach()
    features, sample = of_retrieved(latent, senses)
    used = latent[senses.sample.unique()]
    space = Discriminants(features, sample[: len(NAMES)], 3)
    for row in range(len(senses.texts)):
        own = split_in_two(features[sample[row]] @ (space.without(row) if row < 5 else space.without()), seed=0)
        assert senses.group[row].tolist() == own.group.tolist()
        assert float(senses.separation[row]) == pytest.approx(own.separation, abs=1e-9)
        left_out = (row,) if row < 5 else ()
        two = oracle.bimodality(features[sample[row]].numpy(), own.group.numpy(), space.within(*left_out).numpy(), 0, 8)
        assert float(senses.bimodality[row]) == pytest.approx(two, rel=1e-6, nan_ok=True)
        for number in (0, 1):
            inside = torch.isin(torch.arange(len(features)), sample[row][senses.group[row] == number])
            expected = [oracle.auroc(column[inside].tolist(), column[~inside].tolist()) for column in used.T]
            assert senses.group_auroc[row, number].tolist() == pytest.approx(expected, abs=1e-6)
        inside = torch.isin(torch.arange(len(features)), sample[row])
        expected = [oracle.auroc(column[inside].tolist(), column[~inside].tolist()) for column in used.T]
        assert senses.text_auroc[row].tolist() == pytest.approx(expected, abs=1e-6)
        sides = [latent[senses.sample[row]][senses.group[row] == number] for number in (0, 1)]
        torch.testing.assert_close(senses.latent_t[row], welch_t(*sides), rtol=1e-6, atol=1e-8)


def test_parts_are_compared_half_and_half(pixels: Tensor, clip: HookedCLIP, sae: Any, senses: PictureSenses) -> None:
    activation = clip.vision.run_to(pixels, sae.cfg.metadata.hook_name)[:, 1:].detach()
    features, sample = of_retrieved(sae.encode(activation).amax(1).clamp(min=0).detach(), senses)
    space = Discriminants(features, sample[: len(NAMES)], 3)
    for part, (word, left_out) in enumerate([("paper", (2,)), ("stool", (2, 3))]):
        rows = torch.cat([sample[2][:4], sample[senses.texts.index(word)][:4]])
        own = split_in_two(features[rows] @ space.without(*left_out), seed=0)
        assert float(senses.part_separation[part]) == pytest.approx(own.separation, abs=1e-9)
        assert float(senses.part_purity[part]) == purity(own.group, torch.tensor([0] * 4 + [1] * 4))


def greatest_t(first: Tensor, second: Tensor) -> float:
    columns = [(one.tolist(), other.tolist()) for one, other in zip(first.T, second.T, strict=True)]
    return max(abs(oracle.welch(one, other)) if len({*one, *other}) > 1 else 0.0 for one, other in columns)


def test_chance_is_the_greatest_t_of_random_groups(
    clip: HookedCLIP, pixels: Tensor, sae: Any, senses: PictureSenses
) -> None:
    activation = clip.vision.run_to(pixels, sae.cfg.metadata.hook_name)[:, 1:].detach()
    latent = sae.encode(activation).amax(1).clamp(min=0).detach().double()
    for row in range(len(senses.texts)):
        group = senses.group[row][torch.randperm(8, generator=torch.Generator().manual_seed(row))]
        active = latent[senses.sample[row]]
        found = greatest_t(active[group == 0], active[group == 1]) if int(group.sum()) > 1 else float("inf")
        assert float(senses.chance_t[row]) == pytest.approx(found, rel=1e-6)
    for part, word in enumerate(senses.part_words):
        both = torch.cat([latent[senses.sample[2]], latent[senses.sample[senses.texts.index(word)]]])
        order = torch.randperm(16, generator=torch.Generator().manual_seed(len(senses.texts) + part))
        found = greatest_t(both[order[:8]], both[order[8:]])
        assert float(senses.part_chance_t[part]) == pytest.approx(found, rel=1e-6)


def test_one_picture_is_no_group_to_compare_with() -> None:
    cloud = torch.rand(9, 4, dtype=torch.float64)
    assert _chance(cloud[:1], cloud[1:]) == _chance(cloud[1:], cloud[:1]) == torch.inf
    assert _chance(cloud[:2], cloud[2:]) < torch.inf


def test_function_words_are_no_parts(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    names = ["crane", "duck", "crown of paper", "stool", "heart"]
    how: Any = {"template": BARE, "n": 8, "n_dims": 3, "n_controls": 2, "progress": False}
    assert find_picture_senses(clip, pixels, sae, names, **how).part_words == ("crown", "paper")
    assert find_picture_senses(clip, pixels, sae, names, ignore=(), **how).part_words == ("crown", "of", "paper")


def test_thresholds_come_from_the_controls(senses: PictureSenses) -> None:
    one, two = senses.separation[:5].sort().values[2], senses.mixed_separation.sort().values[2]
    assert senses.threshold == pytest.approx(2 / (1 / float(one) + 1 / float(two)))
    assert senses.purity_threshold == pytest.approx((0.5 + float(senses.mixed_purity.sort().values[2])) / 2)
    low = float(senses.mixed_bimodality.nanquantile(0.05))
    assert senses.bimodality_threshold() == low
    assert senses.to_frame().two_groups.tolist() == [float(value) >= low for value in senses.bimodality[:5]]
    assert senses.cosine_threshold == min(float(row.sort().values[3]) for row in senses.cosine[:5])


def test_seeds_and_batches(clip: HookedCLIP, pixels: Tensor, sae: Any, senses: PictureSenses) -> None:
    again = find_picture_senses(
        clip, pixels, sae, NAMES, template=BARE, n=8, n_dims=3, n_controls=5, batch_size=23, progress=False
    )
    torch.testing.assert_close(again.mixed_separation, senses.mixed_separation)
    torch.testing.assert_close(again.latent_t, senses.latent_t)


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_a_killed_pass_goes_on_and_broken_pictures_are_named(clip: HookedCLIP, sae: Any, tmp_path: Path) -> None:
    _, height, width = clip.pixels(Image.new("RGB", (9, 9)))[0].shape if clip.preprocess else (3, 24, 32)
    rows = np.random.default_rng(4).integers(0, 255, (25, height, width, 3), dtype=np.uint8)
    paths = [tmp_path / f"{number:02}.png" for number in range(25)]
    for path, row in zip(paths, rows, strict=True):
        Image.fromarray(row).save(path)
    for number in (2, 17):
        paths[number].write_bytes(b"no picture")
    how: Any = {"template": BARE, "n": 8, "n_dims": 3, "n_controls": 5, "batch_size": 4, "preprocess": as_tensor,
                "progress": False}  # fmt: skip
    good = [path for number, path in enumerate(paths) if number not in (2, 17)]
    whole = find_picture_senses(clip, paths, sae, NAMES, **how)
    assert [Path(skip.name).name for skip in whole.skipped] == ["02.png", "17.png"]
    assert "2 pictures skipped" in repr(whole)
    alone = find_picture_senses(clip, good, sae, NAMES, **how)
    place = torch.tensor([number for number in range(25) if number not in (2, 17)])
    assert torch.equal(place[alone.sample], whole.sample)
    torch.testing.assert_close(alone.separation, whole.separation, rtol=1e-6, atol=1e-9)

    seen: list[int] = []

    def interrupting(picture: Image.Image) -> Tensor:
        seen.append(0)
        if len(seen) == 14:
            raise KeyboardInterrupt
        return as_tensor(picture)

    kept: Any = {**how, "checkpoint": tmp_path / "pass", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        find_picture_senses(clip, paths, sae, NAMES, **{**kept, "preprocess": interrupting})
    assert (tmp_path / "pass").exists()
    again = find_picture_senses(clip, paths, sae, NAMES, **kept)
    assert torch.equal(again.sample, whole.sample)
    assert torch.equal(again.separation, whole.separation)
    assert torch.equal(again.latent_t, whole.latent_t)
    with pytest.raises(InputError, match="other settings"):
        find_picture_senses(clip, paths, sae, [*NAMES, "tulip"], **kept)
    whole.save(tmp_path / "senses.safetensors")
    assert PictureSenses.load(tmp_path / "senses.safetensors").skipped == whole.skipped


def test_a_picture_that_breaks_between_the_passes_is_named(clip: HookedCLIP, sae: Any, tmp_path: Path) -> None:
    rows = np.random.default_rng(4).integers(0, 255, (12, 24, 32, 3), dtype=np.uint8)
    for number, row in enumerate(rows):
        Image.fromarray(row).save(tmp_path / f"{number:02}.png")
    how: Any = {"template": BARE, "n": 6, "n_dims": 3, "n_controls": 5, "batch_size": 5, "progress": False}
    whole = find_picture_senses(clip, tmp_path, sae, NAMES, preprocess=as_tensor, **how)
    used = whole.sample.unique().tolist()
    seen: list[int] = []

    def breaking(picture: Image.Image) -> Tensor:
        seen.append(0)
        if len(seen) == 12:  # the end of the first pass
            for number in broken:
                (tmp_path / f"{number:02}.png").write_bytes(b"no picture")
        return as_tensor(picture)

    for broken in (used[-1:], used[:2], used):
        seen.clear()
        with pytest.raises(InputError, match=f"{broken[0]:02}.png: .*not an image") as error:
            find_picture_senses(clip, tmp_path, sae, NAMES, preprocess=breaking, **how)
        assert all(f"{number:02}.png" in str(error.value) for number in broken[:3])
        if broken != used:
            assert f"{len(broken)} of the {len(used)} pictures of the prompts" in str(error.value)
        for number in broken:
            Image.fromarray(rows[number]).save(tmp_path / f"{number:02}.png")
    broken = sorted(set(range(12)) - set(used))  # nobody looks at those again
    assert broken
    seen.clear()
    assert find_picture_senses(clip, tmp_path, sae, NAMES, preprocess=breaking, **how).sample.equal(whole.sample)


def test_a_stream_is_refused_before_it_is_read(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    read: list[int] = []

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            read.append(0)
            yield from pixels

    for data in (Stream(), torch.utils.data.DataLoader(list(pixels), shuffle=True)):
        with pytest.raises(InputError, match="can be read in one order only"):
            find_picture_senses(clip, data, sae, NAMES, template=BARE, n=8, n_dims=3, progress=False)
    assert read == []


def test_saved_and_loaded(senses: PictureSenses, tmp_path: Path) -> None:
    senses.save(tmp_path / "senses.safetensors")
    found = PictureSenses.load(tmp_path / "senses.safetensors")
    assert (found.names, found.part_words, found.threshold) == (senses.names, senses.part_words, senses.threshold)
    assert torch.equal(found.group, senses.group)
    with pytest.raises(LoadError, match=r"PictureSenses\.save"):
        PictureSenses.load(tmp_path / "none")


def test_wrong_input(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    for names, settings_, message in [
        (["a", "b", "c"], {}, "at least four"),
        (["a", "b", "c", "a"], {}, "each once"),
        (NAMES, {"n": 61}, "60 readable pictures"),
        (NAMES, {"n": 2}, "at least 4"),
        (NAMES, {"template": "a photo"}, "one {}"),
        (NAMES, {"n": 60}, "every name retrieves the same 60 pictures"),
    ]:
        with pytest.raises(InputError, match=message):
            find_picture_senses(clip, pixels, sae, names, progress=False, **settings_)


BAT = {
    "bat": [
        Sense("bat.n.01", "", ("bat", "chiropteran"), ("placental_mammal.n.01", "mammal.n.01")),
        Sense("bat.n.05", "", ("bat",), ("club.n.02",)),
        Sense("bat.n.06", "", (), ()),
    ],
    "duck": [Sense("duck.n.01", "", ("duck",), ("bird.n.01",))],
    "photo": [Sense("photo.n.01"), Sense("photo.n.02")],
}


def test_senses_of_the_words_of_prompts(clip: HookedCLIP) -> None:
    found = find_word_senses(["a photo of a bat", "a photo of a duck", "a Bat"], BAT, clip, n_senses=2)
    assert found.senses == ("bat.n.01", "bat.n.05") * 2
    assert found.prompts == ("a photo of a bat",) * 2 + ("a Bat",) * 2
    assert found.texts == ("bat chiropteran placental mammal", "bat club") * 2
    with torch.no_grad():
        torch.testing.assert_close(found.vectors, clip.embed_texts(list(found.texts), normalize=True).float())
    assert find_word_senses(["a bat"], BAT, clip).texts[2] == "bat"
    assert find_word_senses(["A photo, of a Bat."], BAT, clip).words == ("bat",) * 3
    army = {"bat": [Sense("bat.n.01", "", ("bat",), ("u.s._army_unit.n.01",)), Sense("bat.n.05", "", ("bat",), ())]}
    assert find_word_senses(["a bat"], army, clip).texts[0] == "bat u.s. army unit"
    assert len(find_word_senses(["a duck"], BAT, clip)) == 0
    assert set(find_word_senses(["a photo"], BAT, clip, ignore=()).words) == {"photo"}
    for prompts, n in ((["a bat"], 1), ([], 6), ("a bat", 6)):
        with pytest.raises(InputError, match="at least one prompt"):
            find_word_senses(prompts, BAT, clip, n_senses=n)


def test_a_target_stands_for_names(clip: HookedCLIP, pixels: Tensor, sae: Any, senses: PictureSenses) -> None:
    with torch.no_grad():
        vectors = clip.embed_texts(list(senses.prompts[:5]))
    target = direction_target(vectors, labels=NAMES)
    found = find_picture_senses(clip, pixels, sae, target, n=8, n_dims=3, n_controls=5, batch_size=7, progress=False)
    assert found.prompts == found.texts == found.names == tuple(NAMES)
    assert (found.part_of.tolist(), found.part_words) == ([2], ("stool",))  # "paper" has no direction here
    assert torch.equal(found.sample, senses.sample[:5])
    assert torch.equal(found.group, senses.group[:5])
    # Without "paper" fewer pictures are retrieved, and principal components are of these: the ridge is another.
    torch.testing.assert_close(found.part_separation, senses.part_separation[1:], rtol=0.2, atol=0)
