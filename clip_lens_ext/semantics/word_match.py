"""Is a word in a text? Whole words, in any case, whatever stands around them."""

from __future__ import annotations

import re
from typing import Final

FUNCTION_WORDS: Final = ("a", "an", "and", "in", "of", "on", "the", "with")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    Example:
        >>> words_of("A photo of a bird-of-paradise.")
        ['a', 'photo', 'of', 'a', 'bird-of-paradise']
    """
    return re.findall(r"\w+(?:['-]\w+)*", text.lower())


def holds(text: str, subject: str) -> bool:
    """Whether a text has a word or a phrase, whole; no text has an empty one.

    Example:
        >>> holds("a photo of a Fire engine.", "fire engine"), holds("a photo of a gear", "ear")
        (True, False)
    """
    return bool(subject) and re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text, re.IGNORECASE) is not None
