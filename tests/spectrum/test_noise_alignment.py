"""Latents that live in the noise: rows against the projector, chance against simulation, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import spectrum as oracle
from oracles.models import build_text, build_vision
from oracles.saes import KINDS, build_sae
from oracles.transcoders import prisma_transcoder

import clip_lens_ext as cle
from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.towers import HookedTower

HOOK, D = "blocks.0.hook_resid_post", 48


def split_of(d: int = D, k: int = 9, *, seed: int = 0, **fields: Any) -> cle.NoiseSplit:
    generator = torch.Generator().manual_seed(seed)
    found = cle.split_noise(torch.randn(12 * d, d, generator=generator, dtype=torch.float64), cut=k)
    return replace(found, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_projector(kind: str) -> None:
    sae, split = build_sae(kind, D, HOOK, "patches"), split_of()
    found = cle.noise_alignment(sae, split, noise_hook=HOOK)
    keep = oracle.projector(split.basis.numpy())
    for latent, row in enumerate(sae.W_dec.detach().numpy()):
        assert float(found.value[latent]) == pytest.approx(row @ keep @ row / (row @ row), abs=1e-12)
    rest = cle.noise_alignment(sae, replace(split, basis=split.signal_basis), noise_hook=HOOK)
    torch.testing.assert_close(found.value + rest.value, torch.ones(len(found), dtype=torch.float64))
    assert (found.hook_name, found.noise_hook, found.by_chance) == (HOOK, HOOK, 9 / D)


def test_planted_latents_are_found_and_no_others() -> None:
    sae, split = build_sae("topk", D, HOOK, "patches"), split_of()
    inside, half = [3, 17, 30], 8
    with torch.no_grad():
        for latent in inside:
            mix = torch.randn(9, generator=torch.Generator().manual_seed(latent), dtype=torch.float64)
            sae.W_dec[latent] = split.basis @ mix
        sae.W_dec[half] = split.basis[:, 0] + split.signal_basis[:, 0]
        sae.W_dec[5] = 0
    found = cle.noise_alignment(sae, replace(split, hook_name=HOOK))
    torch.testing.assert_close(found.value[inside], torch.ones(3, dtype=torch.float64))
    assert float(found.value[half]) == pytest.approx(0.5)
    assert sorted(found.top(3).tolist()) == inside
    assert sorted(found.within().tolist()) == inside
    assert found.value[5].isnan()
    assert found.p_value[5].isnan()
    assert 5 not in found.top(1000).tolist()
    assert len(found.top(1000)) == len(found) - 1
    frame = found.to_frame()
    assert sorted(frame["latent"][:3]) == inside
    assert frame["latent"].iloc[-1] == 5
    assert np.isnan(frame["alignment"].iloc[-1])
    assert "37 latents of blocks.0.hook_resid_post, 9 of 48 dimensions" in repr(found)


def test_chance_against_simulation() -> None:
    """Random directions: their mean is rank / d, and the p-values are uniform."""
    sae = build_sae("topk", D, HOOK, "patches", d_sae=4000)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(4000, D, generator=torch.Generator().manual_seed(1)))
    found = cle.noise_alignment(sae, split_of(), noise_hook=HOOK)
    # One direction spreads by 0.055, so the mean of 4000 by 0.0009; three standard errors of a share are 0.024.
    assert float(found.value.mean()) == pytest.approx(found.by_chance, abs=0.003)
    for level in (0.05, 0.3, 0.8):
        assert float((found.p_value <= level).double().mean()) == pytest.approx(level, abs=0.024)
    # 40 random SAEs of 37 latents, each with a chance of 0.1: more than ten would be one case in a thousand.
    hits = sum(
        bool(len(cle.noise_alignment(rows_of(sae, range(37 * i, 37 * i + 37)), split_of(), noise_hook=HOOK)
                 .within(alpha=0.1)))
        for i in range(40)
    )  # fmt: skip
    assert 0 < hits <= 10


def rows_of(sae: Any, latents: Any) -> Any:
    part = build_sae("topk", D, HOOK, "patches", d_sae=len(latents))
    with torch.no_grad():
        part.W_dec.copy_(sae.W_dec[list(latents)])
    return part


def test_all_and_nothing() -> None:
    sae = build_sae("topk", D, HOOK, "patches")
    for k, value in ((0, 0.0), (D, 1.0)):
        found = cle.noise_alignment(sae, split_of(k=k), noise_hook=HOOK)
        torch.testing.assert_close(found.value, torch.full((37,), value, dtype=torch.float64))
        assert (found.p_value == 1).all()
        assert len(found.within()) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_embedding_behind_a_projection(dtype: torch.dtype) -> None:
    model = build_vision().to(dtype)
    tower = HookedTower(model)
    sae, split = build_sae("topk", D, "hook_pooled", "pooled", dtype=dtype), split_of(20, 4)
    found = cle.noise_alignment(sae, split, tower=tower)
    keep = oracle.projector(split.basis.numpy())
    for latent, row in enumerate((sae.W_dec @ model.proj).detach().double().numpy()):
        assert float(found.value[latent]) == pytest.approx(row @ keep @ row / (row @ row), rel=1e-5)
    assert (found.hook_name, found.noise_hook, found.d) == ("hook_pooled", "hook_embedding", 20)
    with pytest.raises(InputError, match="pass tower=, whose projection"):
        cle.noise_alignment(sae, split)


def test_the_bias_of_a_projection_is_no_direction_of_a_latent() -> None:
    model = build_text("first").double()
    sae, split = build_sae("topk", 40, "hook_pooled", "pooled"), split_of(20, 4)
    found = cle.noise_alignment(sae, split, tower=HookedTower(model))
    keep = oracle.projector(split.basis.numpy())
    weight = model.text_projection.weight.detach().numpy()
    for latent, row in enumerate(sae.W_dec.detach().numpy() @ weight.T):
        assert float(found.value[latent]) == pytest.approx(row @ keep @ row / (row @ row), rel=1e-9)


def test_an_sae_of_the_embedding_needs_no_tower() -> None:
    sae, split = build_sae("topk", 20, "hook_embedding", "pooled"), split_of(20, 4)
    found = cle.noise_alignment(sae, split)
    assert torch.equal(found.value, cle.noise_alignment(sae, split, tower=HookedTower(build_vision().double())).value)


def test_what_is_not_linear_is_refused() -> None:
    split = split_of(20, 4)
    tower = HookedTower(build_vision("late_norm").double())
    for hook in ("blocks.1.hook_resid_post", HOOK):
        with pytest.raises(InputError, match=r"LayerNorms or blocks.*use noise_share"):
            cle.noise_alignment(build_sae("topk", D, hook, "cls"), split, tower=tower)
    pooled = build_sae("topk", D, "hook_pooled", "pooled")
    with (
        tower.hooks(fwd_hooks=[("hook_embedding", lambda value, hook: value.square())]),
        pytest.raises(InputError, match="not linear from hook_pooled"),
    ):
        cle.noise_alignment(pooled, split, tower=tower)


@pytest.mark.parametrize(
    ("split", "settings", "message"),
    [
        (lambda: torch.eye(D), {}, "a NoiseSplit is needed"),
        (lambda: split_of(30, 2), {"noise_hook": HOOK}, "the split is of 30 dimensions, and a latent writes 48"),
        (lambda: split_of(hook_name="blocks.1.hook_resid_pre"), {}, "of blocks.1.hook_resid_pre, and the SAE is at"),
        (lambda: split_of(hook_name=HOOK, tower="text"), {}, "of the text tower, the SAE of the vision tower"),
        (lambda: split_of(hook_name=HOOK, token_scope="cls"), {}, "of 'cls' tokens.*reads 'patches'"),
        (lambda: split_of(hook_name=HOOK), {"noise_hook": "hook_embedding"}, "contradicts the split"),
    ],
)
def test_wrong_input(split: Any, settings: dict[str, Any], message: str) -> None:
    sae = build_sae("topk", D, HOOK, "patches", tower="vision")
    with pytest.raises(InputError, match=message):
        cle.noise_alignment(sae, split(), **settings)


def test_an_sae_without_a_hook_and_wrong_numbers() -> None:
    nameless = build_sae("topk", D, None, None)
    with pytest.raises(InputError, match="does not say which hook"):
        cle.noise_alignment(nameless, split_of())
    found = cle.noise_alignment(nameless, split_of(), hook_name=HOOK, noise_hook=HOOK)
    assert found.hook_name == HOOK
    with pytest.raises(InputError, match="k must be at least 1"):
        found.top(0)
    with pytest.raises(InputError, match="alpha is a probability"):
        found.within(alpha=1.0)
    with pytest.raises(HookNameError):
        cle.noise_alignment(nameless, split_of(), tower=HookedTower(build_vision().double()), hook_name="nothing")


def test_a_transcoder_is_refused(tmp_path: Path) -> None:
    transcoder = cle.load_sae(prisma_transcoder(tmp_path).path)
    with pytest.raises(InputError, match="this is a transcoder"):
        cle.noise_alignment(transcoder, split_of(transcoder.cfg.d_in, 2), noise_hook="blocks.9.ln2.hook_normalized")
