"""Every hook holds the value that TransformerLens' name for it means, and an edit there has the effect that it means.

The oracle writes the whole tower down from its formula. Each hook is read and edited, one at a time and all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from open_clip.transformer import LayerNorm
from oracles import tower as oracle
from oracles.models import TEXT_VARIANTS, VISION_VARIANTS, build, inputs, native_forward
from torch import Tensor, nn
from torch.nn import functional as F

from clip_lens_ext.towers import HookedTower

ALL = [("vision", variant) for variant in VISION_VARIANTS] + [("text", variant) for variant in TEXT_VARIANTS]
BOTH = [("vision", "plain"), ("text", "flattened")]
# Rounding of float64 over two or three blocks, and of float32: relative to the largest number of the tensor.
FINE, COARSE = 1e-12, 1e-6


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest number; masked scores have to be masked in both."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    masked = expected == -torch.inf
    assert torch.equal(found == -torch.inf, masked)
    found, expected = found.masked_fill(masked, 0), expected.masked_fill(masked, 0)
    return float((found - expected).abs().max() / expected.abs().max())


@cache
def clean(tower: str, variant: str) -> tuple[nn.Module, Tensor, oracle.Spec, Tensor, dict[str, Tensor]]:
    model = build(tower, variant).double()
    x = inputs(tower, 2, dtype=torch.float64)
    spec = oracle.spec_of(model)
    return model, x, spec, *oracle.run(spec, x)


def perturb(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Add fixed random numbers; masked scores stay masked."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return lambda tensor: tensor + 0.3 * noise.to(tensor.dtype)


def hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda activation, hook: edit(activation)


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_names(tower: str, variant: str) -> None:
    model, _, _, _, values = clean(tower, variant)
    assert sorted(HookedTower(model).hook_names()) == sorted(values)


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_cached_values_and_parity_with_every_hook_live(tower: str, variant: str) -> None:
    model, x, _, embedding, values = clean(tower, variant)
    for dtype, bound in [(torch.float64, FINE), (torch.float32, COARSE)]:
        hooked = HookedTower(build(tower, variant).to(dtype))
        found, cache = hooked.run_with_cache(x.to(dtype) if tower == "vision" else x)
        assert error(found, embedding) <= bound
        assert sorted(cache.keys()) == sorted(values)
        for name, value in values.items():
            # A score of float32 is a sum of 16 products, small where they cancel: the noise of a block on top of it.
            assert error(cache[name], value) <= 3 * bound, name
        assert error(native_forward(model, x), embedding) <= FINE


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_value_of_each_hook_alone(tower: str, variant: str) -> None:
    model, x, _, _, values = clean(tower, variant)
    hooked = HookedTower(model)
    for name, value in values.items():
        found, cache = hooked.run_with_cache(x, names_filter=name)
        assert list(cache.keys()) == [name]
        assert error(cache[name], value) <= FINE, name
        assert error(found, values["hook_embedding"]) <= FINE, name


@pytest.mark.parametrize(("tower", "variant"), [pair for pair in ALL if pair[1] not in ("unprojected", "module")])
def test_edit_at_every_hook(tower: str, variant: str) -> None:
    model, x, spec, embedding, values = clean(tower, variant)
    hooked = HookedTower(model)
    single = HookedTower(build(tower, variant)) if (tower, variant) in BOTH else None
    for name, value in values.items():
        edit = perturb(value)
        expected, _ = oracle.run(spec, x, {name: edit})
        found = hooked.run_with_hooks(x, fwd_hooks=[(name, hook(edit))])
        assert error(found, expected) <= FINE, name
        assert error(expected, embedding) > 1e-4, f"the edit at {name} changes nothing, so it tests nothing"
        if single is not None:
            coarse = single.run_with_hooks(x.float() if tower == "vision" else x, fwd_hooks=[(name, hook(edit))])
            assert error(coarse, expected) <= 2 * COARSE, name


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_edits_at_every_hook_at_once(tower: str, variant: str) -> None:
    model, x, spec, _, values = clean(tower, variant)
    edits = {name: perturb(value) for name, value in values.items()}
    expected, seen = oracle.run(spec, x, edits)
    hooked = HookedTower(model)
    found = hooked.run_with_hooks(x, fwd_hooks=[(name, hook(edit)) for name, edit in edits.items()])
    assert error(found, expected) <= FINE
    fwd_hooks = [(name, hook(edit)) for name, edit in edits.items()]
    with hooked.hooks(fwd_hooks=fwd_hooks):
        _, cache = hooked.run_with_cache(x)  # caching hooks come second: they see the edited value
    for name in values:
        assert error(cache[name], edits[name](seen[name])) <= FINE, name


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_gradients_at_every_hook(tower: str, variant: str) -> None:
    """A backward hook sees the derivative of the oracle, by central differences along one direction."""
    model, x, spec, _, values = clean(tower, variant)
    hooked = HookedTower(model)
    weights = torch.linspace(-1, 2, 2 * values["hook_embedding"].shape[1], dtype=torch.float64)
    step = 1e-5
    for name in [name for name in values if not name.startswith("blocks.0")]:
        direction = torch.randn(values[name].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            moved = oracle.run(spec, x, {name: lambda value, by=sign * step * direction: value + by})[0]
            ends.append(moved.flatten() @ weights)
        seen: list[Tensor] = []
        with hooked.hooks(bwd_hooks=[(name, lambda gradient, hook, seen=seen: seen.append(gradient))]):
            (hooked(x).flatten() @ weights).backward()
        found = float((seen[0].detach() * direction).sum())
        # The error of a central difference is step^2 times the third derivative; the slope is of size 1 to 100.
        assert found == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), rel=1e-6, abs=1e-6), name
    model.zero_grad()


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_normalized_is_before_gain_and_bias(tower: str, variant: str) -> None:
    """As TransformerLens 3.9's LayerNorm has it: mean 0, variance 1 (less epsilon), whatever the gain is."""
    model, x, _, _, _ = clean(tower, variant)
    _, cache = HookedTower(model).run_with_cache(x, names_filter=lambda name: name.endswith("hook_normalized"))
    for name, value in cache.items():
        assert value.mean(dim=-1).abs().max() < 1e-12, name
        assert torch.allclose(value.var(dim=-1, unbiased=False), torch.ones(1, dtype=value.dtype), atol=0.02), name


def test_branch_inputs_reach_their_branch_alone() -> None:
    model, x, _, _, values = clean("vision", "plain")
    hooked = HookedTower(model)
    for name, skip, out in [
        ("hook_attn_in", "hook_resid_pre", "hook_attn_out"),
        ("hook_mlp_in", "hook_resid_mid", "hook_mlp_out"),
    ]:
        after = "hook_resid_mid" if name == "hook_attn_in" else "hook_resid_post"
        with hooked.hooks(fwd_hooks=[(f"blocks.0.{name}", lambda value, hook: value * -3 + 1)]):
            _, cache = hooked.run_with_cache(x)
        stream = cache[f"blocks.0.{after}"] - cache[f"blocks.0.{out}"]
        assert error(stream, values[f"blocks.0.{skip}"]) <= FINE
        assert error(cache[f"blocks.0.{out}"], values[f"blocks.0.{out}"]) > 1e-2


def test_resid_mid_reaches_both_branches() -> None:
    model, x, _, _, values = clean("vision", "plain")
    hooked = HookedTower(model)
    with hooked.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda value, hook: value * -3 + 1)]):
        _, cache = hooked.run_with_cache(x)
    edited = values["blocks.0.hook_resid_mid"] * -3 + 1
    assert error(cache["blocks.0.hook_mlp_in"], edited) <= FINE
    assert error(cache["blocks.0.hook_resid_post"] - cache["blocks.0.hook_mlp_out"], edited) <= FINE


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_shapes_and_the_width_of_every_hook(tower: str, variant: str) -> None:
    model, _, _, _, values = clean(tower, variant)
    hooked = HookedTower(model)
    for name, value in values.items():
        expected = None if name.endswith(("hook_attn_scores", "hook_pattern")) else value.shape[-1]
        assert hooked.hook_width(name) == expected, name
    cfg = hooked.cfg
    assert values["blocks.1.hook_resid_post"].shape[1:] == (cfg.n_ctx, cfg.d_model)
    assert values["blocks.0.attn.hook_pattern"].shape[1:] == (cfg.n_heads, cfg.n_ctx, cfg.n_ctx)
    assert values["blocks.0.attn.hook_q"].shape[1:] == (cfg.n_ctx, cfg.n_heads, cfg.d_head)
    assert values["hook_embedding"].shape[1:] == (cfg.d_embed,)
    assert cfg.n_layers == len(model.transformer.resblocks)
    assert cfg.act_fn == ("quick_gelu" if variant in ("bare", "eos") else "gelu")


def test_attention_maths_runs_only_for_its_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused attention until a hook inside is live; scores and pattern only for their own listeners."""
    model, x, _, _, _ = clean("vision", "plain")
    hooked = HookedTower(model)
    counts = {"softmax": 0, "scaled": 0, "native": 0}

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(Tensor, "softmax", count("softmax", Tensor.softmax))
    monkeypatch.setattr(F, "scaled_dot_product_attention", count("scaled", F.scaled_dot_product_attention))
    handles = [
        block.attn.register_forward_pre_hook(lambda module, args: counts.update(native=counts["native"] + 1))
        for block in model.transformer.resblocks
    ]
    expected = {
        None: (0, 2),
        "blocks.1.hook_resid_mid": (0, 2),
        "blocks.1.ln1.hook_scale": (0, 2),
        "blocks.1.mlp.hook_pre": (0, 2),
        "blocks.1.attn.hook_q": (0, 1),
        "blocks.1.attn.hook_z": (0, 1),
        "blocks.1.attn.hook_result": (0, 1),
        "blocks.1.attn.hook_attn_scores": (1, 1),
        "blocks.1.attn.hook_pattern": (1, 1),
    }
    shapes: list[tuple[int, ...]] = []
    summed = Tensor.sum
    monkeypatch.setattr(
        Tensor, "sum", lambda self, *a, **k: (shapes.append(tuple(self.shape)), summed(self, *a, **k))[1]
    )
    for name, (softmax, native) in expected.items():
        counts.update(softmax=0, scaled=0, native=0)
        shapes.clear()
        if name is None:
            hooked(x)
        else:
            hooked.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: None)])
        assert (counts["softmax"], counts["native"]) == (softmax, native), name
        per_head = (2, 13, 3, 48) in shapes  # the write of each head, n_heads times the memory
        assert per_head == (name == "blocks.1.attn.hook_result"), name
    for handle in handles:
        handle.remove()


def test_no_layer_norm_maths_without_a_listener() -> None:
    model, x, _, _, _ = clean("vision", "plain")
    calls = []
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    handles = [norm.register_forward_hook(lambda *args: calls.append(1)) for norm in norms]
    hooked = HookedTower(model)
    hooked.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_attn_in", lambda value, hook: None)])
    assert len(calls) == len(norms) == 6
    calls.clear()
    hooked.run_with_hooks(x, fwd_hooks=[("blocks.0.ln2.hook_scale", lambda value, hook: None)])
    assert len(calls) == 5
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_bfloat16_with_every_hook_live(tower: str, variant: str) -> None:
    """Decomposed maths in bfloat16: the tower's own 8-bit rounding, here some 1e-2, and no more."""
    _, x, _, embedding, _ = clean(tower, variant)
    hooked = HookedTower(build(tower, variant).to(torch.bfloat16))
    x = x.to(torch.bfloat16) if tower == "vision" else x
    assert error(hooked.run_with_cache(x)[0], embedding) < 0.05
    assert error(hooked.run_with_cache(x)[0], hooked(x).double()) < 0.05


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_weights_by_head_are_views_of_the_native_ones(tower: str, variant: str) -> None:
    model, x, _, _, values = clean(tower, variant)
    attention = HookedTower(model).blocks[1].attn
    normalized = values["blocks.1.ln1.hook_normalized"]
    ln = model.transformer.resblocks[1].ln_1
    x = normalized * ln.weight.detach() + ln.bias.detach()
    native = model.transformer.resblocks[1].attn
    for letter, index in [("q", 0), ("k", 1), ("v", 2)]:
        weight = getattr(attention, f"W_{letter.upper()}")
        bias = native.in_proj_bias.detach().chunk(3)[index].reshape(attention.n_heads, -1)
        found = torch.stack([x @ w for w in weight.detach()], dim=2) + bias
        assert error(found, values[f"blocks.1.attn.hook_{letter}"]) <= FINE
        assert weight.untyped_storage().data_ptr() == native.in_proj_weight.untyped_storage().data_ptr()
    z = values["blocks.1.attn.hook_z"]
    found = torch.stack([z[:, :, head] @ w for head, w in enumerate(attention.W_O.detach())], dim=2)
    assert error(found, values["blocks.1.attn.hook_result"]) <= FINE
    assert attention.W_O.untyped_storage().data_ptr() == native.out_proj.weight.untyped_storage().data_ptr()
    assert attention.b_O is native.out_proj.bias
