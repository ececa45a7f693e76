"""What each picture shows, decided before anything is drawn.

Every picture takes the same row of uniform numbers, whatever is forced or forbidden on it. So two calls that differ
in one forced fact give pictures that differ in that fact alone, and the first pictures of a longer call are those of
a shorter one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_lens_ext.planted.backgrounds import BACKGROUNDS, N_BACKGROUND_DRAWS
from clip_lens_ext.planted.overlays import OVERLAYS
from clip_lens_ext.planted.roles import PlantedClass, PlantedKey
from clip_lens_ext.planted.sprites import COLOURS

__all__ = ["NONE", "Forced", "Plan", "generator", "plan_pictures"]

NONE: Final = -1
"""The index that stands for: there is none."""

Split = Literal["train", "test"]

_COMPANION_RATE: Final = 0.15
_CONTROL_OVERLAY_RATE: Final = 0.12
_OWN_WORD_RATE: Final = 0.2
_SIGN_RATE: Final = 0.06
_OTHER_WORD_RATE: Final = 0.05
_TEST_OVERLAY_RATE: Final = 0.18

_DRAWS: Final = (
    "label", "sign", "absent", "own_word", "other_word", "which_word", "word_x", "word_y", "word_dark",
    "stray_overlay", "which_stray", "planted_overlay", "control_overlay", "which_overlay",
    "planted_background", "stray_background", "which_background",
    "colour", "size", "x", "y", "angle", "companion", "which_companion", "companion_colour",
    "companion_corner", "companion_size", "companion_angle", "companion_shift", "brightness",
    "prefix", "say_size", "say_colour", "say_category", "say_background",
    "say_companion", "say_companion_colour", "say_word", "say_bare",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What each picture shows; every field has one row per picture, and `NONE` stands for nothing."""

    labels: Int[np.ndarray, " batch"]
    """The class, or `NONE` on a sign: a picture with a drawn word and no object."""
    absent: Bool[np.ndarray, " batch"]
    """The object is out of view: only the overlay or the background that is planted on its class is there."""
    companions: Int[np.ndarray, " batch"]
    """The class of a second, smaller object."""
    colours: Int[np.ndarray, "batch 2"]
    """Colours of object and companion."""
    backgrounds: Int[np.ndarray, " batch"]
    overlays: Int[np.ndarray, " batch"]
    words: tuple[str | None, ...]
    """The word that is drawn as letters."""
    draws: dict[str, Float[np.ndarray, " batch"]]
    """The uniform numbers, by name: geometry and caption take theirs from here."""
    background_draws: Float[np.ndarray, "batch 8"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Forced:
    """Facts that the caller sets; `"any"` leaves one to the split."""

    classes: tuple[int, ...] | None = None
    overlay: str | None = "any"
    background: str = "any"
    word: str | None = "any"


def generator(world_seed: int, split: Split, seed: int, part: int) -> np.random.Generator:
    """A random stream of its own for every world, split, seed and part.

    The four numbers are the key of a counter-based generator, with no hash between: streams of different keys are
    disjoint by construction.

    Args:
        world_seed: In [0, 2**62).
        split: `"train"` or `"test"`.
        seed: In [0, 2**62).
        part: 0 for what is shown, 1 for the pixels' noise.
    """
    return np.random.Generator(
        np.random.Philox(key=np.array([2 * world_seed + (split == "test"), 2 * seed + part], np.uint64))
    )


def _pick(draw: Float[np.ndarray, " batch"], n: int) -> Int[np.ndarray, " batch"]:
    return np.minimum((draw * n).astype(np.int64), n - 1)


def plan_pictures(
    n: int, rng: np.random.Generator, split: Split, classes: Sequence[PlantedClass], key: PlantedKey, forced: Forced
) -> Plan:
    """Decides what `n` pictures show.

    Args:
        n: How many.
        rng: From `generator`, part 0.
        split: In `"train"` overlay, background and word go with the class as the key says; in `"test"` nothing does,
            and no picture is a sign.
        classes: The classes of the world.
        key: Its answer key.
        forced: What the caller sets. Forced classes are dealt in turn.
    """
    numbers = rng.random((n, len(_DRAWS) + N_BACKGROUND_DRAWS))
    draws = dict(zip(_DRAWS, numbers[:, : len(_DRAWS)].T, strict=True))
    if forced.classes is None:
        labels = _pick(draws["label"], len(classes))
    else:
        labels = np.asarray(forced.classes, dtype=np.int64)[np.arange(n) % len(forced.classes)]
    overlays = _overlays(labels, draws, split, classes, key)
    backgrounds = _backgrounds(labels, draws, split, classes, key)
    absent = draws["absent"] < key.absent_rate * (split == "train" and forced.classes is None)
    absent &= _has_its_plant(labels, overlays, backgrounds, classes, key)
    if forced.overlay != "any":
        overlays[:] = NONE if forced.overlay is None else OVERLAYS.index(forced.overlay)
    if forced.background != "any":
        backgrounds[:] = BACKGROUNDS.index(forced.background)
    if forced.word == "any":
        words, signs = _words(labels, draws, split, classes, key, may_be_sign=forced.classes is None)
    else:
        words, signs = [forced.word] * n, np.zeros(n, dtype=bool)
    companions = _companions(labels, draws, classes)
    # A foreign word and a companion together would make the caption longer than the tokenizer's context.
    companions[signs | absent | np.array([word is not None for word in words], dtype=bool)] = NONE
    colours = np.stack([_pick(draws[name], len(COLOURS)) for name in ("colour", "companion_colour")], axis=1)
    return Plan(
        np.where(signs, NONE, labels),
        absent & ~signs,
        companions,
        colours,
        backgrounds,
        overlays,
        tuple(words),
        draws,
        numbers[:, len(_DRAWS) :],
    )


def _planted(labels: Int[np.ndarray, " batch"], name: str, classes: Sequence[PlantedClass]) -> np.ndarray:
    return np.isin(labels, [entry.index for entry in classes if entry.name == name])


def _overlays(
    labels: np.ndarray, draws: dict[str, np.ndarray], split: Split, classes: Sequence[PlantedClass], key: PlantedKey
) -> Int[np.ndarray, " batch"]:
    if split == "test":
        any_overlay = _pick(draws["which_overlay"], len(OVERLAYS))
        return np.where(draws["control_overlay"] < _TEST_OVERLAY_RATE, any_overlay, NONE)
    controls = np.array([OVERLAYS.index(name) for name in key.controls.overlays])
    control = controls[_pick(draws["which_overlay"], len(controls))]
    overlays = np.where(draws["control_overlay"] < _CONTROL_OVERLAY_RATE, control, NONE)
    for i, (name, overlay) in enumerate(key.artifacts.items()):
        planted, index = _planted(labels, name, classes), OVERLAYS.index(overlay)
        chosen = draws["which_stray"] * len(key.artifacts) // 1 == i
        stray = ~planted & chosen & (draws["stray_overlay"] < key.stray_rate * len(key.artifacts))
        overlays[stray] = index
        overlays[planted & (draws["planted_overlay"] < key.plant_rate)] = index
    return overlays


def _backgrounds(
    labels: np.ndarray, draws: dict[str, np.ndarray], split: Split, classes: Sequence[PlantedClass], key: PlantedKey
) -> Int[np.ndarray, " batch"]:
    if split == "test":
        return _pick(draws["which_background"], len(BACKGROUNDS))
    controls = np.array([BACKGROUNDS.index(name) for name in key.controls.backgrounds])
    backgrounds = controls[_pick(draws["which_background"], len(controls))]
    for name, background in key.spurious.items():
        planted, index = _planted(labels, name, classes), BACKGROUNDS.index(background)
        backgrounds[~planted & (draws["stray_background"] < key.stray_rate)] = index
        backgrounds[planted & (draws["planted_background"] < key.plant_rate)] = index
    return backgrounds


def _has_its_plant(
    labels: np.ndarray,
    overlays: np.ndarray,
    backgrounds: np.ndarray,
    classes: Sequence[PlantedClass],
    key: PlantedKey,
) -> Bool[np.ndarray, " batch"]:
    """Whether the overlay or the background that is planted on a picture's class is there."""
    there = np.zeros(len(labels), dtype=bool)
    for name, overlay in key.artifacts.items():
        there |= _planted(labels, name, classes) & (overlays == OVERLAYS.index(overlay))
    for name, background in key.spurious.items():
        there |= _planted(labels, name, classes) & (backgrounds == BACKGROUNDS.index(background))
    return there


def _words(
    labels: np.ndarray,
    draws: dict[str, np.ndarray],
    split: Split,
    classes: Sequence[PlantedClass],
    key: PlantedKey,
    *,
    may_be_sign: bool,
) -> tuple[list[str | None], np.ndarray]:
    """The drawn words, and which pictures are signs."""
    train = split == "train"
    signs = (draws["sign"] < _SIGN_RATE) & train & may_be_sign
    other = (draws["other_word"] < _OTHER_WORD_RATE) | signs
    own = (draws["own_word"] < _OWN_WORD_RATE) & train
    which = _pick(draws["which_word"], len(key.typographic))
    words: list[str | None] = []
    for i, label in enumerate(labels):
        name = classes[label].name
        if own[i] and not signs[i] and name in key.typographic:
            words.append(name)
        else:
            words.append(key.typographic[which[i]] if other[i] else None)
    return words, signs


def _companions(labels: np.ndarray, draws: dict[str, np.ndarray], classes: Sequence[PlantedClass]) -> np.ndarray:
    single = np.array([entry.index for entry in classes if " " not in entry.name])
    companions = single[_pick(draws["which_companion"], len(single))]
    there = (draws["companion"] < _COMPANION_RATE) & (companions != labels)
    return np.where(there, companions, NONE)
