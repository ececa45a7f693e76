"""The senses that a dictionary gives to the words of prompts, as directions that latents are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics.word_match import FUNCTION_WORDS, words_of
from clip_lens_ext.semantics.wordnet import Sense, WordNet
from clip_lens_ext.towers.clip import HookedCLIP


@dataclass(frozen=True, eq=False)
class WordSenses:
    """Senses of the words of prompts; `find_word_senses` makes it.

    Attributes:
        prompts: the prompts with a word of two senses or more, one per sense.
        words: the word, one per sense.
        senses: names of the senses, as `"crane.n.04"`.
        texts: what was embedded for each sense.
        vectors: of the texts, of unit length, `[sense d_embed]`.
        judge: name of the model that embedded them.
    """

    prompts: tuple[str, ...]
    words: tuple[str, ...]
    senses: tuple[str, ...]
    texts: tuple[str, ...]
    vectors: Tensor
    judge: str

    def __len__(self) -> int:
        return len(self.senses)

    def __repr__(self) -> str:
        return f"WordSenses({len(self)} senses of {len(set(self.words))} words in {len(set(self.prompts))} prompts)"


@torch.no_grad()
def find_word_senses(
    prompts: Sequence[str],
    dictionary: WordNet | Mapping[str, Sequence[Sense]],
    judge: HookedCLIP,
    *,
    n_senses: int = 6,
    ignore: Sequence[str] = (*FUNCTION_WORDS, "photo", "picture"),
) -> WordSenses:
    """Look up every word of the prompts, and embed the senses of those that have several.

    A sense is embedded as its first two words and the name of what is next above it: `"crane wading bird"`.

    Args:
        prompts: the prompts.
        dictionary: from `read_wordnet`, or a mapping from words to senses, such as `Vocabulary.senses`.
        judge: embeds the texts; the judge of the alignment that they will be compared in.
        n_senses: at most so many senses of a word, the first ones of the dictionary.
        ignore: words that are not looked up.

    Returns:
        `WordSenses`; none where no word has two senses.

    Raises:
        InputError: no prompt, or `n_senses` below 2.

    Example:
        >>> import clip_lens_ext as cle
        >>> plant = cle.Sense("bat.n.01", lemmas=("bat",), hypernyms=("plant.n.02",))
        >>> toy = cle.Sense("bat.n.05", lemmas=("bat",), hypernyms=("toy.n.01",))
        >>> senses = find_word_senses(["a photo of a bat"], {"bat": [plant, toy]}, cle.planted_clip())
        >>> senses.texts, senses.vectors.shape
        (('bat plant', 'bat toy'), torch.Size([2, 128]))
    """
    if isinstance(ignore, str):
        raise InputError(f"ignore is a list of words, got the string {ignore!r}")
    if isinstance(prompts, str) or not prompts or n_senses < 2:
        raise InputError("a list of at least one prompt is needed, and at least 2 senses of a word")
    found: list[tuple[str, str, str, str]] = []
    for prompt in prompts:
        for word in dict.fromkeys(words_of(prompt)):
            if word in ignore:
                continue
            known = dictionary.senses(word) if isinstance(dictionary, WordNet) else tuple(dictionary.get(word, ()))
            if len(known) > 1:
                found += [(prompt, word, sense.name, _text(word, sense)) for sense in known[:n_senses]]
    prompts_of, words, senses, texts = (tuple(column) for column in zip(*found, strict=True)) if found else ((),) * 4
    vectors = judge.embed_texts(list(texts), normalize=True).float().cpu() if texts else torch.zeros(0, 0)
    return WordSenses(prompts_of, words, senses, texts, vectors, judge.model_name)


def _text(word: str, sense: Sense) -> str:
    above = sense.hypernyms[0].rsplit(".", 2)[0].replace("_", " ") if sense.hypernyms else None
    return " ".join(dict.fromkeys([*(sense.lemmas[:2] or (word,)), *([above] if above else [])]))
