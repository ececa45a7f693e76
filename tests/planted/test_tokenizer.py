"""The word-level tokenizer."""

from __future__ import annotations

import pickle

import pytest
import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import PlantedWorld, WordTokenizer


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(PlantedWorld(0).vocabulary)


def test_round_trip(tokenizer: WordTokenizer) -> None:
    captions = PlantedWorld(0).sample(200, seed=1).captions
    tokens = tokenizer(captions)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (200, tokenizer.context_length)
    assert [tokenizer.decode(row) for row in tokens] == captions


def test_end_has_the_highest_id_and_padding_follows(tokenizer: WordTokenizer) -> None:
    texts = ["", "a", "a photo of a red heart"]
    tokens = tokenizer(texts)
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1
    for row, text in zip(tokens, texts, strict=True):
        n = len(text.split())
        assert row[0] == 1
        assert row.argmax() == n + 1
        assert row[n + 1] == tokenizer.eot_token_id
        assert (row[n + 2 :] == 0).all()
        assert ((row[1 : n + 1] > 1) & (row[1 : n + 1] < tokenizer.eot_token_id)).all()


def test_one_text_is_a_batch_of_one_and_case_does_not_matter(tokenizer: WordTokenizer) -> None:
    assert torch.equal(tokenizer("A Photo"), tokenizer(["a photo"]))


def test_every_word_has_its_own_id(tokenizer: WordTokenizer) -> None:
    ids = tokenizer(list(tokenizer.vocabulary))[:, 1]
    assert ids.tolist() == list(range(2, tokenizer.vocab_size - 1))


def test_pickles(tokenizer: WordTokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(again(["a red heart"]), tokenizer(["a red heart"]))


def test_unknown_words_and_long_texts_are_named(tokenizer: WordTokenizer) -> None:
    with pytest.raises(InputError, match=r"'hearts' in 'a hearts'.*did you mean 'heart'"):
        tokenizer("a hearts")
    fits = " ".join(["a"] * (tokenizer.context_length - 2))
    assert tokenizer(fits)[0, -1] == tokenizer.eot_token_id
    with pytest.raises(InputError, match="room for 14"):
        tokenizer(["a", fits + " a"])
    with pytest.raises(InputError, match="ids are in"):
        tokenizer.decode([1, tokenizer.vocab_size])


@pytest.mark.parametrize("words", [["a", "a"], ["A"], ["two words"], [""]])
def test_wrong_vocabularies(words: list[str]) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        WordTokenizer(words)
