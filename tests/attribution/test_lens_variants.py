"""The Logit Lens read three ways: with the picture's LayerNorm held, and without any LayerNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import tower as oracle
from oracles.attribution import each
from oracles.saes import KINDS, build_sae
from oracles.sites import IDS, SITES, make
from oracles.zoo import BY_NAME, model_of
from torch.nn import functional as F

from clip_lens_ext.attribution import Attribution, direction_target, logit_lens, probe_target
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

# Where the SAE has a token that pooling takes, from the middle of the network and from its end.
DIRECT = [i for i in (2, 3, 5, 6, 7, 8, 9, 10, 14, 15, 16, 17, 20, 22, 23, 24, 25)]
LAST_CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("index", DIRECT, ids=[IDS[i] for i in DIRECT])
def test_the_direct_effect_against_the_oracle(index: int, cosine: bool) -> None:
    """The row is added to the last stream while LayerNorm's scale is held, and the embedding looked at."""
    site = SITES[index]
    model, x, sae, directions = make(site)
    tower, target = HookedTower(model), direction_target(directions, cosine=cosine)
    unit = logit_lens(tower, x, sae, target, variant="frozen_norm")
    times = logit_lens(tower, x, sae, target, variant="frozen_norm", times_activation=True)
    assert (unit.method, times.method) == ("logit_lens_frozen_norm", "activation_x_logit_lens_frozen_norm")
    assert times.settings == {"variant": "frozen_norm", "times_activation": True}
    explained = each(model, x[1:], sae, site[2], site[3], directions, cosine=cosine)[0]
    for latent in explained.active()[:1]:
        each_token = [explained.direct(latent, token) for token in range(len(explained.tokens))]
        assert torch.allclose(unit.dense()[1, :, latent], torch.stack(each_token).sum(dim=0), rtol=0, atol=1e-12)
        amounts = explained.latents[:, latent]
        expected = sum(amount * one for amount, one in zip(amounts, each_token, strict=True))
        assert torch.allclose(times.dense()[1, :, latent], expected, rtol=0, atol=1e-12)
    assert times.value.abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_direct_effect_of_every_class_of_sae(kind: str) -> None:
    """A decoder that the SAE's input scales is scaled here too: one unit of a latent writes that much."""
    model, x, sae, directions = make(LAST_CLS, kind)
    found = logit_lens(HookedTower(model), x, sae, direction_target(directions), variant="frozen_norm")
    explained = each(model, x, sae, LAST_CLS[2], "cls", directions)[1]
    for latent in explained.active()[:3]:
        assert torch.allclose(found.dense()[1, :, latent], explained.direct(latent, 0), rtol=0, atol=1e-12)


def test_the_direct_effect_with_the_error_term_dropped() -> None:
    site = SITES[6]
    model, x, sae, directions = make(site)
    target = direction_target(directions)
    found = logit_lens(HookedTower(model), x, sae, target, variant="frozen_norm", error_term="dropped")
    explained = each(model, x, sae, site[2], site[3], directions, kept=False)[0]
    latent = explained.active()[0]
    assert torch.allclose(found.dense()[0, :, latent], explained.direct(latent, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("index", [2, 3, 10, 15, 17, 20], ids=[IDS[i] for i in (2, 3, 10, 15, 17, 20)])
def test_the_embedding_variant(index: int, cosine: bool) -> None:
    """`y(W_proj D_i)`: the row times the projection's matrix, neither LayerNorm nor bias."""
    site = SITES[index]
    model, x, sae, directions = make(site)
    found = logit_lens(HookedTower(model), x, sae, direction_target(directions, cosine=cosine), variant="embedding")
    weights = oracle.spec_of(model).weights
    matrix = weights.get("proj", weights.get("text_projection"))
    embedded = sae.W_dec.detach() @ matrix
    lens = F.cosine_similarity(embedded[:, None], directions[None], dim=-1) if cosine else embedded @ directions.T
    assert torch.allclose(found.value, lens[found.latent], rtol=0, atol=1e-12)
    assert found.method == "logit_lens_embedding"
    times = logit_lens(HookedTower(model), x, sae, direction_target(directions, cosine=cosine), variant="embedding",
                       times_activation=True)  # fmt: skip
    assert torch.allclose(times.value, found.value * found.activation[:, None], rtol=0, atol=1e-11)
    assert times.method == "activation_x_logit_lens_embedding"


def test_a_projection_with_a_bias_and_one_that_is_none() -> None:
    model, x, sae, directions = make(("text", "first", "blocks.2.hook_resid_pre", "all", 40))
    found = logit_lens(HookedTower(model), x, sae, direction_target(directions, cosine=False), variant="embedding")
    expected = sae.W_dec.detach() @ model.text_projection.weight.T @ directions.T
    assert torch.allclose(found.value, expected[found.latent], rtol=0, atol=1e-12)
    assert model.text_projection.bias.abs().max() > 0.1
    model, x, _, _ = make(("text", "unprojected", "hook_pooled", "pooled", 40))
    sae = build_sae("topk", 40, "blocks.1.hook_resid_post", "all", tower="text")
    vectors = torch.eye(40, dtype=torch.float64)[:2]
    found = logit_lens(HookedTower(model), x, sae, direction_target(vectors, cosine=False), variant="embedding")
    assert torch.allclose(found.value, sae.W_dec.detach()[found.latent][:, :2], rtol=0, atol=1e-13)


def test_a_margin_is_read_along_its_own_derivative() -> None:
    """The runner-up is the one of the picture: the direct effect on two logits, and their difference."""
    model, x, sae, directions = make(LAST_CLS)
    tower = HookedTower(model)
    logits = probe_target(directions, torch.tensor([0.1, 0.0, -0.1]), labels=["a", "b", "c"])
    margins = probe_target(directions, torch.tensor([0.1, 0.0, -0.1]), kind="margin")
    unit = logit_lens(tower, x, sae, logits, variant="frozen_norm")
    found = logit_lens(tower, x, sae, margins, variant="frozen_norm")
    scores = unit.prediction
    for pair in range(len(unit)):
        sample = int(unit.sample[pair])
        for index in range(3):
            others = [other for other in range(3) if other != index]
            rival = max(others, key=lambda other: float(scores[sample, other]))
            expected = unit.value[pair, index] - unit.value[pair, rival]
            assert torch.allclose(found.value[pair, index], expected, rtol=0, atol=1e-12)


def test_tokens_without_a_direct_path() -> None:
    model, x, sae, directions = make(("vision", "plain", "blocks.0.hook_resid_post", "patches", 48))
    with pytest.raises(InputError, match="an SAE on 'patches' has no direct path to the output: pooling takes cls"):
        logit_lens(HookedTower(model), x, sae, direction_target(directions), variant="frozen_norm")


def test_towers_whose_end_is_no_linear_map() -> None:
    for name, message in [("hf-siglip-vision", "pooling is attention"), ("resnet", "run as they are")]:
        tower = HookedTower(model_of(name))
        hook = "blocks.1.hook_resid_post"
        sae = build_sae("topk", tower.hook_width(hook), hook, "all")
        target = direction_target(torch.ones(tower.cfg.d_embed, dtype=torch.float64))
        for variant in ("frozen_norm", "embedding"):
            with pytest.raises(InputError, match=message):
                logit_lens(tower, BY_NAME[name].inputs(1, dtype=torch.float64), sae, target, variant=variant)


def test_an_mlp_head_is_no_projection() -> None:
    model = BY_NAME["timm-cls"].build().double()
    model.head = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.GELU(), torch.nn.Linear(30, 20)).double()
    tower = HookedTower(model)
    sae = build_sae("topk", 48, "blocks.1.hook_resid_post", "cls")
    target = direction_target(torch.ones(20, dtype=torch.float64))
    with pytest.raises(InputError, match="the projection of this tower is not linear"):
        logit_lens(tower, BY_NAME["timm-cls"].inputs(dtype=torch.float64), sae, target, variant="embedding")


def test_before_the_first_layer_norm_and_under_a_live_hook() -> None:
    model, x, _, directions = make(LAST_CLS)
    tower, target = HookedTower(model), direction_target(directions)
    sae = build_sae("topk", 48, "hook_full_embed", "all")
    with pytest.raises(InputError, match=r"lies a LayerNorm: take blocks\.0\.hook_resid_pre"):
        logit_lens(tower, x, sae, target, variant="frozen_norm")
    tower.add_perma_hook("hook_pooled", lambda value, hook: 2 * value)
    with pytest.raises(InputError, match="is a hook live at the end of the tower"):
        logit_lens(tower, x, make(LAST_CLS)[2], target, variant="frozen_norm")
    assert not tower.hook_dict["blocks.1.hook_resid_post"]._forward_hooks


def test_an_unknown_variant() -> None:
    model, x, sae, directions = make(LAST_CLS)
    with pytest.raises(InputError, match="'decoder', 'frozen_norm' or 'embedding', got 'tuned'"):
        logit_lens(HookedTower(model), x, sae, direction_target(directions), variant="tuned")  # type: ignore[arg-type]


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, x, sae, directions = make(LAST_CLS)
    found = logit_lens(HookedTower(model), x, sae, direction_target(directions), variant="frozen_norm")
    found.save(tmp_path / "lens.safetensors")
    assert Attribution.load(tmp_path / "lens.safetensors").settings == found.settings
