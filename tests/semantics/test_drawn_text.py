"""What `draw_word` refuses to draw."""

from __future__ import annotations

import pytest
import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics import draw_word


@pytest.mark.parametrize("word", ["\u732b", "\u043a\u043e\u0442", "\u03bb", "caf\u00e9 \U0001f600"])
def test_a_character_that_the_font_lacks_would_be_a_box(word: str) -> None:
    grey = torch.full((1, 3, 48, 64), 128, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"has no .*would draw a box"):
        draw_word(grey, word)


def test_letters_digits_and_marks_are_drawn() -> None:
    grey = torch.full((1, 3, 48, 64), 128, dtype=torch.uint8)
    drawn = [draw_word(grey, letter) for letter in "abcxyzABCXYZ0123456789!?.-&"]
    assert len({picture.numpy().tobytes() for picture in drawn}) == len(drawn)
