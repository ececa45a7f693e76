"""Sums over a data set equal loops over its images, in any split; a stopped pass goes on to the same bits."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.proof import aggregate
from oracles.sites import make
from PIL import Image
from torch import Tensor

from clip_lens_ext.attribution import (
    Attribution,
    AttributionAccumulator,
    AttributionSummary,
    HeadComparison,
    aggregate_attributions,
    attribution_patching,
    compare_heads,
    direction_target,
    exact_ablation,
    logit_lens,
)
from clip_lens_ext.attribution.data_pass import called
from clip_lens_ext.data import Skipped
from clip_lens_ext.errors import HookNameError, InputError, LoadError
from clip_lens_ext.towers import HookedTower

CLS = ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48)
PATCHES = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
EOT = ("text", "eos", "blocks.1.hook_resid_post", "eot", 40)
N, D_SAE = 7, 37
OWN = [2, 0, 0, 2, 2, 0, 0]  # target 1 has no image
QUIET: dict[str, Any] = {"progress": False}


def parts(site: Any = CLS, kind: str = "topk") -> tuple[HookedTower, Tensor, Any, Any]:
    model, x, sae, directions = make(site, kind, batch=N)
    return HookedTower(model, model_name="tiny"), x, sae, direction_target(directions, labels=["a", "b", "c"])


def images_of(result: Attribution, index: int, samples: list[int]) -> list[dict[int, float]]:
    found = []
    for sample in samples:
        own = result.sample == sample
        found.append(dict(zip(result.latent[own].tolist(), result.value[own][:, index].tolist(), strict=True)))
    return found


def check(found: AttributionSummary, result: Attribution, k: int, samples_of: list[list[int]]) -> None:
    assert found.n_images.tolist() == [len(samples) for samples in samples_of]
    for index, samples in enumerate(samples_of):
        if not samples:
            assert found.mean[index].isnan().all()
            assert found.share[index].isnan().all()
            assert not found.n_active[index].any()
            continue
        mean, share, n_top, n_active = aggregate(images_of(result, index, samples), D_SAE, k)
        assert found.mean[index].tolist() == pytest.approx(mean, abs=1e-12)
        assert found.share[index].tolist() == pytest.approx(share, abs=1e-10)
        assert found.n_top[index].tolist() == n_top
        assert found.n_active[index].tolist() == n_active


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("site", [CLS, PATCHES, EOT], ids=["cls", "patches", "prompts"])
@pytest.mark.parametrize("own", [False, True])
def test_against_loops(site: Any, own: bool, batch_size: int) -> None:
    tower, x, sae, target = parts(site)
    found = aggregate_attributions(tower, x, sae, target, k=3, batch_size=batch_size, target_of=OWN if own else None,
                                   **QUIET)  # fmt: skip
    samples = [[i for i in range(N) if OWN[i] == index] if own else [*range(N)] for index in range(3)]
    check(found, attribution_patching(tower, x, sae, target), 3, samples)
    assert (found.method, found.labels, found.k, found.own_images) == ("attribution_patching", ("a", "b", "c"), 3, own)
    assert (found.hook_name, found.token_scope, found.error_term, found.unit) == (site[2], site[3], "kept", "cosine")
    assert found.total.dtype == torch.float64
    assert found.provenance["model"] == "tiny"
    assert found.provenance["target_fingerprint"] == target.fingerprint


@pytest.mark.parametrize("method", ["exact_ablation", partial(logit_lens, times_activation=True)])
def test_every_method_and_setting(method: Any) -> None:
    tower, x, sae, target = parts()
    found = aggregate_attributions(tower, x, sae, target, method=method, error_term="dropped", batch_size=3, **QUIET)
    named = exact_ablation if method == "exact_ablation" else method
    check(found, named(tower, x, sae, target, error_term="dropped"), 10, [[*range(N)]] * 3)
    assert found.error_term == "dropped"


def test_top_and_frame() -> None:
    tower, x, sae, target = parts()
    found = aggregate_attributions(tower, x, sae, target, target_of=OWN, k=2, **QUIET)
    top = found.top(40)
    assert top.values.shape == top.latents.shape == (3, 40)
    frame = found.to_frame()
    for index, label in enumerate("abc"):
        own = frame[frame.target == label]
        n = int((found.n_active[index] > 0).sum())
        assert len(own) == n
        assert top.latents[index, :n].tolist() == own.latent.tolist()
        assert top.values[index, :n].tolist() == own.mean_attribution.tolist() == sorted(own.mean_attribution)[::-1]
        assert (top.latents[index, n:] == -1).all()
        assert top.values[index, n:].isnan().all()
        for row in own.itertuples():
            assert row.share == float(found.share[index, row.latent])
            assert (row.n_top, row.n_active) == (found.n_top[index, row.latent], found.n_active[index, row.latent])
            assert row.n_images == OWN.count(index)
    assert frame.target.tolist() == sorted(frame.target)
    with pytest.raises(InputError, match="at least 1, got 0"):
        found.top(0)
    assert "0 to 4 images, 3 targets, 37 latents" in repr(found)


def test_shares() -> None:
    tower, x, sae, target = parts()
    found = aggregate_attributions(tower, x, sae, target, **QUIET)
    assert torch.allclose(found.share.clamp(min=0).sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert (found.share < 0).any()
    assert (found.share.sign() == found.mean.sign()).all()
    against = replace(found, total=-found.total.abs())
    assert against.share.isnan().all()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cuts", [[7], [2, 5], [1, 1, 1, 1, 1, 1, 1]])
def test_merged_in_any_split(cuts: list[int], own: bool) -> None:
    tower, x, sae, target = parts()
    numbers = torch.tensor(OWN)
    whole = aggregate_attributions(tower, x, sae, target, k=3, target_of=numbers if own else None, **QUIET)
    several = [
        aggregate_attributions(tower, part, sae, target, k=3, target_of=those if own else None, **QUIET)
        for part, those in zip(x.split(cuts), numbers.split(cuts), strict=True)
    ]
    for order in (several, several[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged.merge(part)
        assert torch.allclose(merged.total, whole.total, rtol=0, atol=1e-12)
        for name in ("n_top", "n_active", "n_images"):
            assert torch.equal(getattr(merged, name), getattr(whole, name)), name


def test_accumulators_merge() -> None:
    tower, x, sae, target = parts()
    several = []
    for part in x.split([3, 4]):
        found = AttributionAccumulator(target.labels, D_SAE, k=3)
        found.update(attribution_patching(tower, part, sae, target))
        several.append(found)
    first, second = several
    empty = AttributionAccumulator(target.labels, D_SAE, k=3)
    assert empty.merge(first) is empty
    merged = empty.merge(second).result()
    check(merged, attribution_patching(tower, x, sae, target), 3, [[*range(N)]] * 3)
    before = merged.total.clone()
    empty.update(attribution_patching(tower, x, sae, target))
    assert torch.equal(merged.total, before)  # a result does not change afterwards
    with pytest.raises(InputError, match="differ in k 3 and 4"):
        first.merge(AttributionAccumulator(target.labels, D_SAE, k=4))
    other = AttributionAccumulator(target.labels, D_SAE, k=3)
    other.update(exact_ablation(tower, x, sae, target))
    with pytest.raises(InputError, match="differ in method 'attribution_patching' and 'exact_ablation'"):
        first.merge(other)
    with pytest.raises(InputError, match="nothing to sum up"):
        AttributionAccumulator(target.labels, D_SAE).result()


def test_what_an_accumulator_refuses() -> None:
    tower, x, sae, target = parts()
    result = attribution_patching(tower, x, sae, target)
    found, own = (AttributionAccumulator(target.labels, D_SAE, own_images=flag) for flag in (False, True))
    with pytest.raises(InputError, match="takes one result of all targets"):
        found.update({0: result})
    with pytest.raises(InputError, match="takes a mapping"):
        own.update(result)
    with pytest.raises(InputError, match="expected attributions to a over 37 latents, got a, b, c"):
        own.update({0: result})
    with pytest.raises(InputError, match="targets are 0 to 2, got 3"):
        own.update({3: result})
    with pytest.raises(InputError, match="over 36 latents, got a, b, c over 37"):
        AttributionAccumulator(target.labels, 36).update(result)
    with pytest.raises(InputError, match="per_token=False"):
        found.update(attribution_patching(tower, x, sae, target, per_token=True))
    with pytest.raises(InputError, match="NaN"):
        found.update(replace(result, value=result.value * torch.nan))
    found.update(result)
    with pytest.raises(InputError, match="differ in error_term 'kept' and 'dropped'"):
        found.update(attribution_patching(tower, x, sae, target, error_term="dropped"))
    with pytest.raises(InputError, match="k must be a positive integer"):
        AttributionAccumulator(target.labels, D_SAE, k=0)
    with pytest.raises(InputError, match="differ in d_sae 36 and 37"):
        AttributionAccumulator(target.labels, 36).load_state_dict(found.state_dict())


# -- resume


def stopping(at: int) -> Any:
    """Attribution patching that is interrupted at its call number `at`."""
    left = [at]

    def method(tower: Any, x: Any, sae: Any, target: Any) -> Attribution:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return attribution_patching(tower, x, sae, target)

    method.__qualname__ = "patching"
    return method


def same(one: AttributionSummary, other: AttributionSummary) -> None:
    for field in fields(AttributionSummary):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


@pytest.mark.parametrize("own", [None, OWN])
def test_resumed_at_every_batch(tmp_path: Path, own: list[int] | None) -> None:
    tower, x, sae, target = parts()
    settings: dict[str, Any] = {"batch_size": 2, "target_of": own, **QUIET}
    whole = aggregate_attributions(tower, x, sae, target, method=stopping(99), **settings)
    n_calls = 4 if own is None else 6
    for at in range(n_calls):
        path = tmp_path / f"{at}"
        with pytest.raises(KeyboardInterrupt):
            aggregate_attributions(tower, x, sae, target, method=stopping(at), checkpoint=path, **settings)
        again = aggregate_attributions(tower, x, sae, target, method=stopping(99), checkpoint=path, **settings)
        same(again, whole)
    final = aggregate_attributions(tower, x, sae, target, method=stopping(0), checkpoint=path, **settings)
    same(final, whole)  # a pass that is complete computes nothing


def test_a_checkpoint_of_another_question(tmp_path: Path) -> None:
    tower, x, sae, target = parts()
    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        aggregate_attributions(tower, x, sae, target, method=stopping(2), checkpoint=path, batch_size=2, **QUIET)
    settings: dict[str, Any] = {"method": stopping(9), "checkpoint": path, "batch_size": 2, **QUIET}
    for changed, message in (
        ({"k": 3}, "k was 10 and is now 3"),
        ({"method": "attribution_patching"}, "method was 'patching' and is now 'attribution_patching'"),
        ({"error_term": "dropped"}, "error_term was 'kept' and is now 'dropped'"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"target_of": OWN}, "target_of was None"),
    ):
        with pytest.raises(InputError, match=message):
            aggregate_attributions(tower, x, sae, target, **{**settings, **changed})
    with pytest.raises(InputError, match="targets was"):
        aggregate_attributions(tower, x, sae, direction_target(-target.vectors, labels=target.labels), **settings)
    with pytest.raises(InputError, match="other data"):
        aggregate_attributions(tower, x.flip(0), sae, target, **settings)
    with torch.no_grad():
        sae.W_dec[0] += 1e-6
    with pytest.raises(InputError, match="sae_sha256 was"):
        aggregate_attributions(tower, x, sae, target, **settings)
    with torch.no_grad():
        sae.W_dec[0] -= 1e-6
        tower.native.proj[0] += 1e-3
    with pytest.raises(InputError, match="model_sha256 was"):
        aggregate_attributions(tower, x, sae, target, **settings)


def test_the_name_of_a_method_is_the_same_in_every_process() -> None:
    assert called(attribution_patching) == "attribution_patching"
    assert called(partial(logit_lens, times_activation=True)) == "logit_lens(times_activation=True)"


# -- data


def test_images_without_active_latents_count_as_zero() -> None:
    tower, x, sae, target = parts(kind="standard")
    with torch.no_grad():
        rows = tower.run_to(x, CLS[2])[:, 0]
        greatest = ((rows - sae.b_dec) @ sae.W_enc + sae.b_enc).max(dim=1).values
        sae.b_enc -= greatest.sort().values[2:4].mean()
    silent = (greatest.argsort()[:3]).tolist()
    for own in (None, OWN):
        found = aggregate_attributions(tower, x, sae, target, k=3, batch_size=1, target_of=own, **QUIET)
        samples = [[i for i in range(N) if own is None or OWN[i] == index] for index in range(3)]
        check(found, attribution_patching(tower, x, sae, target), 3, samples)
    with pytest.raises(InputError, match="nothing to sum up"):
        aggregate_attributions(tower, x[silent], sae, target, **QUIET)


def test_unreadable_images_are_skipped_and_their_targets_with_them(tmp_path: Path) -> None:
    tower, x, sae, target = parts()
    for i in range(N):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"nothing")

    def preprocess(image: Image.Image) -> Tensor:
        return x[image.getpixel((0, 0))[0]]

    found = aggregate_attributions(tower, tmp_path, sae, target, preprocess=preprocess, batch_size=2, k=3,
                                   target_of=OWN, **QUIET)  # fmt: skip
    samples = [[i for i in range(N) if OWN[i] == index and i != 2] for index in range(3)]
    check(found, attribution_patching(tower, x, sae, target), 3, samples)
    assert [skip.name for skip in found.skipped] == ["2.png"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_of": [0] * 6}, "target_of has 6 numbers for 7 images"),
        ({"target_of": [0, 1, 2, 3, 0, 0, 0]}, "targets are 0 to 2, got 0 to 3"),
        ({"target_of": [0, -1, 2, 0, 0, 0, 0]}, "targets are 0 to 2, got -1 to 2"),
        ({"target_of": [0.0] * 7}, "a list of integers"),
        ({"target_of": []}, "a list of integers"),
        ({"method": "patching"}, "no method 'patching'"),
        ({"method": "logit_lens_of_all_latents"}, "gives a Tensor; only an Attribution"),
        ({"k": 0}, "k must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    tower, x, sae, target = parts()
    with pytest.raises(InputError, match=message):
        aggregate_attributions(tower, x, sae, target, **settings, **QUIET)


def test_what_is_no_fault_of_an_image() -> None:
    tower, x, sae, target = parts()
    with pytest.raises(HookNameError):
        aggregate_attributions(tower, x, sae, target, hook_name="blocks.7.hook_resid_post", **QUIET)
    with pytest.raises(InputError, match=r"images 0, 1, 2, \.\.\.: at blocks.1.hook_resid_post the"):
        aggregate_attributions(tower, x, sae, target, token_scope="patches", **QUIET)


def test_save_and_load(tmp_path: Path) -> None:
    tower, x, sae, target = parts()
    found = aggregate_attributions(tower, x, sae, target, **QUIET)
    found = replace(found, skipped=(Skipped("ä.png", "empty"), Skipped("b", "c")))
    found.save(tmp_path / "s")
    again = AttributionSummary.load(tmp_path / "s")
    same(again, found)
    assert again.skipped[0].name == "ä.png"
    assert again.merge(found).n_images.tolist() == [14, 14, 14]
    with pytest.raises(LoadError, match=r"no file of Attribution\.save"):
        Attribution.load(tmp_path / "s")
    for name, value in {"k": 3, "method": "x", "error_term": "dropped", "own_images": True}.items():
        with pytest.raises(InputError, match=f"differ in {name}"):
            found.merge(replace(again, **{name: value}))


# -- two heads


def heads(tower: HookedTower, x: Tensor) -> tuple[Any, Any]:
    probe = direction_target(tower(x)[:3].detach(), labels=["a", "b", "c"], cosine=False)
    generator = torch.Generator().manual_seed(9)
    texts = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    return probe, direction_target(texts, labels=["a photo of a", "a photo of b", "a photo of c"])


@pytest.mark.parametrize("own", [None, OWN])
def test_heads_against_two_summaries(own: list[int] | None) -> None:
    from oracles.attribution import spearman
    from oracles.proof import overlap

    tower, x, sae, _ = parts()
    probe, texts = heads(tower, x)
    found = compare_heads(tower, x, sae, probe, texts, k=4, target_of=own, batch_size=3, **QUIET)
    for summary, target in ((found.probe, probe), (found.texts, texts)):
        expected = aggregate_attributions(tower, x, sae, target, k=4, target_of=own, batch_size=3, **QUIET)
        assert torch.equal(summary.total, expected.total)
        assert summary.labels == target.labels
        assert summary.unit == target.unit
    frame = found.to_frame()
    for index in range(3):
        seen = [i for i in range(D_SAE) if found.probe.n_active[index, i] > 0]
        rows = frame[frame["class"] == "abc"[index]]
        assert sorted(rows.latent) == seen
        if not seen:
            assert found.rank_correlation[index].isnan()
            assert found.overlap[index].isnan()
            continue
        a, b = ({i: float(summary.share[index, i]) for i in seen} for summary in (found.probe, found.texts))
        expected = spearman(list(a.values()), list(b.values()))
        assert float(found.rank_correlation[index]) == pytest.approx(expected, abs=1e-9)
        assert float(found.overlap[index]) == overlap(a, b, 4)
        assert rows.difference.tolist() == sorted(rows.difference, reverse=True)
        for row in rows.itertuples():
            assert (row.share_probe, row.share_text) == (a[row.latent], b[row.latent])
            assert row.difference == row.share_probe - row.share_text
    assert "3 classes" in repr(found)
    assert found.labels == ("a", "b", "c")


def test_a_head_beside_itself() -> None:
    tower, x, sae, _ = parts()
    probe, _ = heads(tower, x)
    found = compare_heads(tower, x, sae, probe, probe, k=4, **QUIET)
    assert (found.rank_correlation == 1).all()
    assert (found.overlap == 1).all()
    # Shares have no unit: a longer weight vector is the same head.
    longer = direction_target(probe.vectors * 5, labels=probe.labels, cosine=False)
    scaled = compare_heads(tower, x, sae, longer, probe, k=4, **QUIET)
    assert torch.allclose(scaled.probe.share, scaled.texts.share, rtol=1e-9)


def test_one_prefix_for_both_heads() -> None:
    tower, x, sae, _ = parts()
    probe, texts = heads(tower, x)
    calls: list[int] = []
    handle = tower.native.conv1.register_forward_hook(lambda *args: calls.append(1))
    compare_heads(tower, x, sae, probe, texts, batch_size=3, **QUIET)
    handle.remove()
    assert len(calls) == 3


def test_heads_resume(tmp_path: Path) -> None:
    tower, x, sae, _ = parts()
    probe, texts = heads(tower, x)
    settings: dict[str, Any] = {"batch_size": 2, "checkpoint": tmp_path / "c", **QUIET}
    with pytest.raises(KeyboardInterrupt):
        compare_heads(tower, x, sae, probe, texts, method=stopping(5), **settings)
    again = compare_heads(tower, x, sae, probe, texts, method=stopping(4), **settings)
    whole = compare_heads(tower, x, sae, probe, texts, batch_size=2, method=stopping(99), **QUIET)
    same(again.probe, whole.probe)
    same(again.texts, whole.texts)


def test_heads_of_two_parts_of_the_data() -> None:
    tower, x, sae, _ = parts()
    probe, texts = heads(tower, x)
    whole = compare_heads(tower, x, sae, probe, texts, k=4, **QUIET)
    first, second = (compare_heads(tower, part, sae, probe, texts, k=4, **QUIET) for part in x.split([3, 4]))
    merged = first.merge(second)
    assert torch.allclose(merged.probe.total, whole.probe.total, rtol=0, atol=1e-12)
    assert torch.allclose(merged.texts.share, whole.texts.share, rtol=0, atol=1e-12)
    assert torch.equal(merged.overlap, whole.overlap)
    assert torch.allclose(merged.rank_correlation, whole.rank_correlation, rtol=0, atol=1e-12)
    assert merged.probe.n_images.tolist() == [N] * 3
    with pytest.raises(InputError, match="differ in k 4 and 5"):
        first.merge(replace(second, k=5))
    with pytest.raises(InputError, match="differ in n_images"):
        HeadComparison.of(first.probe, second.texts)


def test_heads_of_other_classes() -> None:
    tower, x, sae, target = parts()
    fewer = direction_target(target.vectors[:2], labels=["a", "b"])
    with pytest.raises(InputError, match="the probe has 3 classes and the texts 2"):
        compare_heads(tower, x, sae, target, fewer, **QUIET)
    turned = direction_target(target.vectors, labels=["b", "a", "c"])
    with pytest.raises(InputError, match="same labels in another order"):
        compare_heads(tower, x, sae, target, turned, **QUIET)
