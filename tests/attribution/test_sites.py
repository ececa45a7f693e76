"""Sites at what a block adds to the stream, and which tokens have a path to the output, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.saes import build_sae
from oracles.sites import make
from oracles.zoo import BY_NAME, model_of
from torch import Tensor

from clip_lens_ext.attribution import (
    attribution_patching,
    direction_target,
    exact_ablation,
    frozen_layer_norm,
    gradient_dropping,
    integrated_gradients,
    logit_lens,
    open_site,
)
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

FAMILIES = [
    "hf-clip-vision",
    "hf-clip-text",
    "hf-siglip-vision",
    "hf-siglip-text",
    "timm-siglip",
    "timm-cls",
    "timm-registers",
    "timm-avg",
    "coca-vision",
    "coca-text",
]
HOOKS = ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]


def of_family(name: str, hook: str, scope: str = "all") -> tuple[HookedTower, Tensor, Any, Any]:
    case = BY_NAME[name]
    tower = HookedTower(model_of(name))
    sae = build_sae("topk", tower.cfg.d_model, hook, scope, tower=case.tower)
    generator = torch.Generator().manual_seed(0)
    target = direction_target(torch.randn(2, tower.cfg.d_embed, generator=generator, dtype=torch.float64))
    return tower, case.inputs(dtype=torch.float64), sae, target


def spliced(tower: HookedTower, x: Tensor, sae: Any, target: Any) -> tuple[Tensor, Tensor]:
    """`z dy/dz` `[sample target d_sae]` by autograd through the whole model, and the latents `[sample token d_sae]`."""
    caught: list[Tensor] = []
    with tower.saes(sae):
        hook = f"{next(iter(tower.acts_to_saes))}.hook_sae_acts_post"
        with tower.hooks(fwd_hooks=[(hook, lambda value, hook: caught.append(value))]):
            y = target(tower(x))
            gradients = [torch.autograd.grad(y[:, i].sum(), caught[0], retain_graph=True)[0] for i in range(y.shape[1])]
    return torch.stack([(caught[0] * gradient).sum(dim=1) for gradient in gradients], dim=1).detach(), caught[0]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_block_adds_is_explained_in_every_family(name: str, hook: str) -> None:
    tower, x, sae, target = of_family(name, hook)
    expected, _ = spliced(tower, x, sae, target)
    found = attribution_patching(tower, x, sae, target)
    assert torch.allclose(found.dense(), expected, rtol=0, atol=1e-11)
    assert expected.abs().max() > 1e-4
    latent = int(found.latent[0])

    def zero(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[..., latent] = 0
        return value

    exact = exact_ablation(tower, x, sae, target, latents=[latent])
    with torch.no_grad(), tower.saes(sae):
        edited = target(tower.run_with_hooks(x, fwd_hooks=[(f"{hook}.hook_sae_acts_post", zero)]))
        assert torch.allclose(exact.dense()[:, :, latent], target(tower(x)) - edited, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_runs_in_every_family(name: str) -> None:
    """Prediction, completeness and the vanishing of a held model's difference, where no oracle of its own is needed."""
    tower, x, sae, target = of_family(name, "blocks.0.hook_resid_pre")
    site = open_site(tower, x, sae)
    patching = attribution_patching(tower, site, sae, target)
    integrated = integrated_gradients(tower, site, sae, target, n_steps=24)
    assert float(integrated.completeness_gap.abs().max()) < 1e-6
    dropped, frozen = gradient_dropping(tower, site, sae, target), frozen_layer_norm(tower, site, sae, target)
    for found in (integrated, dropped, frozen):
        assert torch.allclose(found.prediction, patching.prediction, rtol=0, atol=1e-12)
        assert torch.equal(found.latent, patching.latent)
    assert (dropped.value >= 0).all()
    assert dropped.settings["blocks"] == [0, 1]
    by_hooks = []
    for layer in (0, 1):
        names = [f"blocks.{layer}.hook_{part}_out" for part in ("attn", "mlp")]
        hooks = [(one, lambda value, hook: value.detach()) for one in names]
        with tower.hooks(fwd_hooks=hooks):
            by_hooks.append(spliced(tower, x, sae, target)[0].abs())
    assert torch.allclose(dropped.dense(), sum(by_hooks) / 2, rtol=0, atol=1e-12)
    assert "ln_final.hook_scale" in frozen.settings["frozen"]
    attention = "attention" in tower.cfg.pooling
    for variant in ("frozen_norm", "embedding"):
        if attention:
            with pytest.raises(InputError, match="there is no linear map"):
                logit_lens(tower, site, sae, target, variant=variant)
        else:
            assert logit_lens(tower, site, sae, target, variant=variant).value.abs().max() > 1e-4


def test_the_prefix_runs_once() -> None:
    model, x, sae, directions = make(("vision", "plain", "blocks.1.hook_mlp_out", "cls", 48))
    runs: list[int] = []
    model.conv1.register_forward_hook(lambda *args: runs.append(1))
    attribution_patching(HookedTower(model), x, sae, direction_target(directions))
    assert runs == [1]


@pytest.mark.parametrize("part", ["attn_out", "mlp_out"])
def test_live_hooks_around_the_site(part: str) -> None:
    """A hook on the stream before it, on the site itself and behind it: each counts, once."""
    hook = f"blocks.0.hook_{part}"
    model, x, sae, directions = make(("vision", "average", hook, "patches", 48))
    tower, target = HookedTower(model), direction_target(directions)
    plain = attribution_patching(tower, x, sae, target)
    for name in ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", hook, "blocks.1.hook_mlp_in"):
        tower.add_perma_hook(name, lambda value, hook: value * torch.linspace(0.5, 1.5, 48).double())
    expected, _ = spliced(tower, x, sae, target)
    found = attribution_patching(tower, x, sae, target)
    # TransformerLens runs hooks that were there before the SAE first: what it reads is what they leave.
    direct = open_site(tower, x, sae).predict(target)
    assert torch.allclose(direct, target(tower(x)).detach(), rtol=0, atol=1e-12)
    assert torch.allclose(found.prediction, direct, rtol=0, atol=1e-12)
    assert not torch.allclose(found.prediction, plain.prediction, rtol=0, atol=1e-3)
    assert expected.shape == found.dense().shape


def test_the_tail_of_a_site_is_the_tower() -> None:
    """Nothing edited: the site's prediction is the tower's, also where an SAE is attached at the same hook."""
    model, x, sae, directions = make(("text", "flattened", "blocks.1.hook_attn_out", "eot", 40))
    tower, target = HookedTower(model), direction_target(directions)
    with torch.no_grad():
        plain = target(tower(x))
        assert torch.allclose(open_site(tower, x, sae).predict(target), plain, rtol=0, atol=1e-13)
        other = build_sae("topk", 40, "blocks.1.hook_attn_out", "eot", tower="text", seed=3)
        with tower.saes(other, use_error_term=False):
            assert torch.allclose(open_site(tower, x, sae).predict(target), target(tower(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("site", "what"),
    [
        (("vision", "plain", "blocks.1.hook_mlp_out", "patches", 48), "the cls token alone"),
        (("vision", "plain", "blocks.1.hook_attn_out", "patches", 48), "the cls token alone"),
        (("vision", "average", "blocks.1.hook_mlp_out", "cls", 48), "the mean of the patches"),
        (("text", "flattened", "blocks.2.hook_attn_out", "cls", 40), "the eot token alone"),
        (("text", "last", "blocks.2.hook_mlp_out", "eot", 40), "the last token alone"),
    ],
    ids=lambda value: "-".join(value[:4]) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("method", [attribution_patching, exact_ablation, integrated_gradients, frozen_layer_norm])
def test_tokens_without_a_path(method: Any, site: Any, what: str) -> None:
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions)
    assert spliced(tower, x, sae, target)[0].abs().max() == 0
    with pytest.raises(InputError, match=rf"at {site[2]} the embedding depends on {what}"):
        method(tower, x, sae, target)


def test_hooks_that_are_no_site() -> None:
    model, x, _, directions = make(("vision", "plain", "blocks.1.hook_mlp_out", "cls", 48))
    tower = HookedTower(model)
    for hook in ("blocks.0.hook_attn_in", "blocks.0.hook_mlp_in", "blocks.0.ln1.hook_normalized", "hook_pos_embed"):
        sae = build_sae("topk", 48, hook, "all")
        with pytest.raises(
            InputError, match=r"carries only a part of the state; see .* hook_attn_out and hook_mlp_out"
        ):
            attribution_patching(tower, x, sae, direction_target(directions))


@pytest.mark.parametrize("scope", ["patches", "all"])
@pytest.mark.parametrize(
    "hook", ["attn.hook_z", "attn.hook_result", "mlp.hook_pre", "mlp.hook_post", "ln2.hook_normalized"]
)
def test_hooks_inside_of_the_last_block_are_no_site_either(hook: str, scope: str) -> None:
    """Patches have no path to a CLS that is pooled from there; that no tail starts there is said first."""
    model, x, _, directions = make(("vision", "plain", "blocks.1.hook_mlp_out", "cls", 48))
    tower = HookedTower(model)
    name = f"blocks.1.{hook}"
    width = 120 if hook.startswith("mlp") else 48
    sae = build_sae("topk", width, name, scope, reshape=hook == "attn.hook_z")
    for method in (attribution_patching, exact_ablation, integrated_gradients):
        with pytest.raises(InputError, match=rf"{name} carries only a part of the state; see tower\.split_names"):
            method(tower, x, sae, direction_target(directions))


@pytest.mark.parametrize("hook", ["hook_full_embed", "blocks.0.hook_resid_mid", "blocks.1.hook_attn_out",
                                  "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"])  # fmt: skip
@pytest.mark.parametrize("scope", ["patches", "all"])
def test_tokens_after_the_end_of_text_get_nothing(hook: str, scope: str) -> None:
    """Under causal attention the embedding does not depend on them: every method that runs the tail says zero."""
    model, x, sae, directions = make(("text", "flattened", hook, scope, 40), batch=3)
    tower, target = HookedTower(model), direction_target(directions)
    eot = tower.eot_positions(x)
    assert eot is not None
    for method in (attribution_patching, integrated_gradients):
        found = method(tower, x, sae, target, per_token=True)
        after = found.token + (scope == "patches") > eot[found.sample]
        assert after.any()
        assert (found.value[after] == 0).all()
        assert (found.value[~after] != 0).any()
    codes = open_site(tower, x, sae).codes
    late = codes.position[codes.sample, codes.token] > eot[codes.sample]
    reaching = set(zip(codes.sample[~late].tolist(), codes.latent[~late].tolist(), strict=True))
    exact = exact_ablation(tower, x, sae, target, progress=False)
    pairs = list(zip(exact.sample.tolist(), exact.latent.tolist(), strict=True))
    dead = torch.tensor([pair not in reaching for pair in pairs])
    assert dead.any()
    assert exact.value[dead].abs().max() < 1e-14  # float64: the same numbers in a batch of another size
    assert exact.value[~dead].abs().max() > 1e-4
