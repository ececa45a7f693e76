"""One unit of a latent adds its effective decoder row, times the token's scale, in every SAELens class."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from oracles.saes import KINDS, SAEFormula, build_sae
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.decoder import check_decoder, decoder_rows, output_scale

ROWS = torch.randn(4, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 + 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_is_the_sae(kind: str) -> None:
    sae = build_sae(kind, 11, None, None)
    formula = SAEFormula(sae)
    latents = sae.encode(ROWS)
    recons = sae.decode(latents)
    for i, row in enumerate(ROWS):
        assert torch.allclose(latents[i], formula.encode(row), rtol=0, atol=1e-13)
        assert torch.allclose(recons[i], formula.decode(latents[i], row), rtol=0, atol=1e-12)
    assert 0 < int((latents > 0).sum()) < latents.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_of_a_latent(kind: str, dtype: torch.dtype) -> None:
    sae = build_sae(kind, 11, None, None, dtype=dtype)
    formula, rows = SAEFormula(sae), ROWS.to(dtype)
    scale, latents = output_scale(sae, rows), torch.tensor([0, 5, 5, 36])
    assert scale.shape == (4, 1)
    found = decoder_rows(sae, latents)
    assert found.shape == (4, 11)
    for i, row in enumerate(ROWS):
        for j, latent in enumerate(latents.tolist()):
            base = torch.zeros(37, dtype=torch.float64)
            moved = base.clone()
            moved[latent] = 1
            expected = formula.decode(moved, row) - formula.decode(base, row)
            # Rounding of numbers of size one to ten.
            bound = 1e-12 if dtype == torch.float64 else 1e-5
            assert torch.allclose((scale[i] * found[j]).double(), expected, rtol=0, atol=bound), (kind, i, latent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_passes_the_check(kind: str, dtype: torch.dtype) -> None:
    sae = build_sae(kind, 11, None, None, dtype=dtype)
    check_decoder(sae, ROWS[:1].to(dtype), torch.arange(37))
    check_decoder(sae, 1000 * ROWS[:1].to(dtype), torch.tensor([3]))


class Squared(type(build_sae("standard", 11, None, None))):
    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts**2 @ self.W_dec + self.b_dec


class Doubled(type(build_sae("topk", 11, None, None))):
    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts * 2)


@pytest.mark.parametrize(("kind", "changed"), [("standard", Squared), ("topk", Doubled)])
def test_a_decoder_of_another_kind_is_refused(kind: str, changed: type) -> None:
    sae = build_sae(kind, 11, None, None)
    sae.__class__ = changed
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises(InputError, match=f"{changed.__name__}.decode is not what SAELens' classes compute"):
            check_decoder(sae, ROWS[:1], torch.arange(5))


def test_the_check_runs_once_and_keeps_no_sae_alive() -> None:
    sae = build_sae("standard", 11, None, None)
    check_decoder(sae, ROWS[:1], torch.arange(5))
    calls = []
    sae.hook_sae_acts_post.add_hook(lambda value, hook: calls.append(1))
    check_decoder(sae, ROWS[:1], torch.arange(5))
    assert calls == []
    gone = weakref.ref(sae)
    del sae
    gc.collect()
    assert gone() is None
