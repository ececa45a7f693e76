"""The terms that latents are compared with: words or phrases, their senses, and the templates around them."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics.term_embeddings import TermEmbeddings, embed_terms
from clip_lens_ext.semantics.wordnet import PartOfSpeech, Sense, read_wordnet
from clip_lens_ext.towers.clip import HookedCLIP

_BARE = ("{}",)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Distinct terms, the templates that each is put into, and the empty prompt that scores are relative to.

    Make it with `from_terms`, `from_file`, `imagenet`, `wordnet` or `common_words`.

    Attributes:
        terms: distinct, without spaces at their ends, in the order given.
        templates: each with one `{}` where the term goes; the bare term by default, as Dreyer et al. 2505.20229.
        empty_prompt: the prompt without a term; the empty string whatever the templates, as there.
        senses: what WordNet says of the terms that have senses.
        source: where the terms come from.
        repeated: terms that were given more than once; each is there once, at its first place.
    """

    terms: tuple[str, ...]
    templates: tuple[str, ...] = _BARE
    empty_prompt: str = ""
    senses: Mapping[str, tuple[Sense, ...]] = field(default_factory=dict)
    source: str = "terms"
    repeated: tuple[str, ...] = ()
    _embedded: dict[str, TermEmbeddings] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.terms, str):
            raise InputError(f"terms are a list of strings, got the string {self.terms!r}")
        if not self.terms:
            raise InputError("a vocabulary needs at least one term")
        wrong = [term for term in self.terms if not isinstance(term, str) or not term or term != term.strip()]
        if wrong:
            raise InputError(f"a term is a string with something in it and no space at its ends, got {wrong[0]!r}")
        if len(set(self.terms)) != len(self.terms):
            raise InputError("the terms are not distinct: make the vocabulary with Vocabulary.from_terms")
        _check_templates(self.templates)

    def __len__(self) -> int:
        return len(self.terms)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.terms[:3])) + (", ..." if len(self) > 3 else "")
        return f"Vocabulary({len(self)} terms of {self.source}: {shown}; {len(self.templates)} templates)"

    @property
    def fingerprint(self) -> str:
        """sha256 over terms, templates and the empty prompt: all that the embeddings depend on beside the model."""
        content = json.dumps([self.terms, self.templates, self.empty_prompt])
        return hashlib.sha256(content.encode()).hexdigest()

    def prompts(self, term: str) -> list[str]:
        """The prompts of one term, one for each template."""
        return [template.replace("{}", term) for template in self.templates]

    def embed(
        self,
        clip: HookedCLIP,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> TermEmbeddings:
        """The embedding of every term and of the empty prompt, computed once for each model.

        The embedding of a prompt is L2-normalised; that of a term is the mean over its templates, normalised again.
        Terms are never averaged with one another.

        Args:
            clip: its text tower embeds them.
            cache_dir: also keep them in this folder, in a file named by vocabulary and model. A file that does not
                belong to this model, or is damaged, is computed again with a warning.
            batch_size: prompts in a batch.
            progress: draw a bar.

        Returns:
            `TermEmbeddings` on the CPU, of unit length; half precision becomes float32.

        Raises:
            InputError: a model without a text tower, or a term whose embedding has no direction.
        """
        return embed_terms(self, clip, self._embedded, cache_dir=cache_dir, batch_size=batch_size, progress=progress)

    def union(self, other: Vocabulary) -> Vocabulary:
        """These terms, and those of the other that are not among them.

        Raises:
            InputError: the two have other templates or empty prompts.
        """
        if (self.templates, self.empty_prompt) != (other.templates, other.empty_prompt):
            raise InputError("the two vocabularies have different templates or empty prompts")
        terms = tuple(dict.fromkeys((*self.terms, *other.terms)))
        senses = {**other.senses, **self.senses}
        repeated = tuple(dict.fromkeys((*self.repeated, *other.repeated)))
        source = f"{self.source} + {other.source}"
        return Vocabulary(terms, self.templates, self.empty_prompt, senses, source, repeated)

    @classmethod
    def from_terms(
        cls,
        terms: Iterable[str],
        *,
        templates: str | Sequence[str] = _BARE,
        empty_prompt: str = "",
        senses: Mapping[str, Sequence[Sense]] | None = None,
    ) -> Vocabulary:
        """A vocabulary of your own words or phrases.

        Args:
            terms: in any order; spaces at their ends are dropped. A term that is given again is kept once, at its
                first place; that is warned of, and is in `.repeated`. Upper and lower case are different.
            templates: one or several, each with one `{}`.
            empty_prompt: what scores are relative to.
            senses: of some of the terms, for instance from `read_wordnet`.

        Raises:
            InputError: no term, an empty one, something that is no string, or a template without one `{}`.

        Example:
            >>> vocabulary = Vocabulary.from_terms(["dog", "tabby cat"], templates=["{}", "a photo of a {}"])
            >>> vocabulary.prompts("tabby cat")
            ['tabby cat', 'a photo of a tabby cat']
        """
        if isinstance(terms, str):
            raise InputError(f"terms is a list of strings, got the one string {terms!r}")
        return _make(terms, templates, empty_prompt, senses or {}, "terms", warn=True)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, templates: str | Sequence[str] = _BARE, empty_prompt: str = ""
    ) -> Vocabulary:
        """A text file in UTF-8 with one term a line; blank lines are left out, a `#` is part of its term.

        Raises:
            LoadError: no such file, or it is no text in UTF-8.
            InputError: it has no term.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"cannot read terms from {os.fspath(path)!r}: {type(error).__name__}: {error}") from error
        terms = [line for line in lines if line.strip()]
        if not terms:
            raise InputError(f"{os.fspath(path)!r} has no term: one a line is needed")
        return _make(terms, templates, empty_prompt, {}, path.name, warn=True)

    @classmethod
    def imagenet(cls, *, templates: str | Sequence[str] = _BARE, empty_prompt: str = "") -> Vocabulary:
        """The class names of ImageNet-1k as open_clip has them; two of its 1000 classes share a name with another.

        Example:
            >>> vocabulary = Vocabulary.imagenet()
            >>> len(vocabulary), vocabulary.terms[0], vocabulary.repeated
            (998, 'tench', ('missile', 'sunglasses'))
        """
        from open_clip import IMAGENET_CLASSNAMES

        return _make(IMAGENET_CLASSNAMES, templates, empty_prompt, {}, "ImageNet-1k", warn=False)

    @classmethod
    def wordnet(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        part_of_speech: PartOfSpeech = "noun",
        lemmas: Literal["first", "all"] = "first",
        templates: str | Sequence[str] = _BARE,
        empty_prompt: str = "",
    ) -> Vocabulary:
        """WordNet's words in lower case, with spaces, and for each all of its senses with gloss and hypernyms.

        Args:
            folder: with WordNet's dictionary files; None: where NLTK keeps its corpus. Nothing is downloaded.
            part_of_speech: which words.
            lemmas: the first lemma of each synset (67,000 nouns in WordNet 3.0), or all (118,000).
            templates, empty_prompt: as in `from_terms`.

        Raises:
            InputError: `lemmas` or the part of speech is unknown.
            LoadError: the data are not there; the message says how to get them.
        """
        if lemmas not in ("first", "all"):
            raise InputError(f"lemmas is 'first' or 'all', got {lemmas!r}")
        wordnet = read_wordnet(folder, part_of_speech=part_of_speech)
        terms = list(wordnet.terms(lemmas=lemmas))
        found = _make(terms, templates, empty_prompt, {}, f"WordNet ({part_of_speech})", warn=False)
        return replace(found, senses=wordnet.by_word(terms))

    @classmethod
    def common_words(
        cls, n: int, *, language: str = "en", templates: str | Sequence[str] = _BARE, empty_prompt: str = ""
    ) -> Vocabulary:
        """The `n` most frequent words of a language, most frequent first, from the package wordfreq.

        Raises:
            InputError: `n` is not positive, or more than the package has; no such language.
            LoadError: wordfreq is not installed.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n must be a positive integer, got {n!r}")
        try:
            from wordfreq import available_languages, top_n_list
        except ImportError as error:
            raise LoadError(
                "common words need the package wordfreq: pip install 'clip-lens-ext[words]', or give a list of your "
                "own to Vocabulary.from_file"
            ) from error
        if language not in available_languages("best"):
            raise InputError(f"wordfreq has no language {language!r}: {', '.join(sorted(available_languages('best')))}")
        words = top_n_list(language, n)
        if len(words) < n:
            raise InputError(f"wordfreq has {len(words)} words of {language!r}, and {n} were asked for")
        return _make(words, templates, empty_prompt, {}, f"common words ({language})", warn=False)


def _check_templates(templates: Sequence[str]) -> None:
    if not templates:
        raise InputError("no template given: '{}' is the bare term")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(f"a template has one {{}} for the term, and not so {template!r}")
    if len(set(templates)) != len(templates):
        raise InputError("a template is given twice")


def _make(
    terms: Iterable[str],
    templates: str | Sequence[str],
    empty_prompt: str,
    senses: Mapping[str, Sequence[Sense]],
    source: str,
    *,
    warn: bool,
) -> Vocabulary:
    count: dict[str, int] = {}
    for term in terms:
        if not isinstance(term, str) or not term.strip():
            raise InputError(f"a term is a string with something in it, got {term!r}")
        count[term.strip()] = count.get(term.strip(), 0) + 1
    repeated = tuple(term for term, n in count.items() if n > 1)
    if repeated and warn:
        shown = ", ".join(map(repr, repeated[:5])) + (", ..." if len(repeated) > 5 else "")
        warnings.warn(f"{len(repeated)} terms are given more than once, and are kept once: {shown}", stacklevel=3)
    unknown = [term for term in senses if term not in count]
    if unknown:
        raise InputError(f"senses are given for {unknown[0]!r}, which is not among the terms")
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    given = {term: tuple(found) for term, found in senses.items() if found}
    return Vocabulary(tuple(count), templates, empty_prompt, given, source, repeated)
