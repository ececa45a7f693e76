"""Results on disk: whole or not there, checked when read; and the files of every layout that was ever written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext import result_files
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.image_files import Skipped
from clip_lens_ext.result_files import load_result, read_parts, save_result, write_parts
from clip_lens_ext.saes import SparseCodes
from clip_lens_ext.semantics import References, TermEmbeddings

# Names in an unknown encoding, what JSON has to escape, and nothing at all.
NAMES = ("ä.png", 'a "b".png', "\udcff.png", "new\nline", "")


@dataclass(frozen=True, eq=False)
class Inner:
    count: Tensor
    n_samples: int


@dataclass(frozen=True, eq=False)
class Outer:
    value: Tensor
    n_samples: int
    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    bounds: tuple[float, float]
    inner: Inner
    kept: Tensor | None
    settings: dict[str, Any] | None = None
    seed: int | None = None


def outer(**changed: Any) -> Outer:
    """Views of one tensor, a transposed one, half precision: what a safetensors file is picky about."""
    numbers = torch.arange(6.0).reshape(2, 3)
    found = Outer(numbers.T, 3, NAMES, (Skipped("x.png", "it is empty"),), (-1.0, float("inf")),
                  Inner(numbers[0].bfloat16(), 3), None, {"layers": [1, 2], "of": None})  # fmt: skip
    return replace(found, **changed)


def check_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b), field.name
            assert a.dtype == b.dtype, field.name
        elif isinstance(a, Inner):
            check_same(a, b)
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


@pytest.mark.parametrize("changed", [{}, {"kept": torch.zeros(0, 2)}, {"names": (), "skipped": ()}, {"seed": 5}])
def test_every_field_comes_back(tmp_path: Path, changed: dict[str, Any]) -> None:
    found = outer(**changed)
    save_result(found, tmp_path / "a")
    check_same(found, load_result(Outer, tmp_path / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_fields_may_be_views_of_one_tensor(tmp_path: Path) -> None:
    shared = torch.arange(4)
    found = outer(value=shared[1:], kept=shared)
    save_result(found, tmp_path / "a")
    check_same(found, load_result(Outer, tmp_path / "a"))


def test_names_do_not_go_into_the_header(tmp_path: Path) -> None:
    """safetensors refuses to read a header of more than 100 MB, which a million file names are."""
    sizes = []
    for n in (10, 5000):
        names = tuple(f"{i:0100}.png" for i in range(n))
        save_result(outer(names=names), tmp_path / "a")
        assert load_result(Outer, tmp_path / "a").names == names
        sizes.append(int.from_bytes((tmp_path / "a").read_bytes()[:8], "little"))
    assert sizes[1] - sizes[0] < 100  # but for the digits of the offsets and what aligns them


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    save_result(outer(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="a set is no plain JSON value"):
        save_result(outer(settings={"x": set()}), path)

    def full(tensors: Any, part: Path, metadata: Any) -> None:
        part.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(result_files, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_result(outer(seed=1), path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_where_to(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        save_result(outer(), tmp_path)
    with pytest.raises(InputError, match=r"there is no folder '.*gone'"):
        save_result(outer(), tmp_path / "gone" / "a")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("gone", "FileNotFoundError"), ("folder", "Error"), ("empty", "Error"), ("truncated", "Error"),
        ("text", "Error"), ("flipped", "its content is not what was written"),
        ("header", "its content is not what was written"), ("plain", "it says of nothing what it holds"),
        ("another", "it holds Inner"), ("no JSON", "JSONDecodeError"), ("no object", "its header holds no fields"),
        ("no texts", "it lacks names"), ("no tensors", "it lacks value, count$"),
        ("no tensor", "its value is no tensor"),
        ("no bytes", "UnicodeDecodeError"), ("unknown", "it has colour, which this version does not know"),
        ("a number", "TypeError"), ("misfit", "its parts do not fit together"),
    ],
)  # fmt: skip
def test_broken_files_say_what_is_wrong(tmp_path: Path, fault: str, reason: str) -> None:
    path, key = tmp_path / "a", "clip_lens_ext.Outer"
    save_result(outer(), path)
    content, tensors, header = path.read_bytes(), load_file(path), json.loads(metadata_of(path)[key])
    if fault in ("gone", "folder"):
        path.unlink()
        path.mkdir() if fault == "folder" else None
    elif fault in ("empty", "truncated", "text"):
        path.write_bytes({"empty": b"", "truncated": content[:-20], "text": b"<html>" * 40}[fault])
    elif fault == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "header":
        path.write_bytes(content.replace(b"layers", b"Layers"))
    elif fault == "plain":
        save_file(tensors, path)
    elif fault == "another":
        save_result(Inner(torch.zeros(1), 1), path)
    elif fault in ("no JSON", "no object"):
        save_file(tensors, path, metadata={key: {"no JSON": "{", "no object": "[]"}[fault]})
    else:
        if fault == "no texts":
            del tensors["texts/names"]
        elif fault == "no bytes":
            tensors["texts/names"][3] = 255
        elif fault == "no tensors":
            tensors = {name: value for name, value in tensors.items() if name.startswith("texts/")}
        elif fault == "no tensor":
            del tensors["value"]
            header["value"] = [1.0]
        elif fault == "unknown":
            header["colour"] = "red"
        elif fault == "a number":
            del tensors["texts/names"]
            header["names"] = 3
        save_file(tensors, path, metadata={key: json.dumps(header)})
    with pytest.raises(LoadError, match=rf"{path} is no file of Outer\.save: .*{reason}"):
        load_result(Outer, path, fits=lambda found: fault != "misfit")


def test_parts_say_whose_they_are(tmp_path: Path) -> None:
    write_parts(tmp_path / "a", "one", {"x": torch.ones(2)}, {"n": 1}, {"names": ["b"]})
    tensors, plain, texts = read_parts(tmp_path / "a", "one")
    assert (tensors["x"].tolist(), plain, texts) == ([1, 1], {"n": 1}, {"names": ["b"]})
    with pytest.raises(LoadError, match=r"no file of other\.save: it holds one"):
        read_parts(tmp_path / "a", "other")


# -- files of earlier versions, written as those wrote them


def written_with_lists_in_the_header(result: Any, path: Path) -> None:
    """As attributions, their summaries and faithfulness were: every field that is no tensor in the header."""
    given = {field.name: getattr(result, field.name) for field in fields(result)}
    tensors = {name: value.contiguous().clone() for name, value in given.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in given.items() if name not in tensors}
    save_file(tensors, path, metadata={f"clip_lens_ext.{type(result).__name__}": json.dumps(rest, default=asdict)})


def written_with_lists_beside(
    path: Path, kind: str, tensors: dict[str, Tensor | None], plain: dict[str, Any], texts: dict[str, Any]
) -> None:
    """As references, labels, scores and embeddings were: no hash, and nothing of tensors that are None."""
    stored = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    for name, value in texts.items():
        stored[f"texts/{name}"] = torch.from_numpy(np.frombuffer(json.dumps(list(value)).encode(), np.uint8).copy())
    save_file(stored, path, metadata={f"clip_lens_ext.{kind}": json.dumps(plain)})


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, Tensor, Any]:
    clip, sae = cle.planted_clip(), cle.planted_sae()
    pixels = cle.planted.normalise(cle.PlantedWorld(0).sample(4, seed=0, split="test").images)
    return clip, sae, pixels, cle.direction_target(torch.eye(2, 128), labels=["a crane", "Käse"])


def pick(result: Any, names: str) -> dict[str, Any]:
    return {name: getattr(result, name) for name in names.split()}


def equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        elif field.name == "activity":
            equal(a, b)
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


def test_old_attributions(world: Any, tmp_path: Path) -> None:
    clip, sae, pixels, target = world
    one = replace(cle.attribution_patching(clip.vision, pixels, sae, target), sample_names=tuple("abcd"))
    gap = replace(one, completeness_gap=one.prediction * 0.1, settings={"n_steps": 4})
    several = cle.aggregate_attributions(clip.vision, pixels, sae, target, progress=False)
    several = replace(several, skipped=(Skipped("x.png", "it is empty"),))
    checked = cle.faithfulness(clip.vision, pixels, sae, target, {"patching": one}, n_steps=3, progress=False)
    for found in (one, gap, several, checked):
        written_with_lists_in_the_header(found, tmp_path / "old")
        equal(found, type(found).load(tmp_path / "old"))
        found.save(tmp_path / "new")
        equal(found, type(found).load(tmp_path / "new"))


@pytest.mark.parametrize("latents", [None, [3, 5, 7]])
def test_old_references(world: Any, tmp_path: Path, latents: Any) -> None:
    clip, sae, pixels, _ = world
    found = cle.collect_references(clip.vision, pixels, sae, k=2, latents=latents, progress=False)
    found = replace(found, skipped=(Skipped("x.png", "it is empty"),), names=NAMES[:4])
    written_with_lists_beside(
        tmp_path / "old", "References",
        {**pick(found, "sample activation position indexes latents"),
         **pick(found.activity, "n_active total least greatest")},
        pick(found, "n_samples hook_name token_scope provenance"),
        {"names": found.names, "skipped": [[skip.name, skip.reason] for skip in found.skipped]},
    )  # fmt: skip
    equal(found, References.load(tmp_path / "old"))


def test_old_labels_scores_and_embeddings(world: Any, tmp_path: Path) -> None:
    clip, sae, pixels, _ = world
    references = cle.collect_references(clip.vision, pixels, sae, k=3, progress=False)
    embeddings = cle.embed_references(references, pixels, clip, progress=False)
    written_with_lists_beside(
        tmp_path / "e", "ReferenceEmbeddings", pick(embeddings, "vectors sample row activation lowest"),
        pick(embeddings, "judge hook_name token_scope provenance"), {},
    )  # fmt: skip
    equal(embeddings, type(embeddings).load(tmp_path / "e"))
    words = cle.Vocabulary.from_terms(["crane", "heart"])
    named = cle.align(references, words, clip, images=pixels, progress=False)
    for label in (named, replace(named, directions=None, baseline=None, term_vectors=None)):
        written_with_lists_beside(
            tmp_path / "a", "Alignment", pick(label, "term score n_references directions baseline term_vectors"),
            pick(label, "scorer unit judge vocabulary hook_name token_scope settings provenance"),
            {"terms": label.terms},
        )  # fmt: skip
        equal(label, type(label).load(tmp_path / "a"))
    for score in (cle.clarity(embeddings), cle.redundancy(embeddings)):
        written_with_lists_beside(
            tmp_path / "s", "LatentScores", pick(score, "value n_samples partner"),
            pick(score, "name bounds undefined settings seed provenance"), {},
        )  # fmt: skip
        equal(score, type(score).load(tmp_path / "s"))


@pytest.mark.parametrize("right", [True, False])
def test_old_term_embeddings_and_their_checksum(world: Any, tmp_path: Path, right: bool) -> None:
    import hashlib

    found = cle.Vocabulary.from_terms(["crane", "heart"]).embed(world[0], progress=False)
    digest = hashlib.sha256(found.vectors.numpy().tobytes() + found.empty.numpy().tobytes())
    content = digest.hexdigest() if right else "0" * 64
    written_with_lists_beside(
        tmp_path / "t", "TermEmbeddings", pick(found, "vectors empty"),
        {**pick(found, "model model_hash vocabulary provenance"), "content": content}, pick(found, "terms templates"),
    )  # fmt: skip
    if right:
        equal(found, TermEmbeddings.load(tmp_path / "t"))
    else:
        with pytest.raises(LoadError, match=r"TermEmbeddings\.save: its content is not what was written"):
            TermEmbeddings.load(tmp_path / "t")


@pytest.mark.parametrize("fault", [None, "no facts", "no count", "misfit", "latent"])
def test_old_codes(world: Any, tmp_path: Path, fault: str | None) -> None:
    clip, sae, pixels, _ = world
    codes = cle.encode(clip.vision, pixels, sae)
    count = torch.bincount(codes.sample * codes.n_token + codes.token, minlength=codes.n_sample * codes.n_token)
    tensors = {"count": count.int(), "latent": codes.latent.int(), "value": codes.value,
               "position": codes.position.int().contiguous()}  # fmt: skip
    metadata = {"kind": "clip_lens_ext.SparseCodes",
                "facts": json.dumps(pick(codes, "n_sample n_token d_sae hook_name token_scope"))}  # fmt: skip
    if fault == "no facts":
        del metadata["facts"]
    elif fault == "no count":
        del tensors["count"]
    elif fault == "misfit":
        tensors["value"] = tensors["value"][:-1].clone()
    elif fault == "latent":
        tensors["latent"][0] = codes.d_sae
    path = tmp_path / "c.safetensors"
    save_file(tensors, path, metadata=metadata)
    if fault is None:
        equal(codes, SparseCodes.load(path))
    else:
        reason = {"no facts": "JSONDecodeError", "no count": "it lacks count"}.get(fault, "do not fit together")
        with pytest.raises(LoadError, match=rf"no file of SparseCodes\.save: .*{reason}"):
            SparseCodes.load(path)
