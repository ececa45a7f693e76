"""The tail at one token is the tail: for every family's pooling, at every hook it starts from, with its gradient."""

from __future__ import annotations

import pytest
import torch
from oracles.models import TEXT_VARIANTS, VISION_VARIANTS, build, inputs

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower
from clip_lens_ext.towers.pooled_tail import can_run_pooled, run_pooled

ALL = [("vision", variant) for variant in VISION_VARIANTS] + [("text", variant) for variant in TEXT_VARIANTS]
MEAN_POOLED = {("vision", "bare"), ("vision", "average")}


def starts(tower: HookedTower) -> list[str]:
    last = tower.cfg.n_layers - 1
    ends = [f"blocks.{last}.hook_resid_{part}" for part in ("pre", "mid", "post")]
    return [f"blocks.{last - 1}.hook_resid_post", *ends]


@pytest.mark.parametrize(("kind", "variant"), ALL)
def test_pooled_tail_and_its_gradient_are_those_of_the_whole_tail(kind: str, variant: str) -> None:
    tower = HookedTower(build(kind, variant).double())
    x = inputs(kind, 5, dtype=torch.float64)
    tokens = x if kind == "text" else None
    for name in starts(tower):
        assert can_run_pooled(tower, name) == ((kind, variant) not in MEAN_POOLED)
        if (kind, variant) in MEAN_POOLED:
            continue
        # Edited, so that the samples differ at every token and not only in what they show.
        edit = torch.randn(tower.run_to(x, name).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        whole = (tower.run_to(x, name) + edit).requires_grad_()
        pooled = whole.detach().clone().requires_grad_()
        expected, found = tower.run_from(name, whole, tokens=tokens), run_pooled(tower, name, pooled, tokens=tokens)
        # float64: the same sums in another order.
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
        torch.testing.assert_close(pooled.grad, whole.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["vision", "text"])
def test_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    tower = HookedTower(build(kind, {"vision": "plain", "text": "flattened"}[kind]).to(dtype))
    x = inputs(kind, 5, dtype=dtype)
    name = starts(tower)[0]
    activation = tower.run_to(x, name)
    found = run_pooled(tower, name, activation, tokens=x if kind == "text" else None)
    assert found.dtype == dtype
    # Rounding of one block in 8 and 24 bits of mantissa, on embeddings of order one.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(found, tower.run_from(name, activation), rtol=tolerance, atol=tolerance)


def test_not_where_somebody_listens_trains_or_starts_earlier() -> None:
    tower = HookedTower(build("vision", "plain"))
    name = starts(tower)[0]
    assert can_run_pooled(tower, name)
    with tower.hooks([(f"blocks.{tower.cfg.n_layers - 1}.attn.hook_pattern", lambda activation, hook: None)]):
        assert not can_run_pooled(tower, name)
    tower.train()
    assert not can_run_pooled(tower, name)
    tower.eval()
    assert can_run_pooled(tower, name)
    for early in ("hook_embed", "blocks.0.hook_resid_pre", "hook_pooled", "hook_embedding"):
        assert not can_run_pooled(tower, early)


def test_prompts_are_needed_where_they_say_which_token() -> None:
    tower = HookedTower(build("text", "eos"))
    activation = tower.run_to(inputs("text", 2), starts(tower)[0])
    with pytest.raises(InputError, match="tokens="):
        run_pooled(tower, starts(tower)[0], activation)


def test_ablation_with_a_listener_is_that_without() -> None:
    """A hook that changes nothing sends exact ablation through the whole tail: another path to the same numbers."""
    pytest.importorskip("sae_lens")
    clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
    pixels = cle.planted.normalise(world.sample(1, seed=3, split="test").images)
    target = cle.text_target(clip, world.prompts()[0])
    short = cle.exact_ablation(clip.vision, pixels, sae, target)
    with clip.vision.hooks([("blocks.3.hook_attn_out", lambda activation, hook: activation)]):
        assert not can_run_pooled(clip.vision, sae.cfg.metadata.hook_name)
        whole = cle.exact_ablation(clip.vision, pixels, sae, target)
    torch.testing.assert_close(short.value, whole.value, rtol=0, atol=1e-6)  # float32 cosines
    assert short.value.abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_a_view_of_a_text_tower_has_the_mode_of_its_model(training: bool) -> None:
    model = build("text", "flattened").train(training)
    assert HookedTower(model).native.training == training
