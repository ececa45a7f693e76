"""Sets of latents at zero against a loop through the native model, and controls of like worth."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.saes import build_sae
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.attribution import direction_target, exact_ablation, probe_target
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.saes import encode
from clip_lens_ext.semantics import SwitchedOff, switch_off
from clip_lens_ext.semantics.switch_off import matched
from clip_lens_ext.towers import HookedCLIP

PROMPTS = ["a crane", "a duck", "a bow"]
# float64; decoding with some latents at zero and taking their rows off round differently, and so does the pooled tail.
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def sets(clip: HookedCLIP, pixels: Tensor, sae: Any) -> dict[str, list[int]]:
    active = encode(clip.vision, pixels[:6], sae).latent.unique().tolist()
    return {"few": active[2:4], "many": active[2:9]}


@pytest.fixture(scope="module")
def found(clip: HookedCLIP, pixels: Tensor, sae: Any, sets: dict[str, list[int]]) -> SwitchedOff:
    return switch_off(clip, pixels[:6], sae, PROMPTS, sets, n_controls=3, batch_size=4, progress=False)


def without(clip: HookedCLIP, sae: Any, x: Tensor, latents: list[int]) -> Tensor:
    """Cosines of one picture by the whole tower, with the SAE decoded twice and the difference added."""
    hook, scope = sae.cfg.metadata.hook_name, sae.cfg.metadata.token_scope
    own = slice(1, None) if scope == "patches" else slice(0, 1) if scope == "cls" else slice(None)

    def edit(activation: Tensor, hook: Any) -> Tensor:
        rows = activation[:, own]
        codes = sae.encode(rows)
        fewer = codes.clone()
        fewer[..., latents] = 0
        sae.encode(rows)  # some SAEs keep what they need to decode
        whole = sae.decode(codes)
        sae.encode(rows)
        activation = activation.clone()
        activation[:, own] += sae.decode(fewer) - whole
        return activation

    with torch.no_grad():
        text = clip.embed_texts(PROMPTS, normalize=True)
        embedding = clip.vision.run_with_hooks(x[None], fwd_hooks=[(hook, edit)])
        return (F.normalize(embedding, dim=-1) @ text.T)[0]


def test_predictions_are_those_of_edited_codes(
    clip: HookedCLIP, pixels: Tensor, sae: Any, sets: dict[str, list[int]], found: SwitchedOff
) -> None:
    for sample in range(6):
        torch.testing.assert_close(found.before[sample], without(clip, sae, pixels[sample], []), **TIGHT)
        for number, latents in enumerate(sets.values()):
            expected = without(clip, sae, pixels[sample], latents)
            torch.testing.assert_close(found.after[number, sample], expected, **TIGHT)
    assert (found.after - found.before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "hook", "scope"),
    [("standard, layer norm", "blocks.0.hook_resid_post", "patches"), ("topk", "blocks.1.hook_resid_post", "cls"),
     ("topk rescaled", "blocks.0.hook_resid_mid", "all")],
)  # fmt: skip
def test_scaled_decoders_and_other_tokens(clip: HookedCLIP, pixels: Tensor, kind: str, hook: str, scope: str) -> None:
    other = build_sae(kind, 48, hook, scope, tower="vision", d_sae=37)
    active = encode(clip.vision, pixels[:2], other)
    latents = active.latent.unique()[:5]
    found = switch_off(clip, pixels[:2], other, PROMPTS, latents, n_controls=1, progress=False)
    for sample in range(2):
        expected = without(clip, other, pixels[sample], latents.tolist())
        torch.testing.assert_close(found.after[0, sample], expected, **TIGHT)


def test_one_latent_loses_what_exact_ablation_says(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    target = direction_target(torch.eye(clip.vision.cfg.d_embed, dtype=torch.float64)[:2])
    exact = exact_ablation(clip.vision, pixels[:3], sae, target, progress=False).dense()
    latents = exact.abs().amax(dim=(0, 1)).topk(4).indices
    single = {str(latent): [latent] for latent in latents.tolist()}
    found = switch_off(clip, pixels[:3], sae, target, single, n_controls=0, progress=False)
    assert found.control.shape == (4, 0, 3, 2)
    for number, latent in enumerate(latents.tolist()):
        torch.testing.assert_close(found.before - found.after[number], exact[:, :, latent].double(), **TIGHT)


def test_controls_are_other_active_latents_of_like_worth(
    clip: HookedCLIP, pixels: Tensor, sae: Any, sets: dict[str, list[int]], found: SwitchedOff
) -> None:
    dense = encode(clip.vision, pixels[:6], sae).dense()
    worth = dense.abs().sum(dim=1) * sae.W_dec.norm(dim=1)
    for number, latents in enumerate(sets.values()):
        torch.testing.assert_close(found.activation[number], worth[:, latents].sum(dim=1).detach(), **TIGHT)
        assert found.n_off[number].tolist() == (worth[:, latents] > 0).sum(dim=1).tolist()
    assert (found.control != found.before).any()
    # Each control, by the same seed, taken away by hand.
    chosen = torch.zeros(37, dtype=torch.bool)
    chosen[sets["many"]] = True
    for sample, draw in ((0, 0), (5, 2)):
        mask = torch.zeros(37, dtype=torch.bool)
        mask[sets["many"]] = worth[sample, sets["many"]] > 0
        drawn = matched(worth[sample].detach(), mask, chosen, n_nearest=4, rng=random.Random(f"0 {sample} many {draw}"))
        expected = without(clip, sae, pixels[sample], drawn.nonzero().flatten().tolist())
        torch.testing.assert_close(found.control[1, draw, sample], expected, **TIGHT)
        control = float(worth[sample][drawn].sum().detach())
        assert float(found.control_activation[1, draw, sample]) == pytest.approx(control, rel=1e-9)


def test_batches_sets_and_seeds(
    clip: HookedCLIP, pixels: Tensor, sae: Any, sets: dict[str, list[int]], found: SwitchedOff
) -> None:
    again = switch_off(clip, pixels[:6], sae, PROMPTS, sets, n_controls=3, batch_size=5, progress=False)
    torch.testing.assert_close(again.after, found.after, **TIGHT)
    torch.testing.assert_close(again.control, found.control, **TIGHT)
    alone = {"many": sets["many"]}
    one = switch_off(clip, pixels[:6], sae, PROMPTS, alone, n_controls=2, progress=False)
    torch.testing.assert_close(one.after[0], found.after[1], **TIGHT)
    torch.testing.assert_close(one.control[0], found.control[1, :2], **TIGHT)
    other = switch_off(clip, pixels[:6], sae, PROMPTS, sets, n_controls=3, seed=1, progress=False)
    assert not torch.equal(other.control, found.control)


def test_other_sets_leave_a_control_as_it_is(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    dense = encode(clip.vision, pixels[:4], sae).dense()
    worth = (dense.abs().sum(dim=1) * sae.W_dec.norm(dim=1)).detach()
    first = int((worth > 0).sum(dim=0).argmax())
    # What the first latent's controls are drawn from: in another set, it was not theirs.
    distance = (worth.log() - worth[:, first : first + 1].log()).abs()
    distance[:, first] = torch.inf
    nearest = distance.argsort(dim=1)[:, :2].unique().tolist()
    how: Any = {"n_controls": 3, "n_nearest": 2, "progress": False}
    alone = switch_off(clip, pixels[:4], sae, PROMPTS, {"a": [first]}, **how)
    for sets in ({"a": [first], "b": nearest}, {"b": nearest, "a": [first]}, {"a": [first], "b": [first, *nearest]}):
        both = switch_off(clip, pixels[:4], sae, PROMPTS, sets, **how)
        a = both.number("a")
        torch.testing.assert_close(both.after[a], alone.after[0], **TIGHT)
        torch.testing.assert_close(both.control[a], alone.control[0], **TIGHT)
        torch.testing.assert_close(both.control_activation[a], alone.control_activation[0], **TIGHT)
    # Unless it is said that controls are to leave them alone.
    spared = switch_off(clip, pixels[:4], sae, PROMPTS, {"a": [first]}, spared=nearest, **how)
    torch.testing.assert_close(spared.after, alone.after, **TIGHT)
    chosen = torch.zeros(37, dtype=torch.bool).index_fill(0, torch.tensor([first, *nearest]), True)
    for sample in range(4):
        off = torch.zeros(37, dtype=torch.bool).index_fill(0, torch.tensor([first]), bool(worth[sample, first] > 0))
        drawn = matched(worth[sample], off, chosen, n_nearest=2, rng=random.Random(f"0 {sample} a 1"))
        assert not bool(drawn[nearest].any())
        expected = without(clip, sae, pixels[sample], drawn.nonzero().flatten().tolist())
        torch.testing.assert_close(spared.control[0, 1, sample], expected, **TIGHT)


def test_winners_and_the_table(found: SwitchedOff) -> None:
    frame = found.to_frame()
    assert frame.set.tolist() == ["few", "many"]
    for number in range(2):
        changed = [found.after[number, s].argmax() != found.before[s].argmax() for s in range(6)]
        assert frame.changed[number] == pytest.approx(sum(map(bool, changed)) / 6)
        by_chance = [found.control[number, d, s].argmax() != found.before[s].argmax()
                     for d in range(3) for s in range(6)]  # fmt: skip
        assert frame.changed_by_controls[number] == pytest.approx(sum(map(bool, by_chance)) / 18)
    assert found.winner_after.shape == (2, 6)
    assert (found.number("many"), found.winner_control.shape) == (1, (2, 3, 6))
    with pytest.raises(InputError, match="no set 'mani'"):
        found.number("mani")


def test_a_target_predicts_as_it_does(clip: HookedCLIP, pixels: Tensor, sae: Any, sets: dict[str, list[int]]) -> None:
    weight = torch.randn(4, clip.vision.cfg.d_embed, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = probe_target(weight, torch.arange(4.0, dtype=torch.float64), normalize=True)
    found = switch_off(clip, pixels[:2], sae, probe, sets, n_controls=0, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(found.before, probe(clip.vision(pixels[:2])), **TIGHT)


@given(seed=st.integers(0, 99), n=st.integers(1, 12), n_off=st.integers(0, 12), n_nearest=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_control_has_as_many_others(seed: int, n: int, n_off: int, n_nearest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    worth = torch.rand(n, generator=generator).clamp(min=0.2) - 0.2  # some are not active
    chosen = torch.rand(n, generator=generator) < n_off / 12
    off = chosen & (worth > 0)
    found = matched(worth, off, chosen, n_nearest=n_nearest, rng=random.Random(seed))
    free = (worth > 0) & ~chosen
    assert not bool((found & ~free).any())
    assert int(found.sum()) == min(int(off.sum()), int(free.sum()))


def test_a_control_is_near_in_worth() -> None:
    worth = torch.tensor([8.0, 1.0, 0.1, 7.9, 1.01, 0.11, 3.0, 0.0])
    chosen = torch.zeros(8, dtype=torch.bool)
    chosen[:3] = True
    found = matched(worth, chosen.clone(), chosen, n_nearest=1, rng=random.Random(0))
    assert found.nonzero().flatten().tolist() == [3, 4, 5]


def test_saved_and_loaded(found: SwitchedOff, tmp_path: Path) -> None:
    found.save(tmp_path / "off.safetensors")
    loaded = SwitchedOff.load(tmp_path / "off.safetensors")
    assert (loaded.sets, loaded.latents, loaded.names, loaded.skipped) == (
        found.sets, found.latents, found.names, found.skipped,
    )  # fmt: skip
    assert torch.equal(loaded.control, found.control)
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(LoadError, match=r"SwitchedOff\.save"):
        SwitchedOff.load(tmp_path / "other")


def test_wrong_input(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    for latents, message in [
        ([], "has no latents"), ({}, "no set of latents"), ([37], "0..36"), ([-1], "0..36"), ([0.5], "whole numbers"),
        ({"a": [1], "b": []}, "'b' has no latents"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            switch_off(clip, pixels[:1], sae, PROMPTS, latents, progress=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_controls"):
        switch_off(clip, pixels[:1], sae, PROMPTS, [1], n_controls=-1, progress=False)
    with pytest.raises(InputError, match="'spared' has"):
        switch_off(clip, pixels[:1], sae, PROMPTS, [1], spared=[40], progress=False)


def test_nothing_stays_behind_after_an_exception(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    plain = clip.vision(pixels[:2]).detach()

    class Failing:
        vectors, labels = torch.zeros(1, 20), ("a",)

        def __call__(self, embedding: Tensor) -> Tensor:
            raise RuntimeError("no prediction")

    with pytest.raises(RuntimeError, match="no prediction"):
        switch_off(clip, pixels[:2], sae, Failing(), [1], progress=False)
    assert torch.is_grad_enabled()
    assert torch.equal(clip.vision(pixels[:2]).detach(), plain)
