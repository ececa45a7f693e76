"""Attribution patching is `z dy/dz`: autograd's through a spliced SAE, and the central difference of a plain oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.attribution import each
from oracles.models import build_vision, inputs, prompts
from oracles.saes import KINDS, build_sae
from oracles.sites import IDS, SITES, Site, make, vectors
from torch import Tensor

from clip_lens_ext.attribution import (
    Attribution,
    attribution_patching,
    direction_target,
    exact_ablation,
    logit_lens,
    open_site,
)
from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.towers import HookedTower

LAST_CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
MIDDLE = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)


def through_the_sae(tower: HookedTower, x: Tensor, sae: Any, target: Any, *, kept: bool, **where: Any) -> Tensor:
    """The textbook way: the SAE in the graph, autograd to every latent; `[sample target token d_sae]`."""
    caught: list[Tensor] = []
    with tower.saes(sae, use_error_term=kept, **where):
        hook = f"{next(iter(tower.acts_to_saes))}.hook_sae_acts_post"
        with tower.hooks(fwd_hooks=[(hook, lambda value, hook: caught.append(value))]):
            y = target(tower(x))
            gradients = [torch.autograd.grad(y[:, i].sum(), caught[0], retain_graph=True)[0] for i in range(y.shape[1])]
    found = torch.stack([caught[0] * gradient for gradient in gradients], dim=1).detach()
    return found if found.dim() == 4 else found[:, :, None]


def close(found: Tensor, expected: Tensor, bound: float) -> bool:
    return float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_against_autograd_through_the_spliced_sae(site: Site, kept: bool) -> None:
    for dtype, bound in [(torch.float64, 1e-10), (torch.float32, 1e-5)]:
        model, x, sae, directions = make(site, dtype=dtype)
        tower, target = HookedTower(model), direction_target(directions)
        expected = through_the_sae(tower, x, sae, target, kept=kept)
        error_term = "kept" if kept else "dropped"
        tokens = attribution_patching(tower, x, sae, target, error_term=error_term, per_token=True)
        total = attribution_patching(tower, x, sae, target, error_term=error_term)
        assert close(tokens.dense(), expected, bound)
        assert close(total.dense(), expected.sum(dim=2), bound)
        assert expected.abs().max() > 1e-4, "nothing here to get wrong"
        assert close(total.prediction, target(tower.run_with_saes(x, saes=sae, use_error_term=kept)).detach(), bound)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_against_autograd(kind: str, kept: bool) -> None:
    model, x, sae, directions = make(MIDDLE, kind)
    tower, target = HookedTower(model), direction_target(directions)
    expected = through_the_sae(tower, x, sae, target, kept=kept)
    found = attribution_patching(tower, x, sae, target, error_term="kept" if kept else "dropped", per_token=True)
    assert close(found.dense(), expected, 1e-10)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("site", [SITES[i] for i in (0, 3, 6, 11, 14)], ids=[IDS[i] for i in (0, 3, 6, 11, 14)])
def test_against_the_oracle(site: Site, kept: bool, cosine: bool) -> None:
    model, x, sae, directions = make(site)
    target = direction_target(directions, cosine=cosine)
    error_term = "kept" if kept else "dropped"
    found = attribution_patching(HookedTower(model), x, sae, target, error_term=error_term)
    dense = found.dense()
    for sample, explained in enumerate(each(model, x, sae, site[2], site[3], directions, cosine=cosine, kept=kept)):
        assert torch.allclose(found.prediction[sample], explained.predict(explained.latents), rtol=1e-11, atol=1e-12)
        active = explained.active()
        assert found.latent[found.sample == sample].tolist() == active
        for latent in active[:2]:
            # The oracle's difference quotient is good to 1e-10 of the prediction.
            expected = explained.patching(latent)
            assert torch.allclose(
                dense[sample, :, latent], expected, rtol=0, atol=1e-9 * float(found.prediction.abs().max())
            )


def test_per_token_against_the_oracle() -> None:
    model, x, sae, directions = make(MIDDLE)
    found = attribution_patching(HookedTower(model), x, sae, direction_target(directions), per_token=True)
    explained = each(model, x, sae, MIDDLE[2], MIDDLE[3], directions)[1]
    entries = (found.sample == 1).nonzero().flatten().tolist()[::17]
    for entry in entries:
        expected = explained.patching(int(found.latent[entry]), int(found.token[entry]))
        assert torch.allclose(found.value[entry], expected, rtol=0, atol=1e-9)
    assert len(entries) >= 4


@pytest.mark.parametrize("method", [attribution_patching, exact_ablation, logit_lens])
@pytest.mark.parametrize("site", [MIDDLE, LAST_CLS, SITES[14]], ids=["patches", "cls", "eot"])
def test_a_batch_is_one_by_one(site: Site, method: Any) -> None:
    model, x, sae, directions = make(site, batch=3)
    tower, target = HookedTower(model), direction_target(directions)
    whole = method(tower, x, sae, target).dense()
    for i in range(3):
        # Other batch sizes sum in another order: float64's rounding.
        assert close(method(tower, x[i : i + 1], sae, target).dense()[0], whole[i], 1e-11)
    for j in range(3):
        one = method(tower, x, sae, direction_target(directions[j]))
        assert close(one.dense()[:, 0], whole[:, j], 1e-11)


def permuted(sae: Any, order: Tensor) -> Any:
    other = build_sae("topk", sae.cfg.d_in, sae.cfg.metadata.hook_name, sae.cfg.metadata.token_scope)
    state = dict(sae.state_dict())
    other.load_state_dict(
        {**state, "W_dec": state["W_dec"][order], "W_enc": state["W_enc"][:, order], "b_enc": state["b_enc"][order]}
    )
    return other


@pytest.mark.parametrize("method", [attribution_patching, exact_ablation, logit_lens])
def test_permuting_latents_permutes_attributions(method: Any) -> None:
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    expected = method(tower, x, sae, target).dense()[..., order]
    assert close(method(tower, x, permuted(sae, order), target).dense(), expected, 1e-10)


@settings(max_examples=15, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_positive_homogeneity_in_the_target(factor: float, seed: int) -> None:
    """An inner product scales with its vector, a cosine does not notice; a negated vector negates both."""
    model, x, sae, _ = make(LAST_CLS)
    tower, directions = HookedTower(model), vectors(20, 2, seed=seed)
    site = open_site(tower, x, sae)
    for cosine in (True, False):
        base = attribution_patching(tower, site, sae, direction_target(directions, cosine=cosine)).value
        scaled = attribution_patching(tower, site, sae, direction_target(directions * factor, cosine=cosine)).value
        negated = attribution_patching(tower, site, sae, direction_target(-directions, cosine=cosine)).value
        assert close(scaled, base * (1 if cosine else factor), 1e-11)
        assert close(negated, -base, 1e-12)


@pytest.mark.parametrize("site", [LAST_CLS, SITES[15]], ids=["cls", "eot"])
def test_last_block_without_error_term_sums_to_zero(site: Site) -> None:
    """After the last block the cosine of a LayerNorm's output does not change with the scale of its input, but for
    epsilon. Without error term and without decoder bias the input is `z @ W_dec`, so `sum_i z_i dy/dz_i` is the
    derivative along that scale: zero. A decoder bias is a part of the input that is no latent, and takes its share.
    """
    model, x, sae, directions = make(site)
    final = model.ln_post if site[0] == "vision" else model.ln_final
    final.eps = 1e-14  # epsilon breaks the scale invariance: leave of it what rounding leaves
    tower, target = HookedTower(model), direction_target(directions)
    with_bias = attribution_patching(tower, x, sae, target, error_term="dropped")
    with torch.no_grad():
        sae.b_dec.zero_()
    found = attribution_patching(tower, x, sae, target, error_term="dropped")
    kept = attribution_patching(tower, x, sae, target, error_term="kept")
    size = found.dense().abs().sum(dim=-1)
    assert (found.dense().sum(dim=-1).abs() <= 1e-10 * size).all()
    assert (with_bias.dense().sum(dim=-1).abs() > 1e-3 * size).all()
    assert (kept.dense().sum(dim=-1).abs() > 1e-3 * size).all()


@pytest.mark.parametrize("kept", ["kept", "dropped"])
@pytest.mark.parametrize("kind", KINDS)
def test_patching_is_exact_where_the_tail_is_linear(kind: str, kept: Any) -> None:
    """From the pooled vector on there is a matrix and an inner product: the first order is all there is."""
    model, x, sae, directions = make(("vision", "plain", "hook_pooled", "pooled", 48), kind)
    tower, target = HookedTower(model), direction_target(directions, cosine=False)
    patching = attribution_patching(tower, x, sae, target, error_term=kept)
    exact = exact_ablation(tower, x, sae, target, error_term=kept)
    assert close(patching.value, exact.value, 1e-12)
    assert not close(
        attribution_patching(tower, x, sae, direction_target(directions), error_term=kept).value,
        exact_ablation(tower, x, sae, direction_target(directions), error_term=kept).value,
        1e-6,
    )


def test_sign() -> None:
    """Small activations: a positive attribution is a latent whose removal lowers the prediction."""
    model, x, sae, directions = make(LAST_CLS)
    tower, target = HookedTower(model), direction_target(directions)
    with torch.no_grad():
        sae.W_dec *= 1e-3  # so that the first order is all that counts
    patching, exact = attribution_patching(tower, x, sae, target), exact_ablation(tower, x, sae, target)
    assert torch.equal(patching.value.sign(), exact.value.sign())
    assert {-1.0, 1.0} == set(patching.value.sign().flatten().tolist())
    assert close(patching.value, exact.value, 1e-2)


def test_a_site_is_shared_and_checked() -> None:
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    site = open_site(tower, x, sae, error_term="dropped")
    runs = []
    handle = model.conv1.register_forward_hook(lambda *args: runs.append(1))
    found = attribution_patching(tower, site, sae, target)
    assert runs == [], "the prefix runs once"
    handle.remove()
    assert found.error_term == "dropped"
    assert torch.equal(found.value, attribution_patching(tower, x, sae, target, error_term="dropped").value)
    for wrong in [(HookedTower(model), sae), (tower, build_sae("topk", 48, MIDDLE[2], "patches"))]:
        with pytest.raises(InputError, match="opened with another tower or another SAE"):
            attribution_patching(wrong[0], site, wrong[1], target)


@pytest.mark.parametrize(
    "setting",
    [
        {"error_term": "dropped"},
        {"token_scope": "cls"},
        {"hook_name": "blocks.1.hook_resid_pre"},
    ],
)
def test_settings_that_contradict_the_site(setting: Any) -> None:
    """A setting that is accepted and never read gives a silent number."""
    model, x, sae, directions = make(MIDDLE)
    tower = HookedTower(model)
    site = open_site(tower, x, sae)
    with pytest.raises(InputError):
        attribution_patching(tower, site, sae, direction_target(directions), **setting)


def test_instead_of_the_saes_own_hook_and_tokens() -> None:
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    where = {"hook_name": "blocks.1.hook_resid_pre", "token_scope": "cls"}
    found = attribution_patching(tower, x, sae, target, **where)
    assert close(found.dense(), through_the_sae(tower, x, sae, target, kept=True, **where).sum(dim=2), 1e-10)
    assert (found.hook_name, found.token_scope) == ("blocks.1.hook_resid_pre", "cls")


def test_many_entries_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_lens_ext.attribution import site as module

    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    expected = attribution_patching(tower, x, sae, target).value
    monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", 7)
    assert close(attribution_patching(tower, x, sae, target).value, expected, 1e-13)


def test_frozen_weights_and_no_grad_mode() -> None:
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    expected = attribution_patching(tower, x, sae, target)
    model.requires_grad_(False)
    sae.requires_grad_(False)
    with torch.no_grad():
        found = attribution_patching(tower, x, sae, target)
    assert close(found.value, expected.value, 1e-12)
    assert not found.value.requires_grad
    assert not found.prediction.requires_grad
    assert not found.activation.requires_grad


def test_nothing_is_left_behind() -> None:
    model, x, sae, directions = make(MIDDLE)
    tower = HookedTower(model)
    attribution_patching(tower, x, sae, direction_target(directions))
    assert all(p.grad is None for p in [*model.parameters(), *sae.parameters()])
    assert not tower.list_hooks()
    assert not tower.acts_to_saes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("hook", ["hook_pooled", "ln_final.hook_normalized"])
def test_a_hook_on_the_tail_counts(hook: str, foreign: bool) -> None:
    """Also where the tail is short enough to go round the hooks, and for a hook that torch itself registers."""
    model, x, sae, directions = make(LAST_CLS)
    tower, target = HookedTower(model), direction_target(directions)
    plain = attribution_patching(tower, x, sae, target)
    if foreign:
        tower.hook_dict[hook].register_forward_hook(
            lambda module, args, value: value * torch.linspace(-1, 2, 48).double()
        )
    else:
        tower.add_perma_hook(hook, lambda value, hook: value * torch.linspace(-1, 2, 48).double())
    expected = through_the_sae(tower, x, sae, target, kept=True)
    found = attribution_patching(tower, x, sae, target)
    assert close(found.dense(), expected.sum(dim=2), 1e-10)
    assert not close(found.value, plain.value, 1e-3)


@pytest.mark.parametrize(
    "site",
    [
        ("vision", "plain", "blocks.1.hook_resid_post", "patches", 48),
        ("vision", "plain", "blocks.1.hook_resid_mid", "patches", 48),
        ("vision", "average", "blocks.1.hook_resid_post", "cls", 48),
        ("text", "flattened", "blocks.2.hook_resid_post", "cls", 40),
        ("text", "flattened", "blocks.2.hook_resid_mid", "cls", 40),
        ("text", "last", "blocks.2.hook_resid_post", "cls", 40),
        ("text", "first", "blocks.2.hook_resid_post", "eot", 40),
    ],
    ids=lambda site: "-".join(site[:4]),
)
def test_tokens_without_a_path_to_the_output(site: Site) -> None:
    """Every attribution would be exactly zero there, which says nothing and looks like a result."""
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    assert through_the_sae(tower, x, sae, target, kept=True).abs().max() == 0
    for method in (attribution_patching, exact_ablation):
        with pytest.raises(InputError, match=r"no path to the output"):
            method(tower, x, sae, target)


def test_what_does_not_fit() -> None:
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_z carries only a part of the state"):
        attribution_patching(tower, x, build_sae("topk", 48, "blocks.0.attn.hook_z", "all", reshape=True), target)
    with pytest.raises(HookNameError, match="did you mean"):
        attribution_patching(tower, x, sae, target, hook_name="blocks.0.hook_resid_pots")
    with pytest.raises(InputError, match="error_term is 'kept' or 'dropped', got 'both'"):
        attribution_patching(tower, x, sae, target, error_term="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reads vectors of 40"):
        attribution_patching(tower, x, build_sae("topk", 40, MIDDLE[2], "cls"), target)
    with pytest.raises(InputError, match="are they of the same model"):
        attribution_patching(tower, x, sae, direction_target(vectors(21)))
    with pytest.raises(InputError, match="one picture"):
        attribution_patching(tower, x[0], sae, target)
    with torch.no_grad():
        sae.b_enc -= 1000
    with pytest.raises(InputError, match="no active latent"):
        attribution_patching(tower, x, sae, target)


def test_an_sae_whose_decoder_is_no_affine_map_is_refused() -> None:
    model, x, sae, directions = make(MIDDLE, "standard")
    sae.__class__ = type("Squared", (type(sae),), {"decode": lambda self, z: z**2 @ self.W_dec + self.b_dec})
    with pytest.raises(InputError, match=r"Squared\.decode"):
        attribution_patching(HookedTower(model), x, sae, direction_target(directions))


def test_result_says_where_it_comes_from() -> None:
    model, x, sae, directions = make(MIDDLE)
    sae.cfg.metadata.sha256 = "abc"
    tower = HookedTower(model, model_name="tiny")
    found = attribution_patching(tower, x, sae, direction_target(directions, labels=["a", "b", "c"]))
    assert isinstance(found, Attribution)
    assert (found.method, found.tower, found.token_scope, found.error_term, found.unit) == (
        "attribution_patching",
        "vision",
        "patches",
        "kept",
        "cosine",
    )
    assert (found.n_sample, found.d_sae, found.n_token, found.labels) == (2, 37, 12, ("a", "b", "c"))
    assert found.provenance["model"] == "tiny"
    assert found.provenance["sae_sha256"] == "abc"
    again = attribution_patching(tower, x.clone(), sae, direction_target(directions))
    other = attribution_patching(tower, x + 1e-9, sae, direction_target(directions))
    assert again.provenance["data_fingerprint"] == found.provenance["data_fingerprint"]
    assert other.provenance["data_fingerprint"] != found.provenance["data_fingerprint"]
    inner = attribution_patching(tower, x, sae, direction_target(directions, cosine=False))
    assert inner.unit == "inner product"
    dense = sae.encode(tower.run_to(x, MIDDLE[2])[:, 1:]).sum(dim=1)
    assert torch.allclose(found.activation, dense[found.sample, found.latent], atol=1e-12)


def test_bfloat16_tower() -> None:
    """An SAE of float32 on a stream of bfloat16: the numbers of float32 to bfloat16's rounding, 8 bits a step."""
    model, x, sae, directions = make(LAST_CLS, "standard", dtype=torch.float32)
    expected = attribution_patching(HookedTower(model), x, sae, direction_target(directions)).dense()
    half = build_vision().to(torch.bfloat16)
    found = attribution_patching(HookedTower(half), x.bfloat16(), sae, direction_target(directions)).dense()
    assert close(found.float(), expected, 0.2)


def test_text_prompts_of_any_end() -> None:
    """Each prompt is explained at its own end-of-text token."""
    site = ("text", "flattened", "blocks.2.hook_resid_post", "eot", 40)
    model, _, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    ids = torch.cat([prompts(2, seed=1), prompts(2, seed=3)])
    codes = open_site(tower, ids, sae).codes
    assert codes.position.flatten().tolist() == ids.argmax(dim=-1).tolist()
    assert len(set(codes.position.flatten().tolist())) >= 3
    expected = through_the_sae(tower, ids, sae, target, kept=True)
    assert close(attribution_patching(tower, ids, sae, target).dense(), expected.sum(dim=2), 1e-10)
    assert inputs("text").shape == (2, 9)
