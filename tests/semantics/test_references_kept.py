"""What is kept of the references: statistics of activity, files, and crops."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.saes import build_sae
from safetensors.torch import load_file, save_file
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.data import Skipped
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics import References, collect_references, crop_references
from clip_lens_ext.towers import HookedCLIP, HookedTower

ACTIVITY = ("n_active", "total", "least", "greatest")


def collect(clip: HookedCLIP, data: Any, sae: Any, **settings: Any) -> References:
    return collect_references(clip.vision, data, sae, progress=False, **settings)


def peaks_by_loop(clip: HookedCLIP, pixels: Tensor, sae: Any) -> list[list[float]]:
    """For each latent the greatest activation of every sample that activates it."""
    dense = cle.encode(clip.vision, pixels, sae).dense().tolist()
    found = []
    for latent in range(len(dense[0][0])):
        peaks = [max(token[latent] for token in tokens) for tokens in dense]
        found.append([peak for peak in peaks if peak > 0])
    return found


def test_activity_against_loops(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    found = collect(clip, pixels[:9], sae, k=2, batch_size=4).activity
    expected = peaks_by_loop(clip, pixels[:9], sae)
    assert any(not own for own in expected) or min(map(len, expected)) < 9
    for latent, own in enumerate(expected):
        assert int(found.n_active[latent]) == len(own)
        # Activations are kept in float32.
        assert float(found.total[latent]) == pytest.approx(sum(own), rel=1e-6)
        assert float(found.least[latent]) == pytest.approx(min(own, default=0), rel=1e-6)
        assert float(found.greatest[latent]) == pytest.approx(max(own, default=0), rel=1e-6)
        if own:
            assert float(found.mean[latent]) == pytest.approx(sum(own) / len(own), rel=1e-6)
            assert float(found.frequency[latent]) == pytest.approx(len(own) / 9)
        else:
            assert found.mean[latent].isnan()
    assert found.n_samples == 9
    assert found.n_silent == sum(not own for own in expected)


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 8), ()])
def test_activity_does_not_depend_on_the_split(clip: HookedCLIP, pixels: Tensor, sae: Any, cuts: tuple) -> None:
    whole = collect(clip, pixels[:9], sae, k=2, batch_size=9).activity
    parts = [collect(clip, part, sae, k=2, batch_size=2) for part in pixels[:9].tensor_split(list(cuts))]
    merged = parts[-1]
    for part in reversed(parts[:-1]):
        merged = part.merge(merged)
    for name in ACTIVITY:
        # Sums in another order: float64 of a few float32 numbers.
        torch.testing.assert_close(getattr(merged.activity, name), getattr(whole, name), rtol=1e-12, atol=0)
    assert merged.activity.n_samples == 9


def test_counts_merge_as_their_results(clip: HookedCLIP) -> None:
    from clip_lens_ext.semantics.activity import ActivityCount

    one, other, whole = ActivityCount(4), ActivityCount(4), ActivityCount(4)
    first = torch.tensor([0, 2, 2]), torch.tensor([1.5, 2.0, 4.0])
    second = torch.tensor([2, 3]), torch.tensor([0.5, 7.0])
    one.update(*first, n_samples=2)
    other.update(*second, n_samples=5)
    for batch, n in ((first, 2), (second, 5)):
        whole.update(*batch, n_samples=n)
    merged = one.merge(other)
    assert merged is one
    merged.update(torch.tensor([1]), torch.tensor([9.0]), n_samples=1)
    whole.update(torch.tensor([1]), torch.tensor([9.0]), n_samples=1)
    for name in ACTIVITY:
        assert torch.equal(getattr(merged.result(), name), getattr(whole.result(), name)), name
    assert merged.result().least.tolist() == [1.5, 9.0, 0.5, 7.0]
    assert merged.result().n_samples == 8
    with pytest.raises(InputError, match="of 4 and of 3 latents"):
        one.merge(ActivityCount(3))


def test_only_the_wanted_latents_are_counted(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    whole = collect(clip, pixels[:9], sae, k=2).activity
    chosen = int(whole.n_active.argmax())
    some = collect(clip, pixels[:9], sae, k=2, latents=[chosen]).activity
    assert int(some.n_active[chosen]) == int(whole.n_active[chosen])
    assert int(some.n_active.sum()) == int(whole.n_active[chosen])


@pytest.mark.parametrize("latents", [None, [3, 5]])
def test_save_and_load(clip: HookedCLIP, pixels: Tensor, sae: Any, tmp_path: Path, latents: Any) -> None:
    found = collect(clip, pixels[:5], sae, k=3, latents=latents)
    # Names of files in an unknown encoding, and what JSON has to escape.
    object.__setattr__(found, "names", ("ä.png", 'a "b".png', "\udcff.png", "new\nline", "5"))
    object.__setattr__(found, "skipped", (Skipped("x.png", "the file is empty"),))
    found.save(tmp_path / "r.safetensors")
    again = References.load(tmp_path / "r.safetensors")
    for field in fields(References):
        one, other = getattr(found, field.name), getattr(again, field.name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), field.name
            assert one.dtype == other.dtype, field.name
        elif field.name != "activity":
            assert one == other, field.name
            assert type(one) is type(other), field.name
    for name in ACTIVITY:
        assert torch.equal(getattr(found.activity, name), getattr(again.activity, name))
    assert again.activity.n_samples == 5
    assert found.merge(again).n_samples == 10
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]  # nothing half-written stays


@pytest.mark.parametrize(
    "fault", ["gone", "folder", "empty", "truncated", "text", "another", "no JSON", "no names", "no tensor", "shape"]
)
def test_broken_files(references: References, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "r"
    references.save(path)
    content, tensors = path.read_bytes(), load_file(path)
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    del metadata["sha256"]  # which would find every fault before the fault itself is met
    if fault in ("gone", "folder"):
        path.unlink()
        if fault == "folder":
            path.mkdir()
    elif fault in ("empty", "truncated", "text"):
        path.write_bytes({"empty": b"", "truncated": content[:-20], "text": b"<html>" * 40}[fault])
    elif fault == "another":
        save_file(tensors, path)
    elif fault == "no JSON":
        save_file(tensors, path, metadata={"clip_lens_ext.References": "{"})
    else:
        if fault == "shape":
            tensors["position"] = tensors["position"][:, :-1].contiguous()
        else:
            del tensors["texts/names" if fault == "no names" else "sample"]
        save_file(tensors, path, metadata=metadata)
    with pytest.raises(LoadError, match=r"no file of References\.save"):
        References.load(path)


def latent_with_references(references: References) -> int:
    return int((references.sample >= 0).sum(dim=1).argmax())


@pytest.mark.parametrize("context", [0, 1, 2, 7])
def test_crops_are_around_the_greatest_patch(
    clip: HookedCLIP, pixels: Tensor, sae: Any, references: References, context: int
) -> None:
    dense = cle.encode(clip.vision, pixels[:7], sae).dense()  # patches alone: 3 rows of 4
    seen = set()
    for latent in range(references.d_sae):
        found = references.of(latent)
        crops = crop_references(references, latent, pixels[:7], clip.vision, context=context)
        assert crops.sample.tolist() == found.sample.tolist()
        assert len(crops.pictures) == len(crops.box) == len(found.sample)
        for picture, box, sample in zip(crops.pictures, crops.box.tolist(), found.sample.tolist(), strict=True):
            row, column = divmod(int(dense[sample, :, latent].argmax()), 4)
            left, top, right, bottom = box
            assert torch.equal(picture, pixels[sample, :, top:bottom, left:right])
            assert left <= 8 * column
            assert right >= 8 * column + 8
            assert top <= 8 * row
            assert bottom >= 8 * row + 8
            assert (bottom - top, right - left) == (8 * min(2 * context + 1, 3), 8 * min(2 * context + 1, 4))
            if context == 1 and 0 < column < 3:
                assert left == 8 * column - 8  # centred where there is room
            assert 0 <= left < right <= 32
            assert 0 <= top < bottom <= 24
            seen.add((row, column))
    assert len(seen) > 6


@pytest.mark.parametrize(("scope", "hook"), [("cls", "blocks.0.hook_resid_post"), ("pooled", "hook_pooled")])
def test_without_a_position_the_crop_is_the_picture(clip: HookedCLIP, pixels: Tensor, scope: str, hook: str) -> None:
    sae = build_sae("topk", 48, hook, scope, tower="vision")
    found = collect(clip, pixels[:4], sae, k=2)
    latent = latent_with_references(found)
    crops = crop_references(found, latent, pixels[:4], clip.vision)
    assert crops.box.tolist() == [[0, 0, 32, 24]] * len(crops.sample)
    assert torch.equal(crops.pictures[0], pixels[int(crops.sample[0])])


def test_crops_of_files_and_of_a_silent_latent(clip: HookedCLIP, sae: Any, tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        noise = torch.randint(0, 255, (24, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"not a picture")
    found = collect(clip, tmp_path, sae, k=3, preprocess=clip.preprocess)
    latent = latent_with_references(found)
    crops = crop_references(found, latent, tmp_path, clip.vision, preprocess=clip.preprocess, context=9)
    names = found.of(latent).names
    for name, picture in zip(names, crops.pictures, strict=True):
        assert torch.equal(picture, clip.preprocess(cle.read_image(tmp_path / name)))
    silent = int((found.sample >= 0).sum(dim=1).argmin())
    assert found.sample[silent, 0] < 0
    assert crop_references(found, silent, tmp_path, clip.vision, preprocess=clip.preprocess).pictures == ()
    (tmp_path / names[0]).write_bytes(b"")
    with pytest.raises(InputError, match=f"{names[0]}' cannot be read any more"):
        crop_references(found, latent, tmp_path, clip.vision, preprocess=clip.preprocess)


def test_crops_of_another_folder(clip: HookedCLIP, sae: Any, tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for folder, letter in (("one", "a"), ("other", "b"), ("moved", "a")):
        (tmp_path / folder).mkdir()
        for number in range(4):
            noise = torch.randint(0, 255, (24, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(tmp_path / folder / f"{letter}{number}.png")
    found = collect(clip, tmp_path / "one", sae, k=3, preprocess=clip.preprocess)
    latent = latent_with_references(found)
    for refuses in (
        lambda data: crop_references(found, latent, data, clip.vision, preprocess=clip.preprocess),
        lambda data: cle.embed_references(found, data, clip, progress=False),
    ):
        with pytest.raises(InputError, match=r"not the images of the references: where 'a\d\.png' .* 'b\d\.png' now"):
            refuses(tmp_path / "other")
        refuses(tmp_path / "moved")
        # A list of files has whole paths for names, a tensor none.
        refuses(sorted((tmp_path / "one").iterdir()))
    pixels = torch.stack([clip.preprocess(cle.read_image(file)) for file in sorted((tmp_path / "one").iterdir())])
    assert len(crop_references(found, latent, pixels, clip.vision).pictures) == len(found.of(latent).sample)


def test_crops_of_something_else(clip: HookedCLIP, pixels: Tensor, references: References) -> None:
    latent = latent_with_references(references)
    with pytest.raises(InputError, match="0 or more, got -1"):
        crop_references(references, latent, pixels[:7], clip.vision, context=-1)
    with pytest.raises(InputError, match=r"reads 24 x 32 pixels, got \[24, 40\]"):
        crop_references(references, latent, torch.zeros(7, 3, 24, 40, dtype=torch.float64), clip.vision)
    assert clip.text is not None
    with pytest.raises(InputError, match="no grid of patches"):
        crop_references(references, latent, pixels[:7], clip.text)
    with pytest.raises(InputError, match="latents are 0 to"):
        crop_references(references, 99, pixels[:7], clip.vision)
    object.__setattr__(far := References(**references.__dict__), "position", references.position + 9)
    with pytest.raises(InputError, match="were the references collected on this tower"):
        crop_references(far, latent, pixels[:7], HookedTower(clip.vision.native))
