"""One contract for every tower family: the native numbers, every hook where its name says, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import tower as oracle
from oracles.models import randomise_
from oracles.zoo import BY_NAME, FULL, RESIDUAL, Case, hf_clip, hf_siglip, model_of
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower, load_clip

ALL = [case.name for case in (*FULL, *RESIDUAL)]
PARTS = [case.name for case in FULL]
LISTENED = [case.name for case in RESIDUAL]


def fine(name: str) -> float:
    """Rounding of float64 over two blocks. Hugging Face's eager attention takes its softmax in float32."""
    return 1e-6 if "eager" in name else 1e-12


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest number; masked scores have to be masked in both."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    masked = expected < -1e30  # Hugging Face's eager mask is the lowest number and not minus infinity
    assert torch.equal(found < -1e30, masked)
    found, expected = found.masked_fill(masked, 0), expected.masked_fill(masked, 0)
    return float((found - expected).abs().max() / expected.abs().max())


def perturb(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Add fixed random numbers; masked scores stay masked."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return lambda tensor: tensor + 0.3 * noise.to(tensor.dtype)


def hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda activation, hook: edit(activation)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_bit_equal_to_the_native_forward_whole_and_split(name: str, dtype: torch.dtype, grad: bool) -> None:
    model, x = model_of(name, dtype), BY_NAME[name].inputs(3, dtype=dtype)
    tower = HookedTower(model)
    with torch.set_grad_enabled(grad):
        expected = tower.reading.native_forward(x)
        assert torch.isfinite(expected).all()
        assert expected.std(dim=0).max() > 0, "all samples are embedded alike: that tests nothing"
        assert torch.equal(tower(x), expected)
        for split in tower.split_names():
            assert torch.equal(tower.run_from(split, tower.run_to(x, split)), expected), split


@pytest.mark.parametrize("name", PARTS)
def test_every_hook_holds_what_its_name_means(name: str) -> None:
    model, x = model_of(name), BY_NAME[name].inputs(dtype=torch.float64)
    spec = BY_NAME[name].spec
    assert spec is not None
    embedding, values = oracle.run(spec(model), x)
    tower = HookedTower(model)
    found, cache = tower.run_with_cache(x)
    assert sorted(cache.keys()) == sorted(values)
    assert error(found, embedding) <= fine(name)
    for point, value in values.items():
        assert error(cache[point], value) <= fine(name), point
        width = None if point.endswith(("hook_attn_scores", "hook_pattern")) else value.shape[-1]
        assert tower.hook_width(point) == width, point
    single = HookedTower(model_of(name, torch.float32))
    found, _ = single.run_with_cache(x.float() if x.is_floating_point() else x)
    assert error(found, embedding) <= 2e-6  # float32, every part of every block on its own


@pytest.mark.parametrize("name", PARTS)
def test_an_edit_at_every_hook_has_the_effect_that_transformer_lens_means(name: str) -> None:
    model, x = model_of(name), BY_NAME[name].inputs(dtype=torch.float64)
    assert BY_NAME[name].spec is not None
    spec = BY_NAME[name].spec(model)
    embedding, values = oracle.run(spec, x)
    tower = HookedTower(model)
    for point, value in values.items():
        edit = perturb(value)
        expected, _ = oracle.run(spec, x, {point: edit})
        found = tower.run_with_hooks(x, fwd_hooks=[(point, hook(edit))])
        assert error(found, expected) <= fine(name), point
        assert error(expected, embedding) > 1e-5, f"the edit at {point} changes nothing, so it tests nothing"


@pytest.mark.parametrize("name", LISTENED)
def test_an_edit_of_what_a_block_gives_is_the_next_one_s_input(name: str) -> None:
    model, x = model_of(name), BY_NAME[name].inputs(dtype=torch.float64)
    tower = HookedTower(model)
    plain, cache = tower.run_with_cache(x)
    assert sorted(cache.keys()) == sorted(tower.hook_names())
    for split in tower.split_names():
        value = cache[split]
        assert value.shape[-1] == tower.hook_width(split)
        edit = perturb(value)
        changed = tower.run_with_hooks(x, fwd_hooks=[(split, hook(edit))])
        assert error(changed, plain) > 1e-5, split
        # The edited value, by the other way in: the tail from the hook.
        torch.testing.assert_close(tower.run_from(split, edit(value), tokens=tokens(name, x)), changed)


def tokens(name: str, x: Tensor) -> Tensor | None:
    return x if BY_NAME[name].tower == "text" else None


def test_resnet_stage_by_stage() -> None:
    """ModifiedResNet written out: an edit between its blocks, against the tower's."""
    model, x = model_of("resnet"), BY_NAME["resnet"].inputs(dtype=torch.float64)
    tower: Any = HookedTower(model)
    native: Any = model
    blocks = [block for layer in (native.layer1, native.layer2, native.layer3, native.layer4) for block in layer]
    for at in range(len(blocks)):
        stream = native.stem(x)
        for layer, block in enumerate(blocks):
            stream = block(stream)
            if layer == at:
                channels = torch.linspace(-1, 1, stream.shape[1], dtype=torch.float64)
                stream = stream * 0.5 + channels[:, None, None]
        expected = native.attnpool(stream)
        edit = lambda value, hook: value * 0.5 + torch.linspace(-1, 1, value.shape[-1], dtype=torch.float64)  # noqa: E731
        found = tower.run_with_hooks(x, fwd_hooks=[(f"blocks.{at}.hook_resid_post", edit)])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_gradients_of_inputs_and_parameters_are_the_native_ones(name: str, live: bool) -> None:
    case = BY_NAME[name]
    model, x = case.build().double(), case.inputs(dtype=torch.float64)
    if x.is_floating_point():
        x.requires_grad_()
    tower = HookedTower(model)
    inputs = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs += [x] if case.tower == "vision" else []

    def gradients(embedding: Tensor) -> list[Tensor | None]:
        weights = torch.linspace(-1, 2, embedding.numel(), dtype=torch.float64).reshape(embedding.shape)
        return list(torch.autograd.grad((embedding * weights).sum(), inputs, allow_unused=True))

    expected = gradients(tower.reading.native_forward(x))
    hooks = [(lambda point: True, lambda activation, hook: activation)] if live else []
    with tower.hooks(hooks):
        found = gradients(tower(x))
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            scale = max(1.0, float(other.abs().max()))
            assert float((one - other).abs().max()) <= fine(name) * 100 * scale


@pytest.mark.parametrize("name", PARTS)
def test_components_of_the_stream_add_up(name: str) -> None:
    model, x = model_of(name), BY_NAME[name].inputs(dtype=torch.float64)
    tower: Any = HookedTower(model)
    _, cache = tower.run_with_cache(x)
    last = tower.cfg.n_layers - 1
    stream = cache[f"blocks.{last}.hook_resid_post"]
    parts, labels = cache.decompose_resid(return_labels=True)
    assert "0_attn_out" in labels
    start = cache["blocks.0.hook_resid_pre"] - cache["hook_full_embed"]  # what ln_pre changes, zero without it
    assert error(parts.sum(dim=0) + start, stream) <= 1e-12
    sums = cache.accumulated_resid(layer=-1, incl_mid=False)
    assert error(sums[-1], stream) <= 1e-12
    heads = cache.stack_head_results(layer=-1)
    scales = [tower.blocks[layer].reading for layer in range(last + 1)]
    written = sum(cache[f"blocks.{layer}.attn.hook_result"].sum(dim=2) for layer in range(last + 1))
    assert len(heads) == tower.cfg.n_heads * (last + 1)
    assert error(heads.sum(dim=0), written) <= 1e-12
    for layer, block in enumerate(scales):
        out = cache[f"blocks.{layer}.attn.hook_result"].sum(dim=2) + tower.blocks[layer].attn.b_O
        assert error(block.scale_attn_out(out), cache[f"blocks.{layer}.hook_attn_out"]) <= 1e-12


@pytest.mark.parametrize("name", ALL)
def test_an_sae_attaches_and_comes_off_without_a_trace(name: str) -> None:
    pytest.importorskip("sae_lens")
    from oracles import saes as oracle_saes

    case = BY_NAME[name]
    tower: Any = HookedTower(case.build())
    x, point = case.inputs(), f"blocks.{HookedTower(model_of(name)).cfg.n_layers - 1}.hook_resid_pre"
    expected, before = tower(x), state(tower)
    sae = oracle_saes.build_sae("topk", tower.hook_width(point), point, "all")
    with tower.saes(sae):
        # The error term is an exact difference where nothing is edited.
        assert torch.equal(tower(x), expected)
        _, cache = tower.run_with_cache(x, names_filter=f"{point}.hook_sae_acts_post")
        assert cache[f"{point}.hook_sae_acts_post"].shape[-1] == sae.cfg.d_sae
    with tower.saes(sae, use_error_term=False):
        assert not torch.equal(tower(x), expected)
    with pytest.raises(ZeroDivisionError), tower.saes(sae, use_error_term=False):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), tower.hooks([(point, failing)]):
        tower(x)
    assert state(tower) == before
    assert torch.equal(tower(x), expected)


def failing(activation: Tensor, hook: Any) -> None:
    raise ZeroDivisionError


def state(tower: HookedTower) -> tuple[Any, ...]:
    """Everything that a pass could leave behind."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tower.native.modules()]
    points = [(name, len(point._forward_hooks), point.name) for name, point in tower.hook_dict.items()]
    return hooks, points, sorted(tower.native.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_copies_pickles_and_moves(name: str) -> None:
    case = BY_NAME[name]
    model = case.build()
    keys = list(model.state_dict())
    tower, x = HookedTower(model), case.inputs()
    expected = tower(x)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            for parameter in other.native.parameters():
                parameter.mul_(1.01)
        assert not torch.equal(other(x), expected)
        point = other.split_names()[-3]
        edited = other.run_with_hooks(x, fwd_hooks=[(point, lambda activation, hook: activation * 0.5)])
        assert not torch.equal(edited, other(x))
    assert torch.equal(tower(x), expected)
    tower.to(torch.float64)
    assert tower.cfg.dtype == torch.float64
    wide = x.double() if x.is_floating_point() else x
    assert error(tower(wide), expected) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_freed_when_dropped(name: str) -> None:
    model = BY_NAME[name].build()
    tower = HookedTower(model)
    with tower.hooks([(tower.split_names()[0], lambda activation, hook: None)]):
        tower(BY_NAME[name].inputs())
    gone = weakref.ref(tower)
    del tower
    gc.collect()
    assert gone() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ALL)
def test_bad_inputs(name: str) -> None:
    case: Case = BY_NAME[name]
    tower, x = HookedTower(model_of(name)), case.inputs(dtype=torch.float64)
    for wrong in (x[:0], x[..., :-1], x.float()):
        with pytest.raises(InputError):
            tower(wrong)
    if case.tower == "vision":
        broken = x.clone()
        broken[1, 0, 0, 0] = torch.nan
        with pytest.raises(InputError, match="sample 1"):
            tower(broken)
    else:
        with pytest.raises(InputError, match="token ids"):
            tower(x + 1000)


def test_no_logit_lens_where_the_head_is_not_taken_apart() -> None:
    tower = HookedTower(model_of("resnet"))
    with pytest.raises(InputError, match="Logit Lens"):
        tower.project(torch.zeros(1, tower.cfg.d_model, dtype=torch.float64))
    point = "blocks.1.hook_resid_post"
    activation = tower.run_to(BY_NAME["resnet"].inputs(dtype=torch.float64), point)
    tower.native.train()
    try:
        with pytest.raises(InputError, match="eval"):
            tower.run_from(point, activation)
    finally:
        tower.native.eval()


@pytest.mark.parametrize("name", [name for name in PARTS if HookedTower(model_of(name)).cfg.pooling == "attention"])
def test_the_lens_of_an_attention_pool_sees_one_token(name: str) -> None:
    """A sequence in which all tokens are one vector pools to what that vector pools to alone."""
    tower = HookedTower(model_of(name))
    last = f"blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
    rows = torch.randn(3, tower.cfg.d_model, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = tower.run_from(last, rows[:, None].repeat(1, tower.cfg.n_ctx, 1))
    torch.testing.assert_close(tower.project(rows), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_stop_at_layer(name: str) -> None:
    tower: Any = HookedTower(model_of(name))
    x, n_layers = BY_NAME[name].inputs(dtype=torch.float64), tower.cfg.n_layers
    halve = (f"blocks.{n_layers - 1}.hook_resid_post", lambda activation, hook: activation * 0.5)
    _, whole = tower.run_with_cache(x)
    for layer in (0, 1, -1, n_layers):
        stream, cache = tower.run_with_cache(x, stop_at_layer=layer)
        point = halve[0] if layer == n_layers else f"blocks.{layer % n_layers}.hook_resid_pre"
        torch.testing.assert_close(stream, whole[point], rtol=0, atol=0)
        ran = [key for key, _ in cache.items() if key.startswith("blocks.")]
        assert all(int(key.split(".")[1]) < (layer if layer >= 0 else n_layers + layer) for key in ran)
        assert stream.requires_grad == tower(x).requires_grad
    with tower.hooks([halve]):
        assert error(tower(x, stop_at_layer=n_layers), 0.5 * whole[halve[0]]) <= fine(name)
    with pytest.raises(InputError, match="blocks"):
        tower(x, stop_at_layer=n_layers + 1)


@pytest.mark.parametrize("name", PARTS)
def test_attention_is_taken_apart_for_its_listeners_alone(name: str) -> None:
    tower: Any = HookedTower(model_of(name))
    x, ran = BY_NAME[name].inputs(dtype=torch.float64), []
    for layer, block in enumerate(tower.blocks):
        # Every family's attention runs natively through this one call.
        block.attn.reading.run = counting(block.attn.reading.run, lambda layer=layer: ran.append(layer))
    last = tower.cfg.n_layers - 1
    for point, whole in {
        f"blocks.{last}.mlp.hook_pre": [0, last],
        f"blocks.{last}.hook_attn_in": [0, last],
        f"blocks.{last}.ln1.hook_scale": [0, last],
        f"blocks.{last}.attn.hook_q": [0],
        f"blocks.{last}.attn.hook_pattern": [0],
        f"blocks.{last}.attn.hook_result": [0],
    }.items():
        ran.clear()
        apart = [(f"blocks.{layer}.hook_attn_out", lambda activation, hook: None) for layer in range(last + 1)]
        with tower.hooks(apart):
            tower.run_with_hooks(x, fwd_hooks=[(point, lambda activation, hook: None)])
        assert ran == whole, point
    calls: list[str] = []
    softmax = torch.Tensor.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", lambda *a, **k: (calls.append("softmax"), softmax(*a, **k))[1])
        tower(x)
        if calls:
            return  # Hugging Face's eager attention and SigLIP's head call it themselves
        for point, count in {"hook_z": 0, "hook_result": 0, "hook_pattern": 1, "hook_attn_scores": 1}.items():
            calls.clear()
            tower.run_with_hooks(x, fwd_hooks=[(f"blocks.{last}.attn.{point}", lambda activation, hook: None)])
            assert len(calls) == count, point


def counting(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("make", [hf_clip, hf_siglip], ids=["clip", "siglip"])
def test_both_towers_of_one_model_at_once(make: Callable[[], Any]) -> None:
    model = randomise_(make()).eval()
    clip = load_clip(model)
    text, pictures, ids = clip.text, BY_NAME["hf-clip-vision"].inputs(), BY_NAME["hf-clip-text"].inputs()
    assert text is not None
    plain = text(ids)
    seen: list[str] = []
    halve = [("blocks.0.hook_resid_post", lambda activation, hook: (seen.append(hook.name), activation * 0.5)[1])]
    with clip.vision.hooks(halve):
        changed = clip.vision(pictures)
        assert torch.equal(text(ids), plain)
        with text.hooks(halve):
            assert not torch.equal(text(ids), plain)
            assert torch.equal(clip.vision(pictures), changed)
    assert len(seen) == 3
    assert torch.equal(clip.vision(pictures), model.get_image_features(pixel_values=pictures).pooler_output)
    clip.vision.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in text.parameters())
    assert not any(parameter.requires_grad for parameter in model.vision_model.parameters())
