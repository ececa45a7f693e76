"""A pixel font of capital letters, three columns by five rows, and words set in it."""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Bool

from clip_lens_ext.errors import InputError

__all__ = ["word_mask"]

_GLYPHS: Final[dict[str, str]] = {
    "a": ".#. #.# ### #.# #.#",
    "b": "##. #.# ##. #.# ##.",
    "c": ".## #.. #.. #.. .##",
    "d": "##. #.# #.# #.# ##.",
    "e": "### #.. ##. #.. ###",
    "f": "### #.. ##. #.. #..",
    "g": ".## #.. #.# #.# .##",
    "h": "#.# #.# ### #.# #.#",
    "i": "### .#. .#. .#. ###",
    "j": "..# ..# ..# #.# .#.",
    "k": "#.# ##. #.. ##. #.#",
    "l": "#.. #.. #.. #.. ###",
    "m": "#.# ### ### #.# #.#",
    "n": "##. #.# #.# #.# #.#",
    "o": ".#. #.# #.# #.# .#.",
    "p": "##. #.# ##. #.. #..",
    "q": ".#. #.# #.# .#. ..#",
    "r": "##. #.# ##. #.# #.#",
    "s": ".## #.. .#. ..# ##.",
    "t": "### .#. .#. .#. .#.",
    "u": "#.# #.# #.# #.# ###",
    "v": "#.# #.# #.# #.# .#.",
    "w": "#.# #.# ### ### #.#",
    "x": "#.# #.# .#. #.# #.#",
    "y": "#.# #.# .#. .#. .#.",
    "z": "### ..# .#. #.. ###",
}


def word_mask(word: str, *, scale: int = 2) -> Bool[np.ndarray, "row column"]:
    """The ink of a word: letters of 3 x 5 cells, one empty column between them, each cell `scale` pixels wide and high.

    Args:
        word: Letters a to z; capitals look the same.
        scale: Pixels per cell.

    Returns:
        True where there is ink, `[5*scale (4*n_letters - 1)*scale]`.

    Raises:
        InputError: If the word is empty or has a character that is not a letter.

    Example:
        >>> from clip_lens_ext.planted.font import word_mask
        >>> for row in word_mask("hi", scale=1):
        ...     print("".join(".#"[int(ink)] for ink in row))
        #.#.###
        #.#..#.
        ###..#.
        #.#..#.
        #.#.###
    """
    strange = sorted({letter for letter in word if letter.lower() not in _GLYPHS})
    if not word or strange:
        raise InputError(f"cannot draw the word {word!r}: the pixel font has the letters a to z, and not {strange}")
    columns = []
    for letter in word.lower():
        columns += [
            np.array([[cell == "#" for cell in row] for row in _GLYPHS[letter].split()]),
            np.zeros((5, 1), bool),
        ]
    ink = np.concatenate(columns[:-1], axis=1)
    return ink.repeat(scale, axis=0).repeat(scale, axis=1)
