"""Logit Lens, energy and chance: each is its formula, and says what it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import tower as oracle
from oracles.attribution import each
from oracles.saes import KINDS, SAEFormula, build_sae
from oracles.sites import IDS, SITES, Site, make
from torch.nn import functional as F

from clip_lens_ext.attribution import (
    activation_energy,
    attribution_patching,
    direction_target,
    logit_lens,
    random_attribution,
)
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

MIDDLE = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
RESIDUAL = [i for i, site in enumerate(SITES) if site[2].split("_")[-1] in ("pre", "mid", "post", "out")]


@pytest.mark.parametrize("times_activation", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("site", [SITES[i] for i in RESIDUAL], ids=[IDS[i] for i in RESIDUAL])
def test_logit_lens(site: Site, cosine: bool, times_activation: bool) -> None:
    """`y(project(W_dec[i]))`: the row alone through the final LayerNorm with its bias, and the projection."""
    model, x, sae, directions = make(site)
    target = direction_target(directions, cosine=cosine)
    found = logit_lens(HookedTower(model), x, sae, target, times_activation=times_activation)
    embedded = oracle.logit_lens_map(oracle.spec_of(model), sae.W_dec.detach())
    lens = F.cosine_similarity(embedded[:, None], directions[None], dim=-1) if cosine else embedded @ directions.T
    for sample, explained in enumerate(each(model, x, sae, site[2], site[3], directions, cosine=cosine)):
        own = found.sample == sample
        assert found.latent[own].tolist() == explained.active()
        for latent, value, activation in zip(
            found.latent[own].tolist(), found.value[own], found.activation[own], strict=True
        ):
            total = explained.latents[:, latent].sum()
            assert torch.allclose(activation, total, atol=1e-11)
            assert torch.allclose(value, lens[latent] * (total if times_activation else 1), rtol=0, atol=1e-10)
    assert found.method == ("activation_x_logit_lens" if times_activation else "logit_lens")


def test_logit_lens_reads_the_effective_row() -> None:
    model, x, sae, directions = make(MIDDLE, "topk rescaled")
    target = direction_target(directions)
    found = logit_lens(HookedTower(model), x, sae, target)
    rows = F.normalize(sae.W_dec.detach(), dim=-1)
    lens = target(oracle.logit_lens_map(oracle.spec_of(model), rows))
    assert torch.allclose(found.value, lens[found.latent], rtol=0, atol=1e-10)


@pytest.mark.parametrize("hook", ["hook_pooled", "hook_embedding"])
def test_logit_lens_needs_residual_stream_vectors(hook: str) -> None:
    model, x, sae, directions = make(("vision", "plain", hook, "pooled", 48 if hook == "hook_pooled" else 20))
    with pytest.raises(InputError, match=f"reads residual-stream vectors; {hook} gives none"):
        logit_lens(HookedTower(model), x, sae, direction_target(directions))


@pytest.mark.parametrize("kind", KINDS)
def test_energy(kind: str) -> None:
    """`|z| ||D||` summed over tokens: the length of what each latent writes, the same for every target."""
    model, x, sae, directions = make(MIDDLE, kind)
    tower, target = HookedTower(model), direction_target(directions)
    found = activation_energy(tower, x, sae, target)
    tokens = activation_energy(tower, x, sae, target, per_token=True)
    formula = SAEFormula(sae)
    activation = tower.run_to(x, MIDDLE[2])
    for sample in range(2):
        expected = torch.zeros(12, 37, dtype=torch.float64)
        for token in range(12):
            row = activation[sample, token + 1]
            latents = formula.encode(row)
            nothing = formula.decode(torch.zeros(37, dtype=torch.float64), row)
            for latent in latents.nonzero().flatten().tolist()[::3]:
                one = torch.zeros(37, dtype=torch.float64)
                one[latent] = latents[latent]
                expected[token, latent] = (formula.decode(one, row) - nothing).norm()
        checked = expected > 0
        for index in range(3):
            assert torch.allclose(tokens.dense()[sample, index][checked], expected[checked], rtol=0, atol=1e-10)
    assert torch.allclose(tokens.dense().sum(dim=2), found.dense(), rtol=0, atol=1e-11)
    assert (found.value > 0).all()
    assert torch.equal(found.value[:, 0], found.value[:, 2])


def test_random_numbers_are_seeded_and_say_so() -> None:
    model, x, sae, directions = make(MIDDLE, "standard")
    tower, target = HookedTower(model), direction_target(directions)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (random_attribution(tower, x, sae, target, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state), "the global random state stays as it was"
    assert torch.equal(one.value, again.value)
    assert not torch.equal(one.value, other.value)
    assert (one.seed, other.seed, one.method) == (3, 4, "random")
    assert attribution_patching(tower, x, sae, target).seed is None
    columns = one.value.T
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 0.5, "every target has an order of its own"
    n = one.value.numel()
    assert n > 100
    # Mean and variance of n standard normal numbers, within five of their standard deviations.
    assert abs(float(one.value.mean())) < 5 / n**0.5
    assert abs(float(one.value.var()) - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [1, 3]])
def test_random_numbers_belong_to_the_sample(sizes: list[int]) -> None:
    """In any batch, at any place in it; samples that differ have numbers of their own, in every batch."""
    model, x, sae, directions = make(MIDDLE, "standard", batch=4)
    tower, target = HookedTower(model), direction_target(directions)
    whole = random_attribution(tower, x, sae, target, seed=3)
    found = [random_attribution(tower, part, sae, target, seed=3) for part in x.split(sizes)]
    assert torch.equal(torch.cat([part.value for part in found]), whole.value)
    turned = random_attribution(tower, x.flip(0), sae, target, seed=3)
    assert torch.equal(turned.dense().flip(0), whole.dense())
    each = [part.flatten()[:60] for part in whole.dense()]
    both = [(one != 0) & (other != 0) for one, other in pairwise(each)]
    assert all(mask.any() for mask in both)
    for (one, other), mask in zip(pairwise(each), both, strict=True):
        assert not torch.isclose(one[mask], other[mask]).any()


@pytest.mark.parametrize("method", [logit_lens, activation_energy, random_attribution])
def test_the_same_pairs_and_prediction_as_patching(method: Any) -> None:
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    for error_term in ("kept", "dropped"):
        found = method(tower, x, sae, target, error_term=error_term)
        patching = attribution_patching(tower, x, sae, target, error_term=error_term)
        assert torch.equal(found.sample, patching.sample)
        assert torch.equal(found.latent, patching.latent)
        assert torch.allclose(found.prediction, patching.prediction, rtol=0, atol=1e-13)
        assert found.error_term == error_term
        assert not found.value.requires_grad


def test_what_does_not_fit() -> None:
    model, x, _, directions = make(MIDDLE)
    for method in (logit_lens, activation_energy, random_attribution):
        with pytest.raises(InputError, match="reads vectors of 40"):
            method(HookedTower(model), x, build_sae("topk", 40, MIDDLE[2], "cls"), direction_target(directions))
