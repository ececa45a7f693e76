"""What the benchmarks of Sparse CLIP compute and decide by themselves, before their tables are written."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import (
    sparse_ablations,
    sparse_drift,
    sparse_findings,
    sparse_methods,
    sparse_rivals,
    sparse_scratch,
    sparse_steering,
    sparse_steering_methods,
)
from benchmarks.sparse_ablations import BASE, of_cap, of_penalties, steps
from benchmarks.sparse_findings import FAILS, HOLDS, OPEN, Interval, between, both, over
from benchmarks.sparse_scores import hits, same_class
from benchmarks.sparse_setup import is_there, objects_of
from benchmarks.sparse_steering_methods import Steered, Way, apart, draw_controls, draw_targets, same, steered
from clip_lens_ext.planted import PlantedWorld, normalise, planted_clip
from clip_lens_ext.sparse_clip import EmbeddedPairs

N_PICTURE, N_FEATURE = 200, 40


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are far apart; pages draw an interval for every cell."""
    monkeypatch.setattr(sparse_findings, "N_BOOTSTRAP", 300)


# --- the truth of the world ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3])
def test_one_word_of_a_compound_that_names_another_object_is_there_where_that_object_is(seed: int) -> None:
    world = PlantedWorld(seed)
    for compound in world.key.compounds:
        rest = compound.head if compound.named_part == "modifier" else compound.modifier
        assert objects_of(world, compound.part_word) == {compound.part_object}
        assert objects_of(world, rest) == {compound.object}
        batch = world.sample(12, seed=1, split="test", classes=[compound.phrase, compound.part_word], word=None)
        for i in range(len(batch)):
            assert is_there(world, batch, i, compound.part_word) == (compound.part_object in batch.objects[i])
            assert is_there(world, batch, i, rest) == (compound.object in batch.objects[i])


def test_a_drawn_word_is_no_object() -> None:
    world = PlantedWorld(0)
    word, other = world.key.typographic[:2]
    batch = world.sample(8, seed=1, split="test", classes=[other], word=word)
    assert [is_there(world, batch, i, other) for i in range(8)] == [True] * 8
    assert not any(is_there(world, batch, i, word) for i in range(8))


def test_both_senses_of_a_word_the_category_and_the_background_are_there() -> None:
    world = PlantedWorld(0)
    word, senses = next(iter(world.key.polysemous.items()))
    assert objects_of(world, word) == set(senses)
    batch = world.sample(10, seed=2, split="test", classes=[word], background="sand")
    of = {entry.object: entry.category for entry in world.classes}
    for i in range(10):
        assert is_there(world, batch, i, word)
        assert is_there(world, batch, i, "sand")
        assert not is_there(world, batch, i, "waves")
        for category in world.key.categories:
            assert is_there(world, batch, i, category) == (category in {of[one] for one in batch.objects[i]})


def test_same_class_is_the_share_of_pairs_that_show_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(30, 6, generator=generator) * (torch.rand(30, 6, generator=generator) < 0.4)
    codes[:, 4], codes[:, 5] = 0.0, torch.eye(30)[7]
    labels = torch.randint(4, (30,), generator=generator)

    def share(pictures: list[int]) -> float:
        pairs = [(a, b) for a in pictures for b in pictures if a != b]
        return sum(int(labels[a] == labels[b]) for a, b in pairs) / len(pairs) if pairs else float("nan")

    found, chance = same_class(codes, labels)
    expected = [share([i for i in range(30) if codes[i, feature] > 0.001]) for feature in range(6)]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, equal_nan=True)
    assert found[4:].isnan().all()
    assert chance == pytest.approx(share(list(range(30))), abs=1e-6)


def test_a_picture_that_is_equally_near_to_two_classes_is_no_hit() -> None:
    prompts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert hits(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), prompts, torch.tensor([0, 0])).tolist() == [True, False]


# --- verdicts -----------------------------------------------------------------------------------------------------


def test_an_interval_decides_only_where_the_threshold_is_outside() -> None:
    interval = Interval(0.5, 0.4, 0.6)
    assert [interval.above(t) for t in (0.3, 0.5, 0.7)] == [HOLDS, OPEN, FAILS]
    assert [interval.below(t) for t in (0.3, 0.5, 0.7)] == [FAILS, OPEN, HOLDS]
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    assert nothing.above() == nothing.below() == OPEN
    assert [both(HOLDS, HOLDS), both(HOLDS, OPEN), both(OPEN, FAILS), both()] == [HOLDS, OPEN, FAILS, OPEN]


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(500, generator=generator)
    other = one + 0.05 + 0.05 * torch.randn(500, generator=generator)
    paired, apart_ = over(other - one), between(other, one)
    assert paired.mean == pytest.approx(apart_.mean)
    assert paired.above() == HOLDS
    assert apart_.above() == OPEN
    # The normal approximation, whose standard error is that of two means.
    width = 2 * 1.96 * float((one.var() / 500 + other.var() / 500).sqrt())
    assert apart_.high - apart_.low == pytest.approx(width, rel=0.2)
    with_gaps = torch.cat([one, torch.tensor([torch.nan])])
    assert over(with_gaps).mean == pytest.approx(float(one.mean()), abs=1e-6)
    assert between(with_gaps, one).mean == pytest.approx(0.0, abs=1e-6)


def row(share: float, l0: float, **settings: Any) -> dict[str, Any]:
    """A row whose first pictures are right, and whose pictures have almost the same L0."""
    right = torch.arange(N_PICTURE) < share * N_PICTURE
    features = torch.linspace(0, 1, N_FEATURE, dtype=torch.float64)
    given = {
        "zero-shot": share, "i2t": 0.1, "t2i": 0.1, "hits": right, "L0 image": l0, "L0 text": l0, "active": 0.9,
        "density": 0.1, "clarity": 0.3, "clarity baseline": 0.1, "same class": 0.2, "same class chance": 0.03,
        "bimodal": 0.5, "bimodal chance": 0.2, "truth": 0.6, "truth chance": 0.1, "truth or drawn": 0.6,
        "truth or drawn chance": 0.1, "named": 9, "L0s": (l0 + torch.arange(N_PICTURE) % 2).long(),
        "densities": features, "clarities": features, "same classes": features, "bimodals": (features < 0.5).double(),
        **dict.fromkeys(steps(), l0),
    }  # fmt: skip
    return given | settings


@pytest.fixture
def ablations() -> dict[str, dict[str, Any]]:
    """Rows in which everything is as the paper says."""
    rows = {}
    for i, width in enumerate(sparse_ablations.WIDTHS):
        rows[f"x{width}, ReLU"] = row(0.3 + 0.1 * i, 100.0 if width >= 16 else 10.0 * width)
        rows[f"x{width}, no ReLU"] = {"zero-shot": 0.7, "i2t": 0.1, "t2i": 0.1, "hits": row(0.7, 1.0)["hits"]}
    rows[BASE] = row(0.7, 100.0, **{sparse_ablations.steps()[2]: 400.0})
    for i, cap in enumerate(cap for cap in sparse_ablations.CAPS if cap != sparse_ablations.CAP):
        rows[of_cap(cap)] = row(0.8 - 0.1 * (cap == 20.0), 900.0 - 100 * i)
    for weight in sparse_ablations.L1:
        rows[f"x16, L1 {weight:g}"] = row(0.5, 80.0)
    for k in sparse_ablations.TOPK:
        rows[f"x16, TopK {k}"] = row(0.4, float(k))
    return rows


def verdicts(sentences: list[str]) -> list[str]:
    """What each sentence says, if it says something of a finding."""
    return [next((word for word in (FAILS, HOLDS, OPEN) if word in one), "") for one in sentences]


def test_findings_of_the_ablations_hold_where_all_is_as_in_the_paper(ablations: dict[str, dict[str, Any]]) -> None:
    found = sparse_ablations.findings(ablations)
    assert verdicts(found) == [HOLDS] * 7
    assert "TopK 128 (L0 128) beside ReLU (L0 100)" in found[5]
    assert "TopK 8 (L0 8) beside ReLU (L0 100) -30.0 points" in found[5]
    assert found[5].count("not counted") == 2  # 8 and 32, which no row with the ReLU comes near


def test_findings_of_the_ablations_do_not_hold_where_the_rows_say_otherwise(
    ablations: dict[str, dict[str, Any]],
) -> None:
    ablations["x32, no ReLU"]["hits"] = row(0.9, 1.0)["hits"]  # width helps without the ReLU too
    ablations["x1, no ReLU"]["hits"] = row(0.2, 1.0)["hits"]
    ablations["x32, ReLU"] = row(0.8, 190.0)
    ablations[of_cap(40.0)]["L0s"] = ablations[of_cap(20.0)]["L0s"] - 100
    ablations[of_cap(20.0)]["hits"] = row(0.95, 1.0)["hits"]
    for name in ("L1 0.001", "L1 0.01", "L1 0.1", "TopK 8", "TopK 32", "TopK 128"):
        ablations[f"x16, {name}"] |= {"hits": row(0.9, 1.0)["hits"], **dict.fromkeys(steps(), 900.0)}
    assert verdicts(sparse_ablations.findings(ablations)) == [FAILS] * 7


def test_equal_rows_decide_nothing(ablations: dict[str, dict[str, Any]]) -> None:
    ablations[of_cap(50.0)]["hits"] = ablations[of_cap(20.0)]["hits"]
    assert verdicts(sparse_ablations.of_caps(ablations)) == [HOLDS, OPEN]


def test_a_collapsed_row_is_named_and_in_no_comparison(ablations: dict[str, dict[str, Any]]) -> None:
    ablations["x16, L1 0.1"] = row(0.0, 0.2)
    found = of_penalties(ablations)
    assert found[-1].startswith("- L1 0.1 collapsed")
    assert all("L1 0.1 " not in one.replace("L1 0.1 collapsed", "") for one in found)
    ablations["x16, L1 0.1"] = row(0.9, 90.0)
    assert "holds here for 3, does not hold here for 1" in of_penalties(ablations)[0]


def test_each_row_of_a_table_has_a_cell_for_each_head(ablations: dict[str, dict[str, Any]]) -> None:
    n = len(sparse_ablations.head(ablations[BASE]))
    dense = {name: ablations[BASE][name] for name in ("zero-shot", "i2t", "t2i", "hits")}
    assert {len(sparse_ablations.shown(name, one)) for name, one in ablations.items()} == {n}
    assert len(sparse_ablations.shown("dense embedding", dense)) == n
    assert "0.700 (0." in sparse_ablations.shown(BASE, ablations[BASE])[1]
    kept = json.loads(json.dumps(sparse_ablations.kept_row(ablations[BASE])))
    assert sum(kept["hits"]) == round(0.7 * N_PICTURE)
    assert kept["zero-shot"] == 0.7
    assert "clarities" not in kept
    sparse_ablations.page(ablations, dense)


def test_early_l0_is_that_of_the_step() -> None:
    found = sparse_ablations.early(pd.DataFrame({"l0_image": [float(step) for step in range(1, 101)]}))
    assert list(found.values()) == [1.0, 3.0, 10.0, 30.0, 100.0]


def method_rows(**ours: Any) -> dict[str, dict[str, Any]]:
    features = row(0.5, 1.0)["clarities"]
    clearer = {"clarities": features + 1, "same classes": features + 1, "bimodals": torch.ones(N_FEATURE)}
    return {
        sparse_methods.OURS: row(0.9, 99.6, **(clearer | ours)),
        sparse_methods.UNTRAINED: row(0.1, 900.0),
        sparse_methods.of_saes(100): row(0.8, 100.0, bimodals=features * 0, through=row(0.8, 1.0)["hits"]),
        "dense and SpLiCE, hardly a penalty": row(0.8, 30.0),
    }  # fmt: skip


def test_findings_of_the_methods_are_decided_by_the_rows() -> None:
    dense = row(0.9, 1.0)["hits"]
    assert verdicts(sparse_methods.findings(method_rows(), dense)) == [HOLDS] * 5
    features = row(0.5, 1.0)["clarities"]
    worse = method_rows(clarities=features - 1, bimodals=(features < 0.1).double(), **{"same classes": features - 1})
    worse[sparse_methods.OURS]["hits"] = row(0.5, 1.0)["hits"]
    worse[sparse_methods.of_saes(100)]["bimodals"] = torch.ones(N_FEATURE)
    assert verdicts(sparse_methods.findings(worse, dense)) == [FAILS] * 5
    found = sparse_methods.page(method_rows(), dense, 41, 1e-9)
    assert "cannot come to that" in found
    table = [line for line in found.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_sparse_and_dense_from_scratch_begin_with_the_same_fresh_towers_and_stand_in_one_table() -> None:
    world = PlantedWorld(0)
    data: Any = SimpleNamespace(world=world, batch=world.sample(4, seed=3, split="test"), words=["heart"],
                                names=["heart", "kite"], labels=torch.tensor([0, 1, 1, 0]))  # fmt: skip
    one, other = (sparse_scratch.codes_by(sparse_scratch.fresh(data), data) for _ in range(2))
    for rows, n in ((one.images, 4), (one.prompts, 2), (one.captions, len(set(data.batch.captions))), (one.words, 1)):
        assert rows.shape == (n, 128)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.prompts, other.prompts)
    assert not torch.allclose(one.images, planted_clip().embed_images(normalise(data.batch.images)), atol=0.1)
    data.own = F.one_hot(torch.arange(4) % len(one.captions), len(one.captions)).bool()
    steps_of = dict.fromkeys(steps(), 7.0)
    rows = method_rows()
    for each in rows.values():
        each["hits"] = each["hits"][:4]
    found = sparse_scratch.page({name: rows[name] for name in list(rows)[:3]}, one, data, steps_of)
    table = [line for line in found.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert found.splitlines()[-1].endswith("of the steps: 7, 7, 7, 7, 7.")


def test_findings_of_the_drift_are_decided_by_the_rows() -> None:
    drift: Any = SimpleNamespace(events=[SimpleNamespace(kind="switch", feature=3)], d_code=N_FEATURE,
                                 counts=lambda: pd.DataFrame({"switch": [0, 1]}, index=["1%", "100%"]))  # fmt: skip
    features = row(0.5, 1.0)["densities"]
    falling = {"1%": row(0.5, 900.0, densities=features + 9), "100%": row(0.9, 100.0)}
    assert verdicts(sparse_drift.findings(falling, drift)) == [HOLDS, HOLDS, HOLDS, OPEN, HOLDS]
    falling["100%"]["bimodals"] = torch.ones(N_FEATURE)
    assert verdicts(sparse_drift.findings(falling, drift)) == [HOLDS, HOLDS, FAILS, HOLDS, HOLDS]
    rising = dict(zip(falling, reversed(falling.values()), strict=True))
    drift.events, drift.counts = [], lambda: pd.DataFrame({"switch": [0, 0]}, index=["1%", "100%"])
    assert verdicts(sparse_drift.findings(rising, drift)) == [FAILS, FAILS, FAILS, FAILS, FAILS]
    names: Any = SimpleNamespace(mean_agreement=0.4, mean_control=0.0, retrieval_accuracy=0.01, retrieval_chance=0.001)
    assert len(sparse_drift.cells("1%", rising["1%"], names)) == len(sparse_drift.head(rising["1%"]))


# --- rivals and attribution ---------------------------------------------------------------------------------------


def test_the_file_of_an_sae_changes_with_the_data_and_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    one = EmbeddedPairs.from_vectors(torch.eye(4, 3) + 1, torch.eye(4, 3) + 2)
    other = EmbeddedPairs.from_vectors(torch.eye(4, 3) + 1, torch.eye(4, 3) + 3)
    found = {sparse_rivals.sae_file(*of) for of in ((one, 8, 2), (other, 8, 2), (one, 16, 2), (one, 8, 4))}
    monkeypatch.setitem(sparse_rivals.SAE, "lr", 1.0)
    assert len(found | {sparse_rivals.sae_file(one, 8, 2)}) == 5


def test_an_sae_is_trained_once_and_leaves_the_global_generator_alone(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_rivals, "SAE", sparse_rivals.SAE | {"n_steps": 40, "batch_size": 32})
    generator = torch.Generator().manual_seed(0)
    pairs = EmbeddedPairs.from_vectors(*(torch.randn(50, 6, generator=generator) for _ in range(2)))
    before = torch.get_rng_state()
    sae = sparse_rivals.joint_sae(pairs, 16, 3, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(sparse_rivals, "SAETrainer", None)
    again = sparse_rivals.joint_sae(pairs, 16, 3, tmp_path)
    rows = torch.nn.functional.normalize(pairs.images, dim=-1)
    assert torch.equal(sae.encode(rows), again.encode(rows))
    assert int((sae.encode(rows) > 0).sum(dim=1).max()) <= 3
    assert len(list(tmp_path.iterdir())) == 1


def test_each_overlap_stands_beside_its_own_chance() -> None:
    exact = torch.zeros(2, 1, 60)
    exact[0, 0, :40], exact[1, 0, :6] = torch.arange(1.0, 41.0), torch.arange(1.0, 7.0)
    found = sparse_methods._compared("x", exact, exact, torch.zeros(2, dtype=torch.int64))
    # Ten of 40, and three of 6.
    assert found == ["x", "23", "1.000", "1.00", f"{(10 / 40 + 3 / 6) / 2:.2f}", "2"]


# --- steering to the same classes ---------------------------------------------------------------------------------


def test_targets_are_drawn_once_among_classes_that_share_nothing_in_any_code() -> None:
    one, other = torch.tensor([[0, 1], [1, 2], [3, 4], [5, 6]]), torch.tensor([[0, 1], [2, 3], [4, 5], [4, 6]])
    choices = apart(one) & apart(other)
    assert choices.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    labels = torch.arange(4).repeat(50)
    found = draw_targets(labels, choices, seed=0)
    assert choices[labels, found].all()
    assert all(len(found[labels == label].unique()) == 2 for label in range(4))
    assert torch.equal(draw_targets(labels[:7], choices, seed=0), found[:7])
    choices[2] = False
    assert (draw_targets(labels, choices, seed=0)[labels == 2] == -1).all()


def toy_way(name: str = "x", n_class: int = 5) -> tuple[Way, Tensor]:
    """Class c has the features 2c and 2c + 1; ten more features are noise."""
    labels = torch.arange(n_class).repeat(6)
    texts = torch.zeros(n_class, 2 * n_class + 10)
    for label in range(n_class):
        texts[label, 2 * label], texts[label, 2 * label + 1] = 2.0, 1.0
    texts[:, -4:] = 0.1
    noise = 0.05 * torch.rand(len(labels), 10, generator=torch.Generator().manual_seed(0))
    codes = texts[labels].clone()
    codes[:, -10:] = noise
    return Way(name, codes, texts, same, texts), labels


def test_controls_are_other_features_and_those_that_are_boosted_are_of_some_text() -> None:
    way, labels = toy_way()
    features = way.features(2)
    off, on = features[labels], features[(labels + 1) % 5]
    live = (way.texts > 0).any(dim=0)
    offs, ons = draw_controls(way.codes, off, on, live, n=3, seed=0)
    assert offs.shape == ons.shape == (3, 30, 2)
    assert live[ons].all()
    few = torch.zeros_like(live)
    few[[11, 14, 17]] = True
    assert few[draw_controls(way.codes, off, on, few, n=3, seed=0)[1]].all()
    for draw in range(3):
        taken = torch.cat([off, on, offs[draw], ons[draw]], dim=1)
        assert all(len(set(row)) == 8 for row in taken.tolist())
    short = draw_controls(way.codes[:4], off[:4], on[:4], live, n=3, seed=0)
    assert torch.equal(short[0], offs[:, :4])
    assert torch.equal(short[1], ons[:, :4])


def test_steering_by_hand_turns_the_class_and_the_control_does_not() -> None:
    way, labels = toy_way()
    targets = draw_targets(labels, apart(way.features(2)), seed=0)
    found = steered(way, labels, targets, 2, (1.0, 3.0))
    assert list(found) == [1.0, 3.0]
    assert torch.equal(found[1.0].answers[0], targets)
    assert found[1.0].new().mean() == 1
    assert found[1.0].old().mean() == 0
    assert found[1.0].old(slice(1, None)).shape == (len(labels), 5)
    assert found[1.0].old(slice(1, None)).mean() > 0.9
    some = torch.where(labels == 3, torch.tensor(-1), targets)
    left = steered(way, labels, some, 2, (1.0,))[1.0]
    assert len(left.labels) == 24
    assert torch.equal(left.answers[0], targets[labels != 3])
    silent = Way(way.name, torch.zeros_like(way.codes), way.texts, same, way.texts)
    assert steered(silent, labels, targets, 2, (1.0,)) == {}  # no strength without an activation
    assert way.features(8) is None  # a prompt has six


def test_an_sae_is_steered_in_its_embedding_with_what_it_leaves_out_kept() -> None:
    way, labels = toy_way()
    rest = torch.full_like(way.codes, 0.01)
    seen: list[Tensor] = []
    other = Way("x", way.codes, way.texts, lambda codes: seen.append(codes) or codes + rest, way.texts)
    targets = draw_targets(labels, apart(way.features(2)), seed=0)
    found = steered(other, labels, torch.where(labels == 3, torch.tensor(-1), targets), 2, (1.0,))[1.0]
    assert all(len(codes) == len(labels) for codes in seen)  # or the rest would be another picture's
    assert torch.equal(seen[0][labels == 3], way.codes[labels == 3])
    assert found.new().mean() == 1


def test_two_ways_are_compared_on_the_same_pictures() -> None:
    targets = torch.arange(4).repeat(10)
    right, wrong = (Steered(answers[None], (targets + 2) % 4, targets) for answers in (targets, (targets + 1) % 4))
    found = {("Sparse CLIP", 1, 1.0): right, ("SAE", 1, 1.0): wrong, ("Sparse CLIP", 2, 1.0): wrong,
             ("SAE", 2, 1.0): right, ("Sparse CLIP", 4, 1.0): right, ("SAE", 4, 1.0): right}  # fmt: skip
    (sentence,) = sparse_steering_methods.compared(found)
    assert "in 1 of 3 settings, fewer in 1, and is not told apart in 1" in sentence


def test_the_page_of_the_methods_has_a_cell_for_each_head() -> None:
    way, labels = toy_way("Sparse CLIP")
    targets = draw_targets(labels, apart(way.features(2)), seed=0)
    found = {(way.name, 1, times): one for times, one in steered(way, labels, targets, 1, (1.0, 2.0)).items()}
    page = sparse_steering_methods.page([way], labels, found, 3)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + 2
    assert len({line.count("|") for line in lines}) == 1
    assert "Sparse CLIP with 8" in page


# --- steering and captions ----------------------------------------------------------------------------------------


def frame(success: float, **columns: float) -> pd.DataFrame:
    """As `to_frame` gives it: one success for all strengths of the concept, none for the control."""
    rows = [("as is", float("nan"), 0.0)]
    for strength in sparse_steering.STRENGTHS:
        rows += [("concept", strength, success if strength >= 2 else 0.1), ("control", strength, 0.0)]
    found = pd.DataFrame(rows, columns=["arm", "strength", "success"])
    found["success_over_control"] = found.success
    for name in ("kept", "own_caption", "new_caption", "corrupted", "retrieval"):
        found[name] = columns.get(name, 0.3)
    for name in [name for name in found.columns if name not in ("arm", "strength")]:
        found[f"{name}_low"], found[f"{name}_high"] = found[name] - 0.02, found[name] + 0.02
    return found


def test_steering_says_whether_the_paper_s_setting_steers_and_which_do() -> None:
    frames = {1: frame(0.2), 2: frame(0.1), 4: frame(0.9), 8: frame(0.51)}
    first, second = sparse_steering.findings(frames, dict.fromkeys(frames, 1.9))
    assert FAILS in first
    assert "2 with 4 features (90% (88 to 92))" in second
    assert all(f"none of the table with {k} feature" in second for k in (1, 2, 8))  # 51%: half is inside
    frames[2] = frame(0.6)
    assert HOLDS in sparse_steering.findings(frames, dict.fromkeys(frames, 1.9))[0]
    assert "No setting" in sparse_steering.findings({2: frame(0.1)}, {2: 1.9})[1]


def test_the_pages_of_steering_show_pictures_as_they_are_once() -> None:
    frames = {1: frame(0.2), 2: frame(0.1)}
    page = sparse_steering.page(frames, dict.fromkeys(frames, 1.9))
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + 2 * 2 * len(sparse_steering.STRENGTHS)
    assert len({line.count("|") for line in lines}) == 1
    assert sum("as is" in line for line in lines) == 1
    assert "harmed" not in page


@pytest.mark.parametrize(
    ("concept", "control", "expected"),
    [(0.6, 0.6, HOLDS), (0.6, 0.1, FAILS), (0.1, 0.1, OPEN)],
    ids=["the strength", "the concept", "neither"],
)
def test_captions_break_by_the_strength_or_by_the_concept(concept: float, control: float, expected: str) -> None:
    n_strength, places = len(sparse_steering.STRENGTHS), torch.arange(N_PICTURE) / N_PICTURE
    corrupted = torch.stack([places < concept, places < control, places < control]).expand(n_strength, -1, -1)
    said: Any = SimpleNamespace(judged_before=torch.stack([places < 0.1] * 3), corrupted=corrupted,
                                strengths=sparse_steering.STRENGTHS)  # fmt: skip
    found = sparse_steering.caption_findings({2: said}, {2: frame(0.3)})
    assert FAILS in found[0]  # 30% of the captions
    assert expected in found[2]
    n_broken = n_strength if concept > 0.1 else 0
    assert f"Such settings are {n_broken} of {n_strength}" in found[2]
