"""Texts as token ids for a captioner: a small protocol, and how known tokenizers fit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from clip_lens_ext.errors import InputError


@runtime_checkable
class CaptionTokenizer(Protocol):
    """What a captioner asks of a tokenizer. There is no start token: the prefix stands where one would."""

    @property
    def end_id(self) -> int:
        """The token that ends a text."""
        ...

    @property
    def n_ids(self) -> int:
        """Token ids are in `[0, n_ids)`."""
        ...

    def to_ids(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        ...

    def to_text(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...


def caption_tokenizer(tokenizer: Any) -> CaptionTokenizer:
    """A tokenizer of open_clip's kind or of Hugging Face as a captioner takes it.

    Args:
        tokenizer: a `CaptionTokenizer`, which comes back as it is; a tokenizer of transformers with an end token; or
            one that is called like open_clip's and has `eot_token_id`, `vocab_size` and `decode`, as `WordTokenizer` of
            the planted world is.

    Raises:
        InputError: it is none of them, or has no end token.

    Example:
        >>> from clip_lens_ext.planted import WordTokenizer
        >>> tokenizer = caption_tokenizer(WordTokenizer(["a", "red", "star"]))
        >>> tokenizer.to_ids("a red star"), tokenizer.to_text([2, 4]), tokenizer.end_id
        ([2, 3, 4], 'a star', 5)
    """
    if isinstance(tokenizer, CaptionTokenizer):
        return tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise InputError("this tokenizer has no end token, so no caption would end: set tokenizer.eos_token")
        return _HuggingFaceTokens(tokenizer)
    if callable(tokenizer) and all(hasattr(tokenizer, name) for name in ("eot_token_id", "vocab_size", "decode")):
        return _OpenClipTokens(tokenizer)
    raise InputError(
        f"a {type(tokenizer).__name__} is no tokenizer that is known here: pass one of transformers, one that is "
        "called like open_clip's, or an object with end_id, n_ids, to_ids and to_text"
    )


class _HuggingFaceTokens:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.end_id = int(tokenizer.eos_token_id)
        self.n_ids = max(len(tokenizer), self.end_id + 1)

    def to_ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def to_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class _OpenClipTokens:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.end_id, self.n_ids = int(tokenizer.eot_token_id), int(tokenizer.vocab_size)

    def to_ids(self, text: str) -> list[int]:
        if hasattr(self._tokenizer, "encode"):  # called, open_clip's own cuts long texts without a word
            return list(self._tokenizer.encode(text))
        row = self._tokenizer([text])[0].tolist()
        return row[1 : row.index(self.end_id)]

    def to_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids))).strip()
