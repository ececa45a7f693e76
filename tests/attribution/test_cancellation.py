"""GradDrop and frozen LayerNorms: derivatives of a model in which something is held, by an oracle that holds it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracles.attribution import each
from oracles.sites import make
from oracles.zoo import BY_NAME, model_of
from torch import nn

from clip_lens_ext.attribution import (
    attribution_patching,
    direction_target,
    frozen_layer_norm,
    gradient_dropping,
    logit_lens,
    open_site,
)
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

Site = tuple[str, str, str, str, int]
FIRST = ("vision", "plain", "blocks.0.hook_resid_pre", "all", 48)
MIDDLE = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
LAST_CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
# Site, and the blocks that come after it with the hooks of what they add.
DROPPED: list[tuple[Site, dict[int, list[str]]]] = [
    (FIRST, {0: ["attn_out", "mlp_out"], 1: ["attn_out", "mlp_out"]}),
    (("vision", "average", "blocks.0.hook_resid_mid", "patches", 48), {0: ["mlp_out"], 1: ["attn_out", "mlp_out"]}),
    (("vision", "average", "blocks.0.hook_attn_out", "patches", 48), {0: ["mlp_out"], 1: ["attn_out", "mlp_out"]}),
    (("vision", "plain", "blocks.0.hook_resid_post", "cls", 48), {1: ["attn_out", "mlp_out"]}),
    (
        ("text", "flattened", "blocks.0.hook_mlp_out", "all", 40),
        {1: ["attn_out", "mlp_out"], 2: ["attn_out", "mlp_out"]},
    ),
    (("vision", "plain", "hook_full_embed", "all", 48), {0: ["attn_out", "mlp_out"], 1: ["attn_out", "mlp_out"]}),
]


def name_of(value: Any) -> str:
    return "-".join(value[:4]) if isinstance(value, tuple) else ""


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("site", "blocks"), DROPPED, ids=name_of)
def test_gradient_dropping_against_the_oracle(site: Site, blocks: dict[int, list[str]], kept: bool) -> None:
    """The mean over the blocks of `|z dy/dz|` of a model in which what the block adds stays what it is."""
    model, x, sae, directions = make(site)
    error_term = "kept" if kept else "dropped"
    found = gradient_dropping(HookedTower(model), x, sae, direction_target(directions), error_term=error_term)
    without = {}
    for layer, names in blocks.items():
        held = [f"blocks.{layer}.hook_{name}" for name in names]
        without[layer] = each(model, x[1:], sae, site[2], site[3], directions, kept=kept, held=held)[0]
    for latent in next(iter(without.values())).active()[:2]:
        expected = sum(one.patching(latent).abs() for one in without.values()) / len(without)
        assert torch.allclose(found.dense()[1, :, latent], expected, rtol=0, atol=1e-9)
    assert found.settings == {"signed": False, "blocks": list(blocks), "vacuous": None}
    assert found.method == "gradient_dropping"
    patching = attribution_patching(HookedTower(model), x, sae, direction_target(directions), error_term=error_term)
    assert float((found.value - patching.value.abs()).abs().max()) > 1e-3 * float(patching.value.abs().max())
    assert float(found.value.abs().max()) > 1e-3 * float(patching.value.abs().max())


def test_effects_that_cancel_are_seen() -> None:
    """A last block whose MLP undoes what a direction of the stream does: patching says nothing, GradDrop finds it."""
    model, x, sae, _ = make(("vision", "late_norm", "blocks.1.hook_resid_mid", "cls", 48))
    tower = HookedTower(model)
    vectors = torch.randn(1, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = direction_target(vectors, cosine=False)
    patching = attribution_patching(tower, x, sae, target).value
    # The MLP's answer is replaced by minus its input, whose gradient is minus that of the stream.
    tower.add_perma_hook("blocks.1.hook_mlp_in", lambda value, hook: setattr(tower, "_seen", value))
    tower.add_perma_hook("blocks.1.hook_mlp_out", lambda value, hook: -tower._seen)
    cancelled = attribution_patching(tower, x, sae, target).value
    dropped = gradient_dropping(tower, x, sae, target).value
    assert float(cancelled.abs().max()) < 1e-9 * float(patching.abs().max())
    assert float(dropped.abs().max()) > 0


def test_per_token_is_the_absolute_value_of_each_token() -> None:
    model, x, sae, directions = make(("vision", "plain", "blocks.0.hook_resid_pre", "all", 48), "standard")
    tower, target = HookedTower(model), direction_target(directions)
    tokens = gradient_dropping(tower, x, sae, target, per_token=True)
    whole = gradient_dropping(tower, x, sae, target)
    assert tokens.token is not None
    assert (tokens.value >= 0).all()
    # The triangle inequality; the sum inside the bars is smaller where tokens have different signs.
    assert (tokens.dense().sum(dim=2) >= whole.dense() - 1e-12).all()
    assert float((tokens.dense().sum(dim=2) - whole.dense()).max()) > 1e-4


@pytest.mark.parametrize(
    "site",
    [
        LAST_CLS,
        ("vision", "plain", "blocks.1.hook_mlp_out", "cls", 48),
        ("vision", "plain", "hook_pooled", "pooled", 48),
        ("vision", "plain", "hook_embedding", "pooled", 20),
    ],
    ids=name_of,
)
def test_gradient_dropping_where_nothing_can_be_dropped(site: Site) -> None:
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    with pytest.warns(UserWarning, match="no block comes after") as said:
        found = gradient_dropping(tower, x, sae, target)
    assert len(said) == 1
    assert found.settings["vacuous"].startswith(f"no block comes after {site[2]}: nothing can be dropped")
    assert found.settings["blocks"] == []
    patching = attribution_patching(tower, x, sae, target).value
    assert torch.allclose(found.value, patching.abs(), rtol=0, atol=1e-13)


def test_gradient_dropping_of_tokens_that_need_the_one_block_left() -> None:
    """Patches reach CLS through the attention of the last block alone: without it nothing is left of them."""
    model, x, sae, directions = make(MIDDLE)
    tower, target = HookedTower(model), direction_target(directions)
    with pytest.warns(UserWarning, match="without block 1 the SAE's tokens have no path") as said:
        found = gradient_dropping(tower, x, sae, target)
    assert len(said) == 1
    assert float(found.value.abs().max()) == 0
    assert float(attribution_patching(tower, x, sae, target).value.abs().max()) > 1e-4


def scales(n_layers: int, first: int, *, mid: bool = False, pre: bool = False) -> list[str]:
    """Hooks of the LayerNorms after a block, in order."""
    found = [f"blocks.{layer}.ln{n}.hook_scale" for layer in range(first, n_layers) for n in (1, 2)]
    return [*(["ln_pre.hook_scale"] if pre else []), *found[1 if mid else 0 :], "ln_final.hook_scale"]


FROZEN: list[tuple[Site, list[str]]] = [
    (FIRST, scales(2, 0)),
    (("vision", "plain", "hook_full_embed", "all", 48), scales(2, 0, pre=True)),
    (("vision", "average", "blocks.0.hook_attn_out", "patches", 48), scales(2, 0, mid=True)),
    (MIDDLE, scales(2, 1)),
    (LAST_CLS, scales(2, 2)),
    (("vision", "late_norm", "blocks.1.hook_mlp_out", "cls", 48), scales(2, 2)),
    (("text", "eos", "blocks.1.hook_resid_post", "eot", 40), scales(3, 2)),
]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("site", "held"), FROZEN, ids=name_of)
def test_frozen_layer_norm_against_the_oracle(site: Site, held: list[str], kept: bool) -> None:
    """`z dy/dz` of a model in which every later LayerNorm divides by what it divides by on this input."""
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    error_term = "kept" if kept else "dropped"
    found = frozen_layer_norm(tower, x, sae, target, error_term=error_term)
    explained = each(model, x[1:], sae, site[2], site[3], directions, kept=kept, held=held)[0]
    for latent in explained.active()[:2]:
        assert torch.allclose(found.dense()[1, :, latent], explained.patching(latent), rtol=0, atol=1e-9)
    assert found.settings == {"frozen": held, "vacuous": None}
    patching = attribution_patching(tower, x, sae, target, error_term=error_term)
    assert torch.allclose(found.prediction, patching.prediction, rtol=0, atol=1e-13)
    assert float((found.value - patching.value).abs().max()) > 1e-3 * float(patching.value.abs().max())


def test_frozen_layer_norm_is_ablation_where_the_rest_is_linear() -> None:
    """After the last block only LayerNorm, matrix and inner product are left: with the scale held they are affine."""
    model, x, sae, directions = make(LAST_CLS)
    target = direction_target(directions, cosine=False)
    found = frozen_layer_norm(HookedTower(model), x, sae, target)
    for sample, explained in enumerate(
        each(model, x, sae, LAST_CLS[2], "cls", directions, cosine=False, held=["ln_final.hook_scale"])
    ):
        for latent in explained.active():
            expected = explained.ablation(latent)
            assert torch.allclose(found.dense()[sample, :, latent], expected, rtol=0, atol=1e-11)
    # And the direct effect is all the effect that is left.
    lens = logit_lens(HookedTower(model), x, sae, target, variant="frozen_norm", times_activation=True)
    assert torch.allclose(found.value, lens.value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("hook", ["hook_pooled", "hook_embedding"])
def test_frozen_layer_norm_where_none_is_left(hook: str) -> None:
    model, x, sae, directions = make(("vision", "plain", hook, "pooled", 48 if hook == "hook_pooled" else 20))
    tower, target = HookedTower(model), direction_target(directions)
    with pytest.warns(UserWarning, match="no LayerNorm comes after") as said:
        found = frozen_layer_norm(tower, x, sae, target)
    assert len(said) == 1
    assert found.settings == {"frozen": [], "vacuous": f"no LayerNorm comes after {hook}"}
    assert torch.allclose(found.value, attribution_patching(tower, x, sae, target).value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["hf-siglip-vision", "timm-siglip", "coca-vision"])
def test_the_layer_norms_of_a_pooling_head_are_held_too(name: str) -> None:
    """They have no hook of the tower: the reference is the native LayerNorm's formula with the scale detached."""
    from oracles.saes import build_sae

    case, model = BY_NAME[name], model_of(name)
    tower, x = HookedTower(model), case.inputs(dtype=torch.float64)
    hook = "blocks.1.hook_resid_pre"
    sae = build_sae("topk", 48, hook, "all", tower="vision")
    vectors = torch.randn(2, tower.cfg.d_embed, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = direction_target(vectors)
    found = frozen_layer_norm(tower, x, sae, target)
    ours = [entry for entry in found.settings["frozen"] if entry.startswith("native.")]
    norms = {entry: tower.native.get_submodule(entry.removeprefix("native.")) for entry in ours}
    assert norms
    assert all(isinstance(norm, nn.LayerNorm) for norm in norms.values())
    for entry, norm in norms.items():
        # Held at other numbers the attribution is another one; with the hooks gone the model is what it was.
        assert not norm._forward_hooks, entry
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patching = attribution_patching(tower, x, sae, target)
    assert torch.allclose(found.prediction, patching.prediction, rtol=0, atol=1e-12)
    # The oracle: every LayerNorm after the hook replaced by an affine map with the scales that it has now.
    expected = _all_norms_held(tower, x, sae, target)
    assert torch.allclose(found.value, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def _all_norms_held(tower: HookedTower, x: Any, sae: Any, target: Any) -> Any:
    """Patching on a copy whose LayerNorms are modules of another class, with the scale as a constant."""
    import copy

    class Held(nn.Module):
        def __init__(self, norm: nn.LayerNorm) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, value: Any) -> Any:
            centred = value - value.mean(dim=-1, keepdim=True)
            variance = (centred**2).mean(dim=-1, keepdim=True)
            return centred / (variance.detach() + self.norm.eps) ** 0.5 * self.norm.weight + self.norm.bias

    native = copy.deepcopy(tower.native)
    site = open_site(tower, x, sae)
    model = HookedTower(native)
    for module in list(native.modules()):
        for child in list(module.children()):
            if isinstance(child, nn.LayerNorm):
                object.__setattr__(child, "forward", Held(child).forward)
    rows = site.base.clone().requires_grad_()
    y = target(model.run_from(site.hook_name, site.positions.put(site.activation, rows)))
    out = torch.zeros(len(site.codes), len(target), dtype=torch.float64)
    for index in range(len(target)):
        gradient = torch.autograd.grad(y[:, index].sum(), rows, retain_graph=True)[0]
        decoder = sae.W_dec[site.codes.latent]
        out[:, index] = (decoder * gradient[site.codes.sample, site.codes.token]).sum(dim=-1) * site.codes.value
    sample, _, pair = site.codes.pairs()
    return torch.zeros(len(sample), len(target), dtype=torch.float64).index_add_(0, pair, out.detach())


@pytest.mark.parametrize("method", [gradient_dropping, frozen_layer_norm])
def test_hooks_are_gone_afterwards_after_an_error_too(method: Any) -> None:
    model, x, sae, directions = make(FIRST)
    tower = HookedTower(model)
    expected = tower(x)
    kept: list[int] = []
    tower.add_hook("blocks.1.hook_mlp_out", lambda value, hook: kept.append(1))
    for target in (direction_target(directions), direction_target(torch.randn(2, 7).double())):
        try:
            method(tower, x, sae, target)
        except InputError:
            assert len(target) == 2
    live = [name for name, point in tower.hook_dict.items() if point.fwd_hooks or point._forward_hooks]
    assert live == ["blocks.1.hook_mlp_out"]
    kept.clear()
    assert torch.allclose(tower(x), expected, rtol=0, atol=1e-12)
    assert kept == [1], "the user's own hook is still there"
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", [gradient_dropping, frozen_layer_norm])
def test_towers_that_are_not_taken_apart(method: Any) -> None:
    from oracles.saes import build_sae

    case = BY_NAME["resnet"]
    tower = HookedTower(model_of("resnet", torch.float32))
    width = tower.hook_width("blocks.2.hook_resid_post")
    sae = build_sae("topk", width, "blocks.2.hook_resid_post", "all", dtype=torch.float32)
    target = direction_target(torch.ones(tower.cfg.d_embed))
    with pytest.raises(InputError, match="needs hooks inside the blocks"):
        method(tower, case.inputs(1), sae, target)
