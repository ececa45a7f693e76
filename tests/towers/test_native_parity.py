"""A hooked tower without hooks is the native model to the last bit, and the native model never learns of it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from oracles.models import (
    TEXT_VARIANTS,
    VISION_VARIANTS,
    build,
    build_clip,
    build_wide,
    inputs,
    native_forward,
    sequence_first_,
    wide_inputs,
)
from torch import Tensor, nn

from clip_lens_ext.towers import HookedCLIP, HookedTower

ALL = [("vision", variant) for variant in VISION_VARIANTS] + [("text", variant) for variant in TEXT_VARIANTS]
BOTH = [("vision", "plain"), ("text", "flattened")]


def transformer(model: nn.Module) -> nn.Module:
    return model.transformer


def freeze(model: nn.Module, how: str) -> nn.Module:
    """Which parameters need gradients decides whether torch takes its fused attention, whose last bits differ."""
    blocks = transformer(model).resblocks
    if how == "all":
        model.requires_grad_(False)
    elif how == "first blocks":
        blocks[:-1].requires_grad_(False)
    elif how == "all but the first block":
        model.requires_grad_(False)
        blocks[0].requires_grad_(True)
    elif how == "all but the last block":
        model.requires_grad_(False)
        blocks[-1].requires_grad_(True)
    return model


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_forward_is_native_to_the_last_bit(tower: str, variant: str, dtype: torch.dtype, grad: bool) -> None:
    model = build(tower, variant).to(dtype)
    x = inputs(tower, 3, dtype=dtype)
    with torch.set_grad_enabled(grad):
        expected, found = native_forward(model, x), HookedTower(model)(x)
    assert torch.equal(found, expected)
    assert found.requires_grad == grad
    assert found.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "frozen", ["nothing", "all", "first blocks", "all but the first block", "all but the last block"]
)
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_frozen_parameters_and_modes(tower: str, frozen: str, grad: bool, training: bool) -> None:
    model = freeze(build_wide(tower), frozen).train(training)
    x = wide_inputs(tower)
    with torch.set_grad_enabled(grad):
        assert torch.equal(HookedTower(model)(x), native_forward(model, x))
    assert model.training == training


def test_vision_input_that_needs_a_gradient() -> None:
    model = freeze(build_wide("vision"), "all")
    x = wide_inputs("vision")
    fused = model(x)
    x.requires_grad_()
    assert torch.equal(HookedTower(model)(x), model(x))
    assert not torch.equal(model(x), fused), "this size does not tell the two paths apart"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_gradient_checkpointing(tower: str, variant: str, grad: bool, training: bool) -> None:
    model = build(tower, variant).train(training)
    model.set_grad_checkpointing(True)
    x = inputs(tower)
    hooked = HookedTower(model)
    with torch.set_grad_enabled(grad):
        expected = native_forward(model, x)
        assert torch.equal(hooked(x), expected)
    if grad:
        native_gradients = gradients(native_forward(model, x), model)
        assert all(torch.equal(a, b) for a, b in zip(native_gradients, gradients(hooked(x), model), strict=True))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_sequence_first_blocks(tower: str, variant: str, grad: bool) -> None:
    model = sequence_first_(build(tower, variant))
    x = inputs(tower, 3)
    with torch.set_grad_enabled(grad):
        assert torch.equal(HookedTower(model)(x), native_forward(model, x))


def test_output_tokens_do_not_change_what_a_tower_gives() -> None:
    for tower, variant in [("vision", "plain"), ("text", "module")]:
        model, x = build(tower, variant), inputs(tower)
        expected = model(x)
        model.output_tokens = True
        assert isinstance(model(x), tuple)
        assert torch.equal(HookedTower(model)(x), expected)


def test_patch_dropout_in_evaluation() -> None:
    clip = build_clip()
    clip.visual.patch_dropout = type("PatchDropout", (nn.Module,), {"forward": lambda self, x: x})()
    x = inputs("vision")
    assert torch.equal(HookedTower(clip.visual)(x), clip.visual(x))


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("grad", [True, False])
def test_mixed_precision_as_open_clip_loads_it(tower: str, grad: bool) -> None:
    """`precision="bf16"` keeps the LayerNorms in float32 (their own class casts back): the stream is bfloat16."""
    clip = build_clip(cast_dtype=torch.bfloat16)
    convert_weights_to_lp(clip, torch.bfloat16)
    model = clip.visual if tower == "vision" else clip
    hooked = HookedTower(model)
    x = inputs(tower, dtype=torch.bfloat16)
    with torch.set_grad_enabled(grad):
        expected = native_forward(model, x)
        assert torch.equal(hooked(x), expected)
        for name in hooked.split_names():
            assert torch.equal(hooked.run_from(name, hooked.run_to(x, name)), expected), name
    assert hooked.cfg.dtype == torch.bfloat16


def gradients(embedding: Tensor, model: nn.Module) -> list[Tensor]:
    weights = torch.linspace(-1, 2, embedding.numel(), dtype=embedding.dtype).reshape(embedding.shape)
    used = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((embedding * weights).sum(), used, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(used, found, strict=True)]


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_gradients_are_native(tower: str, variant: str) -> None:
    model, x = build(tower, variant), inputs(tower)
    native = gradients(native_forward(model, x), model)
    hooked = gradients(HookedTower(model)(x), model)
    assert all(torch.equal(a, b) for a, b in zip(native, hooked, strict=True))
    assert sum(bool(g.abs().sum() > 0) for g in native) >= 15


def test_gradient_of_pictures_is_native() -> None:
    model, x = build("vision", "average"), inputs("vision").requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    found = torch.autograd.grad(HookedTower(model)(x).square().sum(), x)[0]
    assert torch.equal(found, expected)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a module is: class, attribute names, and the identity of every value in it."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        values = vars(module)
        found[name] = (
            type(module),
            tuple(values),
            {key: id(value) for key, value in values.items() if not isinstance(value, bool)},
            {key: [id(item) for item in value.values()] for key, value in values.items() if isinstance(value, dict)},
            module.training,
            module.extra_repr(),
        )
    return found


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_native_model_never_learns_of_the_tower(tower: str, variant: str) -> None:
    model, x = build(tower, variant), inputs(tower)
    before = snapshot(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected, pickled = native_forward(model, x), pickle.dumps(model)
    hooked = HookedTower(model)
    with torch.no_grad():
        hooked(x)
    hooked.run_with_cache(x)
    hooked.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_resid_mid", lambda value, hook: value * 2)])
    hooked.run_from("blocks.1.hook_resid_pre", hooked.run_to(x, "blocks.1.hook_resid_pre"))
    hooked.run_to(x, "blocks.1.attn.hook_pattern")
    assert snapshot(model) == before
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert torch.equal(native_forward(model, x), expected)
    assert pickle.dumps(model) == pickled
    assert torch.equal(native_forward(pickle.loads(pickled), x), expected)


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_wrapping_twice(tower: str, variant: str) -> None:
    model, x = build(tower, variant), inputs(tower)
    first, second = HookedTower(model), HookedTower(model)
    expected = native_forward(model, x)
    first.add_hook("blocks.0.hook_resid_post", lambda value, hook: value + 1)
    assert torch.equal(second(x), expected)
    assert not torch.equal(first(x), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_copies_stand_alone(tower: str, variant: str, copied: Any) -> None:
    model, x = build(tower, variant), inputs(tower)
    hooked = HookedTower(model, model_name="tiny")
    hooked.run_to(x, "blocks.1.hook_resid_pre")
    other = copied(hooked)
    expected = native_forward(model, x)
    assert torch.equal(other(x), expected)
    assert other.cfg == hooked.cfg
    assert other.hook_names() == hooked.hook_names()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(hooked(x), expected), "the copy shares weights with the original"
    assert not torch.equal(other(x), expected), "the copy runs on weights that are not its own"
    other.add_hook("hook_embed", lambda value, hook: value * 0)
    assert torch.equal(hooked(x), expected)
    # live hooks on the copy must act on the copy's own submodules, inside the blocks too
    values = {name: value for name, value in other.run_with_cache(x)[1].items() if name.startswith("blocks.1")}
    assert torch.allclose(
        values["blocks.1.hook_resid_mid"] + values["blocks.1.hook_mlp_out"], values["blocks.1.hook_resid_post"]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_moving_a_tower_moves_the_model(tower: str, variant: str, dtype: torch.dtype) -> None:
    model = build(tower, variant)
    hooked = HookedTower(model).to(dtype)
    x = inputs(tower, dtype=dtype)
    assert hooked.cfg.dtype == dtype
    assert {p.dtype for p in hooked.parameters()} == {dtype}
    if isinstance(model, CLIP):
        assert (
            model.positional_embedding.dtype == model.attn_mask.dtype == dtype if model.attn_mask is not None else True
        )
        assert model.visual.conv1.weight.dtype == torch.float32, "moving the text tower moves the text tower alone"
    with torch.no_grad():
        assert torch.equal(hooked(x), native_forward(model, x))
    model.to(torch.float32)
    assert hooked.cfg.dtype == torch.float32
    x = inputs(tower)
    assert torch.equal(hooked(x), native_forward(model, x))


def test_parameters_of_a_flattened_text_tower() -> None:
    clip = build_clip()
    hooked = HookedTower(clip)
    text = {id(p) for name, p in clip.named_parameters() if not name.startswith("visual.") and name != "logit_scale"}
    found = [id(p) for p in hooked.parameters()]
    assert set(found) == text
    assert len(found) == len(set(found))
    hooked.requires_grad_(False)
    assert clip.visual.proj.requires_grad
    assert clip.logit_scale.requires_grad
    assert not clip.positional_embedding.requires_grad


def test_replaced_weights_are_the_ones_that_run() -> None:
    """`load_state_dict(assign=True)` puts new Parameters into the native model."""
    clip, other = build_clip(seed=0), build_clip(seed=5)
    hooked = HookedCLIP(clip)
    clip.load_state_dict(other.state_dict(), assign=True)
    pixels, ids = inputs("vision"), inputs("text")
    assert torch.equal(hooked.vision(pixels), other.visual(pixels))
    assert torch.equal(hooked.text(ids), other.encode_text(ids))
    own = {id(p) for p in clip.parameters()}
    assert all(id(p) in own for p in hooked.text.parameters()), "the text tower's parameters are not those that run"
    hooked.text.to(torch.float64)
    assert torch.equal(hooked.text(ids), other.double().encode_text(ids)), "moving the tower brought old weights back"


def test_state_dict_names_every_weight_once() -> None:
    clip = build_clip()
    assert set(HookedCLIP(clip).state_dict()) == {f"native.{key}" for key in clip.state_dict()}
    assert set(HookedTower(clip.visual).state_dict()) == {f"native.{key}" for key in clip.visual.state_dict()}


@pytest.fixture
def _small_heap() -> Iterator[None]:
    gc.freeze()  # a full collection over everything that is imported takes seconds
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_small_heap")
@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_freed_when_dropped(tower: str, variant: str) -> None:
    model, x = build(tower, variant), inputs(tower)
    hooked = HookedTower(model)
    hooked.add_hook("blocks.0.hook_resid_mid", lambda value, hook: value)
    kept = hooked.run_to(x, "blocks.1.hook_resid_pre")
    hooked.run_with_cache(x)
    gone, native = weakref.ref(hooked), weakref.ref(model)
    del hooked
    gc.collect()
    assert gone() is None
    assert native() is not None
    del model
    gc.collect()
    assert native() is None
    assert kept.shape[0] == 2
