"""Integrated gradients: an integral by another rule, completeness, and baselines of any kind."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from oracles.attribution import each
from oracles.saes import KINDS
from oracles.sites import IDS, SITES, make
from torch import Tensor

from clip_lens_ext.attribution import (
    Attribution,
    attribution_patching,
    direction_target,
    exact_ablation,
    integrated_gradients,
    open_site,
)
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

MIDDLE = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
LAST_CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
POOLED = ("vision", "plain", "hook_pooled", "pooled", 48)


def some_baseline(*sizes: int) -> Tensor:
    """Latents, two thirds of them zero."""
    generator = torch.Generator().manual_seed(2)
    value = torch.rand(*sizes, 37, generator=generator, dtype=torch.float64)
    return value * (torch.rand(*sizes, 37, generator=generator) < 0.33)


def through_the_sae(
    tower: HookedTower, x: Tensor, sae: Any, target: Any, baseline: Any, *, n_steps: int, kept: bool
) -> Tensor:
    """The textbook way at the same nodes: the whole model with the SAE spliced in, a hook that moves its latents."""
    node, weight = np.polynomial.legendre.leggauss(n_steps)
    with torch.no_grad(), tower.saes(sae, use_error_term=kept):
        hook = f"{next(iter(tower.acts_to_saes))}.hook_sae_acts_post"
        caught: list[Tensor] = []
        tower.run_with_hooks(x, fwd_hooks=[(hook, lambda value, hook: caught.append(value))])
    whole = caught[0] - baseline
    total = torch.zeros(len(target), *whole.shape, dtype=torch.float64)
    for at, share in zip((node + 1) / 2, weight / 2, strict=True):
        latents = (baseline + at * whole).detach().requires_grad_()
        with tower.saes(sae, use_error_term=kept):
            y = target(tower.run_with_hooks(x, fwd_hooks=[(hook, lambda value, hook, latents=latents: latents)]))
        for index in range(len(target)):
            total[index] += share * torch.autograd.grad(y[:, index].sum(), latents, retain_graph=True)[0]
    found = (whole * total).transpose(0, 1)
    return found if found.dim() == 4 else found[:, :, None]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_against_autograd_through_the_spliced_sae(site: Any, kept: bool) -> None:
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    error_term = "kept" if kept else "dropped"
    for baseline in (torch.zeros(37, dtype=torch.float64), some_baseline()):
        expected = through_the_sae(tower, x, sae, target, baseline, n_steps=3, kept=kept)
        settings = {"n_steps": 3, "error_term": error_term, "baseline": baseline if baseline.any() else None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # three steps are few
            tokens = integrated_gradients(tower, x, sae, target, per_token=True, **settings)
            total = integrated_gradients(tower, x, sae, target, **settings)
        # The same nodes, so the same number but for the order of sums.
        bound = 1e-11 * float(expected.abs().max())
        assert torch.allclose(tokens.dense(), expected, rtol=0, atol=bound)
        assert torch.allclose(total.dense(), expected.sum(dim=2), rtol=0, atol=bound)
        assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_sae(kind: str) -> None:
    """A decoder that is scaled by the SAE's input keeps, along the path, the scale of the actual input."""
    model, x, sae, directions = make(MIDDLE, kind)
    tower, target = HookedTower(model), direction_target(directions)
    baseline = some_baseline()
    expected = through_the_sae(tower, x, sae, target, baseline, n_steps=4, kept=True)
    found = integrated_gradients(tower, x, sae, target, n_steps=4, baseline=baseline, per_token=True)
    assert torch.allclose(found.dense(), expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
    assert float(found.completeness_gap.abs().max()) < 1e-3 * float(expected.abs().sum())


@pytest.mark.parametrize("index", [4, 14, 18])
def test_against_the_oracle(index: int) -> None:
    site = SITES[index]
    model, x, sae, directions = make(site)
    found = integrated_gradients(HookedTower(model), x, sae, direction_target(directions), n_steps=16)
    explained = each(model, x, sae, site[2], site[3], directions)[1]
    baseline = torch.zeros_like(explained.latents)
    for latent in explained.active()[1:2]:
        # Bode's rule on six parts: an error of the seventh derivative, some 1e-8 of the prediction here.
        assert torch.allclose(found.dense()[1, :, latent], explained.integrated(latent, baseline), rtol=0, atol=1e-6)


@pytest.mark.parametrize("baseline", ["zero", "vector", "dense"])
@pytest.mark.parametrize("site", [MIDDLE, LAST_CLS, SITES[14], SITES[20]], ids=["patches", "cls", "eot", "write"])
def test_completeness(site: Any, baseline: str) -> None:
    """The sum is the change of the prediction: the gap falls to rounding with the number of nodes, and says so."""
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    n_token = open_site(tower, x, sae).codes.n_token
    start = {"zero": None, "vector": some_baseline(), "dense": some_baseline(2, n_token)}[baseline]
    gaps = []
    for n_steps in (1, 4, 16, 64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = integrated_gradients(tower, x, sae, target, n_steps=n_steps, baseline=start, error_term="dropped")
        gaps.append(float(found.completeness_gap.abs().max()))
    assert gaps[0] > 1e-4
    assert gaps[1] < gaps[0]
    assert gaps[3] < 1e-6
    latents = sae.encode(open_site(tower, x, sae).base)
    change = found.prediction - _predicted(tower, x, sae, target, torch.zeros_like(latents) if start is None else start)
    assert torch.allclose(found.dense().sum(dim=-1) - change, found.completeness_gap, rtol=0, atol=1e-12)


def _predicted(tower: HookedTower, x: Tensor, sae: Any, target: Any, latents: Tensor) -> Tensor:
    """The prediction with the SAE's latents set, through the whole model."""

    def put(value: Tensor, hook: Any) -> Tensor:
        return latents.expand_as(value) if latents.dim() < 3 else latents.reshape(value.shape)

    with torch.no_grad(), tower.saes(sae, use_error_term=False):
        hook = f"{next(iter(tower.acts_to_saes))}.hook_sae_acts_post"
        return target(tower.run_with_hooks(x, fwd_hooks=[(hook, put)]))


def test_the_pairs_are_the_union_of_active_and_baseline() -> None:
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    start = torch.zeros(37, dtype=torch.float64)
    start[[3, 30]] = 0.5
    plain = integrated_gradients(tower, x, sae, target)
    found = integrated_gradients(tower, x, sae, target, baseline=start)
    for sample in range(2):
        active = set(plain.latent[plain.sample == sample].tolist())
        assert set(found.latent[found.sample == sample].tolist()) == active | {3, 30}
    dense = sae.encode(tower.run_to(x, MIDDLE[2])[:, 1:]).sum(dim=1)
    assert torch.allclose(found.activation, dense[found.sample, found.latent], atol=1e-12)
    assert found.settings["baseline"].startswith("latents [37] ")
    assert plain.settings == {"n_steps": 16, "nodes": "Gauss-Legendre", "baseline": "zero"}


def test_the_baseline_itself_is_the_input() -> None:
    """Nothing differs from the baseline: every attribution and the gap are zero."""
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    latents = open_site(tower, x, sae).codes.dense()
    found = integrated_gradients(tower, x, sae, target, baseline=latents)
    assert float(found.value.abs().max()) == 0
    assert float(found.completeness_gap.abs().max()) < 1e-14


@pytest.mark.parametrize("kept", ["kept", "dropped"])
def test_where_the_tail_is_linear_all_methods_are_one(kept: Any) -> None:
    model, x, sae, directions = make(POOLED)
    tower, target = HookedTower(model), direction_target(directions, cosine=False)
    exact = exact_ablation(tower, x, sae, target, error_term=kept).value
    for n_steps in (1, 7):
        found = integrated_gradients(tower, x, sae, target, error_term=kept, n_steps=n_steps)
        assert torch.allclose(found.value, exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
        assert float(found.completeness_gap.abs().max()) < 1e-12


def test_one_step_is_not_patching() -> None:
    """Patching is the gradient at the end of the path, one node the gradient in its middle."""
    model, x, sae, directions = make(LAST_CLS)
    tower, target = HookedTower(model), direction_target(directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = integrated_gradients(tower, x, sae, target, n_steps=1).value
    patching = attribution_patching(tower, x, sae, target).value
    assert float((one - patching).abs().max()) > 1e-3 * float(patching.abs().max())


def test_a_gap_that_is_large_is_said_once() -> None:
    model, x, sae, directions = make(LAST_CLS)
    tower, target = HookedTower(model), direction_target(directions)
    with pytest.warns(UserWarning, match=r"1 steps leave up to \d+% .* take more steps") as said:
        integrated_gradients(tower, x, sae, target, n_steps=1, error_term="dropped")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integrated_gradients(tower, x, sae, target, n_steps=64, error_term="dropped")


def test_bfloat16() -> None:
    """The weights of the nodes are not rounded to eight bits: in a linear tail the mean of equal gradients is one."""
    model, x, sae, directions = make(
        ("vision", "plain", "hook_embedding", "pooled", 20), "standard", dtype=torch.float32
    )
    tower, target = HookedTower(model.to(torch.bfloat16)), direction_target(directions, cosine=False)
    patching = attribution_patching(tower, x.bfloat16(), sae, target).value
    for n_steps in (1, 16, 33):
        found = integrated_gradients(tower, x.bfloat16(), sae, target, n_steps=n_steps).value
        # The gradient is the target's vector in bfloat16, whatever the point; what remains is float32's rounding.
        assert torch.allclose(found, patching, rtol=0, atol=1e-5 * float(patching.abs().max()))


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, x, sae, directions = make(MIDDLE)
    found = integrated_gradients(HookedTower(model), x, sae, direction_target(directions), baseline=some_baseline())
    found.save(tmp_path / "ig.safetensors")
    again = Attribution.load(tmp_path / "ig.safetensors")
    assert torch.equal(again.completeness_gap, found.completeness_gap)
    assert again.settings == found.settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"baseline": torch.zeros(36)}, r"\[37\] for every token, or \[2, 12, 37\], got \[36\]"),
        ({"baseline": torch.zeros(2, 13, 37)}, r"got \[2, 13, 37\]"),
        ({"baseline": [0.0] * 37}, "got list"),
        ({"baseline": torch.full((37,), torch.nan)}, "finite"),
        ({"baseline": torch.zeros(37, dtype=torch.int64)}, "finite floating-point"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"memory_limit": 0}, "memory_limit is a number of bytes"),
    ],
)
def test_what_does_not_fit(settings: Any, message: str) -> None:
    model, x, sae, directions = make(MIDDLE)
    with pytest.raises(InputError, match=message):
        integrated_gradients(HookedTower(model), x, sae, direction_target(directions), **settings)
