"""Vocabularies: what they hold, where they come from, and their embeddings with the two caches."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import semantics as oracle
from tiny_clips import tiny_clip, tokenizer
from torch.nn import functional as F

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics import Sense, TermEmbeddings, Vocabulary, term_embeddings
from clip_lens_ext.towers import HookedCLIP

TERMS = ["dog", "cat", "a b", "Zebra", "zebra", "{x}"]


def embed(vocabulary: Vocabulary, clip: HookedCLIP, **settings: Any) -> TermEmbeddings:
    return vocabulary.embed(clip, progress=False, **settings)


@pytest.mark.parametrize("templates", [["{}"], ["{}", "my {}!"], ["a {}", "{} b", "{}"]])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_terms_are_averaged_over_templates_and_never_with_one_another(
    clip: HookedCLIP, templates: list[str], batch_size: int
) -> None:
    found = embed(Vocabulary.from_terms(TERMS, templates=templates), clip, batch_size=batch_size)
    for row, term in enumerate(TERMS):
        each = [clip.embed_texts(template.replace("{}", term))[0].tolist() for template in templates]
        unit = [[x / oracle.dot(v, v) ** 0.5 for x in v] for v in each]
        expected = oracle.mean(unit)
        length = oracle.dot(expected, expected) ** 0.5
        assert found.vectors[row].tolist() == pytest.approx([x / length for x in expected], abs=1e-12)
    assert found.empty.tolist() == pytest.approx(F.normalize(clip.embed_texts(""), dim=1)[0].tolist(), abs=1e-12)
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert (found.terms, found.templates, found.model) == (tuple(TERMS), tuple(templates), "tiny")


def test_another_empty_prompt(clip: HookedCLIP) -> None:
    found = embed(Vocabulary.from_terms(TERMS, empty_prompt="photo"), clip)
    torch.testing.assert_close(found.empty, F.normalize(clip.embed_texts("photo"), dim=1)[0])
    assert Vocabulary.from_terms(TERMS).fingerprint != found.vocabulary


def test_repeated_terms_are_kept_once_and_named() -> None:
    with pytest.warns(UserWarning, match="2 terms are given more than once, and are kept once: 'dog', 'cat'"):
        found = Vocabulary.from_terms(["dog", " cat", "Dog", "dog ", "cat", "dog"])
    assert found.terms == ("dog", "cat", "Dog")
    assert found.repeated == ("dog", "cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Vocabulary.from_terms(["dog", "Dog"]).repeated == ()


def test_the_fingerprint_is_of_all_that_embeddings_depend_on() -> None:
    base = Vocabulary.from_terms(TERMS)
    others = [
        Vocabulary.from_terms(TERMS[::-1]), Vocabulary.from_terms(TERMS[:-1]), Vocabulary.from_terms([*TERMS, "y"]),
        Vocabulary.from_terms(TERMS, templates="a {}"), Vocabulary.from_terms(TERMS, empty_prompt="a"),
        Vocabulary.from_terms(["dogcat", *TERMS[2:]]),
    ]  # fmt: skip
    assert len({other.fingerprint for other in [base, *others]}) == 7
    assert Vocabulary.from_terms(TERMS, senses={"dog": [Sense("dog.n.01")]}).fingerprint == base.fingerprint
    assert len(base.fingerprint) == 64


def test_memory_keeps_each_model_once(clip: HookedCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, other = Vocabulary.from_terms(TERMS), tiny_clip(seed=1)
    first = embed(vocabulary, clip)
    assert embed(vocabulary, clip) is first
    assert embed(vocabulary, tiny_clip()) is first  # the same weights
    second = embed(vocabulary, other)
    assert not torch.allclose(second.vectors, first.vectors)
    assert embed(vocabulary, clip) is first
    for seed in range(2, 7):
        embed(vocabulary, tiny_clip(seed=seed))
    assert len(vocabulary._embedded) == 4
    assert embed(vocabulary, clip) is not first


def test_what_changes_the_model_changes_its_embeddings() -> None:
    vocabulary, model = Vocabulary.from_terms(TERMS), tiny_clip()
    first = embed(vocabulary, model)
    assert model.text is not None
    with torch.no_grad():
        next(iter(model.text.native.parameters())).data.mul_(1.5)  # not seen by version counters
    second = embed(vocabulary, model)
    assert second.model_hash != first.model_hash
    torch.testing.assert_close(second.vectors[1], F.normalize(model.embed_texts("cat"), dim=1)[0])
    # Same weights, another tokenizer.
    other = tiny_clip(tokenizer=lambda texts: tokenizer([text[::-1] for text in texts]))
    assert other.text is not None
    with torch.no_grad():
        next(iter(other.text.native.parameters())).data.mul_(1.5)
    third = embed(vocabulary, other)
    assert third.model_hash == second.model_hash
    torch.testing.assert_close(third.vectors[1], F.normalize(model.embed_texts("tac"), dim=1)[0])


def test_hooks_are_seen_and_nothing_of_them_is_kept(clip: HookedCLIP, tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_terms(TERMS)
    plain = embed(vocabulary, clip)
    assert clip.text is not None
    with clip.text.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda activation, hook: activation.flip(-1))]):
        edited = embed(vocabulary, clip, cache_dir=tmp_path)
    assert not torch.allclose(edited.vectors, plain.vectors)
    assert not list(tmp_path.iterdir())
    assert embed(vocabulary, clip) is plain


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_disk_cache(clip: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    first = embed(Vocabulary.from_terms(TERMS), clip, cache_dir=folder)
    path = only(folder)
    assert path.name.startswith("terms-tiny-")
    monkeypatch.setattr(term_embeddings, "_compute", None)  # nothing is computed again
    again = embed(Vocabulary.from_terms(TERMS), clip, cache_dir=folder)
    assert torch.equal(again.vectors, first.vectors)
    assert torch.equal(again.empty, first.empty)
    assert (again.terms, again.model_hash, again.vocabulary) == (first.terms, first.model_hash, first.vocabulary)
    monkeypatch.undo()
    embed(Vocabulary.from_terms(TERMS), tiny_clip(seed=1), cache_dir=folder)
    embed(Vocabulary.from_terms(TERMS[1:]), clip, cache_dir=folder)
    assert len(list(folder.iterdir())) == 3


def test_memory_goes_to_the_disk_when_asked(clip: HookedCLIP, tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_terms(TERMS)
    embed(vocabulary, clip)
    embed(vocabulary, clip, cache_dir=tmp_path)
    assert torch.equal(TermEmbeddings.load(only(tmp_path)).vectors, embed(vocabulary, clip).vectors)


@pytest.mark.parametrize("fault", ["truncated", "text", "flipped", "other model", "other terms", "moved"])
def test_a_damaged_or_stale_cache_is_noticed(clip: HookedCLIP, tmp_path: Path, fault: str) -> None:
    good = embed(Vocabulary.from_terms(TERMS), clip, cache_dir=tmp_path)
    path = only(tmp_path)
    content = bytearray(path.read_bytes())
    if fault == "truncated":
        path.write_bytes(content[:-9])
    elif fault == "text":
        path.write_bytes(b"<html>" * 99)
    elif fault == "flipped":
        where = content.rindex(good.vectors[3].numpy().tobytes())
        content[where] ^= 1  # the last bit of one number
        path.write_bytes(content)
    elif fault == "other model":
        embed(Vocabulary.from_terms(TERMS), tiny_clip(seed=1)).save(path)
    elif fault == "other terms":
        embed(Vocabulary.from_terms(TERMS[::-1]), clip).save(path)
    else:  # right keys, wrong numbers, and a right checksum
        dataclasses.replace(good, vectors=good.vectors.flip(0)).save(path)
    with pytest.warns(UserWarning, match="cannot be used and are computed again"):
        found = embed(Vocabulary.from_terms(TERMS), clip, cache_dir=tmp_path)
    assert torch.equal(found.vectors, good.vectors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(embed(Vocabulary.from_terms(TERMS), clip, cache_dir=tmp_path).vectors, good.vectors)


def test_half_precision_becomes_single() -> None:
    clip = tiny_clip().to(torch.bfloat16)
    vocabulary = Vocabulary.from_terms(TERMS)
    found = embed(vocabulary, clip)
    assert found.vectors.dtype == torch.float32
    assert embed(vocabulary, clip) is found
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(6))


def test_models_and_terms_without_embeddings(clip: HookedCLIP) -> None:
    with pytest.raises(InputError, match="vision tower alone"):
        embed(Vocabulary.from_terms(TERMS), HookedCLIP(clip.native.visual))
    with pytest.raises(InputError, match="tokenizer of this live model is not known"):
        embed(Vocabulary.from_terms(TERMS), HookedCLIP(clip.native))
    with pytest.raises(InputError, match="batch_size must be a positive integer"):
        embed(Vocabulary.from_terms(TERMS), clip, batch_size=0)
    broken = tiny_clip()
    with torch.no_grad():
        broken.native.token_embedding.weight[tokenizer(["q"])[0, 1]] = torch.nan
    with pytest.raises(InputError, match=r"embedding of 'quiz' is zero or not finite"):
        embed(Vocabulary.from_terms(["dog", "quiz"]), broken)


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffdog\r\n\r\n  tabby cat \n#tag\nä; b\n".encode())
    found = Vocabulary.from_file(path, templates=["a {}"])
    assert found.terms == ("dog", "tabby cat", "#tag", "ä; b")
    assert (found.templates, found.source) == (("a {}",), "words.txt")
    path.write_text("dog\ndog\n")
    with pytest.warns(UserWarning, match="'dog'"):
        assert Vocabulary.from_file(path).terms == ("dog",)
    path.write_text("\n  \n")
    with pytest.raises(InputError, match="has no term"):
        Vocabulary.from_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="cannot read terms"):
        Vocabulary.from_file(path)
    with pytest.raises(LoadError, match="cannot read terms"):
        Vocabulary.from_file(tmp_path / "none.txt")


def test_imagenet() -> None:
    found = Vocabulary.imagenet(templates="a photo of a {}.")
    assert len(found) == 998  # 1000 classes, and two names that name two of them
    assert {"tench", "toilet paper", "missile"} <= set(found.terms)
    assert found.prompts("tench") == ["a photo of a tench."]
    assert "ImageNet-1k" in repr(found)


def test_common_words() -> None:
    pytest.importorskip("wordfreq")
    found = Vocabulary.common_words(50)
    assert len(found) == 50
    assert found.terms[0] == "the"
    assert Vocabulary.common_words(10).terms == found.terms[:10]
    assert Vocabulary.common_words(5, language="de").terms != found.terms[:5]
    with pytest.raises(InputError, match="no language 'xx'"):
        Vocabulary.common_words(5, language="xx")
    with pytest.raises(InputError, match="were asked for"):
        Vocabulary.common_words(10**8)


def test_common_words_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(LoadError, match=r"pip install 'clip-lens-ext\[words\]'"):
        Vocabulary.common_words(5)
    with pytest.raises(InputError, match="n must be a positive integer, got 0"):
        Vocabulary.common_words(0)


def test_union() -> None:
    one = Vocabulary.from_terms(["dog", "cat"], senses={"dog": [Sense("dog.n.01")]})
    other = Vocabulary.from_terms(["cat", "cow"], senses={"cow": [Sense("cow.n.01")], "cat": [Sense("cat.n.01")]})
    both = one.union(other)
    assert both.terms == ("dog", "cat", "cow")
    assert sorted(both.senses) == ["cat", "cow", "dog"]
    with pytest.raises(InputError, match="different templates"):
        one.union(Vocabulary.from_terms(["cow"], templates="a {}"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary.from_terms([]), "at least one term"),
        (lambda: Vocabulary.from_terms("dog"), "list of strings, got the one string 'dog'"),
        (lambda: Vocabulary.from_terms(["dog", " "]), "something in it, got ' '"),
        (lambda: Vocabulary.from_terms(["dog", 3]), "got 3"),
        (lambda: Vocabulary.from_terms(["dog"], templates=[]), "no template"),
        (lambda: Vocabulary.from_terms(["dog"], templates=["a photo"]), r"one \{\} for the term"),
        (lambda: Vocabulary.from_terms(["dog"], templates="{} {}"), r"one \{\} for the term"),
        (lambda: Vocabulary.from_terms(["dog"], templates=["{}", "{}"]), "given twice"),
        (lambda: Vocabulary.from_terms(["dog"], senses={"cat": []}), "'cat', which is not among the terms"),
        (lambda: Vocabulary(("dog", "dog")), "not distinct"),
        (lambda: Vocabulary((" dog",)), "no space at its ends"),
    ],
)
def test_wrong_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
