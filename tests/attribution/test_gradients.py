"""The derivative of many targets along many latents: three ways that cost differently and give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.sites import SITES, Site, make
from torch import Tensor

from clip_lens_ext.attribution import (
    Target,
    attribution_patching,
    direction_target,
    integrated_gradients,
    open_site,
    probe_target,
)
from clip_lens_ext.attribution import gradients as module
from clip_lens_ext.attribution.forward_mode import pushed_forward
from clip_lens_ext.attribution.site import Site as OpenSite
from clip_lens_ext.towers import HookedTower

LAST_CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
ENDS = [SITES[i] for i in (7, 8, 9, 14, 15, 22, 24)]


def directions(site: Site, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 40 if site[1] == "unprojected" else 20, generator=generator, dtype=torch.float64)


def by_autograd(site: OpenSite, target: Target) -> Tensor:
    """`row . dy/dx` with one plain backward pass for each target and sample, `[active target]`."""
    rows = site.base.detach().clone().requires_grad_()
    y = target(site.tail(rows, torch.arange(len(rows))))
    out = torch.zeros(len(site.codes), len(target), dtype=torch.float64)
    for sample in range(len(rows)):
        for index in range(len(target)):
            gradient = torch.autograd.grad(y[sample, index], rows, retain_graph=True)[0]
            for part, decoder in site.entry_chunks():
                own = site.codes.sample[part] == sample
                products = (decoder * gradient[sample][site.codes.token[part]]).sum(dim=-1)
                out[part, index][own] = products[own].detach()
    return out


@pytest.fixture
def backward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of leaves of each call of autograd."""
    calls: list[int] = []
    real = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(inputs) if isinstance(inputs, list) else 0)
        return real(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


# One target, fewer than the chunks hold, more than the embedding has numbers, and so many that rows are pushed forward.
@pytest.mark.parametrize("n_target", [1, 5, 27])
@pytest.mark.parametrize("site", [*ENDS, SITES[4]], ids=lambda site: "-".join(site[:4]))
def test_any_number_of_targets_is_one_by_one(site: Site, n_target: int) -> None:
    model, x, sae, _ = make(site)
    target = direction_target(directions(site, n_target))
    opened = open_site(HookedTower(model), x, sae)
    found, prediction = module.entry_gradients(opened, target)
    expected = by_autograd(opened, target)
    # The same sums in another order: float64's rounding of numbers of size one.
    assert torch.allclose(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert expected.abs().max() > 1e-3
    assert torch.allclose(prediction, opened.predict(target), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["logit", "margin"])
def test_targets_that_are_no_cosine(kind: Any) -> None:
    for site in (LAST_CLS, SITES[4]):
        model, x, sae, _ = make(site)
        weight = directions(site, 6)
        target = probe_target(weight, torch.linspace(-1, 1, 6), kind=kind)
        opened = open_site(HookedTower(model), x, sae)
        found, _ = module.entry_gradients(opened, target)
        expected = by_autograd(opened, target)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_a_thousand_targets_at_the_last_block_need_no_backward_pass(backward_passes: list[int]) -> None:
    model, x, sae, _ = make(LAST_CLS)
    tower = HookedTower(model)
    found = attribution_patching(tower, x, sae, direction_target(directions(LAST_CLS, 1000)))
    assert backward_passes == []
    assert found.value.shape[1] == 1000
    some = attribution_patching(tower, x, sae, direction_target(directions(LAST_CLS, 1000)[617:618]))
    assert torch.allclose(found.value[:, 617:618], some.value, rtol=0, atol=1e-13)


def test_more_targets_than_the_embedding_has_numbers(backward_passes: list[int]) -> None:
    """At the middle block: twenty passes of the tail for the twenty numbers of the embedding, not a hundred."""
    model, x, sae, _ = make(SITES[4])
    attribution_patching(HookedTower(model), x, sae, direction_target(directions(SITES[4], 100)))
    assert sum(leaves == 1 for leaves in backward_passes) == 20


@pytest.mark.parametrize("bytes_at_once", [1, 30_000])
@pytest.mark.parametrize("site", [LAST_CLS, SITES[4], SITES[5]], ids=["cls", "patches", "all"])
def test_chunks_do_not_matter(site: Site, bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, sae, _ = make(site)
    opened, target = open_site(HookedTower(model), x, sae), direction_target(directions(site, 30))
    expected = module.entry_gradients(opened, target)[0]
    path = integrated_gradients(opened.tower, opened, sae, target, n_steps=5).value
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", bytes_at_once)
    assert torch.allclose(module.entry_gradients(opened, target)[0], expected, rtol=0, atol=1e-13)
    few = integrated_gradients(opened.tower, opened, sae, target, n_steps=5, batch_size=3).value
    assert torch.allclose(few, path, rtol=0, atol=1e-13)


def test_pushed_forward() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    at, direction = torch.ones(4, 3), torch.eye(4, 3)
    assert torch.allclose(pushed_forward(lambda x: x @ matrix.T, at, direction), direction @ matrix.T)
    assert torch.equal(pushed_forward(lambda x: torch.ones(4), at, direction), torch.zeros(4))
    with pytest.raises(RuntimeError, match="inside"):
        pushed_forward(_fails, at, direction)
    assert torch.allclose(pushed_forward(lambda x: 2 * x, at, direction), 2 * direction), "the level is left again"


def _fails(x: Tensor) -> Tensor:
    raise RuntimeError("inside")


def test_float32_and_bfloat16_of_many_targets() -> None:
    """Pushed forward and pulled back agree in lower precision as well, each to its own rounding."""
    for dtype, bound in [(torch.float32, 1e-5), (torch.bfloat16, 0.1)]:
        model, x, sae, _ = make(LAST_CLS, dtype=torch.float32)
        tower, target = HookedTower(model.to(dtype)), direction_target(directions(LAST_CLS, 300))
        many = attribution_patching(tower, x.to(dtype), sae, target).value.float()
        one = attribution_patching(tower, x.to(dtype), sae, target.select([7])).value.float()
        assert torch.allclose(many[:, 7:8], one, rtol=0, atol=bound * float(one.abs().max()))
