"""What holds for every method alike: one signature, batches, permutations, signs, and nothing left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracles.saes import build_sae
from oracles.sites import SITES, make

from clip_lens_ext.attribution import (
    Attribution,
    activation_energy,
    attribution_patching,
    direction_target,
    exact_ablation,
    frozen_layer_norm,
    gradient_dropping,
    integrated_gradients,
    logit_lens,
    open_site,
    random_attribution,
)
from clip_lens_ext.towers import HookedTower

Method = Callable[..., Attribution]
SIGNED: dict[str, Method] = {
    "attribution_patching": attribution_patching,
    "integrated_gradients": partial(integrated_gradients, n_steps=24),
    "frozen_layer_norm": frozen_layer_norm,
    "exact_ablation": exact_ablation,
}
OTHERS: dict[str, Method] = {
    "gradient_dropping": gradient_dropping,
    "logit_lens_frozen_norm": partial(logit_lens, variant="frozen_norm"),
    "activation_x_logit_lens_frozen_norm": partial(logit_lens, variant="frozen_norm", times_activation=True),
    "logit_lens_embedding": partial(logit_lens, variant="embedding"),
    "logit_lens": logit_lens,
    "activation_energy": activation_energy,
}
DETERMINED = SIGNED | OTHERS
EVERY = {**DETERMINED, "random": random_attribution}
PLACES = [SITES[i] for i in (2, 5, 14, 20)]
PLACE_IDS = ["cls", "all", "eot", "write"]


def named(methods: dict[str, Method]) -> Any:
    return pytest.mark.parametrize("method", methods.values(), ids=methods)


def places() -> Any:
    return pytest.mark.parametrize("site", PLACES, ids=PLACE_IDS)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # Other batches and orders sum in another order: float64's rounding of numbers of size one.
    return bool(torch.allclose(found, expected, rtol=0, atol=1e-11))


@places()
@named(DETERMINED)
def test_a_batch_is_one_by_one(method: Method, site: Any) -> None:
    model, x, sae, directions = make(site, batch=3)
    tower, target = HookedTower(model), direction_target(directions)
    whole = method(tower, x, sae, target)
    for i in range(3):
        assert close(method(tower, x[i : i + 1], sae, target).dense()[0], whole.dense()[i])
    for j in range(3):
        assert close(method(tower, x, sae, target.select([j])).dense()[:, 0], whole.dense()[:, j])
    assert whole.value.abs().max() > 1e-4


@named(DETERMINED)
def test_permuting_latents_permutes_the_result(method: Method) -> None:
    model, x, sae, directions = make(SITES[5])
    tower, target = HookedTower(model), direction_target(directions)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    other, state = build_sae("topk", 48, SITES[5][2], SITES[5][3]), dict(sae.state_dict())
    other.load_state_dict(
        {**state, "W_dec": state["W_dec"][order], "W_enc": state["W_enc"][:, order], "b_enc": state["b_enc"][order]}
    )
    assert close(method(tower, x, other, target).dense(), method(tower, x, sae, target).dense()[..., order])


@named(EVERY)
def test_a_site_in_place_of_the_input(method: Method) -> None:
    model, x, sae, directions = make(SITES[20])
    tower, target = HookedTower(model), direction_target(directions)
    for error_term in ("kept", "dropped"):
        site = open_site(tower, x, sae, error_term=error_term)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, direct = method(tower, site, sae, target), method(tower, x, sae, target, error_term=error_term)
        assert torch.equal(found.value, direct.value)
        assert found.error_term == error_term
        assert found.provenance == direct.provenance


@places()
@named(EVERY)
def test_the_result_is_whole(method: Method, site: Any, tmp_path: Any) -> None:
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions, labels=["a", "b", "c"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = method(tower, x, sae, target)
    assert found.method == next(name for name, one in EVERY.items() if one is method)
    assert (found.labels, found.unit, found.hook_name) == (("a", "b", "c"), "cosine", site[2])
    patching = attribution_patching(tower, x, sae, target)
    assert torch.equal(found.sample, patching.sample)
    assert torch.equal(found.latent, patching.latent)
    assert torch.equal(found.activation, patching.activation)
    assert torch.allclose(found.prediction, patching.prediction, rtol=0, atol=1e-13)
    assert not found.value.requires_grad
    assert torch.isfinite(found.value).all()
    found.save(tmp_path / "found.safetensors")
    again = Attribution.load(tmp_path / "found.safetensors")
    assert again.settings == found.settings
    assert torch.equal(again.value, found.value)
    assert torch.is_grad_enabled()
    assert not any(point._forward_hooks or point._forward_pre_hooks for point in tower.hook_points())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *sae.parameters()])


@places()
@named(SIGNED)
def test_sign_and_size_are_those_of_ablation(method: Method, site: Any) -> None:
    """Small latents: the first order is all there is, and each method's own assumption makes no difference.

    Frozen LayerNorms are another model; their sign is that of an ablation under which the scales stay.
    """
    model, x, sae, directions = make(site)
    tower = HookedTower(model)
    target = direction_target(directions)
    with torch.no_grad():
        sae.W_dec *= 1e-3
    exact = exact_ablation(tower, x, sae, target)
    assert {-1.0, 1.0} == set(exact.value.sign().flatten().tolist())
    found = method(tower, x, sae, target)
    if method is frozen_layer_norm:
        assert torch.corrcoef(torch.stack([found.value.flatten(), exact.value.flatten()]))[0, 1] > 0.5
        return
    large = exact.value.abs() > 0.02 * exact.value.abs().max()
    assert torch.equal(found.value.sign()[large], exact.value.sign()[large])
    assert float((found.value - exact.value).abs().max()) < 0.03 * float(exact.value.abs().max())


@named(SIGNED)
def test_positive_homogeneity(method: Method) -> None:
    """An inner product scales with its vector, a cosine does not; a negated vector negates both."""
    model, x, sae, directions = make(SITES[5])
    tower = HookedTower(model)
    for cosine in (True, False):
        base = method(tower, x, sae, direction_target(directions, cosine=cosine)).value
        scaled = method(tower, x, sae, direction_target(7.5 * directions, cosine=cosine)).value
        negated = method(tower, x, sae, direction_target(-directions, cosine=cosine)).value
        assert torch.allclose(scaled, base * (1 if cosine else 7.5), rtol=1e-10, atol=1e-12)
        assert torch.allclose(negated, -base, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("index", [7, 15, 22, 24], ids=["cls", "eot", "cls-mlp_out", "eot-mlp_out"])
def test_at_the_end_without_error_term_gradients_sum_to_zero(index: int) -> None:
    """A cosine after LayerNorm does not change with the length of the stream, which is `z @ W_dec` here.

    At `hook_mlp_out` it is that and the stream that the MLP is added to, so the sum is not zero.
    """
    site = SITES[index]
    model, x, sae, directions = make(site)
    (model.ln_post if site[0] == "vision" else model.ln_final).eps = 1e-14
    with torch.no_grad():
        sae.b_dec.zero_()
    found = attribution_patching(HookedTower(model), x, sae, direction_target(directions), error_term="dropped").dense()
    share = found.sum(dim=-1).abs() / found.abs().sum(dim=-1)
    assert (share < 1e-10).all() if "resid_post" in site[2] else (share > 1e-3).all()


def test_float32_and_no_grad_models() -> None:
    """In float32 every method gives float64's numbers to float32's rounding, with weights that need no gradient."""
    for name, method in DETERMINED.items():
        wide = make(SITES[20])
        narrow = make(SITES[20], dtype=torch.float32)
        expected = method(HookedTower(wide[0]), *wide[1:3], direction_target(wide[3])).dense()
        model, x, sae, directions = narrow
        model.requires_grad_(False)
        sae.requires_grad_(False)
        found = method(HookedTower(model), x, sae, direction_target(directions)).dense()
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max()), name
