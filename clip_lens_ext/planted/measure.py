"""Measures whether a dual encoder has learnt its world, and whether what was planted has taken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Final

import torch
from jaxtyping import Float, UInt8
from open_clip.model import CLIP

from clip_lens_ext.errors import InputError
from clip_lens_ext.planted.tokenizer import WordTokenizer
from clip_lens_ext.planted.world import TEMPLATE, PlantedWorld, normalise

__all__ = ["Intervention", "PlantedReport", "measure_clip"]

_HELD_OUT_SEED: Final = 2**50
"""Beyond the seeds of all training pictures."""


@dataclasses.dataclass(frozen=True)
class Intervention:
    """How far a change to the pictures raises the cosine with one prompt."""

    name: str
    """Class whose prompt it is."""
    change: str
    """What was done to the pictures."""
    lift: float
    """Mean of cosine after minus before, over pictures of other classes or over empty backgrounds."""
    elsewhere: float
    """The same mean for the prompts of all other classes: what the change does to any prompt."""


@dataclasses.dataclass(frozen=True)
class PlantedReport:
    """What `measure_clip` found, on pictures without drawn words unless it says otherwise."""

    n_per_class: int
    accuracy: dict[str, float]
    """Kind -> zero-shot accuracy among all names, mean over its classes, on held-out pictures: drawn as the training
    pictures are, so overlays and backgrounds go with the classes, from seeds that no training sees."""
    unambiguous: float
    """Mean over `PlantedWorld.unambiguous_classes`, on the same pictures."""
    worst_class: tuple[str, float]
    """Of the unambiguous classes: the name and accuracy of the worst."""
    decorrelated: dict[str, float]
    """Kind -> the same accuracy on test pictures, where overlay and background are independent of the class. What it
    loses against `accuracy` is what the plants took."""
    senses: dict[str, dict[str, float]]
    """Polysemous word -> object -> share of its pictures among the pictures nearest to the word's prompt, as many as
    both senses have together. 1 is perfect; two senses' share of all pictures is chance."""
    compounds: dict[str, dict[str, float]]
    """Phrase -> mean cosine of its prompt with pictures of its own object, of the part's object, and of all others."""
    signs: float
    """Share of empty backgrounds with a typographic word drawn on them whose nearest name is that word."""
    reading: tuple[Intervention, ...]
    """A typographic word drawn on an empty background."""
    undrawn: tuple[Intervention, ...]
    """Control: a word drawn that is never drawn on training pictures."""
    artifacts: tuple[Intervention, ...]
    """The planted overlay laid over pictures of other classes."""
    control_overlays: tuple[Intervention, ...]
    """Control: each of the other overlays, with the prompts of the artifact classes."""
    spurious: tuple[Intervention, ...]
    """The planted background behind pictures of other classes, instead of any background."""

    def to_dict(self) -> dict[str, Any]:
        """The figures as nested dicts, lists, strings and numbers rounded to four digits."""
        return json.loads(json.dumps(dataclasses.asdict(self)), parse_float=lambda digits: round(float(digits), 4))


def measure_clip(
    clip: CLIP, world: PlantedWorld, tokenizer: WordTokenizer, *, n_per_class: int = 40, seed: int = 0
) -> PlantedReport:
    """Zero-shot accuracy by kind of class, and the strength of every plant, on pictures that no training sees.

    Args:
        clip: The model, in evaluation mode.
        world: Its world.
        tokenizer: Its tokenizer.
        n_per_class: Pictures per class, of held-out and of test pictures each.
        seed: Which pictures, in [0, 2**50).

    Raises:
        InputError: If there is not even one picture per class, or the model is in training mode.
    """
    if n_per_class < 1 or clip.training:
        raise InputError(f"measuring takes a model in evaluation mode and a picture per class, and not {n_per_class}")
    return _Measurement(clip, world, tokenizer, n_per_class, seed).report()


class _Measurement:
    def __init__(self, clip: CLIP, world: PlantedWorld, tokenizer: WordTokenizer, n_per_class: int, seed: int) -> None:
        self.clip, self.world, self.n, self.seed = clip, world, n_per_class, seed
        self.names = list(dict.fromkeys(entry.name for entry in world.classes))
        with torch.no_grad():
            self.prompts = clip.encode_text(tokenizer([TEMPLATE.format(name) for name in self.names]), normalize=True)
        batch = world.sample(
            n_per_class * len(world.classes), seed=seed, split="test", classes=range(len(world.classes)), word=None
        )
        self.labels, self.cosines = batch.labels, self.cosine(batch.images)
        held_out = world.sample(
            n_per_class * len(world.classes), seed=_HELD_OUT_SEED + seed, classes=range(len(world.classes)), word=None
        )
        self.held_out = held_out.labels, self.cosine(held_out.images)
        self.backdrops = world.backdrops(2 * n_per_class, seed=seed)

    def cosine(self, images: UInt8[torch.Tensor, "batch 3 48 48"]) -> Float[torch.Tensor, "batch name"]:
        with torch.no_grad():
            parts = [self.clip.encode_image(normalise(some), normalize=True) for some in images.split(256)]
        return torch.cat(parts) @ self.prompts.T

    def report(self) -> PlantedReport:
        world, key = self.world, self.world.key
        by_class, decorrelated = self._accuracy(*self.held_out), self._accuracy(self.labels, self.cosines)
        unambiguous = {entry.name: by_class[entry.index] for entry in world.unambiguous_classes}
        worst = min(unambiguous, key=lambda name: unambiguous[name])
        signs = [
            self.cosine(world.draw_word(self.backdrops, word)).argmax(dim=1) == self.names.index(word)
            for word in key.typographic
        ]
        artifacts = [change for name, overlay in key.artifacts.items() for change in self._overlays(name, [overlay])]
        others = [change for name in key.artifacts for change in self._overlays(name, key.controls.overlays)]
        return PlantedReport(
            n_per_class=self.n,
            accuracy=self._by_kind(by_class),
            unambiguous=_mean(list(unambiguous.values())),
            worst_class=(worst, unambiguous[worst]),
            decorrelated=self._by_kind(decorrelated),
            senses={word: self._senses(word, objects) for word, objects in key.polysemous.items()},
            compounds={c.phrase: self._compound(c.phrase, c.object, c.part_object) for c in key.compounds},
            signs=float(torch.cat(signs).float().mean()),
            reading=tuple(self._reading(word) for word in key.typographic),
            undrawn=tuple(self._reading(word) for word in key.controls.undrawn_words),
            artifacts=tuple(artifacts),
            control_overlays=tuple(others),
            spurious=tuple(self._background(name, background) for name, background in key.spurious.items()),
        )

    def _accuracy(self, labels: torch.Tensor, cosines: torch.Tensor) -> list[float]:
        """Zero-shot accuracy of each class."""
        names = torch.tensor([self.names.index(self.world.classes[label].name) for label in labels])
        right = cosines.argmax(dim=1) == names
        return [float(right[labels == entry.index].float().mean()) for entry in self.world.classes]

    def _by_kind(self, by_class: Sequence[float]) -> dict[str, float]:
        kinds = dict.fromkeys(entry.kind for entry in self.world.classes)
        return {kind: _mean([by_class[e.index] for e in self.world.classes if e.kind == kind]) for kind in kinds}

    def _of(self, shown: str) -> torch.Tensor:
        return self.labels == next(entry.index for entry in self.world.classes if entry.object == shown)

    def _senses(self, word: str, objects: tuple[str, str]) -> dict[str, float]:
        nearest = self.cosines[:, self.names.index(word)].topk(len(objects) * self.n).indices
        return {shown: float(self._of(shown)[nearest].sum() / self.n) for shown in objects}

    def _compound(self, phrase: str, whole: str, part: str) -> dict[str, float]:
        cosine, is_whole, is_part = self.cosines[:, self.names.index(phrase)], self._of(whole), self._of(part)
        groups = {"own object": is_whole, "part's object": is_part, "all others": ~(is_whole | is_part)}
        return {group: float(cosine[chosen].mean()) for group, chosen in groups.items()}

    def _intervention(self, name: str, change: str, before: torch.Tensor, after: torch.Tensor) -> Intervention:
        """From the cosines `[batch name]` before and after a change."""
        lift = (after - before).mean(dim=0)
        here = torch.tensor([other == name for other in self.names])
        return Intervention(name, change, float(lift[here].mean()), float(lift[~here].mean()))

    def _reading(self, word: str) -> Intervention:
        written = self.cosine(self.world.draw_word(self.backdrops, word))
        return self._intervention(word, f"word {word}", self.cosine(self.backdrops), written)

    def _others(self, name: str, background: str = "any") -> torch.Tensor:
        """Pictures of all other classes, without overlay or word."""
        labels = [entry.index for entry in self.world.classes if entry.name != name]
        n = 4 * self.n
        return self.world.sample(
            n, seed=self.seed, split="test", classes=labels, overlay=None, background=background, word=None
        ).images

    def _overlays(self, name: str, overlays: Sequence[str]) -> list[Intervention]:
        plain = self._others(name)
        before = self.cosine(plain)
        after = {overlay: self.cosine(self.world.draw_overlay(plain, overlay)) for overlay in overlays}
        return [self._intervention(name, f"overlay {overlay}", before, cosine) for overlay, cosine in after.items()]

    def _background(self, name: str, background: str) -> Intervention:
        before, after = self.cosine(self._others(name)), self.cosine(self._others(name, background))
        return self._intervention(name, f"background {background}", before, after)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
