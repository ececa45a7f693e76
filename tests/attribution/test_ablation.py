"""Exact ablation is the difference of two runs of the whole model, for every active latent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.attribution import each
from oracles.saes import KINDS, build_sae
from oracles.sites import IDS, SITES, Site, make
from oracles.zoo import BY_NAME, model_of
from torch import Tensor

from clip_lens_ext.attribution import (
    attribution_patching,
    direction_target,
    exact_ablation,
    open_site,
)
from clip_lens_ext.attribution.bound import tail_batch, tail_numbers
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

MIDDLE = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)


def by_hooks(tower: HookedTower, x: Tensor, sae: Any, target: Any, latent: int, *, kept: bool) -> Tensor:
    """The difference with the SAE spliced in and the latent zeroed by a hook, the model run from its input."""

    def zero(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[..., latent] = 0
        return value

    with torch.no_grad(), tower.saes(sae, use_error_term=kept):
        hook = f"{next(iter(tower.acts_to_saes))}.hook_sae_acts_post"
        return target(tower(x)) - target(tower.run_with_hooks(x, fwd_hooks=[(hook, zero)]))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_against_runs_with_a_hook(site: Site, kept: bool) -> None:
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    found = exact_ablation(tower, x, sae, target, error_term="kept" if kept else "dropped")
    dense = found.dense()
    for latent in found.latent.unique().tolist():
        expected = by_hooks(tower, x, sae, target, latent, kept=kept)
        # Differences of cosines: float64's rounding of numbers of size one, through the whole model.
        assert torch.allclose(dense[:, :, latent], expected, rtol=0, atol=1e-12)
    assert found.value.abs().max() > 1e-4
    assert found.prediction.shape == (2, 3)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class(kind: str, kept: bool) -> None:
    model, x, sae, directions = make(MIDDLE, kind)
    tower, target = HookedTower(model), direction_target(directions)
    found = exact_ablation(tower, x, sae, target, error_term="kept" if kept else "dropped")
    for latent in found.latent.unique().tolist()[::6]:
        expected = by_hooks(tower, x, sae, target, latent, kept=kept)
        assert torch.allclose(found.dense()[:, :, latent], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("index", [2, 4, 14])
def test_against_the_oracle(index: int, kept: bool, cosine: bool) -> None:
    site = SITES[index]
    model, x, sae, directions = make(site)
    target = direction_target(directions, cosine=cosine)
    found = exact_ablation(HookedTower(model), x, sae, target, error_term="kept" if kept else "dropped")
    for sample, explained in enumerate(each(model, x, sae, site[2], site[3], directions, cosine=cosine, kept=kept)):
        for latent in explained.active()[:3]:
            assert torch.allclose(found.dense()[sample, :, latent], explained.ablation(latent), rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    model, x, sae, directions = make(MIDDLE, batch=3)
    tower, target = HookedTower(model), direction_target(directions)
    expected = exact_ablation(tower, x, sae, target)
    rows: list[int] = []
    handle = model.ln_post.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = exact_ablation(tower, x, sae, target, batch_size=batch_size)
    handle.remove()
    # Other batches sum in another order: float64's rounding.
    assert torch.allclose(found.value, expected.value, rtol=0, atol=1e-13)
    assert max(rows[1:]) <= batch_size, "batch_size bounds the tail's batch; the first run is the prediction"
    assert sum(rows[1:]) == len(found)


def picks(result: Any) -> list[tuple[int, int]]:
    return list(zip(result.sample.tolist(), result.latent.tolist(), strict=True))


@pytest.mark.parametrize("site", [MIDDLE, SITES[7], SITES[20]], ids=["patches", "cls", "write"])
def test_some_latents_alone(site: Site) -> None:
    model, x, sae, directions = make(site, batch=3)
    tower, target = HookedTower(model), direction_target(directions)
    whole = exact_ablation(tower, x, sae, target)
    wanted = whole.latent.unique()[[5, 0, 3]]
    for latents in (wanted, wanted.tolist(), [*wanted.tolist(), int(wanted[0])]):
        found = exact_ablation(tower, x, sae, target, latents=latents, batch_size=2)
        kept = torch.isin(whole.latent, wanted)
        assert picks(found) == [pair for pair, keep in zip(picks(whole), kept.tolist(), strict=True) if keep]
        assert torch.allclose(found.value, whole.value[kept], rtol=0, atol=1e-13)
        assert torch.equal(found.activation, whole.activation[kept])
        assert torch.equal(found.prediction, whole.prediction)
    assert whole.settings is None
    assert found.settings == {"latents": "some of the active ones", "top_k": None}


def test_the_greatest_of_another_method() -> None:
    model, x, sae, directions = make(MIDDLE, batch=3)
    tower, target = HookedTower(model), direction_target(directions)
    site = open_site(tower, x, sae)
    patching, whole = attribution_patching(tower, site, sae, target), exact_ablation(tower, site, sae, target)
    found = exact_ablation(tower, site, sae, target, latents=patching, top_k=4)
    best = patching.top(4).latents
    expected = sorted({(s, int(latent)) for s in range(3) for latent in best[s].flatten()})
    assert picks(found) == expected
    assert 12 < len(expected) < len(whole), "the targets' lists differ, and no sample is measured whole"
    values = dict(zip(picks(whole), whole.value, strict=True))
    for pair, value in zip(picks(found), found.value, strict=True):
        assert torch.allclose(value, values[pair], rtol=0, atol=1e-13)
    again = exact_ablation(tower, site, sae, target, latents=found)
    assert picks(again) == expected
    few = exact_ablation(tower, site, sae, target, latents=patching, top_k=10_000)
    assert picks(few) == picks(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": []}, "whole numbers, at least one"),
        ({"latents": [0.5]}, "whole numbers"),
        ({"latents": [True, False]}, "whole numbers"),
        ({"latents": [3, 37]}, r"the latents 0\.\.36, got \[3, 37\]"),
        ({"latents": [-1]}, "got \\[-1\\]"),
        ({"latents": [1], "top_k": 3}, "top_k ranks by an Attribution"),
        ({"top_k": 3}, "top_k ranks by an Attribution"),
        ({"memory_limit": -5}, "memory_limit is a number of bytes"),
    ],
)
def test_latents_that_are_none(settings: Any, message: str) -> None:
    model, x, sae, directions = make(MIDDLE)
    with pytest.raises(InputError, match=message):
        exact_ablation(HookedTower(model), x, sae, direction_target(directions), **settings)


def test_latents_of_another_input_and_latents_that_are_off() -> None:
    model, x, sae, directions = make(SITES[7])
    tower, target = HookedTower(model), direction_target(directions)
    other = attribution_patching(tower, x + 1, sae, target)
    with pytest.raises(InputError, match="an Attribution of another input"):
        exact_ablation(tower, x, sae, target, latents=other, top_k=3)
    off = sorted(set(range(37)) - set(exact_ablation(tower, x, sae, target).latent.tolist()))
    with pytest.raises(InputError, match="none of these latents is active"):
        exact_ablation(tower, x, sae, target, latents=off)


@pytest.mark.parametrize("memory_limit", [1, 500_000, 10_000_000])
def test_memory_bounds_the_batch(memory_limit: int) -> None:
    model, x, sae, directions = make(MIDDLE, batch=3)
    tower, target = HookedTower(model), direction_target(directions)
    site = open_site(tower, x, sae)
    expected = exact_ablation(tower, site, sae, target, batch_size=7)
    rows: list[int] = []
    handle = model.ln_post.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = exact_ablation(tower, site, sae, target, memory_limit=memory_limit)
    handle.remove()
    assert torch.allclose(found.value, expected.value, rtol=0, atol=1e-13)
    bound = tail_batch(site, len(target), gradient=False, memory_limit=memory_limit)
    assert max(rows[1:]) <= bound
    assert (bound == 1) == (memory_limit == 1)


@pytest.mark.parametrize("index", [1, 2, 4, 6, 7, 13, 15, 19, 22])
def test_the_estimate_is_above_what_the_tail_keeps(index: int) -> None:
    """What autograd keeps for the backward pass of one copy, counted, is below the estimate and not far below."""
    model, x, sae, directions = make(SITES[index], dtype=torch.float64)
    tower = HookedTower(model)
    site = open_site(tower, x, sae)
    found, estimate = kept_by_autograd(site, direction_target(directions)), tail_numbers(site, gradient=True)
    assert 0.9 * found < estimate < 12 * found + 2000


@pytest.mark.parametrize("name", ["resnet", "swin", "mt5", "hf-siglip-vision", "coca-vision"])
def test_the_estimate_holds_for_other_families(name: str) -> None:
    case, tower = BY_NAME[name], HookedTower(model_of(name))
    for hook in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"):
        sae = build_sae("topk", tower.hook_width(hook), hook, "all")
        site = open_site(tower, case.inputs(2, dtype=torch.float64), sae)
        target = direction_target(torch.ones(1, tower.cfg.d_embed, dtype=torch.float64))
        found, estimate = kept_by_autograd(site, target), tail_numbers(site, gradient=True)
        assert 0.9 * found < estimate < 60 * found + 6 * site.base[0].numel() + 32 * 3 * 64 * 64
        assert tail_numbers(site, gradient=False) <= estimate


def kept_by_autograd(site: Any, target: Any) -> float:
    """Numbers that autograd keeps for the backward pass of the tail, a copy; the weights are not among them."""
    kept: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    rows = site.base.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        target(site.tail(rows, torch.arange(2)))
    modules = (site.tower.native, site.sae)
    weights = {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in [*module.parameters(), *module.buffers()]
    }
    return sum(size for place, size in kept.items() if place not in weights) / 2 / 8


def test_batch_size_of_nothing() -> None:
    model, x, sae, directions = make(MIDDLE)
    with pytest.raises(InputError, match="at least 1, got 0"):
        exact_ablation(HookedTower(model), x, sae, direction_target(directions), batch_size=0)


def test_prefix_runs_once() -> None:
    model, x, sae, directions = make(MIDDLE)
    tower = HookedTower(model)
    site = open_site(tower, x, sae)
    calls = []
    model.transformer.resblocks[0].register_forward_hook(lambda *args: calls.append(1))
    exact_ablation(tower, site, sae, direction_target(directions), batch_size=3)
    assert calls == []


def test_small_latents_agree_with_patching() -> None:
    """To first order: halving every decoder row halves the relative difference."""
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    gaps = []
    for _ in range(3):
        patching, exact = attribution_patching(tower, x, sae, target).value, exact_ablation(tower, x, sae, target).value
        gaps.append(float((patching - exact).abs().max() / exact.abs().max()))
        with torch.no_grad():
            sae.W_dec *= 0.01
    assert gaps[0] > 1e-3
    assert gaps[1] < 0.05 * gaps[0]
    assert gaps[2] < 0.05 * gaps[1]


def test_a_latent_that_is_on_at_several_tokens_is_removed_at_all() -> None:
    model, x, _, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    sae = build_sae("standard", 48, MIDDLE[2], "all", d_sae=5)
    found = exact_ablation(tower, x, sae, target)
    assert len(found) <= 10 < len(open_site(tower, x, sae).codes), "pairs, not entries"
    for latent in range(5):
        assert torch.allclose(
            found.dense()[:, :, latent], by_hooks(tower, x, sae, target, latent, kept=True), atol=1e-12
        )


def test_no_graph() -> None:
    model, x, sae, directions = make(MIDDLE)
    found = exact_ablation(HookedTower(model), x, sae, direction_target(directions))
    assert not found.value.requires_grad
    assert torch.is_grad_enabled()
