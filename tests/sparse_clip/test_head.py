"""A head behind both towers: still an ordinary model, hook by hook, with the code as its embedding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles.models import EMBED_DIM, TEXT_VARIANTS, VISION_VARIANTS, build_clip, pictures, prompts
from oracles.zoo import hf_clip
from torch import nn

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.sparse_clip import SparseHead, add_sparse_heads
from clip_lens_ext.towers.families.headed import HeadedTower

X, IDS = pictures(3), prompts(3)


def dense_of(**variant: Any) -> cle.HookedCLIP:
    return cle.HookedCLIP(build_clip(**variant))


@torch.no_grad()
@pytest.mark.parametrize(("activation", "k"), [("relu", None), ("none", None), ("topk", 5)])
def test_the_code_by_its_formula(activation: Any, k: int | None) -> None:
    dense = dense_of()
    clip = add_sparse_heads(dense, 70, activation=activation, k=k, seed=3)
    for tower, plain, x, head in (
        (clip.vision, dense.vision, X, clip.native.image_head), (clip.text, dense.text, IDS, clip.native.text_head),
    ):  # fmt: skip
        before = plain(x).double() @ head.weight.double().T
        expected = torch.zeros_like(before)
        for row, code in zip(before, expected, strict=True):
            kept = sorted(range(70), key=lambda i: -float(row[i]))[: k or 70]
            for i in kept:
                code[i] = row[i] if activation == "none" else max(0.0, float(row[i]))
        torch.testing.assert_close(tower(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert tower.cfg.d_embed == 70
    assert not torch.equal(clip.native.image_head.weight, clip.native.text_head.weight)


@torch.no_grad()
@pytest.mark.parametrize("vision", VISION_VARIANTS)
def test_every_hook_of_the_trunk_stays(vision: str) -> None:
    dense = dense_of(vision=vision)
    clip = add_sparse_heads(dense, 33)
    for tower, plain, x in ((clip.vision, dense.vision, X), (clip.text, dense.text, IDS)):
        assert tower.hook_names() == plain.hook_names()
        expected = tower(x)
        assert torch.equal(expected, tower.reading.native_forward(x))
        for split in tower.split_names():
            assert torch.equal(tower.run_from(split, tower.run_to(x, split)), expected)
        _, cache = tower.run_with_cache(x)
        _, of_dense = plain.run_with_cache(x)
        assert torch.equal(cache["hook_embedding"], tower.run_with_cache(x)[0])
        for name in set(cache) - {"hook_embedding"}:
            assert torch.equal(cache[name], of_dense[name]), name
        edited = tower.run_with_hooks(x, fwd_hooks=[("hook_embedding", lambda code, hook: code * 0)])
        assert not edited.any()


@torch.no_grad()
@pytest.mark.parametrize("text", [name for name in TEXT_VARIANTS if name != "unprojected"])
def test_it_runs_as_an_open_clip_model_does(text: str) -> None:
    clip = add_sparse_heads(dense_of(text=text), 33, logit_scale=50.0)
    image, texts, scale = clip.native(X, IDS)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    assert torch.equal(texts, clip.native.encode_text(IDS, normalize=True))
    assert float(scale) == pytest.approx(50)
    again = cle.load_clip(clip.native)
    assert torch.equal(again.vision(X), clip.vision(X))


@torch.no_grad()
def test_no_weight_twice_and_the_dense_model_untouched() -> None:
    dense = dense_of()
    before = {name: value.clone() for name, value in dense.native.state_dict().items()}
    clip = add_sparse_heads(dense, 33)
    names = set(clip.native.state_dict())
    assert names == {f"dense.{name}" for name in before} | {"image_head.weight", "text_head.weight", "logit_scale"}
    clip.native.load_state_dict({name: value + 1 for name, value in clip.native.state_dict().items()})
    assert all(torch.equal(before[name], value) for name, value in dense.native.state_dict().items())
    moved = copy.deepcopy(clip.native).double()
    assert moved.encode_image(X.double()).dtype == torch.float64
    assert moved.visual.trunk is moved.dense.visual
    clip.native.train()
    assert clip.native.visual.training
    assert clip.native.dense.visual.training


def test_attribution_and_spectrum_know_that_it_is_not_linear() -> None:
    clip = add_sparse_heads(dense_of(), 33)
    target = cle.direction_target(torch.randn(2, 33, generator=torch.Generator().manual_seed(0)))
    from oracles.saes import build_sae

    sae = build_sae("topk", 48, hook_name="blocks.1.hook_resid_post", token_scope="cls")
    patching = cle.attribution_patching(clip.vision, X, sae, target)
    z = patching.dense()
    with torch.enable_grad():
        site = cle.open_site(clip.vision, X, sae)
        rows = site.base.clone().requires_grad_()
        gradient = torch.autograd.grad(target(site.tail(rows, torch.arange(3)))[:, 1].sum(), rows)[0]
    expected = site.codes.value * (gradient[site.codes.sample, site.codes.token] * sae.W_dec[site.codes.latent]).sum(-1)
    torch.testing.assert_close(z[site.codes.sample, 1, site.codes.latent], expected.detach(), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="not linear"):
        cle.logit_lens(clip.vision, X, sae, target, variant="frozen_norm")
    split = cle.split_noise(torch.randn(400, 33, generator=torch.Generator().manual_seed(0)), cut=3)
    with pytest.raises(UnsupportedModelError, match="linear map"):
        cle.fold_pruning(clip, split)


def test_hugging_face_too() -> None:
    clip = add_sparse_heads(cle.HookedCLIP(hf_clip()), 33)
    assert clip.vision.cfg.d_embed == clip.text.cfg.d_embed == 33


def test_wrong_input() -> None:
    for arguments, words in (
        ({"d_code": 0}, "d_code is a number"),
        ({"d_in": 2.0}, "d_in is a number"),
        ({"activation": "gelu"}, "activation is one of"),
        ({"k": 3}, "k, from 1 to 8"),
        ({"activation": "topk"}, "k, from 1 to 8"),
        ({"activation": "topk", "k": 9}, "k, from 1 to 8"),
    ):
        with pytest.raises(InputError, match=words):
            SparseHead(**{"d_in": 4, "d_code": 8, **arguments})
    with pytest.raises(InputError, match="logit_scale is a factor"):
        add_sparse_heads(dense_of(), 8, logit_scale=0)
    with pytest.raises(InputError, match="vision tower alone"):
        add_sparse_heads(cle.HookedCLIP(build_clip().visual), 8)
    with pytest.raises(InputError, match="out_features"):
        HeadedTower(build_clip().visual, nn.Identity())
    with pytest.raises(UnsupportedModelError, match="two towers"):
        cle.HookedTower(add_sparse_heads(dense_of(), 8).native)
    assert EMBED_DIM == 20
