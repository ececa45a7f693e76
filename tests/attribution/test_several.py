"""SAEs at several hooks in one backward pass: each gets what it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.models import inputs
from oracles.saes import build_sae
from oracles.sites import make
from oracles.zoo import BY_NAME, model_of

from clip_lens_ext.attribution import (
    attribution_patching,
    attribution_patching_several,
    direction_target,
    open_site,
)
from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.towers import HookedTower

VISION = [("blocks.1.hook_resid_post", "cls"), ("blocks.0.hook_attn_out", "patches"), ("hook_embed", "patches"),
          ("blocks.0.hook_resid_post", "all"), ("blocks.1.hook_mlp_out", "all"), ("blocks.1.hook_resid_pre", "patches"),
          ("hook_pooled", "pooled"), ("blocks.0.hook_resid_mid", "cls")]  # fmt: skip
TEXT = [("blocks.0.hook_mlp_out", "all"), ("blocks.2.hook_resid_post", "eot"), ("blocks.1.hook_attn_out", "eot")]
ORDER = ["hook_embed", "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post",
         "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "hook_pooled"]  # fmt: skip


def setting(tower: str = "vision", n_target: int = 3) -> tuple[HookedTower, Any, list[Any], Any]:
    site = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48) if tower == "vision" else (
        "text", "flattened", "blocks.2.hook_resid_post", "eot", 40)  # fmt: skip
    model, x, _, _ = make(site)
    where = VISION if tower == "vision" else TEXT
    saes = [build_sae("topk", site[4], hook, scope, tower=tower, seed=i) for i, (hook, scope) in enumerate(where)]
    generator = torch.Generator().manual_seed(1)
    target = direction_target(torch.randn(n_target, 20, generator=generator, dtype=torch.float64))
    return HookedTower(model), x, saes, target


# One, more than chunks of rows are multiplied singly, more than the embedding has numbers.
@pytest.mark.parametrize("n_target", [1, 6, 33])
@pytest.mark.parametrize("tower_name", ["vision", "text"])
def test_equal_to_one_at_a_time(tower_name: str, n_target: int) -> None:
    tower, x, saes, target = setting(tower_name, n_target)
    found = attribution_patching_several(tower, x, saes, target)
    assert set(found) == {sae.cfg.metadata.hook_name for sae in saes}
    for sae in saes:
        one, alone = found[sae.cfg.metadata.hook_name], attribution_patching(tower, x, sae, target)
        assert torch.equal(one.latent, alone.latent)
        assert torch.allclose(one.value, alone.value, rtol=0, atol=1e-12)
        assert torch.allclose(one.prediction, alone.prediction, rtol=0, atol=1e-12)
        assert alone.value.abs().max() > 1e-4
        assert (one.method, one.hook_name, one.token_scope) == (alone.method, alone.hook_name, alone.token_scope)
        assert one.provenance == alone.provenance
        assert len(one.settings["together_with"]) == len(saes) - 1


def test_order_is_that_of_the_pass() -> None:
    tower, x, saes, target = setting()
    assert list(attribution_patching_several(tower, x, saes, target)) == ORDER
    assert list(attribution_patching_several(tower, x, saes[::-1], target)) == ORDER


def test_per_token_and_scope_and_names_of_ones_own() -> None:
    tower, x, _, target = setting()
    saes = {hook: build_sae("topk", 48, None, None, seed=i) for i, hook in enumerate(ORDER[3:5])}
    found = attribution_patching_several(tower, x, saes, target, token_scope="patches", per_token=True)
    for hook, sae in saes.items():
        alone = attribution_patching(tower, x, sae, target, hook_name=hook, token_scope="patches", per_token=True)
        assert torch.equal(found[hook].token, alone.token)
        assert torch.allclose(found[hook].value, alone.value, rtol=0, atol=1e-12)


def test_one_forward_and_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, x, saes, target = setting(n_target=1)
    forwards: list[int] = []
    tower.native.ln_post.register_forward_hook(lambda *args: forwards.append(1))
    tower.native.conv1.register_forward_hook(lambda *args: forwards.append(2))
    backwards: list[int] = []
    real = torch.autograd.grad

    def counted(outputs: Any, leaves: Any, *args: Any, **kwargs: Any) -> Any:
        backwards.append(len(leaves) if isinstance(leaves, list) else 1)
        return real(outputs, leaves, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    attribution_patching_several(tower, x, saes, target)
    assert forwards == [2, 1]
    assert backwards == [1, len(saes)], "the target's own gradient, and one pass for all hooks"


@pytest.mark.parametrize("name", ["hf-clip-text", "hf-siglip-vision", "timm-cls", "coca-text", "resnet"])
def test_other_families(name: str) -> None:
    case, tower = BY_NAME[name], HookedTower(model_of(name))
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    if tower.cfg.hooks == "full":
        hooks += ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    saes = [build_sae("topk", tower.hook_width(hook), hook, "all", seed=i) for i, hook in enumerate(hooks)]
    x = case.inputs(dtype=torch.float64)
    target = direction_target(torch.eye(tower.cfg.d_embed, dtype=torch.float64)[:2])
    found = attribution_patching_several(tower, x, saes, target)
    for hook, sae in zip(hooks, saes, strict=True):
        alone = attribution_patching(tower, x, sae, target)
        assert torch.allclose(found[hook].value, alone.value, rtol=0, atol=1e-11 * float(alone.value.abs().max()))


def test_nothing_is_left_behind_after_an_error_too() -> None:
    tower, x, saes, target = setting()
    for wrong in (target, direction_target(torch.eye(7).double())):
        try:
            attribution_patching_several(tower, x, saes, wrong)
        except InputError:
            assert wrong is not target
    assert not any(point._forward_hooks or point._forward_pre_hooks for point in tower.hook_points())
    assert all(parameter.grad is None for parameter in tower.native.parameters())
    with torch.no_grad():
        assert attribution_patching_several(tower, x, saes, target)
    assert torch.is_grad_enabled()


def test_what_does_not_fit() -> None:
    tower, x, saes, target = setting()
    with pytest.raises(InputError, match="no SAE given"):
        attribution_patching_several(tower, x, [], target)
    with pytest.raises(InputError, match="for one use attribution_patching"):
        attribution_patching_several(tower, x, saes[0], target)
    with pytest.raises(InputError, match=r"two SAEs are at blocks\.1\.hook_resid_post"):
        attribution_patching_several(tower, x, [saes[0], build_sae("topk", 48, VISION[0][0], "all")], target)
    with pytest.raises(InputError, match=r"error_term='dropped'.*call attribution_patching for each"):
        attribution_patching_several(tower, x, saes, target, error_term="dropped")
    with pytest.raises(InputError, match="a Site is of one SAE"):
        attribution_patching_several(tower, open_site(tower, x, saes[0]), saes, target)
    with pytest.raises(HookNameError, match="did you mean"):
        attribution_patching_several(tower, x, {"blocks.0.hook_resid_pots": saes[0]}, target)
    with pytest.raises(InputError, match="carries only a part of the state"):
        attribution_patching_several(tower, x, {"blocks.0.hook_mlp_in": saes[0]}, target)
    with pytest.raises(InputError, match="no path to the output"):
        attribution_patching_several(tower, x, [saes[2], build_sae("topk", 48, VISION[0][0], "patches")], target)
    with pytest.raises(InputError, match="one picture"):
        attribution_patching_several(tower, inputs("vision")[0].double(), saes, target)
