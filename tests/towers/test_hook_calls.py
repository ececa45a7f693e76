"""TransformerLens' calls on a tower: nothing is silent where it does nothing, and everything is put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.models import build_text, build_vision, inputs
from torch import Tensor
from transformer_lens import ActivationCache

from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.towers import HookedTower

X = inputs("vision")
HOOK = "blocks.1.hook_resid_mid"


@pytest.fixture
def tower() -> HookedTower:
    return HookedTower(build_vision())


def double(value: Tensor, hook: Any) -> Tensor:
    return value * 2


CALLS: dict[str, Callable[[HookedTower, Any], Any]] = {
    "run_with_cache": lambda tower, names: tower.run_with_cache(X, names_filter=names),
    "get_caching_hooks": lambda tower, names: tower.get_caching_hooks(names),
    "add_caching_hooks": lambda tower, names: tower.add_caching_hooks(names),
}
HOOKING: dict[str, Callable[[HookedTower, Any], Any]] = {
    "add_hook": lambda tower, name: tower.add_hook(name, double),
    "add_perma_hook": lambda tower, name: tower.add_perma_hook(name, double),
    "run_with_hooks": lambda tower, name: tower.run_with_hooks(X, fwd_hooks=[(name, double)]),
    "run_with_hooks backward": lambda tower, name: tower.run_with_hooks(X, bwd_hooks=[(name, double)]),
    "hooks": lambda tower, name: tower.hooks(fwd_hooks=[(name, double)]).__enter__(),
}


def is_clean(tower: HookedTower) -> bool:
    return (
        not any(
            point._forward_hooks
            or point._backward_hooks
            or point._forward_pre_hooks
            or point.fwd_hooks
            or point.bwd_hooks
            for point in tower.hook_points()
        )
        and not tower.is_caching
        and tower.context_level == 0
    )


@pytest.mark.parametrize("call", [*CALLS, *HOOKING])
def test_unknown_name_lists_near_ones(tower: HookedTower, call: str) -> None:
    with pytest.raises(
        HookNameError, match=r"no hook matches 'blocks\.1\.hook_resid_mud'; did you mean 'blocks\.1\.hook_resid_mid'"
    ):
        (CALLS | HOOKING)[call](tower, "blocks.1.hook_resid_mud")
    assert is_clean(tower)


@pytest.mark.parametrize("call", [*CALLS, *HOOKING])
def test_predicate_that_matches_nothing(tower: HookedTower, call: str) -> None:
    with pytest.raises(HookNameError, match="matches no hook"):
        (CALLS | HOOKING)[call](tower, lambda name: "resid_mud" in name)
    assert is_clean(tower)


@pytest.mark.parametrize(
    "names",
    [[HOOK, "hook_embd"], {HOOK, "hook_embd"}, (HOOK, "hook_embd"), iter([HOOK, "hook_embd"])],
    ids=["list", "set", "tuple", "iterator"],
)
@pytest.mark.parametrize("call", CALLS)
def test_one_unknown_name_among_several(tower: HookedTower, call: str, names: Any) -> None:
    names = [HOOK, "hook_embd"] if not isinstance(names, list | set | tuple) else names
    with pytest.raises(HookNameError, match=r"'hook_embd'.*did you mean 'hook_embed'"):
        CALLS[call](tower, names)
    assert is_clean(tower)


@pytest.mark.parametrize("call", CALLS)
def test_empty_filter(tower: HookedTower, call: str) -> None:
    with pytest.raises(HookNameError, match="empty"):
        CALLS[call](tower, [])


@pytest.mark.parametrize(
    "names",
    [HOOK, [HOOK], (HOOK,), {HOOK}, lambda name: name == HOOK],
    ids=["str", "list", "tuple", "set", "predicate"],
)
def test_filters_that_match(tower: HookedTower, names: Any) -> None:
    _, cache = tower.run_with_cache(X, names_filter=names)
    assert list(cache.keys()) == [HOOK]
    found = tower.add_caching_hooks(names)
    tower(X)
    assert list(found) == [HOOK]
    assert torch.equal(found[HOOK], cache[HOOK])
    tower.reset_hooks()
    assert is_clean(tower)


def test_a_predicate_hooks_every_match(tower: HookedTower) -> None:
    seen: list[str] = []
    tower.run_with_hooks(
        X, fwd_hooks=[(lambda name: name.endswith("hook_z"), lambda value, hook: seen.append(hook.name))]
    )
    assert seen == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]


def test_block_that_does_not_exist(tower: HookedTower) -> None:
    with pytest.raises(
        HookNameError,
        match=r"'blocks\.12\.hook_mlp_out': this tower has 2 blocks, the last is 1; see tower\.hook_names",
    ):
        tower.run_with_cache(X, names_filter="blocks.12.hook_mlp_out")
    with pytest.raises(KeyError) as caught:
        tower.check_hook_name("nothing")
    assert str(caught.value).startswith("no hook matches 'nothing'"), "a KeyError shows the repr of its message"


@pytest.mark.parametrize("where", ["hooks", "run_with_hooks", "run_with_cache"])
def test_hooks_are_gone_after_an_exception(tower: HookedTower, where: str) -> None:
    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    expected = tower(X)
    if where == "run_with_cache":
        bad = X.clone()
        bad[1, 0, 0, 0] = torch.nan
        with pytest.raises(InputError):
            tower.run_with_cache(bad)
    elif where == "run_with_hooks":
        with pytest.raises(ZeroDivisionError):
            tower.run_with_hooks(X, fwd_hooks=[("hook_embed", double), (HOOK, fail)])
    else:
        with pytest.raises(ZeroDivisionError), tower.hooks(fwd_hooks=[("hook_embed", double), (HOOK, fail)]):
            tower(X)
    assert is_clean(tower)
    assert torch.equal(tower(X), expected)


def test_a_second_unknown_name_takes_the_first_hook_off_again(tower: HookedTower) -> None:
    with pytest.raises(HookNameError):
        tower.run_with_hooks(X, fwd_hooks=[(HOOK, double), ("blocks.1.hook_resid_mud", double)])
    assert is_clean(tower)


def test_permanent_hooks_are_kept(tower: HookedTower) -> None:
    plain = tower(X)
    tower.add_perma_hook(HOOK, double)
    doubled = tower(X)
    assert not torch.equal(doubled, plain)
    tower.run_with_cache(X)
    tower.run_with_hooks(X, fwd_hooks=[("hook_embed", double)])
    with pytest.raises(ZeroDivisionError), tower.hooks(fwd_hooks=[("hook_embed", double)]):
        raise ZeroDivisionError
    tower.reset_hooks()
    assert torch.equal(tower(X), doubled)
    tower.reset_hooks(including_permanent=True)
    assert torch.equal(tower(X), plain)


def test_nested_contexts(tower: HookedTower) -> None:
    plain = tower(X)
    with tower.hooks(fwd_hooks=[("hook_embed", double)]):
        outer = tower(X)
        with tower.hooks(fwd_hooks=[(HOOK, double)]):
            assert not torch.equal(tower(X), outer)
        assert torch.equal(tower(X), outer)
    assert torch.equal(tower(X), plain)
    assert is_clean(tower)


def test_a_plain_torch_hook_counts_as_a_listener(tower: HookedTower) -> None:
    seen: list[Tensor] = []
    handle = tower.hook_dict["blocks.0.attn.hook_pattern"].register_forward_hook(
        lambda m, i, output: seen.append(output)
    )
    tower(X)
    handle.remove()
    assert seen[0].shape == (2, 3, 13, 13)
    assert torch.allclose(seen[0].sum(-1), torch.ones(2, 3, 13))


def test_cache_object(tower: HookedTower) -> None:
    embedding, cache = tower.run_with_cache(X)
    assert isinstance(cache, ActivationCache)
    assert torch.equal(embedding, cache["hook_embedding"])
    assert cache["resid_post", 1].shape == (2, 13, 48)
    assert cache["pattern", 0].shape == (2, 3, 13, 13)
    _, plain = tower.run_with_cache(X, return_cache_object=False)
    assert type(plain) is dict
    assert list(plain) == list(cache.keys())
    assert is_clean(tower)


def test_remove_batch_dim(tower: HookedTower) -> None:
    _, whole = tower.run_with_cache(X[:1])
    _, cache = tower.run_with_cache(X[:1], remove_batch_dim=True)
    assert cache["blocks.0.attn.hook_pattern"].shape == (3, 13, 13)
    assert torch.equal(cache[HOOK], whole[HOOK][0])
    assert not cache.has_batch_dim
    with pytest.raises(InputError, match="batch of one sample, got 2"):
        tower.run_with_cache(X, remove_batch_dim=True)
    assert is_clean(tower)


def test_pos_slice(tower: HookedTower) -> None:
    """A slice of positions means the token axis; a pooled vector has none, and its batch axis must not be cut."""
    _, whole = tower.run_with_cache(X)
    _, cache = tower.run_with_cache(X, pos_slice=0)
    assert torch.equal(cache[HOOK], whole[HOOK][:, :1])
    assert torch.equal(cache["blocks.0.attn.hook_z"], whole["blocks.0.attn.hook_z"][:, :1])
    assert torch.equal(cache["blocks.0.attn.hook_pattern"], whole["blocks.0.attn.hook_pattern"][:, :, :1])
    for name in ("hook_pooled", "hook_embedding"):
        assert torch.equal(cache[name], whole[name]), name


def test_backward_caching_is_refused(tower: HookedTower) -> None:
    with pytest.raises(InputError, match=r"incl_bwd needs a scalar.*bwd_hooks"):
        tower.run_with_cache(X, incl_bwd=True)
    assert is_clean(tower)


def test_hook_point_names(tower: HookedTower) -> None:
    for name, point in tower.hook_dict.items():
        assert point.name == name
        assert tower.mod_dict[name] is point
    assert tower.hook_dict["blocks.1.hook_resid_post"].layer() == 1


@pytest.mark.parametrize("variant", ["bare", "late_norm"])
def test_cache_analysis_on_a_tower_without_ln_pre(variant: str) -> None:
    """TransformerLens' own decompositions of the residual stream: their parts add up to it."""
    tower = HookedTower(build_vision(variant).double())
    _, cache = tower.run_with_cache(X.double())
    final = cache["blocks.1.hook_resid_post"]
    accumulated, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    assert torch.equal(accumulated[-1], final)
    assert torch.equal(accumulated[1], cache["blocks.0.hook_resid_mid"])
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    assert torch.allclose(parts.sum(dim=0), final, rtol=0, atol=1e-12)


def test_head_results() -> None:
    tower = HookedTower(build_text().double())
    ids = inputs("text")
    _, cache = tower.run_with_cache(ids)
    heads, labels = cache.stack_head_results(return_labels=True)
    assert heads.shape == (12, 2, 9, 40)
    assert labels[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    for layer in range(3):
        summed = heads[4 * layer : 4 * layer + 4].sum(dim=0) + tower.blocks[layer].attn.b_O
        assert torch.allclose(summed, cache[f"blocks.{layer}.hook_attn_out"], rtol=0, atol=1e-12)
    # Without hook_result in the cache TransformerLens makes the results of z and W_O itself.
    _, cache = tower.run_with_cache(ids, names_filter=lambda name: not name.endswith("hook_result"))
    assert torch.allclose(cache.stack_head_results(), heads, rtol=0, atol=1e-12)
