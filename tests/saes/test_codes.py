"""Sparse codes are the SAE's own dense latents at the tokens of its scope, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import tower as oracle
from oracles.models import build, inputs
from oracles.saes import KINDS, SAEFormula, build_sae, scope_tokens
from torch import Tensor

from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.saes.codes import SparseCodes, encode
from clip_lens_ext.towers import HookedTower
from clip_lens_ext.towers.positions import TokenPositions, select_tokens

SITES = [
    ("vision", "blocks.0.hook_resid_post", "cls", 48),
    ("vision", "blocks.1.hook_resid_mid", "patches", 48),
    ("vision", "hook_full_embed", "all", 48),
    ("vision", "blocks.0.attn.hook_z", "all", 48),
    ("vision", "blocks.1.hook_mlp_out", "patches", 48),
    ("vision", "hook_pooled", "pooled", 48),
    ("vision", "hook_embedding", "pooled", 20),
    ("text", "blocks.1.hook_resid_post", "eot", 40),
    ("text", "blocks.2.attn.hook_z", "eot", 40),
    ("text", "blocks.0.hook_resid_pre", "all", 40),
]


def make(site: tuple[str, str, str, int], kind: str = "topk") -> tuple[HookedTower, Tensor, Any]:
    tower, hook, scope, width = site
    model = build(tower, "plain" if tower == "vision" else "flattened").double()
    sae = build_sae(kind, width, hook, scope, reshape=hook.endswith("hook_z"))
    return HookedTower(model), inputs(tower, 3, dtype=torch.float64), sae


@pytest.mark.parametrize("chunk", [1, 4, 4096])
@pytest.mark.parametrize("site", SITES, ids=[f"{site[1]}-{site[2]}" for site in SITES])
def test_codes_are_the_latents_at_the_tokens(site: tuple, chunk: int) -> None:
    tower, x, sae = make(site)
    codes = encode(tower, x, sae, chunk=chunk)
    activation = oracle.run(oracle.spec_of(tower.native), x)[1][site[1]]
    formula = SAEFormula(sae)
    dense = codes.dense()
    n_ctx = 13 if site[0] == "vision" else 9
    n_token = {"patches": 12, "all": n_ctx}.get(site[2], 1)
    assert dense.shape == (3, n_token, 37)
    for sample in range(3):
        eot = int(x[sample].argmax()) if site[0] == "text" else None
        tokens = [-1] if site[2] == "pooled" else scope_tokens(site[2], n_ctx, eot)
        assert codes.position[sample].tolist() == tokens
        for nth, token in enumerate(tokens):
            row = (activation[sample] if token < 0 else activation[sample, token]).flatten()
            assert torch.allclose(dense[sample, nth], formula.encode(row), rtol=0, atol=1e-11)
    assert (codes.value != 0).all()
    assert len(codes) == int((dense != 0).sum())
    assert codes.l0 == pytest.approx(len(codes) / (3 * n_token))
    assert (codes.hook_name, codes.token_scope, codes.d_sae) == (site[1], site[2], 37)
    assert not codes.value.requires_grad
    order = (codes.sample * n_token + codes.token) * 37 + codes.latent
    assert (order.diff() > 0).all(), "sample, token, latent is the order"


@pytest.mark.parametrize("kind", KINDS)
def test_every_class(kind: str) -> None:
    tower, x, sae = make(SITES[1], kind)
    expected = sae.encode(tower.run_to(x, SITES[1][1])[:, 1:])
    for chunk in (1, 5, 36, 4096):
        codes = encode(tower, x, sae, chunk=chunk)
        # A matrix product of other rows sums in another order: float64's rounding.
        assert torch.allclose(codes.dense(), expected, rtol=0, atol=1e-13)
    assert 0 < len(codes) < expected.numel()


def test_settings_of_the_call() -> None:
    tower, x, sae = make(SITES[0])
    codes = encode(tower, x, sae, hook_name="blocks.1.hook_resid_post", token_scope="all")
    assert torch.allclose(codes.dense(), sae.encode(tower.run_to(x, "blocks.1.hook_resid_post")), rtol=0, atol=1e-13)
    assert (codes.hook_name, codes.token_scope) == ("blocks.1.hook_resid_post", "all")


def test_an_sae_that_says_no_scope() -> None:
    tower, x, _ = make(SITES[0])
    assert encode(tower, x, build_sae("topk", 48, "blocks.0.hook_resid_post", None)).n_token == 13
    assert encode(tower, x, build_sae("topk", 48, "hook_pooled", None)).token_scope == "pooled"


def test_negative_latents_are_active() -> None:
    codes = SparseCodes.from_dense(torch.tensor([[[0.0, -2.0, 0.0, 1.0]]]))
    assert codes.latent.tolist() == [1, 3]
    assert codes.value.tolist() == [-2.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_dense_and_pairs(n_sample: int, n_token: int, d_sae: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n_sample, n_token, d_sae, generator=generator)
    dense = dense * (torch.rand(dense.shape, generator=generator) < density)
    codes = SparseCodes.from_dense(dense, hook_name="h", token_scope="all")
    assert torch.equal(codes.dense(), dense)
    assert codes.l0 == pytest.approx(int((dense != 0).sum()) / (n_sample * n_token))
    sample, latent, pair = codes.pairs()
    expected = [
        (s, i) for s in range(n_sample) for i in range(d_sae) if any(dense[s, t, i] != 0 for t in range(n_token))
    ]
    assert list(zip(sample.tolist(), latent.tolist(), strict=True)) == expected
    for entry in range(len(codes)):
        assert expected[int(pair[entry])] == (int(codes.sample[entry]), int(codes.latent[entry]))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_of_an_sae(kind: str) -> None:
    tower, x, sae = make(SITES[2], kind)
    with torch.no_grad():
        sae.W_enc[3, 5] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite latents"):
        encode(tower, x, sae)


def test_nan_of_the_tower() -> None:
    tower, x, sae = make(SITES[0])
    tower.add_hook("hook_full_embed", lambda value, hook: value * torch.inf)
    with pytest.raises(InputError, match="NaN or infinite latents"):
        encode(tower, x, sae)


def test_what_does_not_fit() -> None:
    tower, x, sae = make(SITES[0])
    with pytest.raises(InputError, match="reads vectors of 40"):
        encode(tower, x, build_sae("topk", 40, "blocks.0.hook_resid_post", "cls"))
    with pytest.raises(HookNameError, match="did you mean"):
        encode(tower, x, sae, hook_name="blocks.0.hook_resid_pots")
    with pytest.raises(InputError, match="unknown token scope"):
        encode(tower, x, sae, token_scope="every")
    with pytest.raises(InputError, match="one picture"):
        encode(tower, x[0], sae)


# -- token positions


@pytest.mark.parametrize("scope", ["cls", "patches", "all", "eot"])
def test_take_and_put(scope: Any) -> None:
    activation = torch.arange(3 * 5 * 2.0).reshape(3, 5, 2)
    eot = torch.tensor([4, 1, 2])
    positions = TokenPositions(scope, eot if scope == "eot" else None)
    taken = positions.take(activation)
    out = positions.put(activation, -taken - 1)
    indices = positions.indices(5, 3)
    assert indices.shape == taken.shape[:2]
    for sample in range(3):
        tokens = scope_tokens(scope, 5, int(eot[sample]))
        assert indices[sample].tolist() == tokens
        for nth, token in enumerate(tokens):
            assert torch.equal(taken[sample, nth], activation[sample, token])
        for token in range(5):
            assert torch.equal(
                out[sample, token], -activation[sample, token] - 1 if token in tokens else activation[sample, token]
            )
    assert torch.equal(positions.put(activation, taken), activation)
    assert torch.equal(select_tokens(activation, scope, eot), taken.reshape(-1, 2))
    chosen = torch.tensor([2, 0, 2])
    assert torch.equal(positions.select(chosen).take(activation[chosen]), taken[chosen])


def test_scopes_of_pooled_vectors() -> None:
    positions = TokenPositions("pooled")
    vectors = torch.randn(3, 4)
    assert torch.equal(positions.take(vectors), vectors)
    assert torch.equal(positions.put(vectors, -vectors), -vectors)
    assert positions.indices(1, 3).tolist() == [[-1]] * 3
    with pytest.raises(InputError, match="end-of-text"):
        TokenPositions("eot").take(torch.zeros(2, 3, 4))


def test_an_empty_chunk_is_refused() -> None:
    tower, x, sae = make(SITES[0])
    with pytest.raises(InputError, match="chunk must be at least 1"):
        encode(tower, x, sae, chunk=0)
