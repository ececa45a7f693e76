"""The parts of a comparison: what is shared and run once, subsets, all latents, shards, intervals, and the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.attribution import each, ranks, spearman
from oracles.proof import bootstrap, descending, insertion_curve, overlap
from oracles.saes import build_sae
from oracles.sites import make
from torch import Tensor

from clip_lens_ext.attribution import (
    Attribution,
    Faithfulness,
    Target,
    activation_energy,
    attribution_patching,
    direction_target,
    exact_ablation,
    faithfulness,
    logit_lens,
    logit_lens_scores,
    open_site,
    random_attribution,
)
from clip_lens_ext.attribution.ranks import spearman_columns, top_overlap
from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.errors import HookNameError, InputError, LoadError
from clip_lens_ext.towers import HookedTower

PATCHES = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
MEASURES = ("rank_correlation", "overlap", "deletion_area", "insertion_area")


def parts(site: Any = CLS, batch: int = 2, **settings: Any) -> tuple[HookedTower, Tensor, Any, Target, Tensor]:
    model, x, sae, directions = make(site, batch=batch, **settings)
    return HookedTower(model, model_name="tiny"), x, sae, direction_target(directions), directions


def latents_of(result: Attribution, sample: int, index: int) -> dict[int, float]:
    own = result.sample == sample
    return dict(zip(result.latent[own].tolist(), result.value[own][:, index].tolist(), strict=True))


def some_pairs(result: Attribution, keep: Tensor) -> Attribution:
    return replace(result, sample=result.sample[keep], latent=result.latent[keep], value=result.value[keep],
                   activation=result.activation[keep])  # fmt: skip


def with_inactive(result: Attribution, latent_of: dict[int, int], value: float) -> Attribution:
    """The same result with one latent more in each sample, as a baseline that is not zero gives them."""
    sample = torch.cat([result.sample, torch.tensor(list(latent_of))])
    latent = torch.cat([result.latent, torch.tensor(list(latent_of.values()))])
    order = (sample * result.d_sae + latent).argsort()
    new = result.value.new_full((len(latent_of), result.value.shape[1]), value)
    zero = result.activation.new_zeros(len(latent_of))
    return replace(result, sample=sample[order], latent=latent[order], value=torch.cat([result.value, new])[order],
                   activation=torch.cat([result.activation, zero])[order])  # fmt: skip


# -- some of the steps


@pytest.mark.parametrize("site", [CLS, PATCHES], ids=["cls", "patches"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_some_steps_are_those_columns_of_all_and_no_other_is_run(site: Any, batch_size: int | None) -> None:
    """Also where an order takes inactive latents, whose steps change nothing."""
    tower, x, sae, target, _ = parts(site)
    given = {
        "patching": attribution_patching(tower, x, sae, target),
        "lens of all": logit_lens_scores(tower, sae, target),
    }
    whole = faithfulness(tower, x, sae, target, given, n_steps=9, batch_size=batch_size, progress=False)
    runs: list[int] = []
    counted = [("hook_pooled", lambda value, hook: runs.append(len(value)))]
    steps = [2, 3, 9]
    exact = exact_ablation(tower, x, sae, target)
    with tower.hooks(fwd_hooks=counted):
        some = faithfulness(
            tower, x, sae, target, {**given, "exact_ablation": exact}, steps=steps, batch_size=batch_size,
            progress=False,
        )  # fmt: skip
    assert some.steps == (0, *steps)
    assert some.n_steps == 9
    by_name = [whole.methods.index(name) for name in some.methods]
    for name in ("deletion", "insertion"):
        expected = getattr(whole, name)[by_name][..., [0, *steps]]
        # Other batches of the tail round differently.
        torch.testing.assert_close(getattr(some, name), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(some.deletion_area, some.deletion.mean(dim=-1))
    # Four orders, two samples, both ways, at most three looks each; the prefix and the two ends once a sample.
    assert sum(runs) <= 4 * 2 * len(target) * 2 * 3 + 4 * 2


@pytest.mark.parametrize("steps", [[], [0, 1], [3, 2], [2, 2], [1.0], [True], [-1]])
def test_steps_that_make_no_sense(steps: Any) -> None:
    tower, x, sae, target, _ = parts()
    result = attribution_patching(tower, x, sae, target)
    with pytest.raises(InputError, match="steps are ascending integers from 1 on"):
        faithfulness(tower, x, sae, target, result, steps=steps, progress=False)


# -- the two ends, and identities


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("site", [CLS, PATCHES], ids=["cls", "patches"])
def test_insertion_is_deletion_backwards(site: Any, kept: bool) -> None:
    tower, x, sae, target, _ = parts(site)
    where: dict[str, Any] = {"error_term": "kept" if kept else "dropped"}
    up = attribution_patching(tower, x, sae, target, **where)
    found = faithfulness(tower, x, sae, target, {"up": up, "down": replace(up, value=-up.value)}, n_steps=37,
                         progress=False, **where)  # fmt: skip
    for sample, n in enumerate(found.n_active.tolist()):
        assert n >= 6
        backwards = found.insertion[1, sample, :, : n + 1].flip(-1)
        # The sums of the same rows in another order: float64's rounding through the tail.
        assert torch.allclose(found.deletion[0, sample, :, : n + 1], backwards, rtol=0, atol=1e-12)
        assert torch.equal(found.deletion[:, sample, :, n:], found.insertion[:, sample, :, :1].expand(4, 3, 38 - n))
        assert torch.equal(found.insertion[:, sample, :, n:], found.deletion[:, sample, :, :1].expand(4, 3, 38 - n))
    assert torch.equal(found.deletion[..., 0], up.prediction.expand(4, 2, 3))


@dataclass(frozen=True, eq=False)
class CountingTarget(Target):
    """A target that remembers how many embeddings it was asked for at a time."""

    asked: list[int] = field(default_factory=list)

    def __call__(self, embedding: Tensor) -> Tensor:
        self.asked.append(len(embedding))
        return super().__call__(embedding)


@pytest.mark.parametrize("batch_size", [1, 4, 20, None])
def test_nothing_runs_twice_and_batches_are_bounded(batch_size: int | None) -> None:
    model, x, sae, directions = make(PATCHES)
    tower, target = HookedTower(model), CountingTarget(directions, ("a", "b", "c"))
    n_steps = 30
    site = open_site(tower, x, sae)
    given = [attribution_patching(tower, site, sae, target), activation_energy(tower, site, sae, target),
             exact_ablation(tower, site, sae, target), random_attribution(tower, site, sae, target)]  # fmt: skip
    target.asked.clear()
    found = faithfulness(tower, site, sae, target, given, n_steps=n_steps, batch_size=batch_size, progress=False)
    edits = 0
    for sample in range(2):
        orders = {
            tuple(descending(latents_of(result, sample, index))[:n_steps]) for result in given for index in range(3)
        }
        assert len(orders) < 12  # energy is one order for all targets
        edits += sum(len(order) - (len(order) == int(found.n_active[sample])) for order in orders)
    # Each step of each order once in each direction, every sample as it is and emptied once.
    assert sum(target.asked) == 2 * edits + 2 + 2
    assert max(target.asked) <= max(2, batch_size or 10**6)
    assert batch_size is not None or len(target.asked) == 4


def test_a_sample_without_active_latents() -> None:
    model, x, sae, directions = make(CLS, "standard")
    tower, target = HookedTower(model), direction_target(directions)
    with torch.no_grad():
        rows = tower.run_to(x, CLS[2])[:, 0]
        greatest = ((rows - sae.b_dec) @ sae.W_enc + sae.b_enc).max(dim=1).values
        sae.b_enc -= (greatest[0] + greatest[1]) / 2
    silent = int(greatest.argmin())
    patching = attribution_patching(tower, x, sae, target)
    found = faithfulness(tower, x, sae, target, patching, n_steps=3, progress=False)
    assert found.n_active[silent] == found.n_compared[silent] == 0
    assert found.n_active[1 - silent] > 0
    for curves in (found.deletion, found.insertion):
        assert torch.allclose(curves[:, silent], patching.prediction[silent][:, None], rtol=0, atol=1e-12)
    assert found.rank_correlation[:, silent].isnan().all()
    assert found.overlap[:, silent].isnan().all()


# -- all latents, more latents, fewer latents


@pytest.mark.parametrize("site", [CLS, PATCHES], ids=["cls", "patches"])
def test_scores_of_all_latents(site: Any) -> None:
    tower, x, sae, target, directions = parts(site)
    scores = logit_lens_scores(tower, sae, target)
    lens = logit_lens(tower, x, sae, target)
    assert torch.equal(scores.T[lens.latent], lens.value)
    found = faithfulness(tower, x, sae, target, {"all": scores, "active": lens}, n_steps=12, progress=False, k=3)
    explained = each(make(site)[0], x, sae, site[2], site[3], directions)
    for sample, one in enumerate(explained):
        for index in range(3):
            order = descending(dict(enumerate(scores[index].tolist())))[:12]
            active = set(one.active())
            assert len(active & set(order)) < len(order)  # some steps take nothing
            expected = [float(one.without([i for i in order[:step] if i in active])[index]) for step in range(13)]
            assert found.deletion[0, sample, index].tolist() == pytest.approx(expected, abs=1e-10)
            back = insertion_curve(one, order, 12, index)
            assert found.insertion[0, sample, index].tolist() == pytest.approx(back, abs=1e-10)
    # Ranks are compared over the active latents, whatever else has a score.
    assert torch.equal(found.rank_correlation[0], found.rank_correlation[1])
    assert torch.equal(found.overlap[0].isnan(), found.overlap[1].isnan())
    assert torch.equal(found.overlap[0].nan_to_num(9), found.overlap[1].nan_to_num(9))
    assert not torch.equal(found.deletion[0], found.deletion[1])


def test_scores_need_a_name_and_the_right_shape() -> None:
    tower, x, sae, target, _ = parts()
    scores = logit_lens_scores(tower, sae, target)
    with pytest.raises(InputError, match="no name of their own"):
        faithfulness(tower, x, sae, target, [scores], progress=False)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"\[target d_sae\], here \[3, 37\]; got \[37, 3\]"):
        faithfulness(tower, x, sae, target, {"all": scores.T}, progress=False)
    with pytest.raises(InputError, match="all holds NaN"):
        faithfulness(tower, x, sae, target, {"all": scores.index_fill(1, torch.tensor([3]), torch.nan)}, progress=False)


def test_lens_scores_refuse_what_the_lens_cannot_read() -> None:
    model, _, sae, directions = make(("vision", "plain", "hook_pooled", "pooled", 48))
    tower, target = HookedTower(model), direction_target(directions)
    with pytest.raises(InputError, match="hook_pooled gives none"):
        logit_lens_scores(tower, sae, target)
    with pytest.raises(HookNameError):
        logit_lens_scores(tower, sae, target, hook_name="blocks.9.hook_resid_post")


def test_values_for_inactive_latents_take_a_step_that_changes_nothing() -> None:
    tower, x, sae, target, _ = parts()
    plain = attribution_patching(tower, x, sae, target)
    silent = {sample: next(i for i in range(37) if i not in latents_of(plain, sample, 0)) for sample in range(2)}
    first = with_inactive(plain, silent, 99.0)
    found = faithfulness(tower, x, sae, target, {"plain": plain, "more": first}, n_steps=8, progress=False)
    assert torch.equal(found.deletion[1, ..., 0], found.deletion[1, ..., 1])
    assert torch.equal(found.deletion[1, ..., 1:], found.deletion[0, ..., :-1])
    assert torch.equal(found.insertion[1, ..., 1:], found.insertion[0, ..., :-1])
    assert torch.equal(found.rank_correlation[1], found.rank_correlation[0])


def test_exact_ablation_of_a_part_of_the_latents() -> None:
    tower, x, sae, target, directions = parts(PATCHES)
    patching, exact = attribution_patching(tower, x, sae, target), exact_ablation(tower, x, sae, target)
    keep = torch.rand(len(exact), generator=torch.Generator().manual_seed(2)) < 0.5
    part = some_pairs(exact, keep)
    found = faithfulness(tower, x, sae, target, [patching, part], n_steps=37, progress=False, k=4)
    assert found.methods == ("attribution_patching", "exact_ablation", "random")
    assert found.n_compared.tolist() == [int((part.sample == s).sum()) for s in range(2)]
    assert (found.n_compared < found.n_active).all()
    assert int(found.to_frame()["n_compared"][0]) == len(part)
    for sample in range(2):
        for index in range(3):
            reference = latents_of(part, sample, index)
            own = latents_of(patching, sample, index)
            own = {latent: own[latent] for latent in reference}
            expected = spearman(list(own.values()), list(reference.values()))
            assert float(found.rank_correlation[0, sample, index]) == pytest.approx(expected, abs=1e-9)
            assert float(found.overlap[0, sample, index]) == overlap(own, reference, 4)
    assert (found.rank_correlation[1] == 1).all()
    assert (found.overlap[1] == 1).all()
    explained = each(make(PATCHES)[0], x, sae, PATCHES[2], PATCHES[3], directions)
    for sample, n in enumerate(found.n_compared.tolist()):
        order = descending(latents_of(part, sample, 1))
        expected = [float(explained[sample].without(order[:step])[1]) for step in range(n + 1)]
        assert found.deletion[1, sample, 1, : n + 1].tolist() == pytest.approx(expected, abs=1e-10)
        assert (found.deletion[1, sample, 1, n:] == found.deletion[1, sample, 1, n]).all()


@pytest.mark.parametrize("fault", ["a part of another method", "another SAE's ablation", "not sorted", "NaN", "twice"])
def test_results_with_the_wrong_latents(fault: str) -> None:
    tower, x, sae, target, _ = parts()
    patching, exact = attribution_patching(tower, x, sae, target), exact_ablation(tower, x, sae, target)
    other = build_sae("topk", 48, CLS[2], "cls", seed=4)
    given, message = {
        "a part of another method": (some_pairs(patching, torch.arange(5)), "no value for 7 of the 12 active latents"),
        "another SAE's ablation": (exact_ablation(tower, x, other, target), "another SAE"),
        "not sorted": (some_pairs(patching, torch.arange(12).flip(0)), "sorted by sample"),
        "NaN": (replace(patching, value=patching.value * torch.nan), "attribution_patching holds NaN"),
        "twice": ({"a": exact, "b": exact}, "a and b are both of the method 'exact_ablation'"),
    }[fault]
    with pytest.raises(InputError, match=message):
        faithfulness(tower, x, sae, target, given, n_steps=2, progress=False)  # type: ignore[arg-type]


def test_exact_ablation_and_random_are_known_by_their_method() -> None:
    tower, x, sae, target, _ = parts()
    exact = exact_ablation(tower, x, sae, target)
    chance = random_attribution(tower, x, sae, target)
    found = faithfulness(tower, x, sae, target, {"truth": exact, "chance": chance}, n_steps=2, progress=False)
    assert found.methods == ("truth", "chance")
    assert (found.rank_correlation[0] == 1).all()
    with pytest.raises(InputError, match="the name 'exact_ablation' is that of the method"):
        faithfulness(tower, x, sae, target, {"exact_ablation": chance}, n_steps=2, progress=False)


# -- ranks and overlaps


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=0, max_size=9), st.integers(1, 10))
def test_columns_against_loops(rows: list[list[int]], k: int) -> None:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    a, b = table[:, :2], table[:, 2:]
    for column in range(2):
        first, second = a[:, column].tolist(), b[:, column].tolist()
        found = float(spearman_columns(a, b)[column])
        expected = spearman(first, second) if rows else math.nan
        assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
        expected = overlap(dict(enumerate(first)), dict(enumerate(second)), k)
        assert float(top_overlap(a, b, k)[column]) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert ranks([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]


@pytest.mark.parametrize("k", [2, 6, 12])
def test_overlap_of_the_top(k: int) -> None:
    tower, x, sae, target, _ = parts(PATCHES)
    given = [attribution_patching(tower, x, sae, target), activation_energy(tower, x, sae, target)]
    found = faithfulness(tower, x, sae, target, given, n_steps=1, k=k, progress=False)
    exact = exact_ablation(tower, x, sae, target)
    for row, result in enumerate(given):
        for sample in range(2):
            for index in range(3):
                expected = overlap(latents_of(result, sample, index), latents_of(exact, sample, index), k)
                assert float(found.overlap[row, sample, index]) == pytest.approx(expected, nan_ok=True)
    assert found.k == k
    assert (found.overlap[1] < 1).any()


def test_a_method_without_a_sign_is_held_against_magnitudes() -> None:
    tower, x, sae, target, _ = parts(PATCHES)
    exact = exact_ablation(tower, x, sae, target)
    size = replace(exact, method="size", value=exact.value.abs(), settings={"signed": False})
    plain = replace(size, method="plain", settings={"signed": True})
    found = faithfulness(tower, x, sae, target, [size, plain], n_steps=2, k=4, progress=False)
    assert (found.rank_correlation[0] == 1).all()
    assert (found.overlap[0] == 1).all()
    assert (found.rank_correlation[1] < 0.9).all()
    assert torch.equal(found.deletion[0], found.deletion[1])
    assert found.unsigned == ("size",)
    assert found.to_frame()["signed"].tolist() == [False, True, True, True]
    with pytest.raises(InputError, match=r"differ in unsigned \('size',\) and \(\)"):
        found.merge(replace(found, unsigned=()))


# -- intervals


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=3, max_size=3), min_size=1, max_size=7),
    st.integers(0, 5), st.sampled_from([0.5, 0.9, 0.95]),
)  # fmt: skip
def test_intervals_against_a_loop(values: list[list[float]], seed: int, confidence: float) -> None:
    table = torch.tensor([values, [[2 * v + 1 for v in row] for row in values]], dtype=torch.float64)
    found = bootstrap_intervals(table, n_bootstrap=25, seed=seed, confidence=confidence)
    expected = bootstrap(values, 25, seed, confidence) if len(values) > 1 else (math.nan, math.nan)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    # All rows see the same draws.
    assert found[1].tolist() == pytest.approx([2 * end + 1 for end in expected], abs=1e-12, nan_ok=True)


def comparison(batch: int = 5, **settings: Any) -> Faithfulness:
    tower, x, sae, target, _ = parts(PATCHES, batch)
    given = [attribution_patching(tower, x, sae, target), logit_lens(tower, x, sae, target)]
    return faithfulness(tower, x, sae, target, given, n_steps=6, k=4, n_bootstrap=60, progress=False, **settings)


def test_means_intervals_and_the_frame() -> None:
    found = comparison(seed=3, confidence=0.8)
    frame = found.to_frame()
    for measure in MEASURES:
        values = getattr(found, measure)
        assert values.shape == (4, 5, 3)
        for row in range(4):
            low, high = bootstrap(values[row].tolist(), 60, 3, 0.8)
            assert frame[f"{measure}_low"][row] == pytest.approx(low, abs=1e-12)
            assert frame[f"{measure}_high"][row] == pytest.approx(high, abs=1e-12)
            assert found.interval(measure)[row].tolist() == [
                frame[f"{measure}_low"][row],
                frame[f"{measure}_high"][row],
            ]
            assert frame[measure][row] == float(found.mean(measure)[row]) == pytest.approx(float(values[row].mean()))
            assert row == 2 or low < frame[measure][row] < high
    assert frame["prediction_emptied"].tolist() == pytest.approx([float(found.insertion[0, ..., 0].mean())] * 4)


def test_differences_are_paired() -> None:
    found = comparison(seed=3)
    gap = found.difference("attribution_patching", "logit_lens", "deletion_area")
    values = found.deletion_area[0] - found.deletion_area[1]
    assert gap.value == pytest.approx(float(values.mean()))
    assert (gap.low, gap.high) == pytest.approx(bootstrap(values.tolist(), 60, 3, 0.95), abs=1e-12)
    holes = found.rank_correlation.clone()
    holes[0, 1, 2] = holes[1, 3] = torch.nan
    gap = replace(found, rank_correlation=holes).difference("attribution_patching", "logit_lens")
    values = holes[0] - holes[1]
    assert gap.value == pytest.approx(float(values.nanmean()))
    assert (gap.low, gap.high) == pytest.approx(bootstrap(values.tolist(), 60, 3, 0.95), abs=1e-12)
    with pytest.raises(InputError, match=r"no method 'logit_len'.*did you mean 'logit_lens'"):
        found.difference("logit_len", "random")
    with pytest.raises(InputError, match=r"no measure 'overlaps'.*did you mean 'overlap'"):
        found.mean("overlaps")  # type: ignore[arg-type]


def test_one_sample_has_no_interval() -> None:
    found = comparison(1)
    for measure in MEASURES:
        assert found.interval(measure).isnan().all()
        assert found.mean(measure).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": True}, "k must be an integer"),
        ({"n_steps": 2.0}, "n_steps must be an integer"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"n_bootstrap": 0}, "n_bootstrap"),
        ({"confidence": 1.0}, "confidence lies between 0 and 1"),
    ],
)
def test_wrong_numbers(settings: dict[str, Any], message: str) -> None:
    tower, x, sae, target, _ = parts()
    with pytest.raises(InputError, match=message):
        faithfulness(tower, x, sae, target, activation_energy(tower, x, sae, target), progress=False, **settings)


# -- shards, and the disk


def shards(sizes: list[int]) -> list[Faithfulness]:
    tower, x, sae, target, _ = parts(PATCHES, sum(sizes))
    out = []
    for part in x.split(sizes):
        given = [attribution_patching(tower, part, sae, target), logit_lens(tower, part, sae, target)]
        out.append(faithfulness(tower, part, sae, target, given, n_steps=6, k=4, n_bootstrap=60, progress=False))
    return out


@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 1, 2], [1, 1, 1, 1, 1]])
def test_merged_shards_are_one_comparison(sizes: list[int]) -> None:
    whole, several = comparison(), shards(sizes)
    merged = several[0]
    for part in several[1:]:
        merged = merged.merge(part)
    right = several[-1]  # the other way of setting brackets
    for part in reversed(several[:-1]):
        right = part.merge(right)
    for name in ("deletion", "insertion", "rank_correlation", "overlap", "n_active", "n_compared"):
        found, expected = getattr(merged, name), getattr(whole, name)
        assert torch.equal(found, getattr(right, name)), name
        if name.startswith("n_"):
            assert torch.equal(found, expected), name
        else:
            assert torch.allclose(found, expected, rtol=0, atol=1e-12, equal_nan=True), name
    assert torch.allclose(merged.interval("overlap"), whole.interval("overlap"), atol=1e-12)
    assert merged.n_sample == 5
    assert merged.provenance["data_fingerprint"].count("+") == len(sizes) - 1
    assert merged.provenance == right.provenance


def test_comparisons_that_are_no_shards() -> None:
    found, other = shards([1, 1])
    for name, value in {"methods": ("a", "b", "c", "d"), "labels": ("x", "y", "z"), "k": 5, "error_term": "dropped",
                        "confidence": 0.5, "unit": "inner product"}.items():  # fmt: skip
        with pytest.raises(InputError, match=f"do not belong together: they differ in {name}"):
            found.merge(replace(other, **{name: value}))
    with pytest.raises(InputError, match=r"differ in steps \(0, 1, 2, 3, 4, 5, 6\) and \(0, 1, 2, 3, 4, 5\)"):
        found.merge(replace(other, deletion=other.deletion[..., :-1], steps=other.steps[:-1]))
    for name in ("model", "sae_sha256", "target_fingerprint"):
        with pytest.raises(InputError, match=name):
            found.merge(replace(other, provenance={**other.provenance, name: "other"}))


def test_save_and_load(tmp_path: Path) -> None:
    found = comparison(2)
    found.save(tmp_path / "f.safetensors")
    again = Faithfulness.load(tmp_path / "f.safetensors")
    for one in fields(Faithfulness):
        before, after = getattr(found, one.name), getattr(again, one.name)
        if isinstance(before, Tensor):
            assert torch.equal(before, after), one.name
        else:
            assert (before, type(before)) == (after, type(after)), one.name
    assert repr(again) == repr(found)
    assert "4 methods, 2 samples, 3 targets, 6 steps" in repr(found)
    with pytest.raises(LoadError, match=r"no file of Attribution\.save"):
        Attribution.load(tmp_path / "f.safetensors")
    with pytest.raises(LoadError, match=r"no file of Faithfulness\.save"):
        Faithfulness.load(tmp_path / "g.safetensors")
