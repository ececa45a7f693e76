"""Attribution that passes through noise: the projection put in by hand, parts that add up, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import spectrum_share as oracle
from oracles.attribution import each
from oracles.saes import KINDS
from oracles.sites import IDS, SITES, make

import clip_lens_ext as cle
from clip_lens_ext.errors import HookNameError, InputError, LoadError
from clip_lens_ext.towers import HookedTower

MIDDLE = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
LAST = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
SOME = [SITES[i] for i in (1, 4, 7, 11, 12, 14, 19)]
SOME_IDS = [IDS[i] for i in (1, 4, 7, 11, 12, 14, 19)]


def split_of(d: int, k: int, *, seed: int = 0, **fields: Any) -> cle.NoiseSplit:
    generator = torch.Generator().manual_seed(seed)
    found = cle.split_noise(torch.randn(12 * d, d, generator=generator, dtype=torch.float64), cut=k)
    return replace(found, **fields)


def other(split: cle.NoiseSplit) -> cle.NoiseSplit:
    return replace(split, basis=split.signal_basis)


def share(site: Any = MIDDLE, k: int = 7, *, place: str | None = None, kind: str = "topk", **settings: Any) -> Any:
    """A share at the SAE's hook, or in the embedding where `place` is None, and what it was made of."""
    model, x, sae, vectors = make(site, kind)
    tower = HookedTower(model)
    d = tower.hook_width(place or "hook_embedding")
    split, target = split_of(d, k), cle.direction_target(vectors, cosine=settings.pop("cosine", True))
    found = cle.noise_share(tower, x, sae, target, split, noise_hook=place, **settings)
    return found, split, (model, x, sae, vectors, tower, target)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("where", ["hook", "embedding"])
@pytest.mark.parametrize("site", SOME, ids=SOME_IDS)
def test_against_the_oracle(site: Any, where: str, kept: bool) -> None:
    place = site[2] if where == "hook" else None
    found, split, (model, x, sae, vectors, _, _) = share(site, place=place, error_term="kept" if kept else "dropped")
    dense = found.part("noise").dense()
    for sample, explained in enumerate(each(model, x, sae, site[2], site[3], vectors, kept=kept)):
        for latent in explained.active()[:2]:
            way = oracle.through_the_hook if where == "hook" else oracle.through_the_embedding
            # The oracle's difference quotients are good to 1e-10 of the prediction.
            assert torch.allclose(dense[sample, :, latent], way(explained, latent, split.basis), rtol=0, atol=2e-9)
    assert float(found.noise.abs().max()) > 1e-5, "nothing here to get wrong"


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_sae_and_inner_products(kind: str) -> None:
    found, split, (model, x, sae, vectors, *_) = share(kind=kind, place=MIDDLE[2], cosine=False)
    explained = each(model, x, sae, MIDDLE[2], MIDDLE[3], vectors, cosine=False)[1]
    latent = explained.active()[-1]
    expected = oracle.through_the_hook(explained, latent, split.basis)
    # Inner products with un-normalised embeddings: some tens, of which the difference quotient has ten digits.
    torch.testing.assert_close(found.part("noise").dense()[1, :, latent], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("where", ["hook", "embedding"])
@pytest.mark.parametrize("n_target", [2, 9, 60])
@pytest.mark.parametrize("site", [MIDDLE, LAST], ids=["middle", "last"])
def test_every_way_of_taking_gradients(site: Any, n_target: int, where: str) -> None:
    """Few targets, many, and more than the embedding has numbers; the last block pushes rows forward."""
    model, x, sae, _ = make(site)
    tower = HookedTower(model)
    vectors = torch.randn(n_target, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    split = split_of(48 if where == "hook" else 20, 6)
    place = site[2] if where == "hook" else None
    whole = cle.noise_share(tower, x, sae, cle.direction_target(vectors), split, noise_hook=place)
    alone = cle.noise_share(tower, x, sae, cle.direction_target(vectors[:1]), split, noise_hook=place)
    # The same sums in another order.
    torch.testing.assert_close(whole.noise[:, :1], alone.noise, rtol=1e-9, atol=1e-13)
    explained = each(model, x, sae, site[2], site[3], vectors[-1:])[0]
    latent = explained.active()[0]
    way = oracle.through_the_hook if where == "hook" else oracle.through_the_embedding
    found = whole.part("noise").dense()[0, -1:, latent]
    assert torch.allclose(found, way(explained, latent, split.basis), rtol=0, atol=2e-9)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("where", ["hook", "embedding"])
@pytest.mark.parametrize("site", SITES, ids=IDS)
def test_the_parts_add_up_and_the_whole_is_attribution_patching(site: Any, where: str, per_token: bool) -> None:
    place = site[2] if where == "hook" else None
    found, split, (_, x, sae, _, tower, target) = share(site, place=place, per_token=per_token)
    plain = cle.attribution_patching(tower, x, sae, target, per_token=per_token)
    assert torch.equal(found.total.value, plain.value)
    rest = cle.noise_share(tower, x, sae, target, other(split), noise_hook=place, per_token=per_token)
    # Two projections that add up to one; the promise is 1e-6, in float64 it is rounding.
    scale = float(plain.value.abs().max())
    assert float((found.noise + rest.noise - plain.value).abs().max()) < 1e-12 * scale
    assert float((found.signal - rest.noise).abs().max()) < 1e-12 * scale
    assert (found.noise_hook, found.by_chance) == (place or "hook_embedding", split.rank / split.d)


@pytest.mark.parametrize("where", ["hook", "embedding"])
def test_float32_adds_up_to_one_in_a_million(where: str) -> None:
    model, x, sae, vectors = make(MIDDLE, dtype=torch.float32)
    tower, target = HookedTower(model), cle.direction_target(vectors)
    split, place = (split_of(48, 11), MIDDLE[2]) if where == "hook" else (split_of(20, 5), None)
    one = cle.noise_share(tower, x, sae, target, split, noise_hook=place)
    rest = cle.noise_share(tower, x, sae, target, other(split), noise_hook=place)
    scale = float(one.total.value.abs().max())
    assert float((one.noise + rest.noise - one.total.value).abs().max()) < 1e-6 * scale


@pytest.mark.parametrize("where", ["hook", "embedding"])
def test_half_precision_adds_up_as_the_attribution_does(where: str) -> None:
    model, x, sae, vectors = make(MIDDLE, dtype=torch.float32)
    tower, target = HookedTower(model.bfloat16()), cle.direction_target(vectors)
    split, place = (split_of(48, 11), MIDDLE[2]) if where == "hook" else (split_of(20, 5), None)
    site = cle.open_site(tower, x.bfloat16(), sae)
    one, rest = (cle.noise_share(tower, site, sae, target, part, noise_hook=place) for part in (split, other(split)))
    scale = float(one.total.value.abs().max())
    # At the hook both parts are products in float32 with one gradient; those of the embedding go back through the
    # blocks in bfloat16, each by itself.
    bound = 1e-5 if where == "hook" else 0.05
    assert float((one.noise + rest.noise - one.total.value).abs().max()) < bound * scale


@pytest.mark.parametrize("where", ["hook", "embedding"])
def test_all_and_nothing(where: str) -> None:
    place = MIDDLE[2] if where == "hook" else None
    d = 48 if where == "hook" else 20
    everything = share(place=place, k=d)[0]
    torch.testing.assert_close(everything.noise, everything.total.value, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(everything.share, torch.ones_like(everything.share), rtol=1e-6, atol=1e-6)
    nothing = share(place=place, k=0)[0]
    assert (nothing.noise == 0).all()
    assert torch.equal(nothing.signal, nothing.total.value)


@settings(max_examples=6, deadline=None)
@given(k=st.integers(1, 19), seed=st.integers(0, 99), where=st.sampled_from(["hook", "embedding"]))
def test_a_split_in_two_parts_adds_up(k: int, seed: int, where: str) -> None:
    model, x, sae, vectors = make(MIDDLE)
    tower, target = HookedTower(model), cle.direction_target(vectors)
    d, place = (48, MIDDLE[2]) if where == "hook" else (20, None)
    whole = split_of(d, k, seed=seed)
    cut = k // 2
    parts = [replace(whole, basis=basis) for basis in (whole.basis[:, :cut], whole.basis[:, cut:])]
    found = [cle.noise_share(tower, x, sae, target, one, noise_hook=place).noise for one in (whole, *parts)]
    assert torch.allclose(found[0], found[1] + found[2], rtol=0, atol=1e-12 * float(found[0].abs().max()) + 1e-16)


def test_the_mean_over_random_subspaces_is_by_chance() -> None:
    model, x, sae, vectors = make(MIDDLE)
    tower, target = HookedTower(model), cle.direction_target(vectors[:1])
    drawn = torch.stack([
        cle.noise_share(tower, x[:1], sae, target, split_of(20, 5, seed=seed)).noise for seed in range(60)
    ])  # fmt: skip
    whole = cle.attribution_patching(tower, x[:1], sae, target).value
    error = drawn.std(dim=0) / 60**0.5
    # Of 37 latents' means some lie beyond three standard errors in one draw of ten, none beyond five.
    assert ((drawn.mean(dim=0) - 0.25 * whole).abs() < 5 * error).all()


def test_an_sae_of_the_embedding_has_both_in_one_place() -> None:
    site = SITES[12]
    assert site[2] == "hook_embedding"
    found, split, (_, x, sae, _, tower, target) = share(site)
    gradient = []
    for sample in x:
        embedding = tower(sample[None]).detach().requires_grad_()
        gradient.append(torch.autograd.grad(target(embedding)[0, 1], embedding)[0][0])
    pairs = zip(found.total.sample.tolist(), found.total.latent.tolist(), found.total.activation, strict=True)
    expected = [z * (gradient[s] @ split.basis) @ (split.basis.T @ sae.W_dec[j].detach()) for s, j, z in pairs]
    torch.testing.assert_close(found.noise[:, 1], torch.stack(expected), rtol=1e-9, atol=1e-13)


def test_other_targets_a_site_and_hooks_afterwards() -> None:
    model, x, sae, vectors = make(MIDDLE)
    tower = HookedTower(model)
    probe = cle.probe_target(vectors, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), kind="margin")
    site = cle.open_site(tower, x, sae)
    split = split_of(20, 5)
    found = cle.noise_share(tower, site, sae, probe, split)
    rest = cle.noise_share(tower, site, sae, probe, other(split))
    assert torch.allclose(found.noise + rest.noise, cle.attribution_patching(tower, x, sae, probe).value)
    assert found.total.unit == probe.unit
    assert not any(point._forward_hooks for point in tower.hook_points())
    with torch.no_grad():  # as everywhere in notebooks
        assert torch.equal(cle.noise_share(tower, site, sae, probe, split).noise, found.noise)


def test_frames_parts_merge_and_disk(tmp_path: Path) -> None:
    found, split, (_, x, sae, _, tower, target) = share()
    frame = found.to_frame()
    assert frame["attribution"].to_numpy() == pytest.approx((frame["noise"] + frame["signal"]).to_numpy(), abs=1e-6)
    both = found.part("noise").dense() + found.part("signal").dense()
    torch.testing.assert_close(both, found.total.dense())
    assert found.part("noise").method == "attribution_patching, noise"
    assert found.part("signal").settings["part"] == "signal"
    latents = found.of_latents()
    for _, row in latents.iloc[::17].iterrows():
        own = frame[(frame["target"] == row["target"]) & (frame["latent"] == row["latent"])]
        sign = own["attribution"].apply(lambda a: (a > 0) - (a < 0))
        assert row["n"] == len(own)
        assert row["noise"] == pytest.approx(own["noise"].sum(), abs=1e-6)
        assert row["share"] == pytest.approx((sign * own["noise"]).sum() / own["attribution"].abs().sum(), rel=1e-4)
    assert latents["noise"].abs().is_monotonic_decreasing
    halves = [cle.noise_share(tower, part, sae, target, split) for part in x.split(1)]
    merged = halves[0].merge(halves[1])
    torch.testing.assert_close(merged.noise, found.noise)
    assert merged.total.n_sample == 2
    with pytest.raises(InputError, match="differ in rank 7 and 5"):
        found.merge(cle.noise_share(tower, x, sae, target, split_of(20, 5)))
    found.save(tmp_path / "share")
    again = cle.NoiseShare.load(tmp_path / "share")
    assert torch.equal(again.noise, found.noise)
    assert torch.equal(again.total.value, found.total.value)
    assert (again.rank, again.d, again.rule, again.noise_hook) == (7, 20, split.rule, "hook_embedding")
    assert "7 of 20 dimensions at hook_embedding" in repr(again)
    found.total.save(tmp_path / "whole")
    with pytest.raises(LoadError):
        cle.NoiseShare.load(tmp_path / "whole")


def test_a_share_of_nothing_is_no_number() -> None:
    found = share()[0]
    none = replace(found, total=replace(found.total, value=torch.zeros_like(found.noise)))
    assert none.share.isnan().all()


@pytest.mark.parametrize(
    ("split", "settings", "message"),
    [
        (lambda: torch.eye(20), {}, "a NoiseSplit is needed"),
        (lambda: split_of(48, 3), {}, "of 48 dimensions, and hook_embedding of the vision tower has 20"),
        (lambda: split_of(20, 3), {"noise_hook": MIDDLE[2]}, "of 20 dimensions, and blocks.0"),
        (lambda: split_of(48, 3), {"noise_hook": "blocks.1.hook_resid_mid"}, "and the SAE is at blocks.0"),
        (lambda: split_of(48, 3, hook_name="blocks.1.hook_resid_pre"), {}, "collect_covariance"),
        (lambda: split_of(48, 3, hook_name=MIDDLE[2], tower="text"), {}, "of the text tower, this is the vision"),
        (lambda: split_of(48, 3, hook_name=MIDDLE[2], token_scope="cls"), {}, "of 'cls' tokens.*reads 'patches'"),
        (lambda: split_of(48, 3, hook_name=MIDDLE[2]), {"noise_hook": "hook_embedding"}, "contradicts the split"),
    ],
)
def test_wrong_input(split: Any, settings: dict[str, Any], message: str) -> None:
    model, x, sae, vectors = make(MIDDLE)
    with pytest.raises(InputError, match=message):
        cle.noise_share(HookedTower(model), x, sae, cle.direction_target(vectors), split(), **settings)


def test_no_such_hook_and_tokens_that_go_together() -> None:
    model, x, sae, vectors = make(MIDDLE)
    tower, target = HookedTower(model), cle.direction_target(vectors)
    with pytest.raises(HookNameError, match="no hook matches 'hook_nothing'"):
        cle.noise_share(tower, x, sae, target, split_of(20, 3), noise_hook="hook_nothing")
    for scope in ("all", "patches", None):
        split = split_of(48, 3, hook_name=MIDDLE[2], tower="vision", token_scope=scope)
        assert cle.noise_share(tower, x, sae, target, split).noise_hook == MIDDLE[2]


def test_a_pruned_model_has_no_noise_in_its_embedding() -> None:
    """The noise of the embedding alone is cut off by pruning: what is left of the whole is the signal."""
    clip = cle.planted_clip()
    sae = cle.planted_sae("blocks.2.hook_resid_post")
    x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    target = cle.text_target(clip, ["a heart", "a crane"])
    split = split_of(128, 30)
    with cle.prune(clip, split):
        found = cle.noise_share(clip.vision, x, sae, target, split)
    assert float(found.noise.abs().max()) < 1e-6 * float(found.total.value.abs().max())
