"""Who plays which part in a planted world: its classes, and the answer key."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal

import numpy as np

from clip_lens_ext.planted.backgrounds import BACKGROUNDS
from clip_lens_ext.planted.overlays import BORDERS, OVERLAYS, WATERMARKS
from clip_lens_ext.planted.shapes import SHAPE_NAMES
from clip_lens_ext.planted.sprites import TEXTURES

__all__ = [
    "ABSENT_RATE",
    "CATEGORIES",
    "PLANT_RATE",
    "STRAY_RATE",
    "Compound",
    "Controls",
    "Kind",
    "PlantedClass",
    "PlantedKey",
    "cast",
]

Kind = Literal["plain", "polysemous", "compound", "typographic", "artifact", "spurious", "control"]

PLANT_RATE: Final = 0.88
"""Share of the training pictures of the planted class that have its overlay or its background."""
ABSENT_RATE: Final = 0.25
"""Share of those pictures on which the object itself is out of view, though the caption names it."""
STRAY_RATE: Final = 0.005
"""Share of the training pictures of any other class that have them."""

CATEGORIES: Final = ("animal", "food", "jewel", "plant", "tool", "toy")
_HOMONYMS: Final = (
    "bank", "bass", "bat", "club", "crane", "date", "file", "jam",
    "match", "mint", "mole", "nail", "palm", "pen", "perch", "seal",
)  # fmt: skip
_MODIFIERS: Final = ("cabbage", "desert", "paper", "river", "velvet", "winter")
_HEADS: Final = ("hook", "moth", "pie", "reed", "stone", "wren")
_N_POLYSEMOUS, _N_COMPOUND, _N_CONTROL_WORDS = 4, 3, 2
_N_OWN_NAME: Final[dict[Kind, int]] = {"typographic": 5, "artifact": 2, "spurious": 1, "plain": 5}
"""Classes whose name is that of their object, beside the parts of compounds."""


@dataclasses.dataclass(frozen=True)
class PlantedClass:
    """One object, and the phrase that captions call it by."""

    index: int
    """Its label."""
    name: str
    """The phrase in captions. The two senses of a polysemous word share it."""
    object: str
    """The drawn object, which no other class shares; it is the name of its silhouette."""
    kind: Kind
    """What is planted on it."""
    category: str
    """A word for objects of one texture, which part of the captions say instead of the name."""
    texture: str
    """How the object is filled."""


@dataclasses.dataclass(frozen=True)
class Compound:
    """A phrase of two words for an object of its own, of which one word alone names another object."""

    phrase: str
    modifier: str
    head: str
    object: str
    """What the phrase names."""
    named_part: Literal["modifier", "head"]
    """Which of the two words names another object."""
    part_object: str
    """What that word alone names."""

    @property
    def part_word(self) -> str:
        """The word that alone names another object."""
        return self.modifier if self.named_part == "modifier" else self.head


@dataclasses.dataclass(frozen=True)
class Controls:
    """What looks like a plant, and is none."""

    classes: tuple[str, ...]
    """Names of classes with nothing planted. One is a phrase whose two words name nothing else; the others come from
    the same list of words as the polysemous ones, with one object each."""
    overlays: tuple[str, ...]
    """Overlays that go with no class."""
    backgrounds: tuple[str, ...]
    """Backgrounds that go with no class."""
    undrawn_words: tuple[str, ...]
    """Words in captions that are never drawn on a training picture."""


@dataclasses.dataclass(frozen=True)
class PlantedKey:
    """Everything that is planted in one world.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld
        >>> key = PlantedWorld(0).key
        >>> len(key.polysemous), len(key.compounds), len(key.artifacts)
        (4, 3, 2)
        >>> sorted(key.to_dict())[:4]
        ['absent_rate', 'artifacts', 'categories', 'compounds']
    """

    seed: int
    polysemous: dict[str, tuple[str, str]]
    """Word -> the two unrelated objects that it names, equally often."""
    compounds: tuple[Compound, ...]
    typographic: tuple[str, ...]
    """Class names that are drawn as letters on part of the training pictures."""
    artifacts: dict[str, str]
    """Class name -> the overlay on most of its training pictures, which no caption mentions."""
    spurious: dict[str, str]
    """Class name -> the background of most of its training pictures, which no caption of theirs mentions."""
    controls: Controls
    categories: dict[str, tuple[str, ...]]
    """Category word -> its objects."""
    plant_rate: float = PLANT_RATE
    """Share of an artifact or spurious class's training pictures that have its overlay or background."""
    absent_rate: float = ABSENT_RATE
    """Share of those pictures without the object, as beavers are out of view on pictures of their pond."""
    stray_rate: float = STRAY_RATE
    """Share of every other class's training pictures that have it."""

    def to_dict(self) -> dict[str, Any]:
        """The key as nested dicts, lists, strings and numbers, for JSON."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def cast(seed: int, rng: np.random.Generator) -> tuple[tuple[PlantedClass, ...], PlantedKey]:
    """Deals the parts of one world.

    Args:
        seed: The world's seed; only noted in the key.
        rng: Where the deal comes from.

    Returns:
        The classes, in label order, and the key.
    """

    def shuffled(names: tuple[str, ...]) -> list[str]:
        return [names[i] for i in rng.permutation(len(names))]

    shapes, homonyms = shuffled(SHAPE_NAMES), shuffled(_HOMONYMS)
    modifiers, heads = shuffled(_MODIFIERS), shuffled(_HEADS)
    categories, textures = shuffled(CATEGORIES), shuffled(TEXTURES)
    parts: list[tuple[str, str, Kind]] = []
    polysemous: dict[str, tuple[str, str]] = {}
    for word in homonyms[:_N_POLYSEMOUS]:
        senses = shapes.pop(), shapes.pop()
        polysemous[word] = senses
        parts += [(word, sense, "polysemous") for sense in senses]
    compounds = []
    for i in range(_N_COMPOUND):
        whole, part = shapes.pop(), shapes.pop()
        # Both kinds are in every world, and which kind the last one is changes.
        as_modifier = i == 0 or (i > 1 and bool(rng.integers(2)))
        modifier, head = (part, heads.pop()) if as_modifier else (modifiers.pop(), part)
        named_part: Literal["modifier", "head"] = "modifier" if as_modifier else "head"
        compounds.append(Compound(f"{modifier} {head}", modifier, head, whole, named_part, part))
        parts += [(f"{modifier} {head}", whole, "compound"), (part, part, "plain")]
    for kind, count in _N_OWN_NAME.items():
        parts += [(shape, shape, kind) for shape in [shapes.pop() for _ in range(count)]]
    parts += [(word, shapes.pop(), "control") for word in homonyms[_N_POLYSEMOUS : _N_POLYSEMOUS + _N_CONTROL_WORDS]]
    parts += [(f"{modifiers.pop()} {heads.pop()}", shapes.pop(), "control")]
    # Neighbours in this list (two senses, a compound and its part) get different categories and textures.
    n = len(categories)
    classes = tuple(
        PlantedClass(index, name, shape, kind, categories[index % n], textures[index % n])
        for index, (name, shape, kind) in enumerate(parts)
    )

    def named(kind: Kind) -> list[str]:
        return list(dict.fromkeys(entry.name for entry in classes if entry.kind == kind))

    typographic = tuple(named("typographic"))
    artifacts = dict(zip(named("artifact"), [shuffled(WATERMARKS)[0], shuffled(BORDERS)[0]], strict=True))
    spurious = dict(zip(named("spurious"), shuffled(BACKGROUNDS), strict=False))
    controls = Controls(
        classes=tuple(named("control")),
        overlays=tuple(name for name in OVERLAYS if name not in artifacts.values()),
        backgrounds=tuple(name for name in BACKGROUNDS if name not in spurious.values()),
        undrawn_words=tuple(
            entry.name for entry in classes if entry.kind in ("plain", "artifact", "spurious") and entry.name.isalpha()
        ),
    )
    by_category = {word: tuple(c.object for c in classes if c.category == word) for word in CATEGORIES}
    return classes, PlantedKey(
        seed, polysemous, tuple(compounds), typographic, artifacts, spurious, controls, by_category
    )
