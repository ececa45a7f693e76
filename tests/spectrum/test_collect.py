"""Covariances of a tower's activations: one forward for all hooks and scopes, resumed as if never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.models import EMBED_DIM, build_clip, pictures, prompts

import clip_lens_ext as cle
from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.towers import HookedCLIP

X = pictures(7, dtype=torch.float64)
CLIP = HookedCLIP(build_clip().double(), model_name="tiny")
HOOK = "blocks.0.hook_resid_post"


def collect(**settings):
    return cle.collect_covariance(
        CLIP.vision, X, **{"hook_names": HOOK, "progress": False, "batch_size": 3, **settings}
    )


@torch.no_grad()
def test_every_scope_against_the_activations() -> None:
    found = collect(hook_names=["hook_embedding", HOOK], token_scope=["cls", "patches", "all"])
    cache = CLIP.vision.run_with_cache(X, names_filter=[HOOK, "hook_embedding"])[1]
    expected = {
        ("hook_embedding", "pooled"): cache["hook_embedding"],
        (HOOK, "cls"): cache[HOOK][:, 0],
        (HOOK, "patches"): cache[HOOK][:, 1:].flatten(0, 1),
        (HOOK, "all"): cache[HOOK].flatten(0, 1),
    }
    assert [(part.hook_name, part.token_scope) for part in found] == list(expected)
    for place, rows in expected.items():
        part = found[place]
        # The same float64 rows in other batches, summed in another order.
        torch.testing.assert_close(part.covariance, torch.cov(rows.T), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(part.mean, rows.mean(0), rtol=1e-9, atol=1e-12)
        assert (part.count, part.tower, part.unit_length) == (len(rows), "vision", False)
        assert part.provenance["model"] == "tiny"
    with pytest.raises(InputError, match="several covariances at"):
        found[HOOK]
    with pytest.raises(InputError, match="no covariances at"):
        found["hook_pooled"]


@torch.no_grad()
def test_text_tower_and_unit_length() -> None:
    ids = prompts(6)
    found = cle.collect_covariance(
        CLIP.text, ids, ["hook_embedding", HOOK], token_scope="eot", unit_length=True, progress=False
    )
    rows = torch.nn.functional.normalize(CLIP.text(ids), dim=-1)
    torch.testing.assert_close(found["hook_embedding"].covariance, torch.cov(rows.T), rtol=1e-9, atol=1e-12)
    cache = CLIP.text.run_with_cache(ids, names_filter=HOOK)[1]
    eot = torch.nn.functional.normalize(cache[HOOK][torch.arange(6), ids.argmax(1)], dim=-1)
    torch.testing.assert_close(found[HOOK, "eot"].covariance, torch.cov(eot.T), rtol=1e-9, atol=1e-12)
    assert found[HOOK].unit_length


def test_one_forward_for_all_hooks_and_no_hook_left() -> None:
    calls: list[int] = []
    handle = CLIP.vision.native.conv1.register_forward_hook(lambda *_: calls.append(1))
    try:
        collect(hook_names=[HOOK, "hook_embedding", "blocks.1.hook_resid_mid"])
    finally:
        handle.remove()
    assert len(calls) == 3  # three batches
    assert not any(point._forward_hooks for point in CLIP.vision.hook_points())


def test_a_pass_that_was_stopped_goes_on(tmp_path: Path) -> None:
    whole = collect(hook_names=[HOOK, "hook_embedding"], batch_size=2)
    stop_at, seen = 3, []

    def stop(module, inputs, output):
        seen.append(1)
        if len(seen) == stop_at:
            raise KeyboardInterrupt

    same = {"hook_names": [HOOK, "hook_embedding"], "batch_size": 2, "checkpoint": tmp_path / "pass"}
    handle = CLIP.vision.native.conv1.register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            collect(**same)
        seen.clear()
        stop_at = -1
        again = collect(**same)
    finally:
        handle.remove()
    assert len(seen) == 2  # four batches, of which two were done
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.covariance, other.covariance)
        assert torch.equal(one.mean, other.mean)
    with pytest.raises(InputError, match="other settings: unit_length"):
        collect(**same, unit_length=True)


def test_wrong_input() -> None:
    with pytest.raises(HookNameError, match="no hook matches"):
        collect(hook_names="blocks.9.hook_resid_post")
    with pytest.raises(InputError, match="no hook named"):
        collect(hook_names=[])
    with pytest.raises(InputError, match="unknown token scope 'first'"):
        collect(token_scope="first")
    with pytest.raises(InputError, match="Only a text tower has them"):
        collect(token_scope="eot")
    with pytest.raises(InputError, match=r"covariances are of \[batch token d\]"):
        collect(hook_names="blocks.0.attn.hook_pattern")
    with (
        CLIP.vision.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * float("nan"))]),
        pytest.raises(InputError, match="activation of sample '0' at"),
    ):
        collect()
    assert CLIP.vision.cfg.d_embed == EMBED_DIM
