"""The planted world: pictures and captions with a known answer key."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.planted.backgrounds import BACKGROUNDS
from clip_lens_ext.planted.captions import captions, vocabulary
from clip_lens_ext.planted.drawing import SIZE, draw_pictures, lay_overlay, write_word
from clip_lens_ext.planted.font import word_mask
from clip_lens_ext.planted.overlays import OVERLAYS
from clip_lens_ext.planted.plan import NONE, Forced, Plan, generator, plan_pictures
from clip_lens_ext.planted.roles import PlantedClass, cast

__all__ = ["TEMPLATE", "PlantedBatch", "PlantedWorld", "normalise"]

TEMPLATE: Final = "a photo of a {}"

_UNAMBIGUOUS: Final = ("plain", "typographic", "control")


@dataclasses.dataclass(frozen=True, eq=False)
class PlantedBatch:
    """Pictures, captions, and what is on each picture.

    A box is left, top, right, bottom in pixels, the last two exclusive; it is -1 four times where there is nothing.
    """

    images: UInt8[torch.Tensor, "batch 3 48 48"]
    captions: list[str]
    labels: Int[torch.Tensor, " batch"]
    """Class that the caption names; -1 on a sign, which shows a word and no object (training pictures only)."""
    objects: list[tuple[str, ...]]
    """Objects on the picture, the main one first. None on a sign, and on training pictures of an artifact or spurious
    class that show what is planted on it, but not the object."""
    object_boxes: Int[torch.Tensor, "batch 2 4"]
    """Boxes of the main object and of its companion; the main one may hide part of the companion."""
    backgrounds: list[str]
    overlays: list[str | None]
    words: list[str | None]
    """The word that is drawn as letters."""
    word_boxes: Int[torch.Tensor, "batch 4"]
    """Boxes of the plates that words are drawn on."""

    def __len__(self) -> int:
        return len(self.labels)


def normalise(images: UInt8[torch.Tensor, "*batch 3 row column"]) -> Float[torch.Tensor, "*batch 3 row column"]:
    """Pictures as the shipped CLIP takes them: `(x / 255 - 0.5) / 0.25`.

    Args:
        images: Bytes, `[... 3 row column]`.

    Returns:
        float32 of the same shape, in [-2, 2].

    Raises:
        InputError: If the pictures are not bytes, or do not have three channels.

    Example:
        >>> import torch
        >>> from clip_lens_ext.planted import normalise
        >>> normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).max()
        tensor(2.)
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise InputError(f"pictures are uint8 [... 3 row column], and not {images.dtype} {list(images.shape)}")
    return (images.float() / 255 - 0.5) / 0.25


class PlantedWorld:
    """A small world of drawn objects, whose captions have known faults.

    The seed decides which words, objects, overlays and backgrounds play which part.

    Args:
        seed: The world, in [0, 2**62).

    Raises:
        InputError: If the seed is out of range.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld
        >>> world = PlantedWorld(0)
        >>> batch = world.sample(4, seed=1)
        >>> batch.images.shape, batch.images.dtype
        (torch.Size([4, 3, 48, 48]), torch.uint8)
        >>> len(world.classes), len(world.prompts())
        (30, 30)
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = _checked_seed(seed, "the world's seed")
        # A generator of another kind: the deal shares no stream with the pictures.
        self.classes, self.key = cast(seed, np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed]))))
        self.vocabulary: tuple[str, ...] = vocabulary(self.classes)

    def __repr__(self) -> str:
        return f"PlantedWorld(seed={self.seed})"

    @property
    def unambiguous_classes(self) -> tuple[PlantedClass, ...]:
        """The plain, typographic and control classes: their name names one object, and the object is their only cue."""
        return tuple(entry for entry in self.classes if entry.kind in _UNAMBIGUOUS)

    def prompts(self, template: str = TEMPLATE) -> list[str]:
        """One prompt for each class, in label order; the two senses of a polysemous word have the same one.

        Args:
            template: A text with `{}` where the name goes.

        Raises:
            InputError: If the template has no place for the name.
        """
        if template.count("{}") != 1:
            raise InputError(f"a template has one {{}} for the class name, and not so {template!r}")
        return [template.format(entry.name) for entry in self.classes]

    def sample(
        self,
        n: int,
        *,
        seed: int,
        split: Literal["train", "test"] = "train",
        classes: Sequence[int | str | PlantedClass] | None = None,
        overlay: str | None = "any",
        background: str = "any",
        word: str | None = "any",
    ) -> PlantedBatch:
        """Draws fresh pictures; the same arguments give the same pictures.

        Calls that differ only in `overlay`, `background` or `word` give pictures that differ only there (and lose
        their companion where a word is drawn): an intervention needs no second model of the rest. The first
        pictures of a longer call are those of a shorter one.

        Args:
            n: How many.
            seed: Which ones, in [0, 2**62); the streams of the two splits are disjoint.
            split: On `"train"` pictures overlay, background and word go with the class as the key says. On `"test"`
                pictures they are independent of the class, and every picture has its object.
            classes: Which classes to show, in turn: labels, names or objects; every picture has its object. A
                polysemous name stands for both of its objects. None: all, at random.
            overlay: An overlay for every picture, None for no overlay, or `"any"`.
            background: A background for every picture, or `"any"`.
            word: A word to draw on every picture, None for no word, or `"any"`.

        Raises:
            InputError: If anything asked for is not in this world.
        """
        if split not in ("train", "test"):
            raise InputError(f"split is {split!r}; there are 'train' and 'test'")
        if overlay not in ("any", None):
            _known(overlay, OVERLAYS, "overlay")
        if background != "any":
            _known(background, BACKGROUNDS, "background")
        if word not in ("any", None):
            _drawable(word)
        forced = Forced(None if classes is None else self._labels(classes), overlay, background, word)
        plan = self._plan(n, split, seed, forced)
        images, boxes, word_boxes = draw_pictures(plan, self.classes, generator(self.seed, split, seed, 1))
        shown = zip(np.where(plan.absent, NONE, plan.labels), plan.companions, strict=True)
        return PlantedBatch(
            images=images,
            captions=captions(plan, self.classes),
            labels=torch.from_numpy(plan.labels),
            objects=[tuple(self.classes[label].object for label in pair if label != NONE) for pair in shown],
            object_boxes=boxes,
            backgrounds=[BACKGROUNDS[index] for index in plan.backgrounds],
            overlays=[None if index == NONE else OVERLAYS[index] for index in plan.overlays],
            words=list(plan.words),
            word_boxes=word_boxes,
        )

    def backdrops(self, n: int, *, seed: int, background: str = "any") -> UInt8[torch.Tensor, "batch 3 48 48"]:
        """Neutral pictures: background and noise, with no object, overlay or word.

        Args:
            n: How many.
            seed: Which ones, in [0, 2**62). They are the backgrounds of the test pictures with the same seed.
            background: One background for all, or `"any"`.

        Raises:
            InputError: If there is no such background, or n or the seed is out of range.
        """
        if background != "any":
            _known(background, BACKGROUNDS, "background")
        forced = Forced(None, None, background, None)
        plan = self._plan(n, "test", seed, forced)
        nothing = np.full(len(plan), NONE)
        plan = dataclasses.replace(plan, labels=nothing, companions=nothing)
        return draw_pictures(plan, self.classes, generator(self.seed, "test", seed, 1))[0]

    def draw_word(
        self,
        images: UInt8[torch.Tensor, "batch 3 48 48"],
        word: str,
        *,
        x: float = 0.5,
        y: float = 0.9,
        dark: bool = True,
    ) -> UInt8[torch.Tensor, "batch 3 48 48"]:
        """New pictures with a word written on them, as on training pictures.

        Args:
            images: Pictures as from `sample`.
            word: One to five letters.
            x: From the left (0) to the right (1).
            y: In the upper third (below 0.5; 0 is the edge) or the lower third (from 0.5; 0.5 is the edge).
            dark: Dark letters on a light plate, or the reverse.

        Raises:
            InputError: If the word cannot be drawn, x or y is out of [0, 1], or the pictures have another shape.
        """
        _drawable(word)
        _check_images(images)
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise InputError(f"x and y are fractions in [0, 1], and not {x} and {y}")
        written = images.clone()
        for image in written:
            write_word(image, word, x, min(y, 1 - 1e-9), dark)
        return written

    def draw_overlay(
        self, images: UInt8[torch.Tensor, "batch 3 48 48"], name: str
    ) -> UInt8[torch.Tensor, "batch 3 48 48"]:
        """New pictures with a watermark or a border over them, as on training pictures.

        Args:
            images: Pictures as from `sample`.
            name: An overlay of this world.

        Raises:
            InputError: If there is no such overlay, or the pictures have another shape.
        """
        _known(name, OVERLAYS, "overlay")
        _check_images(images)
        return lay_overlay(images, name)

    def _plan(self, n: int, split: Literal["train", "test"], seed: int, forced: Forced) -> Plan:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise InputError(f"n is {n!r}, and not a number of pictures")
        rng = generator(self.seed, split, _checked_seed(seed, "seed"), 0)
        return plan_pictures(n, rng, split, self.classes, self.key, forced)

    def _labels(self, classes: Sequence[int | str | PlantedClass]) -> tuple[int, ...]:
        labels: list[int] = []
        for asked in classes:
            found = [c.index for c in self.classes if asked == c or asked in (c.name, c.object) or asked == c.index]
            if not found:
                known = [c.name for c in self.classes]
                hint = near(asked, known) if isinstance(asked, str) else ""
                raise InputError(f"no class is {asked!r}{hint}; see .classes, labels 0 to {len(known) - 1}")
            labels += found
        if not labels:
            raise InputError("classes is empty: name at least one, or leave it out for all")
        return tuple(labels)


def _checked_seed(seed: int, what: str) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**62:
        raise InputError(f"{what} is {seed!r}, and not an integer in [0, 2**62)")
    return seed


def _known(name: str | None, names: Sequence[str], what: str) -> None:
    if name not in names:
        raise InputError(f"no {what} is called {name!r}{near(str(name), names)}; there are {', '.join(names)}")


def _drawable(word: str | None) -> None:
    if not isinstance(word, str) or len(word) > 5:
        raise InputError(f"cannot draw {word!r}: a picture is wide enough for a word of five letters")
    word_mask(word)


def _check_images(images: torch.Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise InputError(f"pictures are uint8 [batch 3 {SIZE} {SIZE}], and not {images.dtype} {list(images.shape)}")
