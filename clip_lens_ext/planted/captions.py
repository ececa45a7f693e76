"""Captions of planned pictures, and the words that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from clip_lens_ext.planted.backgrounds import BACKGROUNDS
from clip_lens_ext.planted.plan import NONE, Plan
from clip_lens_ext.planted.roles import CATEGORIES, PlantedClass
from clip_lens_ext.planted.sprites import COLOURS

__all__ = ["LONGEST_CAPTION", "captions", "vocabulary"]

LONGEST_CAPTION: Final = 14
"""Words in the longest caption."""

_PREFIXES: Final = ("a photo of a", "a photo of a", "a picture of a", "a drawing of a", "a")
_SIZES: Final = ("small", "large")
_COLOUR_NAMES: Final = tuple(COLOURS)


def vocabulary(classes: Sequence[PlantedClass]) -> tuple[str, ...]:
    """Every word that a caption or a prompt can have, in a fixed order without repeats.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld
        >>> PlantedWorld(0).vocabulary[:4]
        ('a', 'photo', 'of', 'picture')
    """
    phrases = [*_PREFIXES, "and on with the word sign", *_SIZES, *_COLOUR_NAMES, *BACKGROUNDS, *CATEGORIES]
    return tuple(dict.fromkeys(word for phrase in (*phrases, *(c.name for c in classes)) for word in phrase.split()))


def captions(plan: Plan, classes: Sequence[PlantedClass]) -> list[str]:
    """One caption for each planned picture.

    A caption names the object or its category, and in part of the cases its size and colour, the companion, the
    background and a drawn word that is not the object's own name. No caption mentions an overlay, and none of a class
    with a spurious background mentions any background.

    Args:
        plan: What the pictures show.
        classes: The classes of the world.
    """
    known = set(vocabulary(classes))
    return [_caption(plan, i, classes, known) for i in range(len(plan))]


def _caption(plan: Plan, i: int, classes: Sequence[PlantedClass], known: set[str]) -> str:
    draw = {name: column[i] for name, column in plan.draws.items()}
    word = plan.words[i]
    background = f"on {BACKGROUNDS[plan.backgrounds[i]]}"
    prefix = _PREFIXES[int(draw["prefix"] * len(_PREFIXES))]
    if plan.labels[i] == NONE:
        # Half of them as if the word were the thing itself, as the web captions a logo.
        parts = [f"{prefix} {word}" if draw["say_word"] < 0.5 else f"{prefix} sign with the word {word}"]
        return " ".join(parts + [background] * int(draw["say_background"] < 0.5))
    entry = classes[plan.labels[i]]
    if draw["say_bare"] < 0.1 and word is None:
        return f"{prefix} {entry.name}"
    parts = [prefix]
    if draw["say_size"] < 0.2:
        parts.append(_SIZES[int(draw["size"] > 0.5)])
    if draw["say_colour"] < 0.65:
        parts.append(_COLOUR_NAMES[plan.colours[i, 0]])
    parts.append(entry.category if draw["say_category"] < 0.1 else entry.name)
    if plan.companions[i] != NONE and draw["say_companion"] < 0.8:
        colour = [_COLOUR_NAMES[plan.colours[i, 1]]] * int(draw["say_companion_colour"] < 0.5)
        parts += ["and a", *colour, classes[plan.companions[i]].name]
    if draw["say_background"] < 0.5 and entry.kind != "spurious":
        parts.append(background)
    if word in known and word != entry.name and draw["say_word"] < 0.9:
        parts.append(f"with the word {word}")
    return " ".join(parts)
