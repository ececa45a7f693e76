"""Curves equal a loop that zeroes latents one after the other and re-runs the whole model; ranks handle ties."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.attribution import deletion_curve, each
from oracles.attribution import spearman as slow_spearman
from oracles.proof import insertion_curve
from oracles.saes import build_sae
from oracles.sites import make
from torch import Tensor

from clip_lens_ext.attribution import (
    Faithfulness,
    activation_energy,
    attribution_patching,
    direction_target,
    exact_ablation,
    faithfulness,
    logit_lens,
    open_site,
    random_attribution,
)
from clip_lens_ext.attribution.ranks import spearman
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

PATCHES = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
EOT = ("text", "eos", "blocks.1.hook_resid_post", "eot", 40)


def run(
    site: Any, n_steps: int, *, kept: bool = True, cosine: bool = True, **settings: Any
) -> tuple[Faithfulness, dict[str, Any], Any]:
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions, cosine=cosine)
    where: dict[str, Any] = {"error_term": "kept" if kept else "dropped"}
    given = [attribution_patching(tower, x, sae, target, **where), logit_lens(tower, x, sae, target, **where)]
    found = faithfulness(tower, x, sae, target, given, n_steps=n_steps, progress=False, seed=7, **where, **settings)
    all_of_them = {result.method: result for result in given} | {
        "exact_ablation": exact_ablation(tower, x, sae, target, **where),
        "random": random_attribution(tower, x, sae, target, seed=7, **where),
    }
    return found, all_of_them, each(model, x, sae, site[2], site[3], directions, cosine=cosine, kept=kept)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("site", "n_steps"), [(CLS, 4), (EOT, 9), (PATCHES, 3)], ids=["cls", "more steps than latents", "patches"]
)
def test_curves_areas_and_ranks(site: Any, n_steps: int, kept: bool) -> None:
    found, results, explained = run(site, n_steps, kept=kept)
    assert found.methods == ("attribution_patching", "logit_lens", "exact_ablation", "random")
    assert found.deletion.shape == found.insertion.shape == (4, 2, 3, n_steps + 1)
    assert found.deletion_area.shape == found.rank_correlation.shape == (4, 2, 3)
    for row, method in enumerate(found.methods):
        result = results[method]
        for sample in range(2):
            own = result.sample == sample
            latents = result.latent[own].tolist()
            exact = results["exact_ablation"].value[own]
            for index in range(3):
                values = result.value[own][:, index].tolist()
                order = [latents[i] for i in sorted(range(len(values)), key=lambda i, v=values: -v[i])]
                expected = deletion_curve(explained[sample], order, n_steps, index)
                back = insertion_curve(explained[sample], order, n_steps, index)
                assert found.insertion[row, sample, index].tolist() == pytest.approx(back, abs=1e-10), (method, sample)
                inserted = float(found.insertion_area[row, sample, index])
                assert inserted == pytest.approx(sum(back) / len(back), abs=1e-10)
                curve = found.deletion[row, sample, index]
                assert curve.tolist() == pytest.approx(expected, abs=1e-10), (method, sample, index)
                area = float(found.deletion_area[row, sample, index])
                assert area == pytest.approx(sum(expected) / len(expected), abs=1e-10)
                assert float(found.rank_correlation[row, sample, index]) == pytest.approx(
                    slow_spearman(values, exact[:, index].tolist()), abs=1e-9
                )
    assert found.n_active.tolist() == [len(one.active()) for one in explained]
    assert torch.allclose(found.deletion[..., 0], results["random"].prediction.expand(4, 2, 3), rtol=0, atol=1e-12)
    assert (found.rank_correlation[2] == 1).all()


def test_a_sample_with_fewer_latents_than_steps_stays_at_its_last_value() -> None:
    found, _, explained = run(EOT, 9)
    for sample, one in enumerate(explained):
        n = len(one.active())
        assert n == 6
        last = found.deletion[:, sample, :, n]
        assert torch.allclose(
            found.deletion[:, sample, :, n:], last[..., None].expand(-1, -1, 10 - n), rtol=0, atol=1e-13
        )
        # With every latent gone the order does not matter.
        assert torch.allclose(last, last[:1].expand_as(last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    expected, _, _ = run(PATCHES, 5)
    found, _, _ = run(PATCHES, 5, batch_size=batch_size)
    assert torch.allclose(found.deletion, expected.deletion, rtol=0, atol=1e-12)
    assert torch.allclose(found.insertion, expected.insertion, rtol=0, atol=1e-12)


def test_inner_products_are_not_cosines() -> None:
    found, _, explained = run(CLS, 2, cosine=False)
    assert found.unit == "inner product"
    assert float(found.deletion[0, 1, 2, 0]) == pytest.approx(
        float(explained[1].predict(explained[1].latents)[2]), abs=1e-10
    )


def test_the_two_ends_are_there_once() -> None:
    model, x, sae, directions = make(CLS)
    tower, target = HookedTower(model), direction_target(directions)
    exact, chance = exact_ablation(tower, x, sae, target), random_attribution(tower, x, sae, target, seed=3)
    energy = activation_energy(tower, x, sae, target)
    found = faithfulness(tower, x, sae, target, [exact, chance, energy], n_steps=2, progress=False)
    assert found.methods == ("exact_ablation", "random", "activation_energy")
    own = faithfulness(tower, x, sae, target, energy, n_steps=2, progress=False, seed=3)
    assert own.methods == ("activation_energy", "exact_ablation", "random")
    assert torch.equal(own.deletion[2], found.deletion[1])
    named = faithfulness(tower, x, sae, target, {"a": energy, "b": energy}, n_steps=2, progress=False)
    assert named.methods == ("a", "b", "exact_ablation", "random")
    assert torch.equal(named.deletion[0], named.deletion[1])


def test_exact_order_falls_fastest_at_the_first_step() -> None:
    found, _, _ = run(PATCHES, 3)
    assert (found.deletion[2, ..., 1] <= found.deletion[..., 1].amin(dim=0) + 1e-12).all()


def test_frame() -> None:
    found, _, _ = run(CLS, 3)
    frame = found.to_frame()
    assert frame["method"].tolist() == list(found.methods)
    for row in range(4):
        assert frame["rank_correlation"][row] == pytest.approx(float(found.rank_correlation[row].mean()))
        assert frame["deletion_area"][row] == pytest.approx(float(found.deletion_area[row].mean()))
        assert frame["prediction_before"][row] == pytest.approx(float(found.deletion[row, ..., 0].mean()))
        assert frame["prediction_after"][row] == pytest.approx(float(found.deletion[row, ..., 3].mean()))
    assert (frame["n_undefined"] == 0).all()
    assert (found.labels, found.hook_name, found.token_scope, found.error_term) == (
        ("0", "1", "2"),
        CLS[2],
        "cls",
        "kept",
    )


def test_a_constant_method_has_no_rank_correlation() -> None:
    model, x, sae, directions = make(CLS)
    tower, target = HookedTower(model), direction_target(directions)
    energy = activation_energy(tower, x, sae, target)
    constant = replace(energy, value=torch.ones_like(energy.value), method="constant")
    found = faithfulness(tower, x, sae, target, constant, n_steps=2, progress=False)
    assert found.rank_correlation[0].isnan().all()
    assert found.to_frame()["n_undefined"].tolist() == [6, 0, 0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=12))
def test_spearman_with_ties(pairs: list[tuple[int, int]]) -> None:
    a, b = [float(p[0]) for p in pairs], [float(p[1]) for p in pairs]
    found, expected = spearman(torch.tensor(a), torch.tensor(b)), slow_spearman(a, b)
    assert math.isnan(found) == math.isnan(expected)
    if not math.isnan(expected):
        assert found == pytest.approx(expected, abs=1e-9)


# -- results that do not belong together


def changed(tensor: Tensor) -> Tensor:
    return tensor + 0.01


@pytest.mark.parametrize(
    "fault", ["input", "input with the same latents", "sae", "error term", "labels", "target", "per token", "hook"]
)
def test_results_that_do_not_belong_here(fault: str) -> None:
    model, x, sae, directions = make(CLS)
    tower, target = HookedTower(model), direction_target(directions)
    result, message = {
        "input": lambda: (attribution_patching(tower, x.flip(0), sae, target), "another input"),
        "input with the same latents": lambda: (attribution_patching(tower, x + 1e-7, sae, target), "another input"),
        "sae": lambda: (
            attribution_patching(tower, x, build_sae("topk", 48, CLS[2], "cls", seed=4), target),
            "another SAE",
        ),
        "error term": lambda: (
            attribution_patching(tower, x, sae, target, error_term="dropped"),
            "error term dropped.*kept",
        ),
        "labels": lambda: (attribution_patching(tower, x, sae, direction_target(directions[:2])), "explains 0, 1"),
        "target": lambda: (attribution_patching(tower, x, sae, direction_target(-directions)), "target"),
        "per token": lambda: (attribution_patching(tower, x, sae, target, per_token=True), "per_token=False"),
        "hook": lambda: (attribution_patching(tower, x, sae, target, hook_name="blocks.0.hook_resid_post"), "another"),
    }[fault]()
    with pytest.raises(InputError, match=message):
        faithfulness(tower, x, sae, target, result, n_steps=2, progress=False)


def test_two_results_of_one_method_need_names() -> None:
    model, x, sae, directions = make(CLS)
    tower, target = HookedTower(model), direction_target(directions)
    result = attribution_patching(tower, x, sae, target)
    with pytest.raises(InputError, match="same method"):
        faithfulness(tower, x, sae, target, [result, result], progress=False)
    with pytest.raises(InputError, match="at least 1, got 0"):
        faithfulness(tower, x, sae, target, result, n_steps=0, progress=False)


def test_a_shared_site() -> None:
    model, x, sae, directions = make(PATCHES)
    tower, target = HookedTower(model), direction_target(directions)
    site = open_site(tower, x, sae, error_term="dropped")
    calls = []
    model.conv1.register_forward_hook(lambda *args: calls.append(1))
    result = attribution_patching(tower, site, sae, target)
    found = faithfulness(tower, site, sae, target, result, n_steps=2, progress=False)
    assert found.error_term == "dropped"
    assert calls == []


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, sae, directions = make(CLS)
    tower, target = HookedTower(model), direction_target(directions)
    result = attribution_patching(tower, x, sae, target)
    faithfulness(tower, x, sae, target, result, n_steps=1, progress=False)
    assert capsys.readouterr().err == ""
    faithfulness(tower, x, sae, target, result, n_steps=1)
    assert "deletion and insertion curves" in capsys.readouterr().err
