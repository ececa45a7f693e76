"""WordNet's files, read from a folder or from NLTK's corpus: a small dictionary in its format, written here."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics import Vocabulary, read_wordnet

# lemmas, hypernyms by number, gloss
SYNSETS = [
    (["entity"], [], "that which is"),
    (["object", "physical_object"], [0], "a thing"),
    (["living_thing"], [1], "alive"),
    (["machine"], [1], 'a device; "a big machine"'),
    (["bird"], [2], "has wings | and feathers"),
    (["crane"], [4], "a wading bird"),
    (["crane", "derrick"], [3], "lifts things"),
    (["Grus", "Crane"], [1, 0], "a constellation"),
    (["red_crane"], [5, 6], "both"),
]
ORDER = {"crane": [7, 6, 5]}  # most frequent first


def write_wordnet(folder: Path, part: str = "noun", letter: str = "n") -> Path:
    """`index.POS` and `data.POS` of `SYNSETS`, with licence lines, and offsets that are byte offsets as in WordNet."""
    licence = "".join(f"  {i} This software and database is being provided to you\n" for i in range(3))

    def line(number: int, offsets: list[int]) -> str:
        lemmas, above, gloss = SYNSETS[number]
        words = " ".join(f"{lemma} 0" for lemma in lemmas)
        pointers = [("@i" if lemmas[0] == "Grus" else "@", other) for other in above]
        pointers += [("~", i) for i, (_, parents, _) in enumerate(SYNSETS) if number in parents]
        pointing = " ".join(f"{symbol} {offsets[other]:08d} {letter} 0000" for symbol, other in pointers)
        head = f"{offsets[number]:08d} 03 {letter} {len(lemmas):02x} {words} {len(pointers):03d} {pointing}".rstrip()
        return f"{head} | {gloss}  \n"

    offsets = [0] * len(SYNSETS)
    at = len(licence)
    for number in range(len(SYNSETS)):
        offsets[number] = at
        at += len(line(number, offsets))
    index: dict[str, list[int]] = {}
    for number, (lemmas, _, _) in enumerate(SYNSETS):
        for lemma in lemmas:
            index.setdefault(lemma.lower(), []).append(number)
    entries = []
    for lemma, numbers in sorted(index.items()):
        senses = " ".join(f"{offsets[number]:08d}" for number in ORDER.get(lemma, numbers))
        entries.append(f"{lemma} {letter} {len(numbers)} 2 @ ~ {len(numbers)} 0 {senses}  \n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"data.{part}").write_text(licence + "".join(line(i, offsets) for i in range(len(SYNSETS))))
    (folder / f"index.{part}").write_text(licence + "".join(entries))
    return folder


def test_senses(tmp_path: Path) -> None:
    wordnet = read_wordnet(write_wordnet(tmp_path))
    found = wordnet.senses("Crane")
    assert [sense.name for sense in found] == ["grus.n.01", "crane.n.02", "crane.n.03"]
    assert found[1].lemmas == ("crane", "derrick")
    assert found[1].gloss == "lifts things"
    assert found[1].hypernyms == ("machine.n.01", "object.n.01", "entity.n.01")
    assert found[0].hypernyms == ("object.n.01", "entity.n.01")  # an instance has classes above it, each once
    both = wordnet.senses("red  crane")[0]
    assert both.hypernyms == (
        "crane.n.03", "crane.n.02", "bird.n.01", "machine.n.01", "living_thing.n.01", "object.n.01", "entity.n.01",
    )  # fmt: skip
    assert wordnet.senses("bird")[0].gloss == "has wings | and feathers"
    assert wordnet.senses("unheard-of") == ()
    assert "Physical_Object" in wordnet
    assert "unheard-of" not in wordnet
    assert len(wordnet) == 9


def test_vocabulary(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path)
    found = Vocabulary.wordnet(folder, templates="a photo of a {}")
    assert found.terms == (
        "entity", "object", "living thing", "machine", "bird", "crane", "grus", "red crane",
    )  # fmt: skip
    assert len(found.senses["crane"]) == 3  # all senses, also those that name another lemma first
    assert found.senses["red crane"][0].lemmas == ("red crane",)
    assert sorted(found.senses) == sorted(found.terms)
    assert len(found.senses) == len(found)
    assert "derrick" not in found.senses  # a word of WordNet, and no term here
    both = Vocabulary.from_terms(["bird", "xyz"], templates=found.templates).union(found)
    assert both.senses["crane"] == found.senses["crane"]
    whole = Vocabulary.wordnet(os.fspath(folder), lemmas="all")
    assert set(whole.terms) - set(found.terms) == {"physical object", "derrick"}
    assert whole.repeated == ()
    with pytest.raises(InputError, match="'first' or 'all'"):
        Vocabulary.wordnet(folder, lemmas="some")  # type: ignore[arg-type]


def test_other_parts_of_speech(tmp_path: Path) -> None:
    write_wordnet(tmp_path, "verb", "v")
    assert read_wordnet(tmp_path, part_of_speech="verb").senses("bird")[0].name == "bird.v.01"
    with pytest.raises(LoadError, match=r"index\.noun is missing"):
        read_wordnet(tmp_path)
    with pytest.raises(InputError, match="did you mean 'noun'"):
        read_wordnet(tmp_path, part_of_speech="nouns")  # type: ignore[arg-type]


@pytest.mark.parametrize("zipped", [False, True])
def test_nltks_corpus(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    folder = write_wordnet(tmp_path / "nltk_data" / "corpora" / "wordnet")
    if zipped:
        with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, f"wordnet/{path.name}")
                path.unlink()
        folder.rmdir()
    monkeypatch.setattr(nltk.data, "path", [os.fspath(tmp_path / "nltk_data")])
    found = Vocabulary.wordnet()
    assert found.terms == Vocabulary.wordnet(write_wordnet(tmp_path / "plain")).terms
    assert found.senses["crane"][2].hypernyms[0] == "bird.n.01"


def test_the_data_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = r"nltk\.downloader wordnet.*apt install wordnet-base.*folder="
    with pytest.raises(LoadError, match=rf"no WordNet at .*missing.*{ways}"):
        Vocabulary.wordnet(tmp_path)
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [os.fspath(tmp_path)])
    with pytest.raises(LoadError, match=rf"NLTK is installed, and its WordNet corpus is not.*{ways}"):
        Vocabulary.wordnet()
    for name in ("nltk", "nltk.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LoadError, match=rf"nltk, which is not installed.*{ways}"):
        Vocabulary.wordnet()


@pytest.mark.parametrize(
    "fault", ["cut data", "cut index", "a synset is gone", "an index line is gone", "no numbers", "empty"]
)
def test_damaged_files(tmp_path: Path, fault: str) -> None:
    folder = write_wordnet(tmp_path)
    data, index = folder / "data.noun", folder / "index.noun"
    if fault == "cut data":
        data.write_text(data.read_text()[:-30])
    elif fault == "cut index":
        index.write_text(index.read_text().rstrip()[:-12])
    elif fault == "a synset is gone":
        lines = data.read_text().splitlines(keepends=True)
        data.write_text("".join(line for line in lines if " machine " not in line))
    elif fault == "an index line is gone":
        lines = index.read_text().splitlines(keepends=True)
        index.write_text("".join(line for line in lines if not line.startswith("machine ")))
    elif fault == "no numbers":
        data.write_text("what is this | text\n")
    else:
        data.write_text("")
        index.write_text("")
    with pytest.raises(LoadError, match="are damaged"):
        read_wordnet(folder)
