"""A word-level tokenizer that is called like open_clip's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int

from clip_lens_ext.errors import InputError, near

__all__ = ["WordTokenizer"]

PAD = 0
START = 1


class WordTokenizer:
    """Maps each word of a closed vocabulary to one token.

    The token ids are 0 for padding, 1 for the start, one id for each word from 2 on, and the highest for the end of
    the text, because open_clip pools a text at the highest id.

    Args:
        vocabulary: Lower-case words without spaces, each once.
        context_length: Tokens per text, with start and end.

    Raises:
        InputError: If a word is repeated, empty, in upper case, or has a space in it.

    Example:
        >>> from clip_lens_ext.planted import WordTokenizer
        >>> tokenizer = WordTokenizer(["a", "red", "star"], context_length=6)
        >>> tokenizer(["A red star", ""])
        tensor([[1, 2, 3, 4, 5, 0],
                [1, 5, 0, 0, 0, 0]])
        >>> tokenizer.decode([1, 2, 3, 4, 5, 0])
        'a red star'
    """

    def __init__(self, vocabulary: Iterable[str], context_length: int = 16) -> None:
        self.vocabulary = tuple(vocabulary)
        self.context_length = context_length
        wrong = [word for word in self.vocabulary if word.split() != [word] or word != word.lower()]
        if wrong or len(set(self.vocabulary)) != len(self.vocabulary):
            raise InputError(
                f"a vocabulary holds distinct lower-case words without spaces; not so {wrong or 'distinct'}"
            )
        if context_length < 2:
            raise InputError(f"context_length is {context_length}: start and end alone take 2")
        self._ids = {word: index + START + 1 for index, word in enumerate(self.vocabulary)}

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the three special ones included."""
        return len(self.vocabulary) + 3

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: the highest id."""
        return self.vocab_size - 1

    def __call__(
        self, texts: str | Sequence[str], context_length: int | None = None
    ) -> Int[torch.Tensor, "batch context"]:
        """Token ids of some texts.

        Args:
            texts: One text or several; upper and lower case are the same.
            context_length: Tokens per text, if not the tokenizer's own.

        Returns:
            Start, words, end, then padding, int64, `[batch context_length]`.

        Raises:
            InputError: If a word is not in the vocabulary, or a text is longer than the context.
        """
        length = self.context_length if context_length is None else context_length
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.full((len(texts), length), PAD)
        for row, text in enumerate(texts):
            ids = [START, *(self._id(word, text) for word in text.lower().split()), self.eot_token_id]
            if len(ids) > length:
                raise InputError(
                    f"the text {text!r} has {len(ids) - 2} words, and a context of {length} has room for {length - 2}"
                )
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens

    def _id(self, word: str, text: str) -> int:
        if word not in self._ids:
            raise InputError(
                f"the word {word!r} in {text!r} is not one of the {len(self.vocabulary)} words of this tokenizer"
                f"{near(word, self.vocabulary)}; see .vocabulary"
            )
        return self._ids[word]

    def decode(self, ids: Sequence[int] | Int[torch.Tensor, " token"]) -> str:
        """The text of some token ids, without start, end and padding.

        Args:
            ids: Ids of one text, `[token]`.

        Raises:
            InputError: If an id is not in [0, vocab_size).
        """
        values = [int(value) for value in ids]
        wrong = [value for value in values if not 0 <= value < self.vocab_size]
        if wrong:
            raise InputError(f"token ids are in [0, {self.vocab_size}), and not {wrong}")
        return " ".join(self.vocabulary[value - START - 1] for value in values if START < value < self.eot_token_id)
