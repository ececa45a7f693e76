"""The prefix and the tail: together they are the tower to the last bit, and each runs its own part alone."""

from __future__ import annotations

import pytest
import torch
from oracles.models import (
    TEXT_VARIANTS,
    VISION_VARIANTS,
    build,
    build_text,
    build_vision,
    build_wide,
    inputs,
    native_forward,
    prompts,
    sequence_first_,
    wide_inputs,
)
from torch import Tensor, nn

from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.towers import HookedTower

ALL = [("vision", variant) for variant in VISION_VARIANTS] + [("text", variant) for variant in TEXT_VARIANTS]
BOTH = [("vision", "plain"), ("text", "flattened")]


def split_names(n_layers: int) -> list[str]:
    blocks = [f"blocks.{layer}.hook_resid_{part}" for layer in range(n_layers) for part in ("pre", "mid", "post")]
    return ["hook_embed", "hook_full_embed", *blocks, "hook_pooled", "hook_embedding"]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_tail_of_prefix_is_the_tower_to_the_last_bit(tower: str, variant: str, dtype: torch.dtype, grad: bool) -> None:
    hooked = HookedTower(build(tower, variant).to(dtype))
    x = inputs(tower, 3, dtype=dtype)
    with torch.set_grad_enabled(grad):
        expected = hooked(x)
        assert hooked.split_names() == split_names(hooked.cfg.n_layers)
        for name in hooked.split_names():
            activation = hooked.run_to(x, name)
            assert torch.equal(hooked.run_from(name, activation), expected), name


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "setting", ["checkpointing", "sequence first", "all frozen", "first block frozen", "last block frozen"]
)
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_composition_under_other_settings(tower: str, setting: str, grad: bool) -> None:
    model = build_wide(tower).train(setting == "checkpointing")
    if setting == "checkpointing":
        model.set_grad_checkpointing(True)
    elif setting == "sequence first":
        sequence_first_(model)
    elif setting == "all frozen":
        model.requires_grad_(False)
    else:
        model.transformer.resblocks[0 if setting.startswith("first") else -1].requires_grad_(False)
    hooked, x = HookedTower(model), wide_inputs(tower, 2)
    with torch.set_grad_enabled(grad):
        expected = hooked(x)
        for name in hooked.split_names():
            assert torch.equal(hooked.run_from(name, hooked.run_to(x, name)), expected), name


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_prefix_where_only_early_weights_need_gradients(tower: str) -> None:
    """What goes on from the prefix has to need a gradient wherever it does natively, or torch fuses later attention."""
    model = build_wide(tower).requires_grad_(False)
    model.transformer.resblocks[0].requires_grad_(True)
    hooked, x = HookedTower(model), wide_inputs(tower)
    _, cache = hooked.run_with_cache(x, names_filter="blocks.2.hook_resid_pre")
    assert torch.equal(hooked.run_to(x, "blocks.2.hook_resid_pre"), cache["blocks.2.hook_resid_pre"])


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_composition_where_only_early_weights_need_gradients(tower: str) -> None:
    model = build_wide(tower).requires_grad_(False)
    model.transformer.resblocks[0].requires_grad_(True)
    hooked, x = HookedTower(model), wide_inputs(tower)
    for name in hooked.split_names():
        assert torch.equal(hooked.run_from(name, hooked.run_to(x, name)), hooked(x)), name


@pytest.mark.parametrize(
    "elsewhere",
    [
        "hook_full_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.attn.hook_pattern",
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_resid_post",
        "blocks.1.ln1.hook_scale",
        "ln_final.hook_normalized",
        "hook_pooled",
        "hook_embedding",
    ],
)
@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_composition_with_an_edit_elsewhere(tower: str, variant: str, elsewhere: str) -> None:
    """The hook fires once: in the prefix where it comes before the split, in the tail at the split and after it."""
    hooked, x = HookedTower(build(tower, variant)), inputs(tower)
    calls: list[str] = []

    def edit(value: Tensor, hook: nn.Module) -> Tensor:
        calls.append(str(hook.name))
        return value * 1.5 + 0.1

    with hooked.hooks(fwd_hooks=[(elsewhere, edit)]):
        expected = hooked(x)
        for name in hooked.split_names():
            calls.clear()
            assert torch.equal(hooked.run_from(name, hooked.run_to(x, name)), expected), name
            assert calls == [elsewhere], name


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_prefix_at_every_hook_is_the_cached_value(tower: str, variant: str) -> None:
    hooked, x = HookedTower(build(tower, variant)), inputs(tower)
    for name in hooked.hook_names():
        # The same hooks have to be live: attention with a listener is computed in parts, and rounds otherwise.
        _, cache = hooked.run_with_cache(x, names_filter=name)
        assert torch.equal(hooked.run_to(x, name), cache[name]), name


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_prefix_builds_no_graph(tower: str, variant: str) -> None:
    hooked, x = HookedTower(build(tower, variant)), inputs(tower)
    for name in hooked.hook_names():
        found = hooked.run_to(x, name)
        assert not found.requires_grad, name
        assert found.grad_fn is None, name


def native_calls(model: nn.Module) -> tuple[list[str], list]:
    calls: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for name, module in model.named_modules()
        if name and name != "transformer" and not name.startswith("visual")
    ]
    return calls, handles


def stage(name: str) -> float:
    """Where in the forward pass a native module runs or a hook sits: the greater, the later."""
    order = {
        "conv1": 0,
        "token_embedding": 0,
        "hook_embed": 1,
        "hook_pos_embed": 2,
        "hook_full_embed": 3,
        "patch_dropout": 3.5,
        "ln_pre": 4,
        "ln_post": 90,
        "ln_final": 90,
        "hook_pooled": 91,
        "text_projection": 92,
        "hook_embedding": 93,
    }
    within = [
        "hook_resid_pre",
        "hook_attn_in",
        "ln_1",
        "hook_scale1",
        "hook_normalized1",
        "attn",
        "hook_q",
        "hook_k",
        "hook_v",
        "hook_attn_scores",
        "hook_pattern",
        "hook_z",
        "hook_result",
        "out_proj",
        "ls_1",
        "hook_attn_out",
        "hook_resid_mid",
        "hook_mlp_in",
        "ln_2",
        "hook_scale2",
        "hook_normalized2",
        "mlp",
        "c_fc",
        "hook_pre",
        "gelu",
        "hook_post",
        "c_proj",
        "ls_2",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    parts = name.removeprefix("transformer.").split(".")
    if parts[0] not in ("blocks", "resblocks"):
        return order[parts[0]] + (0.5 if len(parts) > 1 else 0)
    leaf = parts[-1]
    if len(parts) == 2:
        return 5 + int(parts[1])
    if parts[2] in ("ln1", "ln2"):
        leaf += parts[2][-1]
    return 5 + int(parts[1]) + within.index(leaf) / 100


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_prefix_runs_nothing_after_the_hook(tower: str, variant: str) -> None:
    model = build(tower, variant)
    hooked, x = HookedTower(model), inputs(tower)
    calls, handles = native_calls(model)
    late: dict[str, list[str]] = {}
    for name in hooked.hook_names():
        calls.clear()
        hooked.run_to(x, name)
        assert calls, name
        after = [call for call in calls if stage(call) > stage(name)]
        if after:
            late[name] = after
    for handle in handles:
        handle.remove()
    assert late == {}


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_tail_runs_nothing_before_the_hook(tower: str, variant: str) -> None:
    model = build(tower, variant)
    hooked, x = HookedTower(model), inputs(tower)
    calls, handles = native_calls(model)
    for name in hooked.split_names():
        activation = hooked.run_to(x, name)
        calls.clear()
        hooked.run_from(name, activation)
        whole_block = name.endswith("resid_pre")
        early = [call for call in calls if stage(call) < stage(name) and not (whole_block and call.count(".") == 2)]
        assert early == [], name
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("tower", "variant"), ALL)
def test_gradient_of_the_tail_is_that_of_the_whole(tower: str, variant: str) -> None:
    hooked = HookedTower(build(tower, variant).double())
    x = inputs(tower, dtype=torch.float64)
    for name in hooked.split_names():
        leaf = hooked.run_to(x, name).requires_grad_()
        tail = torch.autograd.grad(hooked.run_from(name, leaf).square().sum(), leaf)[0]
        kept: list[Tensor] = []
        with hooked.hooks(fwd_hooks=[(name, lambda value, hook, kept=kept: kept.append(value))]):
            whole = torch.autograd.grad(hooked(x).square().sum(), kept[0])[0]
        assert torch.allclose(tail, whole, rtol=0, atol=1e-12 * float(whole.abs().max())), name
        assert whole.abs().max() > 0


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_tail_takes_any_batch_size(tower: str, variant: str) -> None:
    hooked, x = HookedTower(build(tower, variant).double()), inputs(tower, 3, dtype=torch.float64)
    name = "blocks.1.hook_resid_pre"
    whole = hooked(x)
    activation = hooked.run_to(x, name)
    tokens = {"tokens": x[:1]} if tower == "text" else {}
    one = hooked.run_from(name, activation[:1].clone(), **tokens)
    # Other batch sizes sum in another order: float64's rounding of numbers around one.
    assert torch.allclose(one, whole[:1], rtol=0, atol=1e-13)
    tokens = {"tokens": x[[0, 2, 1, 1]]} if tower == "text" else {}
    several = hooked.run_from(name, activation[[0, 2, 1, 1]], **tokens)
    assert torch.allclose(several, whole[[0, 2, 1, 1]], rtol=0, atol=1e-13)


# -- which prompts an activation of a text tower came from

HOOK = "blocks.1.hook_resid_mid"


def text_tower(variant: str = "flattened") -> HookedTower:
    return HookedTower(build_text(variant))


@pytest.mark.parametrize("variant", ["flattened", "eos"])
def test_prompts_are_remembered_by_identity(variant: str) -> None:
    hooked = text_tower(variant)
    first, second = prompts(2, seed=1), prompts(2, seed=2)
    from_first, from_second = hooked.run_to(first, HOOK), hooked.run_to(second, HOOK)
    assert torch.equal(hooked.run_from(HOOK, from_first), hooked(first))
    assert torch.equal(hooked.run_from(HOOK, from_second), hooked(second))
    assert not torch.equal(hooked(first), hooked(second))


def test_an_edited_copy_finds_the_only_prompts_of_its_batch_size() -> None:
    hooked = text_tower()
    hooked.run_to(prompts(3, seed=4), HOOK)
    ids = prompts(2)
    activation = hooked.run_to(ids, HOOK)
    assert torch.equal(hooked.run_from(HOOK, activation.clone()), hooked(ids))
    assert not torch.equal(hooked.run_from(HOOK, activation * 2), hooked(ids))


@pytest.mark.parametrize("variant", ["flattened", "eos"])
def test_several_prompts_of_one_batch_size_are_ambiguous(variant: str) -> None:
    hooked = text_tower(variant)
    first, second = prompts(2, seed=1), prompts(2, seed=2)
    activation = hooked.run_to(first, HOOK)
    hooked.run_to(second, HOOK)
    with pytest.raises(InputError, match=r"several prompts.*batch size 2.*tokens=ids"):
        hooked.run_from(HOOK, activation.clone())
    assert torch.equal(hooked.run_from(HOOK, activation.clone(), tokens=first), hooked(first))


def test_other_words_that_end_at_the_same_token_are_not_ambiguous() -> None:
    hooked, first = text_tower(), prompts(2)
    second = first.clone()
    second[:, 0] = 11
    activation = hooked.run_to(first, HOOK)
    hooked.run_to(second, HOOK)
    assert torch.equal(hooked.run_from(HOOK, activation.clone()), hooked(first))


def test_no_prompts_known() -> None:
    hooked = text_tower()
    activation = hooked.run_to(prompts(2), HOOK)
    with pytest.raises(InputError, match=r"no prompts at batch size 1.*tokens=ids"):
        hooked.run_from(HOOK, activation[:1].clone())
    # A pooled vector needs no prompts, nor does a tower that pools at a fixed token.
    assert hooked.run_from("hook_pooled", torch.zeros(1, 40)).shape == (1, 20)
    assert text_tower("last").run_from(HOOK, torch.zeros(1, 9, 40)).shape == (1, 20)


def test_tokens_outweigh_what_is_remembered() -> None:
    hooked, first, second = text_tower(), prompts(2, seed=1), prompts(2, seed=2)
    activation = hooked.run_to(first, HOOK)
    found = hooked.run_from(HOOK, activation, tokens=second)
    assert not torch.equal(found, hooked(first))
    assert torch.equal(found, hooked.run_from(HOOK, activation.clone(), tokens=second))
    with pytest.raises(InputError, match=r"3 prompts.*2 samples"):
        hooked.run_from(HOOK, activation, tokens=prompts(3))


def test_remembering_keeps_no_activation_alive() -> None:
    import weakref

    hooked = text_tower()
    activation = hooked.run_to(prompts(2), HOOK)
    gone = weakref.ref(activation)
    del activation
    assert gone() is None


# -- errors


def test_unknown_hooks() -> None:
    hooked = HookedTower(build_vision())
    x = inputs("vision")
    with pytest.raises(HookNameError, match=r"blocks\.1\.hook_resid_pots.*did you mean 'blocks\.1\.hook_resid_post'"):
        hooked.run_to(x, "blocks.1.hook_resid_pots")
    with pytest.raises(HookNameError, match="this tower has 2 blocks, the last is 1"):
        hooked.run_to(x, "blocks.2.hook_resid_post")
    with pytest.raises(HookNameError, match="hook_resid_pre"):
        hooked.run_from("blocks.0.hook_resid_prr", torch.zeros(1, 13, 48))
    with pytest.raises(KeyError):
        hooked.run_to(x, "nonsense")
    for part in ("blocks.0.attn.hook_z", "blocks.0.hook_attn_out", "ln_final.hook_scale", "hook_pos_embed"):
        with pytest.raises(HookNameError, match="only a part of the state"):
            hooked.run_from(part, torch.zeros(1, 13, 48))


@pytest.mark.parametrize(
    ("name", "activation", "message"),
    [
        ("blocks.0.hook_resid_post", torch.zeros(2, 12, 48), r"\[batch 13 48\], got \[2, 12, 48\]"),
        ("blocks.0.hook_resid_post", torch.zeros(2, 48, 13), r"\[batch 13 48\], got \[2, 48, 13\]"),
        ("blocks.0.hook_resid_post", torch.zeros(13, 48), r"\[batch 13 48\], got \[13, 48\]"),
        ("blocks.0.hook_resid_post", torch.zeros(0, 13, 48), r"got \[0, 13, 48\]"),
        ("blocks.0.hook_resid_post", [1.0], "got list"),
        ("hook_pooled", torch.zeros(2, 20), r"\[batch 48\], got \[2, 20\]"),
        ("hook_embedding", torch.zeros(2, 48), r"\[batch 20\], got \[2, 48\]"),
        ("blocks.0.hook_resid_post", torch.zeros(2, 13, 48, dtype=torch.float64), r"float32 on cpu, got torch.float64"),
        ("blocks.0.hook_resid_post", torch.zeros(2, 13, 48, device="meta"), "on cpu, got torch.float32 on meta"),
    ],
)
def test_activations_that_do_not_fit(name: str, activation: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HookedTower(build_vision()).run_from(name, activation)


@pytest.mark.parametrize(("tower", "variant"), BOTH)
def test_a_listener_of_the_prefix_is_taken_off_again(tower: str, variant: str) -> None:
    hooked, x = HookedTower(build(tower, variant)), inputs(tower)
    expected = native_forward(build(tower, variant), x)
    bad = x.clone()
    hooked.run_to(x, "blocks.1.attn.hook_q")
    with (
        hooked.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda value, hook: 1 / 0)]),
        pytest.raises(ZeroDivisionError),
    ):
        hooked.run_to(bad, "blocks.1.attn.hook_q")
    assert torch.equal(hooked(x), expected)
    assert all(not point._forward_hooks and not point._forward_pre_hooks for point in hooked.hook_points())
