"""A pass without latents that was interrupted ends as one that was not, to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.resumed import Stopping, same
from oracles.saes import build_sae
from PIL import Image
from tiny_clips import preprocess, tiny_clip
from torch import Tensor

from clip_lens_ext.attribution import direction_target, probe_target
from clip_lens_ext.errors import InputError
from clip_lens_ext.pass_rows import RowAccumulator
from clip_lens_ext.saes import encode
from clip_lens_ext.semantics import SwitchedOff, switch_off
from clip_lens_ext.semantics.switch_off_pass import AXES, OffBatch
from clip_lens_ext.towers import HookedCLIP

HOOK = "blocks.0.hook_resid_post"
PROMPTS = ["a crane", "a duck", "a bow"]


@pytest.fixture(scope="module")
def sets(clip: HookedCLIP, pixels: Tensor, sae: Any) -> dict[str, list[int]]:
    active = encode(clip.vision, pixels[:7], sae).latent.unique().tolist()
    return {"few": active[2:4], "many": active[4:9]}


def off(clip: HookedCLIP, data: Any, sae: Any, sets: Any, prompts: Any = None, **settings: Any) -> SwitchedOff:
    how = {"n_controls": 2, "batch_size": 2, "progress": False, **settings}
    return switch_off(clip, data, sae, PROMPTS if prompts is None else prompts, sets, **how)


@pytest.mark.parametrize(("every", "n_controls"), [(1, 2), (3, 0)])
def test_resumed_anywhere(
    clip: HookedCLIP, pixels: Tensor, sae: Any, sets: Any, tmp_path: Path, every: int, n_controls: int
) -> None:
    how = {"checkpoint_every": every, "n_controls": n_controls}
    data = pixels[:7]
    read: list[int] = []

    def counted(path: Path) -> int:
        # On a copy: a tower with a hook of the caller's runs another way, and rounds in another way.
        copy = path.with_suffix(".copy")
        if path.exists():
            shutil.copy(path, copy)
        read.clear()
        with clip.vision.hooks(fwd_hooks=[("hook_embed", lambda value, hook: read.append(len(value)))]):
            off(clip, Stopping(data, None), sae, sets, checkpoint=copy, **how)
        return sum(read)

    whole = off(clip, Stopping(data, None), sae, sets, **how)
    for at in (0, 2, 4, 6):
        path = tmp_path / f"{at}"
        with pytest.raises(KeyboardInterrupt):
            off(clip, Stopping(data, at), sae, sets, checkpoint=path, **how)
        assert counted(path) == 7 - at  # what was there is not computed again
        same(off(clip, Stopping(data, None), sae, sets, checkpoint=path, **how), whole)
    assert counted(path) == 0
    same(off(clip, Stopping(data, None), sae, sets, checkpoint=path, **how), whole)


def test_pictures_that_cannot_be_read(clip: HookedCLIP, sae: Any, sets: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        noise = torch.randint(0, 255, (24, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"not a picture")
    left = [4]

    def stopping(picture: Any) -> Tensor:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return preprocess(picture)

    with pytest.raises(KeyboardInterrupt):
        off(clip, folder, sae, sets, preprocess=stopping, checkpoint=tmp_path / "c")
    left[0] = 99
    resumed = off(clip, folder, sae, sets, preprocess=stopping, checkpoint=tmp_path / "c")
    same(resumed, off(clip, folder, sae, sets))
    assert resumed.names == ("0.png", "2.png", "3.png", "4.png", "5.png")
    assert [skip.name for skip in resumed.skipped] == ["1.png"]


def test_a_checkpoint_of_something_else_is_refused(
    clip: HookedCLIP, pixels: Tensor, sets: dict[str, list[int]], tmp_path: Path
) -> None:
    path, data = tmp_path / "c", pixels[:6]
    sae = build_sae("topk", 48, HOOK, "patches", tower="vision", d_sae=37)
    with pytest.raises(KeyboardInterrupt):
        off(clip, Stopping(data, 4), sae, sets, checkpoint=path)
    before = path.read_bytes()
    for changed, message in (
        ({"n_controls": 3}, "n_controls was 2 and is now 3"),
        ({"n_nearest": 3}, "n_nearest was 4 and is now 3"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"spared": [9]}, r"spared was \[\] and is now \[9\]"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"hook_name": "blocks.1.hook_resid_post"}, f"hook_name was '{HOOK}' and is now 'blocks.1"),
        ({"token_scope": "cls"}, "token_scope was 'patches' and is now 'cls'"),
        ({"prompts": PROMPTS[:2]}, "prompts was .*; target was"),
        ({"sets": {"few": sets["few"]}}, "sets was"),
        ({"sets": dict(reversed(sets.items()))}, "sets was"),
        ({"sets": {**sets, "few": [0]}}, "sets was"),
    ):
        with pytest.raises(InputError, match=message):
            off(clip, data, sae, **{"sets": sets, "checkpoint": path, **changed})
    with pytest.raises(InputError, match="other data"):
        off(clip, data.flip(0), sae, sets, checkpoint=path)
    with pytest.raises(InputError, match="model_sha256 was"):
        off(tiny_clip(seed=1), data, sae, sets, checkpoint=path)
    sae.cfg.k += 1  # the same weights
    with pytest.raises(InputError, match="sae_sha256 was"):
        off(clip, data, sae, sets, checkpoint=path)
    sae.cfg.k -= 1
    assert path.read_bytes() == before
    same(off(clip, data, sae, sets, checkpoint=path), off(clip, data, sae, sets))


def test_targets_are_told_apart(clip: HookedCLIP, pixels: Tensor, sae: Any, sets: Any, tmp_path: Path) -> None:
    weight = torch.randn(3, clip.vision.cfg.d_embed, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bias = torch.arange(3.0, dtype=torch.float64)
    targets = [
        probe_target(weight, bias, labels=PROMPTS), probe_target(weight, 2 * bias, labels=PROMPTS),
        probe_target(weight, bias, normalize=True, labels=PROMPTS), direction_target(weight, labels=PROMPTS),
        direction_target(weight.flip(0), labels=PROMPTS), direction_target(weight, labels=PROMPTS, cosine=False),
    ]  # fmt: skip
    for number, target in enumerate(targets):
        path = tmp_path / f"{number}"
        off(clip, pixels[:2], sae, sets, target, checkpoint=path)
        for other in targets:
            if other is not target:
                with pytest.raises(InputError, match=r"settings: target was '\w+' and is now '\w+';"):
                    off(clip, pixels[:2], sae, sets, other, checkpoint=path)
        same(off(clip, pixels[:2], sae, sets, target, checkpoint=path), off(clip, pixels[:2], sae, sets, target))


def test_accumulators_of_two_stretches_are_one() -> None:
    def part(start: int, n: int) -> OffBatch:
        values = torch.arange(start, start + n).double()
        return OffBatch(
            values[:, None].expand(n, 3), values[None, :, None].expand(2, n, 3), values.expand(2, 4, n)[..., None],
            values.expand(2, n).long(), values.expand(2, n), values.expand(2, 4, n), values.long(),
            [f"{i}.png" for i in range(start, start + n)],
        )  # fmt: skip

    whole, one, other = (RowAccumulator(OffBatch, AXES) for _ in range(3))
    for own, parts in ((whole, [part(0, 2), part(2, 3), part(5, 1)]), (one, [part(0, 2)]),
                       (other, [part(2, 3), part(5, 1)])):  # fmt: skip
        for each in parts:
            own.update(each)
    again = RowAccumulator(OffBatch, AXES)
    again.load_state_dict(other.state_dict())
    assert one.merge(again) is one
    for a, b in zip(one.result(), whole.result(), strict=True):
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    assert whole.result().names == [f"{i}.png" for i in range(6)]
    assert whole.result().control.shape == (2, 4, 6, 1)
