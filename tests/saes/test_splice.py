"""An SAE in a tower: the pass is the native one until something is edited, every edit and gradient is the formula's,
and afterwards everything is as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import tower as oracle
from oracles.models import build, inputs
from oracles.saes import KINDS, SAEFormula, build_sae, scope_tokens
from torch import Tensor

import clip_lens_ext.saes  # noqa: F401  registers what add_sae attaches
from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.saes.codes import encode
from clip_lens_ext.towers import HookedTower

# tower, hook, scope, width of the SAE's input
SITES = [
    ("vision", "hook_full_embed", "all", 48),
    ("vision", "blocks.0.hook_resid_pre", "patches", 48),
    ("vision", "blocks.0.hook_resid_post", "cls", 48),
    ("vision", "blocks.0.hook_resid_post", "patches", 48),
    ("vision", "blocks.1.hook_resid_post", "all", 48),
    ("vision", "blocks.1.hook_resid_mid", "cls", 48),
    ("vision", "blocks.1.hook_attn_out", "all", 48),
    ("vision", "blocks.0.hook_mlp_out", "patches", 48),
    ("vision", "blocks.0.mlp.hook_post", "cls", 120),
    ("vision", "blocks.0.attn.hook_z", "patches", 48),
    ("vision", "hook_pooled", "pooled", 48),
    ("vision", "hook_embedding", "pooled", 20),
    ("text", "blocks.2.hook_resid_post", "eot", 40),
    ("text", "blocks.0.hook_resid_mid", "all", 40),
    ("text", "blocks.1.attn.hook_z", "eot", 40),
    ("text", "blocks.1.hook_mlp_out", "eot", 40),
    ("text", "hook_embedding", "pooled", 20),
]
IDS = [f"{hook}-{scope}" for _, hook, scope, _ in SITES]
KEYS = ["input", "acts_pre", "acts_post", "recons", "error", "output"]
Site = tuple[str, str, str, int]


def make(
    site: Site, kind: str = "topk", *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[HookedTower, Tensor, Any]:
    tower, hook, scope, width = site
    model = build(tower, "plain" if tower == "vision" else "flattened").to(dtype)
    sae = build_sae(kind, width, hook, scope, dtype=dtype, reshape=hook.endswith("hook_z"), tower=tower, seed=seed)
    return HookedTower(model), inputs(tower, 2, dtype=dtype), sae


def listened(tower: HookedTower, x: Tensor, hook: str) -> Tensor:
    """The pass with a hook that does nothing: attention with a listener is computed in parts, SAE or not."""
    return tower.run_with_hooks(x, fwd_hooks=[(hook, lambda value, hook: None)])


def tokens_of(site: Site, x: Tensor, sample: int) -> list[int]:
    tower, _, scope, _ = site
    if scope == "pooled":
        return [-1]
    eot = int(x[sample].argmax()) if tower == "text" else None
    return scope_tokens(scope, 13 if tower == "vision" else 9, eot)


def spliced(
    site: Site, x: Tensor, sae: Any, edit: Callable[[Tensor, int], Tensor], *, kept: bool
) -> Callable[[Tensor], Tensor]:
    """What the oracle does to the activation at the hook, for an edit of the latents `[d_sae]` of the n-th token."""
    formula = SAEFormula(sae)

    def replace(activation: Tensor) -> Tensor:
        out = activation.clone()
        for sample in range(len(activation)):
            for nth, token in enumerate(tokens_of(site, x, sample)):
                where = (sample,) if token < 0 else (sample, token)
                row = activation[where].flatten()
                latents = formula.encode(row)
                new = formula.decode(edit(latents, nth), row)
                error = row - formula.decode(latents, row) if kept else 0
                out[where] = (new + error).reshape(activation[where].shape)
        return out

    return replace


def close(found: Tensor, expected: Tensor, bound: float = 1e-11) -> bool:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max()) <= bound * float(expected.abs().max())


# -- the pass


@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, True), (torch.float32, False), (torch.float64, True)])
@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_pass_with_error_term_is_native_to_the_last_bit(site: Site, dtype: torch.dtype, grad: bool) -> None:
    tower, x, sae = make(site, dtype=dtype)
    with torch.set_grad_enabled(grad):
        expected = listened(tower, x, site[1])
        assert torch.equal(tower.run_with_saes(x, saes=sae), expected)
        assert torch.equal(tower.run_with_saes(x, saes=[sae]), expected)
        # with listeners on the SAE, which make it compute a clean reconstruction beside
        assert torch.equal(
            tower.run_with_cache_with_saes(x, saes=sae, names_filter=f"{site[1]}.hook_sae_acts_post")[0], expected
        )


@pytest.mark.parametrize("kind", KINDS)
def test_pass_of_every_class(kind: str) -> None:
    site = ("vision", "blocks.0.hook_resid_post", "patches", 48)
    tower, x, sae = make(site, kind)
    assert torch.equal(tower.run_with_saes(x, saes=sae), tower(x))
    expected, _ = oracle.run(
        oracle.spec_of(tower.native), x, {site[1]: spliced(site, x, sae, lambda latents, nth: latents, kept=False)}
    )
    assert close(tower.run_with_saes(x, saes=sae, use_error_term=False), expected)
    assert not close(expected, tower(x), 1e-3)


@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_pass_without_error_term(site: Site) -> None:
    tower, x, sae = make(site)
    replace = spliced(site, x, sae, lambda latents, nth: latents, kept=False)
    expected, _ = oracle.run(oracle.spec_of(tower.native), x, {site[1]: replace})
    found = tower.run_with_saes(x, saes=sae, use_error_term=False)
    assert close(found, expected)
    if site[1] in tower.split_names():
        tail = tower.run_from(site[1], replace(tower.run_to(x, site[1])), tokens=x if site[0] == "text" else None)
        assert close(found, tail)


def test_bfloat16_tower_with_a_float32_sae() -> None:
    site = ("vision", "blocks.0.hook_resid_post", "all", 48)
    tower, x, sae = make(site, dtype=torch.float32)
    tower.to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    assert torch.equal(tower.run_with_saes(x, saes=sae), tower(x))
    assert tower.run_with_saes(x, saes=sae, use_error_term=False).dtype == torch.bfloat16


@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_cache_has_the_names_and_shapes_of_sae_lens(site: Site) -> None:
    tower, x, sae = make(site)
    _, cache = tower.run_with_cache_with_saes(x, saes=sae)
    assert [key for key in cache if ".hook_sae" in key] == [f"{site[1]}.hook_sae_{key}" for key in KEYS]
    n_token = len(tokens_of(site, x, 0))
    lead = (2,) if site[2] == "pooled" else (2, n_token)
    for key in KEYS:
        value = cache[f"{site[1]}.hook_sae_{key}"]
        width = 37 if "acts" in key else site[3]
        shape = (
            (*lead, 3 if site[0] == "vision" else 4, width // (3 if site[0] == "vision" else 4))
            if (site[1].endswith("hook_z") and key in ("error", "output"))
            else (*lead, width)
        )
        assert value.shape == shape, key
    formula, spec = SAEFormula(sae), oracle.spec_of(tower.native)
    activation = oracle.run(spec, x)[1][site[1]]
    for sample in range(2):
        for nth, token in enumerate(tokens_of(site, x, sample)):
            row = (activation[sample] if token < 0 else activation[sample, token]).flatten()
            at = (sample,) if token < 0 else (sample, nth)
            found = {key: cache[f"{site[1]}.hook_sae_{key}"][at].flatten() for key in KEYS}
            latents = formula.encode(row)
            assert torch.allclose(found["input"], row, atol=1e-11)
            assert torch.allclose(found["acts_post"], latents, atol=1e-11)
            assert torch.allclose(found["recons"], formula.decode(latents, row), atol=1e-11)
            assert torch.allclose(found["error"], row - formula.decode(latents, row), atol=1e-11)
            assert torch.allclose(found["output"], row, atol=1e-11)
            assert (found["acts_pre"][latents > 0] - latents[latents > 0]).abs().max() < 1e-11


def test_no_error_key_where_the_error_is_dropped() -> None:
    tower, x, sae = make(SITES[2])
    _, cache = tower.run_with_cache_with_saes(x, saes=sae, use_error_term=False)
    assert "blocks.0.hook_resid_post.hook_sae_error" not in cache
    assert "blocks.0.hook_resid_post.hook_sae_acts_post" in cache


# -- edits


def edit_latents(latents: Tensor, nth: int) -> Tensor:
    """Take one latent out, scale one, switch one on: at every token differently."""
    latents = latents.clone()
    latents[..., int(latents.argmax()) if latents.dim() == 1 else 0] = 0
    latents[..., 7] = 1.5 + nth
    return latents * 1.25


def edit_batch(value: Tensor, hook: Any) -> Tensor:
    flat = value if value.dim() == 3 else value[:, None]
    out = torch.stack([torch.stack([edit_latents(token, nth) for nth, token in enumerate(sample)]) for sample in flat])
    return out.reshape(value.shape)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_edit_of_latents(site: Site, kept: bool) -> None:
    tower, x, sae = make(site)
    replace = spliced(site, x, sae, edit_latents, kept=kept)
    expected, _ = oracle.run(oracle.spec_of(tower.native), x, {site[1]: replace})
    hooks = [(f"{site[1]}.hook_sae_acts_post", edit_batch)]
    found = tower.run_with_hooks_with_saes(x, saes=sae, use_error_term=kept, fwd_hooks=hooks)
    assert close(found, expected)
    assert not close(found, tower(x), 1e-3)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_edit_of_latents_in_every_class(kind: str, kept: bool) -> None:
    site = ("vision", "blocks.0.hook_resid_post", "patches", 48)
    tower, x, sae = make(site, kind)
    expected, _ = oracle.run(oracle.spec_of(tower.native), x, {site[1]: spliced(site, x, sae, edit_latents, kept=kept)})
    for straight in (True, False):
        with (
            tower.saes(sae, use_error_term=kept, straight_through=straight),
            tower.hooks(fwd_hooks=[(f"{site[1]}.hook_sae_acts_post", edit_batch)]),
        ):
            assert close(tower(x), expected)


@pytest.mark.parametrize("straight", [True, False])
def test_edit_of_the_error(straight: bool) -> None:
    site = ("vision", "blocks.0.hook_resid_post", "cls", 48)
    tower, x, sae = make(site)
    spec = oracle.spec_of(tower.native)

    def moved(activation: Tensor) -> Tensor:
        """The error doubled: the activation moves by the error once more."""
        doubled = activation * 2 - spliced(site, x, sae, lambda latents, nth: latents, kept=False)(activation)
        return torch.cat([doubled[:, :1], activation[:, 1:]], dim=1)

    expected, _ = oracle.run(spec, x, {site[1]: moved})
    hook = f"{site[1]}.hook_sae_error"
    with tower.saes(sae, straight_through=straight):
        found = tower.run_with_hooks(x, fwd_hooks=[(hook, lambda value, hook: value * 2)])
        assert close(found, expected)
        dropped = tower.run_with_hooks(x, fwd_hooks=[(hook, lambda value, hook: torch.zeros_like(value))])
    assert close(dropped, tower.run_with_saes(x, saes=sae, use_error_term=False))


def test_edits_of_reconstruction_and_output() -> None:
    site = ("vision", "blocks.0.hook_resid_post", "cls", 48)
    tower, x, sae = make(site)
    shifted, _ = oracle.run(
        oracle.spec_of(tower.native), x, {site[1]: lambda value: torch.cat([value[:, :1] + 0.5, value[:, 1:]], dim=1)}
    )
    for name in ("recons", "output"):
        hooks = [(f"{site[1]}.hook_sae_{name}", lambda value, hook: value + 0.5)]
        assert close(tower.run_with_hooks_with_saes(x, saes=sae, fwd_hooks=hooks), shifted), name


# -- gradients


def output_weights(tower: HookedTower) -> Tensor:
    return torch.linspace(-1, 2, 2 * tower.cfg.d_embed, dtype=torch.float64).reshape(2, -1)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_gradient_of_latents(site: Site, kept: bool) -> None:
    """Against central differences of the oracle along a direction of the latents."""
    tower, x, sae = make(site, "standard")
    spec, weights = oracle.spec_of(tower.native), output_weights(tower)
    directions = torch.randn(13, 37, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    ends = []
    for step in (1e-5, -1e-5):
        replace = spliced(site, x, sae, lambda latents, nth, step=step: latents + step * directions[nth], kept=kept)
        ends.append((oracle.run(spec, x, {site[1]: replace})[0] * weights).sum())
    for straight in (True, False):
        with tower.saes(sae, use_error_term=kept, straight_through=straight):
            gradient = upstream(tower, x, f"{site[1]}.hook_sae_acts_post")
        gradient = gradient if gradient.dim() == 3 else gradient[:, None]
        found = float((gradient * directions[: gradient.shape[1]]).sum())
        # A central difference of step 1e-5: its own error is some 1e-9 of the slope.
        assert found == pytest.approx(float((ends[0] - ends[1]) / 2e-5), rel=1e-6, abs=1e-7)


def upstream(tower: HookedTower, x: Tensor, at: str = "hook_embed") -> Tensor:
    caught: list[Tensor] = []
    with tower.hooks(fwd_hooks=[(at, lambda value, hook: caught.append(value))]):
        return torch.autograd.grad((tower(x) * output_weights(tower)).sum(), caught[0])[0]


@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_straight_through_gives_the_native_upstream_gradient(site: Site) -> None:
    tower, x, sae = make(site)
    native = upstream(tower, x)
    with tower.saes(sae):
        assert close(upstream(tower, x), native, 1e-12)
        assert native.abs().max() > 0
    with tower.saes(sae, straight_through=False):
        assert not close(upstream(tower, x), native, 1e-3)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk rescaled"])
def test_without_it_the_gradient_passes_through_the_sae(kind: str, kept: bool) -> None:
    site = ("vision", "blocks.0.hook_resid_post", "patches", 48)
    tower, x, sae = make(site, kind)
    activation = tower.run_to(x, site[1]).requires_grad_()
    recons = sae.decode(sae.encode(activation[:, 1:]))
    error = (activation[:, 1:] - recons).detach() if kept else 0
    edited = torch.cat([activation[:, :1], recons + error], dim=1)
    expected = torch.autograd.grad((tower.run_from(site[1], edited) * output_weights(tower)).sum(), activation)[0]
    caught: list[Tensor] = []
    point = tower.hook_dict[site[1]]
    point.add_hook(lambda value, hook: caught.append(value))  # before the SAE: sees its input
    with tower.saes(sae, use_error_term=kept, straight_through=False):
        found = torch.autograd.grad((tower(x) * output_weights(tower)).sum(), caught[0])[0]
    assert close(found, expected)


def test_straight_through_without_error_term() -> None:
    """The gradient at the reconstruction, passed by the SAE unchanged."""
    site = ("vision", "blocks.0.hook_resid_post", "all", 48)
    tower, x, sae = make(site)
    recons = sae.decode(sae.encode(tower.run_to(x, site[1]))).detach().requires_grad_()
    expected = torch.autograd.grad((tower.run_from(site[1], recons) * output_weights(tower)).sum(), recons)[0]
    caught: list[Tensor] = []
    tower.hook_dict[site[1]].add_hook(lambda value, hook: caught.append(value))
    with tower.saes(sae, use_error_term=False, straight_through=True):
        found = torch.autograd.grad((tower(x) * output_weights(tower)).sum(), caught[0])[0]
    assert close(found, expected)


def test_saes_at_two_hooks_do_not_disturb_each_other() -> None:
    first_site = ("vision", "blocks.0.hook_resid_post", "all", 48)
    second_site = ("vision", "blocks.1.hook_resid_mid", "cls", 48)
    tower, x, first = make(first_site)
    second = make(second_site, "standard", seed=3)[2]
    alone = {}
    for sae, site in [(first, first_site), (second, second_site)]:
        with tower.saes(sae):
            alone[site[1]] = upstream(tower, x, f"{site[1]}.hook_sae_acts_post")
    native = upstream(tower, x)
    plain = tower(x)
    with tower.saes([first, second]):
        assert torch.equal(tower(x), plain)
        assert sorted(tower.acts_to_saes) == sorted(alone)
        for hook, expected in alone.items():
            assert close(upstream(tower, x, f"{hook}.hook_sae_acts_post"), expected)
        assert close(upstream(tower, x), native)


# -- attaching and taking off


def snapshot(tower: HookedTower, *saes: Any) -> dict[str, Any]:
    """The hook points, the hooks on them in their order, and every name."""
    return {
        "points": {name: id(point) for name, point in tower.hook_dict.items()},
        "modules": {name: id(module) for name, module in tower.mod_dict.items()},
        "hooks": {name: [id(f) for f in point._forward_hooks.values()] for name, point in tower.hook_dict.items()},
        "lens": {name: [id(h) for h in point.fwd_hooks] for name, point in tower.hook_dict.items()},
        "names": [point.name for point in tower.hook_dict.values()],
        "saes": [
            {name: (point.name, len(point._forward_hooks)) for name, point in sae.hook_dict.items()} for sae in saes
        ],
        "attached": {name: id(sae) for name, sae in tower.acts_to_saes.items()},
        "attributes": sorted(key for key in vars(tower) if key != "_attached_saes"),
    }


HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def parts() -> tuple[HookedTower, Tensor, Any, Any]:
    tower, x, sae = make(("vision", HOOK, "cls", 48))
    other = make(("vision", HOOK, "all", 48), "standard", seed=5)[2]
    tower.add_perma_hook(HOOK, lambda value, hook: value * 1.01)
    tower.add_hook("hook_embed", lambda value, hook: value + 0.01)
    return tower, x, sae, other


@pytest.mark.parametrize(
    "how", ["context", "add and reset", "add and reset by name", "run", "cache", "exception", "failed run"]
)
def test_everything_is_put_back(parts: tuple, how: str) -> None:
    tower, x, sae, other = parts
    before, expected = snapshot(tower, sae, other), tower(x)
    if how == "context":
        with tower.saes(sae, use_error_term=False):
            assert not torch.equal(tower(x), expected)
            assert list(tower.acts_to_saes.values()) == [sae]
            assert f"{HOOK}.hook_sae_acts_post" in tower.hook_names()
            assert sae.hook_sae_acts_post.name == f"{HOOK}.hook_sae_acts_post"
    elif how.startswith("add"):
        tower.add_sae(sae, use_error_term=False)
        assert not torch.equal(tower(x), expected)
        tower.reset_saes(HOOK if how.endswith("name") else None)
    elif how == "run":
        tower.run_with_saes(x, saes=sae, use_error_term=False)
    elif how == "cache":
        tower.run_with_cache_with_saes(x, saes=sae)
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), tower.saes(sae, reset_saes_end=False):
            raise ZeroDivisionError
    else:
        with pytest.raises(InputError):
            tower.run_with_saes(x[:, :1], saes=sae)
    assert snapshot(tower, sae, other) == before
    assert torch.equal(tower(x), expected)


def test_hooks_on_an_saes_own_hook_points_go_with_it(parts: tuple) -> None:
    tower, x, sae, other = parts
    seen: list[str] = []
    mine = sae.hook_sae_acts_post
    mine.add_hook(lambda activation, hook: seen.append("the user's own"))
    point = f"{HOOK}.hook_sae_acts_post"
    with tower.saes(sae):
        tower.add_hook(point, lambda activation, hook: seen.append("outer"))
        with tower.saes(other):
            tower.add_hook(point, lambda activation, hook: seen.append("inner"))
            tower(x)
        tower(x)
    assert seen == ["inner", "the user's own", "outer"]
    tower.add_sae(sae)
    tower.hook_dict[point].add_hook(lambda activation, hook: seen.append("left"), is_permanent=True)
    tower.hook_dict[point].add_hook(lambda gradient, hook: None, dir="bwd")
    tower.reset_saes()
    encode(tower, x, sae)
    assert seen[3:] == ["the user's own"]
    assert len(mine.fwd_hooks) == 1
    assert not mine.bwd_hooks
    assert not other.hook_sae_acts_post.fwd_hooks
    mine.remove_hooks()


def test_a_failing_second_sae_takes_the_first_off(parts: tuple) -> None:
    tower, _, sae, _ = parts
    before = snapshot(tower, sae)
    unfit = build_sae("topk", 40, "blocks.1.hook_resid_post", "cls")
    with pytest.raises(InputError), tower.saes([sae, unfit]):
        pass
    assert snapshot(tower, sae) == before


def test_reset_saes_end_false_keeps_them(parts: tuple) -> None:
    tower, x, sae, _ = parts
    expected = tower(x)
    tower.run_with_saes(x, saes=sae, use_error_term=False, reset_saes_end=False)
    assert not torch.equal(tower(x), expected)
    tower.reset_saes()
    assert torch.equal(tower(x), expected)


def test_nested_contexts_and_replacing(parts: tuple) -> None:
    tower, x, sae, other = parts
    elsewhere = make(("vision", "blocks.1.hook_resid_post", "all", 48), seed=6)[2]
    plain = tower(x)
    before = snapshot(tower, sae, other, elsewhere)
    with tower.saes(sae, use_error_term=False):
        inside, first = snapshot(tower, sae, other, elsewhere), tower(x)
        with tower.saes([other, elsewhere], use_error_term=False):
            assert tower.acts_to_saes == {HOOK: other, "blocks.1.hook_resid_post": elsewhere}
            assert not torch.equal(tower(x), first)
        assert torch.equal(tower(x), first)
        assert tower.acts_to_saes == {HOOK: sae}
        after = snapshot(tower, sae, other, elsewhere)
        assert after["attached"] == inside["attached"]
        assert after["saes"] == inside["saes"]
        tower.reset_saes()
    assert torch.equal(tower(x), plain)
    assert snapshot(tower, sae, other, elsewhere) == before


def test_a_context_gives_back_the_sae_that_was_attached_before(parts: tuple) -> None:
    tower, x, sae, other = parts
    tower.add_sae(sae, use_error_term=False)
    expected = tower(x)
    with tower.saes(other):
        assert tower.acts_to_saes == {HOOK: other}
    assert tower.acts_to_saes == {HOOK: sae}
    assert torch.equal(tower(x), expected)
    with tower.saes(sae, use_error_term=True):
        assert not torch.equal(tower(x), expected)
    assert torch.equal(tower(x), expected), "the same SAE comes back with the settings that it had"


def test_a_context_keeps_the_order_of_hooks(parts: tuple) -> None:
    """A hook that was added after an SAE sees the SAE's output; it still does when a context has replaced the SAE."""
    tower, x, sae, other = parts
    tower.add_sae(sae, use_error_term=False)
    seen: list[Tensor] = []
    tower.add_hook(HOOK, lambda value, hook: seen.append(value.detach()))
    tower(x)
    with tower.saes(other):
        pass
    tower(x)
    assert torch.equal(seen[1], seen[0])


def test_hooks_before_and_after_an_sae(parts: tuple) -> None:
    tower, x, sae, _ = parts
    seen: dict[str, Tensor] = {}
    tower.add_hook(HOOK, lambda value, hook: seen.update(before=value))
    tower.add_sae(sae, use_error_term=False)
    tower.add_hook(HOOK, lambda value, hook: seen.update(after=value))
    tower(x)
    assert torch.allclose(seen["after"][:, :1], sae.decode(sae.encode(seen["before"][:, :1])))
    assert torch.equal(seen["after"][:, 1:], seen["before"][:, 1:])


def test_reset_of_what_is_not_attached(parts: tuple) -> None:
    tower, _, sae, _ = parts
    tower.reset_saes()
    with pytest.raises(HookNameError, match=r"no SAE is attached at 'hook_embed'; attached are: none"):
        tower.reset_saes("hook_embed")
    tower.add_sae(sae)
    with pytest.raises(HookNameError, match=HOOK):
        tower.reset_saes([HOOK, "hook_embed"])
    assert list(tower.acts_to_saes) == [HOOK], "all or none are taken off"


def test_hooks_of_an_sae_are_hooks_of_the_tower(parts: tuple) -> None:
    tower, x, sae, _ = parts
    with pytest.raises(HookNameError):
        tower.run_with_cache(x, names_filter=f"{HOOK}.hook_sae_acts_post")
    with tower.saes(sae):
        _, cache = tower.run_with_cache(x, names_filter=f"{HOOK}.hook_sae_acts_post")
        assert cache[f"{HOOK}.hook_sae_acts_post"].shape == (2, 1, 37)
        assert torch.equal(tower.run_to(x, f"{HOOK}.hook_sae_acts_post"), cache[f"{HOOK}.hook_sae_acts_post"])
        with pytest.raises(HookNameError, match="did you mean"):
            tower.run_with_hooks(x, fwd_hooks=[(f"{HOOK}.hook_sae_acts_pots", lambda value, hook: None)])


@pytest.mark.parametrize("copied", [False, True])
def test_an_attached_sae_of_a_copied_tower(parts: tuple, copied: bool) -> None:
    """A copy with its SAE attached is a tower of its own: taking the SAE off one leaves the other as it is."""
    tower, x, sae, _ = parts
    plain = tower(x)
    tower.add_sae(sae, use_error_term=False)
    expected = tower(x)
    other = copy.deepcopy(tower)
    one, two = (other, tower) if copied else (tower, other)
    assert torch.equal(other(x), expected)
    one.reset_saes()
    assert torch.equal(one(x), plain)
    assert torch.equal(two(x), expected)


def test_a_copied_text_tower_reads_its_own_prompts() -> None:
    tower, ids, sae = make(("text", "blocks.0.hook_resid_post", "eot", 40))
    tower.add_sae(sae, use_error_term=False)
    expected = tower(ids)
    assert torch.equal(copy.deepcopy(tower)(ids), expected)


# -- what does not fit


def test_sae_of_another_width_tower_or_hook(parts: tuple) -> None:
    tower, _, sae, _ = parts
    before = snapshot(tower, sae)
    for bad, error, message in [
        (build_sae("topk", 40, HOOK, "cls"), InputError, r"reads vectors of 40, blocks\.0\.hook_resid_post gives 48"),
        (
            build_sae("topk", 48, "blocks.1.hook_resid_pots", "cls"),
            HookNameError,
            r"did you mean 'blocks\.1\.hook_resid_post'",
        ),
        (build_sae("topk", 48, "blocks.9.hook_resid_post", "cls"), HookNameError, "this tower has 2 blocks"),
        (build_sae("topk", 48, None, "cls"), HookNameError, "does not say which hook it reads: pass hook_name="),
        (build_sae("topk", 48, HOOK, "cls", tower="text"), InputError, "of a text tower, this is the vision tower"),
        (build_sae("topk", 48, HOOK, "class"), InputError, "unknown token scope 'class'"),
        (
            build_sae("topk", 16, "blocks.0.attn.hook_z", "cls", reshape=True),
            InputError,
            "reads vectors of 16, .* gives 48",
        ),
        (build_sae("topk", 13, "blocks.0.attn.hook_pattern", "cls"), InputError, "gives None"),
    ]:
        with pytest.raises(error, match=message):
            tower.add_sae(bad)
        assert snapshot(tower, sae) == before


@pytest.mark.parametrize(
    ("tower", "hook", "scope", "width", "message"),
    [
        ("vision", HOOK, "pooled", 48, "without a token axis"),
        ("vision", "hook_pooled", "cls", 48, "use 'pooled'"),
        ("vision", HOOK, "eot", 48, "end-of-text position"),
    ],
)
def test_scopes_that_the_activation_does_not_have(tower: str, hook: str, scope: str, width: int, message: str) -> None:
    hooked, x, sae = make((tower, hook, scope, width))
    with pytest.raises(InputError, match=message):
        hooked.run_with_saes(x, saes=sae)


def test_the_same_sae_at_two_hooks(parts: tuple) -> None:
    tower, _, sae, _ = parts
    tower.add_sae(sae)
    with pytest.raises(InputError, match=rf"attached at {HOOK} already"):
        tower.add_sae(sae, hook_name="blocks.1.hook_resid_post")
    tower.add_sae(sae, use_error_term=False)  # at its own hook again: replaced
    assert list(tower.acts_to_saes) == [HOOK]
    assert tower.reset_saes() is None
    assert not tower.acts_to_saes


def test_settings_of_the_call_outweigh_the_metadata() -> None:
    tower, x, sae = make(("vision", HOOK, "cls", 48))
    _, cache = tower.run_with_cache_with_saes(x, saes=sae)
    assert cache[f"{HOOK}.hook_sae_acts_post"].shape[1] == 1
    with tower.saes(sae, hook_name="blocks.1.hook_resid_pre", token_scope="all"):
        _, cache = tower.run_with_cache(x)
    assert cache["blocks.1.hook_resid_pre.hook_sae_acts_post"].shape == (2, 13, 37)


def test_an_sae_that_says_no_scope_reads_every_token() -> None:
    tower, x, sae = make(("vision", HOOK, None, 48))  # type: ignore[arg-type]
    _, cache = tower.run_with_cache_with_saes(x, saes=sae)
    assert cache[f"{HOOK}.hook_sae_acts_post"].shape == (2, 13, 37)
    pooled = build_sae("topk", 48, "hook_pooled", None)
    _, cache = tower.run_with_cache_with_saes(x, saes=pooled)
    assert cache["hook_pooled.hook_sae_acts_post"].shape == (2, 37)
