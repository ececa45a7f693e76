"""A pass over references that was interrupted ends as one that was not, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.resumed import Stopping, same
from oracles.saes import build_sae
from PIL import Image
from tiny_clips import tiny_clip
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.codes import encode
from clip_lens_ext.semantics import References, collect_references
from clip_lens_ext.semantics.peaks import peaks
from clip_lens_ext.semantics.reference_pass import ReferenceAccumulator, ReferenceBatch
from clip_lens_ext.towers import HookedCLIP

HOOK = "blocks.0.hook_resid_post"


def collect(clip: HookedCLIP, data: Any, sae: Any, **settings: Any) -> References:
    return collect_references(clip.vision, data, sae, **{"k": 3, "batch_size": 2, "progress": False, **settings})


@pytest.mark.parametrize("latents", [None, [1, 5, 30]])
@pytest.mark.parametrize("every", [1, 3])
def test_resumed_anywhere(clip: HookedCLIP, pixels: Tensor, sae: Any, tmp_path: Path, latents: Any, every: int) -> None:
    data = pixels[:9]
    settings: dict[str, Any] = {"latents": latents, "checkpoint_every": every}
    whole = collect(clip, Stopping(data, None), sae, **settings)
    read: list[int] = []
    for at in range(0, 9, 2):
        path = tmp_path / f"{at}"
        with pytest.raises(KeyboardInterrupt):
            collect(clip, Stopping(data, at), sae, checkpoint=path, **settings)
        with clip.vision.hooks(fwd_hooks=[("hook_embed", lambda value, hook: read.append(len(value)))]):
            again = collect(clip, Stopping(data, None), sae, checkpoint=path, **settings)
        same(again, whole)
        assert sum(read) == 9 - at  # what was there is not computed again
        read.clear()
    with clip.vision.hooks(fwd_hooks=[("hook_embed", lambda value, hook: read.append(len(value)))]):
        same(collect(clip, Stopping(data, None), sae, checkpoint=path, **settings), whole)
    assert read == []  # a pass that is complete computes nothing, and knows its hook and tokens


def test_resumed_twice_with_pictures_that_cannot_be_read(clip: HookedCLIP, sae: Any, tmp_path: Path) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "c"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(7):
        noise = torch.randint(0, 255, (24, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"not a picture")
    left = [0]

    def stopping(picture: Any) -> Tensor:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return clip.preprocess(picture)

    for n in (3, 5):
        left[0] = n
        with pytest.raises(KeyboardInterrupt):
            collect(clip, folder, sae, preprocess=stopping, checkpoint=path)
    left[0] = 99
    resumed = collect(clip, folder, sae, preprocess=stopping, checkpoint=path)
    whole = collect(clip, folder, sae, preprocess=clip.preprocess)
    same(resumed, whole)
    assert [skip.name for skip in resumed.skipped] == [skip.name for skip in whole.skipped] != []


def test_resumed_ones_merge(clip: HookedCLIP, pixels: Tensor, sae: Any, tmp_path: Path) -> None:
    first, second = pixels[:5], pixels[5:11]
    resumed = []
    for number, part in enumerate((first, second)):
        with pytest.raises(KeyboardInterrupt):
            collect(clip, Stopping(part, 3), sae, checkpoint=tmp_path / f"{number}")
        resumed.append(collect(clip, Stopping(part, None), sae, checkpoint=tmp_path / f"{number}"))
    plain = [collect(clip, Stopping(part, None), sae) for part in (first, second)]
    same(resumed[0].merge(resumed[1]), plain[0].merge(plain[1]))
    whole = collect(clip, pixels[:11], sae)
    merged = resumed[0].merge(resumed[1])
    assert torch.equal(merged.sample, whole.sample)
    assert torch.equal(merged.position, whole.position)
    # Other batches: float64's rounding in the tower, and what is kept is float32.
    torch.testing.assert_close(merged.activation, whole.activation, rtol=1e-6, atol=0)


def test_a_checkpoint_of_something_else_is_refused(clip: HookedCLIP, pixels: Tensor, tmp_path: Path) -> None:
    path, data = tmp_path / "c", pixels[:6]
    sae = build_sae("topk", 48, HOOK, "patches", tower="vision")
    with pytest.raises(KeyboardInterrupt):
        collect(clip, Stopping(data, 4), sae, checkpoint=path)
    before = path.read_bytes()
    for changed, message in (
        ({"k": 4}, "k was 3 and is now 4"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"latents": [2]}, r"latents was None and is now \[2\]"),
        ({"hook_name": "blocks.1.hook_resid_post"}, f"hook_name was '{HOOK}' and is now 'blocks.1"),
        ({"token_scope": "cls"}, "token_scope was 'patches' and is now 'cls'"),
    ):
        with pytest.raises(InputError, match=message):
            collect(clip, data, sae, checkpoint=path, **changed)
    with pytest.raises(InputError, match="other data"):
        collect(clip, data.flip(0), sae, checkpoint=path)
    with pytest.raises(InputError, match="checkpoint after 2 batches, and the data have 1"):
        collect(clip, data[:2], sae, checkpoint=path)
    with pytest.raises(InputError, match="model_sha256 was"):
        collect(tiny_clip(seed=1), data, sae, checkpoint=path)
    with pytest.raises(InputError, match="sae_sha256 was"):
        collect(clip, data, build_sae("topk", 48, HOOK, "patches", tower="vision", seed=1), checkpoint=path)
    sae.cfg.k += 1  # the same weights
    with pytest.raises(InputError, match="sae_sha256 was"):
        collect(clip, data, sae, checkpoint=path)
    sae.cfg.k -= 1
    assert path.read_bytes() == before
    same(collect(clip, data, sae, checkpoint=path), collect(clip, data, sae))


def test_accumulators_of_two_stretches_of_the_data_are_one(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    def batches(start: int, stop: int) -> Iterator[ReferenceBatch]:
        for first in range(start, stop, 2):
            part = list(range(first, min(first + 2, stop)))
            codes = encode(clip.vision, pixels[part], sae)
            yield ReferenceBatch(peaks(codes), [f"{i}.png" for i in part], part, HOOK, "patches")

    whole, one, other, empty = (ReferenceAccumulator(sae.cfg.d_sae, 3) for _ in range(4))
    for own, (start, stop) in ((whole, (0, 8)), (one, (0, 4)), (other, (4, 8))):
        for batch in batches(start, stop):
            own.update(batch)
    again = ReferenceAccumulator(sae.cfg.d_sae, 3)
    again.load_state_dict(one.state_dict())
    for batch in batches(4, 8):
        again.update(batch)
    assert one.merge(other).merge(empty) is one
    for found in (one, again):
        mine, expected = found.state_dict(), whole.state_dict()
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            if name == "count.total" and found is one:  # two sums added: float64's rounding
                torch.testing.assert_close(mine[name], value, rtol=1e-14, atol=0)
            elif isinstance(value, Tensor):
                assert torch.equal(mine[name], value), name
            else:
                assert mine[name] == value, name
