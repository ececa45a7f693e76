"""WordNet's nouns with their senses, glosses and hypernyms, read from its own dictionary files.

One reader for every copy: the corpus that NLTK downloads (a folder or a zip) and the dictionary folder of a system
package, which lacks the file `lexnames` that NLTK's reader insists on. Only `index.POS` and `data.POS` are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from clip_lens_ext.errors import InputError, LoadError, near

PartOfSpeech = Literal["noun", "verb", "adj", "adv"]
_PARTS: tuple[str, ...] = get_args(PartOfSpeech)
_HYPERNYM = ("@", "@i")

_HOW = (
    "Ways to get the data: (1) pip install 'clip-lens-ext[words]', then python -m nltk.downloader wordnet; "
    "(2) apt install wordnet-base, then folder='/usr/share/wordnet'; (3) any folder with WordNet's index.noun and "
    "data.noun, as folder=..."
)


@dataclass(frozen=True)
class Sense:
    """One meaning of a word.

    Attributes:
        name: in NLTK's form, `"crane.n.04"`: first lemma, part of speech, number among the senses of that lemma.
        gloss: definition and examples.
        lemmas: every word for this meaning, the first one first; as WordNet spells them, with spaces.
        hypernyms: names of what is above it, nearest first, up to the root.
    """

    name: str
    gloss: str = ""
    lemmas: tuple[str, ...] = ()
    hypernyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Synset:
    kind: str
    lemmas: tuple[str, ...]
    above: tuple[int, ...]
    gloss: str


class WordNet:
    """Senses by word; `read_wordnet` makes it.

    Attributes:
        source: where it was read.
        part_of_speech: `"noun"`, `"verb"`, `"adj"` or `"adv"`.
    """

    def __init__(
        self, index: dict[str, tuple[int, ...]], synsets: dict[int, _Synset], part: PartOfSpeech, source: str
    ) -> None:
        self._index, self._synsets, self.part_of_speech, self.source = index, synsets, part, source
        self._senses: dict[int, Sense] = {}

    def __len__(self) -> int:
        return len(self._synsets)

    def __contains__(self, word: str) -> bool:
        return _key(word) in self._index

    def senses(self, word: str) -> tuple[Sense, ...]:
        """The senses of a word, most frequent first as WordNet orders them; empty where it knows none.

        Args:
            word: spaces or underscores, upper or lower case.
        """
        return tuple(self._sense(offset) for offset in self._index.get(_key(word), ()))

    def terms(self, *, lemmas: Literal["first", "all"] = "first") -> Iterator[str]:
        """The words of every synset in the order of the file, each once, as `Vocabulary.wordnet` takes them.

        Args:
            lemmas: the first lemma of each synset, or all of them.
        """
        seen: set[str] = set()
        for synset in self._synsets.values():
            for lemma in synset.lemmas[:1] if lemmas == "first" else synset.lemmas:
                word = _plain(lemma).lower()
                if word not in seen:
                    seen.add(word)
                    yield word

    def by_word(self, words: Sequence[str]) -> Mapping[str, tuple[Sense, ...]]:
        """The senses of words that it knows, looked up when they are asked for: all hypernyms of all take a while."""
        return _SensesByWord(self, words)

    def _sense(self, offset: int) -> Sense:
        if offset not in self._senses:
            above: dict[int, None] = {}
            layer = self._synsets[offset].above
            while layer:  # breadth first: nearest first
                new = [parent for parent in dict.fromkeys(layer) if parent not in above]
                above |= dict.fromkeys(new)
                layer = tuple(grandparent for parent in new for grandparent in self._synsets[parent].above)
            synset = self._synsets[offset]
            lemmas = tuple(_plain(lemma) for lemma in synset.lemmas)
            hypernyms = tuple(self._name(parent) for parent in above)
            self._senses[offset] = Sense(self._name(offset), synset.gloss, lemmas, hypernyms)
        return self._senses[offset]

    def _name(self, offset: int) -> str:
        lemma = self._synsets[offset].lemmas[0].lower()
        number = self._index[lemma].index(offset) + 1
        return f"{lemma}.{self._synsets[offset].kind}.{number:02d}"


class _SensesByWord(Mapping[str, tuple[Sense, ...]]):
    """A mapping from words to their senses, which are made when they are asked for."""

    def __init__(self, wordnet: WordNet, words: Sequence[str]) -> None:
        self._wordnet, self._words = wordnet, dict.fromkeys(word for word in words if word in wordnet)

    def __getitem__(self, word: str) -> tuple[Sense, ...]:
        if word not in self._words:
            raise KeyError(word)
        return self._wordnet.senses(word)

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)


def read_wordnet(folder: str | os.PathLike[str] | None = None, *, part_of_speech: PartOfSpeech = "noun") -> WordNet:
    """Read WordNet's dictionary files.

    Args:
        folder: with `index.noun` and `data.noun`; None: where NLTK keeps its corpus. Nothing is downloaded.
        part_of_speech: which words.

    Returns:
        `WordNet`.

    Raises:
        InputError: no such part of speech.
        LoadError: the data are not there (the message says how to get them), or are damaged.

    Example:
        >>> read_wordnet("no/such/folder")
        Traceback (most recent call last):
        clip_lens_ext.errors.LoadError: no WordNet at 'no/such/folder': index.noun is missing. Ways to get the data: ...
    """
    if part_of_speech not in _PARTS:
        hint = near(str(part_of_speech), _PARTS)
        raise InputError(f"part_of_speech is one of {', '.join(_PARTS)}, got {part_of_speech!r}{hint}")
    source, texts = _from_folder(Path(folder), part_of_speech) if folder is not None else _from_nltk(part_of_speech)
    try:
        index = dict(_index_entry(line) for line in texts[0].splitlines() if line and not line.startswith(" "))
        synsets = dict(_data_entry(line) for line in texts[1].splitlines() if line and not line.startswith(" "))
        wordnet = WordNet(index, synsets, part_of_speech, source)
        for offset in synsets:
            wordnet._name(offset)
        missing = [o for synset in synsets.values() for o in synset.above if o not in synsets]
        missing += [o for offsets in index.values() for o in offsets if o not in synsets]
    except (ValueError, IndexError, KeyError) as error:
        raise LoadError(f"the WordNet files of {source} are damaged: {type(error).__name__}: {error}") from error
    if missing or not synsets:
        what = f"synset {missing[0]:08d} is missing" if missing else f"data.{part_of_speech} is empty"
        raise LoadError(f"the WordNet files of {source} are damaged: {what}")
    return wordnet


def _key(word: str) -> str:
    return "_".join(word.lower().replace("_", " ").split())


def _plain(lemma: str) -> str:
    return lemma.replace("_", " ")


def _index_entry(line: str) -> tuple[str, tuple[int, ...]]:
    """`lemma pos synset_cnt p_cnt [symbol...] sense_cnt tagsense_cnt offset...`."""
    parts = line.split()
    n_senses, n_pointers = int(parts[2]), int(parts[3])
    offsets = parts[6 + n_pointers :]
    if len(offsets) != n_senses:
        raise ValueError(f"{parts[0]!r} says {n_senses} senses and lists {len(offsets)}")
    return parts[0], tuple(map(int, offsets))


def _data_entry(line: str) -> tuple[int, _Synset]:
    """`offset lex_filenum ss_type w_cnt(hex) [word lex_id]... p_cnt [symbol offset pos source/target]... | gloss`."""
    head, bar, gloss = line.partition("|")
    if not bar:
        raise ValueError(f"the line of synset {line[:8]} is cut off")
    parts = head.split()
    n_words = int(parts[3], 16)
    # An adjective may carry a syntactic marker: "galore(ip)".
    lemmas = tuple(word.partition("(")[0] for word in parts[4 : 4 + 2 * n_words : 2])
    at = 4 + 2 * n_words
    n_pointers = int(parts[at])
    pointers = [parts[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(n_pointers)]
    above = tuple(int(offset) for symbol, offset, _, _ in pointers if symbol in _HYPERNYM)
    return int(parts[0]), _Synset(parts[2], lemmas, above, gloss.strip())


def _from_folder(folder: Path, part: str) -> tuple[str, list[str]]:
    texts = []
    for kind in ("index", "data"):
        path = folder / f"{kind}.{part}"
        if not path.is_file():
            raise LoadError(f"no WordNet at {os.fspath(folder)!r}: {path.name} is missing. {_HOW}")
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return repr(os.fspath(folder)), texts


def _from_nltk(part: str) -> tuple[str, list[str]]:
    try:
        import nltk.data
    except ImportError as error:
        raise LoadError(f"WordNet's data need a folder, or the package nltk, which is not installed. {_HOW}") from error
    texts = []
    for kind in ("index", "data"):
        try:
            pointer = nltk.data.find(f"corpora/wordnet/{kind}.{part}")
        except LookupError as error:
            raise LoadError(f"NLTK is installed, and its WordNet corpus is not. {_HOW}") from error
        with pointer.open() as stream:
            texts.append(stream.read().decode("utf-8", errors="replace"))
    return "NLTK", texts
