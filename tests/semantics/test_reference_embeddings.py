"""`embed_references`: each sample once, by any judge, and only from the images of the references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import semantics as oracle
from oracles.models import prompts
from oracles.saes import build_sae
from PIL import Image
from tiny_clips import tiny_clip
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics import ReferenceEmbeddings, References, collect_references, embed_references
from clip_lens_ext.towers import HookedCLIP


def embed(references: References, images: Any, judge: HookedCLIP, **settings: Any) -> ReferenceEmbeddings:
    return embed_references(references, images, judge, progress=False, **settings)


def assert_gathers(found: ReferenceEmbeddings, references: References, expected: Tensor, k: int) -> None:
    """Every latent's embeddings are those of its samples, in order, and the rest is padding."""
    vectors, mask = found.gather(torch.arange(references.d_sae))
    assert vectors.shape[:2] == (references.d_sae, k)
    for latent in range(references.d_sae):
        own = references.of(latent).sample[:k]
        assert int(mask[latent].sum()) == len(own) == int(found.n_references[latent])
        torch.testing.assert_close(vectors[latent, : len(own)], expected[own], rtol=0, atol=1e-12)
        assert vectors[latent, len(own) :].eq(0).all()
        assert torch.equal(found.activation[latent], references.activation[latent, :k])


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_they_are_those_of_their_samples(
    clip: HookedCLIP, pixels: Tensor, references: References, k: int | None, batch_size: int
) -> None:
    judge = tiny_clip(seed=5, name="judge")
    found = embed(references, pixels[:7], judge, k=k, batch_size=batch_size)
    assert_gathers(found, references, judge.embed_images(pixels[:7]).detach(), k or 4)
    assert len(found.vectors) == len(found.sample.unique()) == len(references.sample[:, :k].unique()) - 1
    assert (found.judge, found.provenance["judge"], found.provenance["model"]) == ("judge", "judge", "tiny")
    assert found.vectors.dtype == torch.float64
    assert "by 'judge'" in repr(found)


def test_each_sample_is_embedded_once(pixels: Tensor, references: References) -> None:
    judge = tiny_clip()
    seen: list[int] = []
    judge.vision.hook_embedding.add_hook(lambda activation, hook: seen.append(len(activation)))
    embed(references, pixels[:7], judge, batch_size=2)
    assert sum(seen) == len(references.sample.unique()) - 1


@pytest.mark.parametrize("normalize", [False, True])
def test_means(clip: HookedCLIP, pixels: Tensor, references: References, normalize: bool) -> None:
    found = embed(references, pixels[:7], clip)
    mean = found.mean(normalize=normalize)
    for latent in range(references.d_sae):
        own = [found.vectors[found.sample == s][0] for s in references.of(latent).sample]
        if not own:
            assert mean[latent].isnan().all()
            continue
        rows = [(v / v.norm() if normalize else v).tolist() for v in own]
        assert mean[latent].tolist() == pytest.approx(oracle.mean(rows), abs=1e-12)


def test_one_bad_embedding_stays_with_its_own_latents(clip: HookedCLIP, pixels: Tensor, references: References) -> None:
    found = embed(references, pixels[:7], clip)
    found.vectors[0] = torch.nan
    tainted = (found.row == 0).any(dim=1)
    assert 0 < int(tainted.sum()) < int((found.n_references > 0).sum())
    expected = tainted | (found.n_references == 0)
    assert torch.equal(found.mean().isnan().any(dim=1), expected)
    vectors, mask = found.gather(slice(None))
    assert torch.equal(vectors.isnan().any(dim=2).any(dim=1), tainted)
    assert not vectors[~mask].isnan().any()


def test_data_of_every_kind(clip: HookedCLIP, pixels: Tensor, references: References) -> None:
    expected = embed(references, pixels[:7], clip)
    dataset = TensorDataset(pixels[:7])
    for data in (dataset, DataLoader(dataset, batch_size=3), list(pixels[:7]), Stream(pixels[:7])):
        found = embed(references, data, clip, batch_size=3)
        torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=1e-12)
        assert torch.equal(found.row, expected.row)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise = torch.randint(0, 255, (24, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / name)
    return tmp_path


def test_folders_skipped_files_and_merged_passes(clip: HookedCLIP, sae: Any, folder: Path) -> None:
    (folder / "a" / "1.png").write_bytes(b"not a picture")

    def collect(data: Any) -> References:
        return collect_references(clip.vision, data, sae, k=2, preprocess=clip.preprocess, progress=False)

    merged = collect(folder / "a").merge(collect(folder / "b"))
    paths = [folder / "a/0.png", folder / "a/2.png", folder / "b/0.png", folder / "b/1.png"]
    expected = clip.embed_images([Image.open(path).convert("RGB") for path in paths]).detach()
    assert_gathers(embed(merged, [folder / "a", folder / "b"], clip), merged, expected, 2)
    judge = tiny_clip(seed=3, preprocess=lambda picture: 2 * clip.preprocess(picture))
    other = judge.embed_images([Image.open(path).convert("RGB") for path in paths]).detach()
    found = embed(merged, [folder / "a", folder / "b"], judge)
    assert_gathers(found, merged, other, 2)  # the judge's own preprocessing
    (folder / "a" / "2.png").unlink()
    Image.new("RGB", (32, 24)).save(folder / "a" / "9.png")
    with pytest.raises(InputError, match=r"not the images of the references: where '2\.png' was collected"):
        embed(merged, [folder / "a", folder / "b"], clip)


def test_a_reference_that_is_gone(clip: HookedCLIP, sae: Any, folder: Path, pixels: Tensor) -> None:
    found = collect_references(clip.vision, folder, sae, k=2, preprocess=clip.preprocess, progress=False)
    (folder / "b" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 5 reference samples .* the first 'b/1.png' .*the file is empty"):
        embed(found, folder, clip)
    whole = collect_references(clip.vision, pixels, sae, k=9, progress=False)
    with pytest.raises(InputError, match="at least 23 samples, and these images are 7"):
        embed(whole, pixels[:7], clip)
    with pytest.raises(InputError, match="are not in these images"):
        embed(whole, Stream(pixels[:7]), clip)


def test_prompts_are_embedded_by_the_text_tower(clip: HookedCLIP) -> None:
    sae = build_sae("topk", 40, "blocks.1.hook_resid_post", "eot", tower="text")
    ids = prompts(5)
    assert clip.text is not None
    references = collect_references(clip.text, ids, sae, k=2, progress=False)
    found = embed(references, ids, clip)
    assert_gathers(found, references, clip.text(ids).detach(), 2)
    assert found.provenance["judge_tower"] == "text"
    with pytest.raises(InputError, match="another judge"):
        embed(references, ids, tiny_clip(name="other"))


def test_save_and_load(clip: HookedCLIP, pixels: Tensor, references: References, tmp_path: Path) -> None:
    found = embed(references, pixels[:7], clip)
    found.save(tmp_path / "e")
    again = ReferenceEmbeddings.load(tmp_path / "e")
    for name in ("vectors", "sample", "row", "activation", "lowest"):
        assert torch.equal(getattr(again, name), getattr(found, name)), name
    for name in ("judge", "hook_name", "token_scope", "provenance"):
        assert getattr(again, name) == getattr(found, name), name
    with pytest.raises(LoadError, match=r"no file of References\.save"):
        References.load(tmp_path / "e")
    references.save(tmp_path / "r")
    with pytest.raises(LoadError, match=r"no file of ReferenceEmbeddings\.save"):
        ReferenceEmbeddings.load(tmp_path / "r")


def test_half_precision_becomes_single(pixels: Tensor, references: References) -> None:
    judge = tiny_clip().to(torch.bfloat16)
    found = embed(references, pixels[:7], judge)
    assert found.vectors.dtype == torch.float32


@pytest.mark.parametrize("k", [0, 5, True, 1.5])
def test_wrong_k(clip: HookedCLIP, pixels: Tensor, references: References, k: Any) -> None:
    with pytest.raises(InputError, match=r"k must be in 1\.\.4"):
        embed(references, pixels[:7], clip, k=k)


def test_nothing_is_active(clip: HookedCLIP, pixels: Tensor, references: References) -> None:
    object.__setattr__(empty := References(**references.__dict__), "sample", torch.full_like(references.sample, -1))
    with pytest.raises(InputError, match="no latent has a reference"):
        embed(empty, pixels[:7], clip)
