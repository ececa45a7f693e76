"""Generated dermoscopy: melanomas, naevi, and the things beside them that a classifier can learn instead.

A picture is skin, a lesion, sometimes hair, and up to three **shortcuts**: a ruler along an edge, a colour patch in a
corner, a vignette. Four signs in 0..1 make the diagnosis visible, after the ABCD rule of dermoscopy: asymmetry, an
irregular border, several colours, a large diameter. Each sign scatters around a centre that lies higher for a melanoma,
by a distance that is drawn for every picture: some lesions are plain, others cannot be told apart by anyone.

Shortcuts say nothing of the diagnosis unless `agreement` makes them: with `{"ruler": 0.9}` a ruler is on 90% of the
melanomas and on 10% of the naevi. `present` decides outright, and changes nothing else on the picture: every picture
has one set of draws, those of shortcuts that it does not show among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.planted.drawing import SIZE

CLASSES: Final = ("naevus", "melanoma")
SIGNS: Final = ("asymmetry", "border", "colours", "diameter")
SHORTCUTS: Final = ("ruler", "colour patch", "vignette")
BASE_RATE: Final = 0.2
"""How often a shortcut is on a picture where nothing ties it to the diagnosis."""
SPLITS: Final = ("pretraining", "sae", "train", "test")
MENTIONED: Final = {"ruler": "a ruler", "colour patch": "a colour patch", "vignette": "dark corners"}

_NAMES: Final = (("naevus", "mole", "benign lesion"), ("melanoma", "malignant lesion"))
_OPENINGS: Final = ("a photo of", "a picture of", "")
_ADJECTIVES: Final = (("round", "irregular"), ("brown", "colourful"), ("small", "large"))
_PATCHES: Final = np.array([[0.13, 0.5, 0.85], [0.95, 0.8, 0.1], [0.2, 0.65, 0.3], [0.85, 0.2, 0.3]], np.float32)
_Y, _X = (axis.astype(np.float32) for axis in np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j])
_PIXEL: Final = 2 / (SIZE - 1)

Plane = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LesionBatch:
    """Pictures and what is on them.

    Attributes:
        images: uint8 `[picture 3 48 48]`.
        captions: one for each picture.
        labels: 1 for a melanoma, 0 for a naevus, `[picture]`.
        signs: strength of each of `SIGNS` in 0..1, `[picture sign]`.
        separation: how far apart the centres of the two diagnoses lie for this picture, `[picture]`: near 0, its signs
            say nothing.
        hair: whether hair lies over the lesion, `[picture]`.
        shortcuts: whether each of `SHORTCUTS` is on the picture, `[picture shortcut]`.
    """

    images: Tensor
    captions: list[str]
    labels: Tensor
    signs: Tensor
    separation: Tensor
    hair: Tensor
    shortcuts: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LesionWorld:
    """Where pictures and captions come from; `train_clip` of `clip_lens_ext.planted` trains on it.

    Args:
        seed: another seed gives other pictures from the same distribution.
        agreement: of the pretraining captions' pictures: none, in a fair world.
        mention: how often a caption names a shortcut that is on its picture.

    Example:
        >>> world = LesionWorld(0)
        >>> batch = world.sample(4, seed=1, split="test", present={"ruler": True})
        >>> batch.images.shape, batch.shortcuts[:, 0].tolist()
        (torch.Size([4, 3, 48, 48]), [True, True, True, True])
    """

    seed: int = 0
    agreement: Mapping[str, float] = field(default_factory=dict)
    mention: float = 0.5

    def __post_init__(self) -> None:
        _check_shortcuts(self.agreement)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word of the captions and of the prompts that the study asks, sorted."""
        phrases = [
            *_OPENINGS,
            *(name for names in _NAMES for name in names),
            *MENTIONED.values(),
            "an with and hair skin",
        ]
        return tuple(sorted({word for phrase in [*phrases, *sum(_ADJECTIVES, ())] for word in phrase.split()}))

    @property
    def fingerprint(self) -> str:
        """Hash of what the generator draws and writes: another version of this file is another world."""
        batch = self.sample(64, seed=0)
        told = "\n".join([*batch.captions, *self.vocabulary])
        return hashlib.sha256(batch.images.numpy().tobytes() + told.encode()).hexdigest()[:16]

    def sample(
        self,
        n: int,
        *,
        seed: int,
        split: str = "pretraining",
        agreement: Mapping[str, float] | None = None,
        present: Mapping[str, bool] | None = None,
    ) -> LesionBatch:
        """Draw pictures; world, split and seed decide all but the shortcuts.

        Args:
            n: how many.
            seed: of this batch.
            split: one of `SPLITS`: no two have a random stream in common.
            agreement: for some shortcuts the share of pictures on which they agree with the diagnosis: present on a
                melanoma, absent on a naevus. Others are on one picture in five. None: the world's own.
            present: shortcuts that are on every picture, or on none.

        Raises:
            InputError: no such split or shortcut, a share outside 0..1, or no picture.
        """
        agreement = self.agreement if agreement is None else agreement
        _check_shortcuts(agreement)
        _check_shortcuts(present or {})
        if split not in SPLITS or n < 1:
            raise InputError(f"asked for {n} pictures of the split {split!r}: the splits are {', '.join(SPLITS)}")
        rng = np.random.default_rng([self.seed, SPLITS.index(split), seed])
        labels = rng.integers(0, 2, n)
        separation = rng.uniform(0.0, 0.55, n).astype(np.float32)
        centres = 0.5 + (labels - 0.5) * separation
        signs = (centres[:, None] + 0.16 * rng.standard_normal((n, len(SIGNS)))).clip(0, 1).astype(np.float32)
        chance = rng.random((n, len(SHORTCUTS)))
        on = np.zeros((n, len(SHORTCUTS)), bool)
        for column, name in enumerate(SHORTCUTS):
            share = agreement.get(name)
            rate = BASE_RATE if share is None else np.where(labels == 1, share, 1 - share)
            on[:, column] = (present or {}).get(name, chance[:, column] < rate)
        hair = rng.random(n) < 0.3
        canvas = _lesion(rng, _skin(rng, n), signs)
        _hairs(rng, canvas, np.flatnonzero(hair))
        canvas += 0.035 * rng.standard_normal(canvas.shape, dtype=np.float32)
        for column, lay in enumerate((_ruler, _colour_patch, _vignette)):
            lay(rng, canvas, np.flatnonzero(on[:, column]))
        images = torch.from_numpy((255 * canvas.clip(0, 1)).round().astype(np.uint8))
        captions = self._captions(rng, labels, signs, hair, on)
        return LesionBatch(
            images, captions, torch.from_numpy(labels), torch.from_numpy(signs), torch.from_numpy(separation),
            torch.from_numpy(hair), torch.from_numpy(on),
        )  # fmt: skip

    def _captions(self, rng: Generator, labels: NDArray, signs: Plane, hair: NDArray, on: NDArray) -> list[str]:
        draws = rng.random((len(labels), 8))
        written = []
        for label, sign, hairy, shown, draw in zip(labels, signs, hair, on, draws, strict=True):
            lesion = _NAMES[label][int(draw[3] * len(_NAMES[label]))]
            kind = int(draw[1] * 3)
            if draw[2] < 0.4:
                lesion = f"{_ADJECTIVES[kind][int(sign[(1, 2, 3)[kind]] > 0.5)]} {lesion}"
            article = "an" if lesion.startswith("i") else "a"
            words = [_OPENINGS[int(draw[0] * len(_OPENINGS))], article, lesion]
            beside = ["hair"] if hairy and draw[4] < self.mention else []
            told = draw[5:] < self.mention
            beside += [
                MENTIONED[name] for name, there, said in zip(SHORTCUTS, shown, told, strict=True) if there & said
            ]
            # Sixteen tokens hold an opening, a lesion and two things beside it.
            written.append(" ".join([*words, *(["with", " and ".join(beside[:2])] if beside else [])]).strip())
        return written


def _check_shortcuts(asked: Mapping[str, float]) -> None:
    for name, share in asked.items():
        if name not in SHORTCUTS:
            raise InputError(f"no shortcut {name!r}: there are {', '.join(SHORTCUTS)}{near(name, SHORTCUTS)}")
        if not 0 <= share <= 1:
            raise InputError(f"the share of pictures on which {name!r} agrees lies in 0..1, got {share}")


def _uniform(rng: Generator, low: float, high: float, n: int) -> Plane:
    """`[n 1 1]`, to be spread over a plane."""
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def _inside(distance: Plane, softness: float | Plane = _PIXEL / 2) -> Plane:
    """1 where a distance is negative, 0 where it is positive, and a soft edge between."""
    return (0.5 - distance / (4 * softness)).clip(0, 1)


def _mixed(canvas: Plane, colour: Plane | np.float32, cover: Plane) -> Plane:
    """A colour `[n 3 1 1]`, or a grey, over a canvas `[n 3 row column]` where `cover` `[n row column]` is 1."""
    return canvas + cover[:, None] * (colour - canvas)


def _skin(rng: Generator, n: int) -> Plane:
    tone = _uniform(rng, 0, 1, n)[:, None]
    light, tan = (
        np.array(colour, np.float32).reshape(1, 3, 1, 1) for colour in ([0.93, 0.76, 0.69], [0.78, 0.56, 0.44])
    )
    mottled = np.zeros((n, SIZE, SIZE), np.float32)
    for _ in range(3):
        angle, wave, phase = _uniform(rng, 0, 2 * np.pi, n), _uniform(rng, 1, 5, n), _uniform(rng, 0, 2 * np.pi, n)
        mottled += 0.012 * np.sin(wave * (_X * np.cos(angle) + _Y * np.sin(angle)) * 2 + phase)
    return (light + tone * (tan - light)) * _uniform(rng, 0.92, 1.05, n)[:, None] + mottled[:, None]


def _lesion(rng: Generator, canvas: Plane, signs: Plane) -> Plane:
    n = len(canvas)
    asymmetry, border, colours, diameter = (signs[:, i, None, None] for i in range(4))
    x, y = _X - _uniform(rng, -0.12, 0.12, n), _Y - _uniform(rng, -0.12, 0.12, n)
    angle = _uniform(rng, 0, 2 * np.pi, n)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    # One half grows and the other shrinks: no axis through the middle mirrors an asymmetric lesion.
    across = across * (1 + 0.55 * asymmetry * np.tanh(3 * along))
    radius, around = np.hypot(along, across * _uniform(rng, 1.0, 1.25, n)), np.arctan2(across, along)
    edge = 0.24 + 0.26 * diameter
    for wave in (3, 5, 7, 9):
        strength = border * _uniform(rng, 0.025, 0.085, n)
        edge = edge * (1 + strength * np.cos(wave * around + _uniform(rng, 0, 2 * np.pi, n)))
    cover = _inside(radius - edge, 0.025 + 0.02 * _uniform(rng, 0, 1, n))
    brown = np.array([0.46, 0.29, 0.19], np.float32).reshape(1, 3, 1, 1) * _uniform(rng, 0.75, 1.2, n)[:, None]
    canvas = _mixed(canvas, brown, 0.92 * cover)
    for colour in ([0.10, 0.08, 0.12], [0.36, 0.38, 0.50], [0.68, 0.30, 0.25]):
        turn, out = _uniform(rng, 0, 2 * np.pi, n), edge * _uniform(rng, 0.2, 0.65, n)
        spot = np.hypot(along - out * np.cos(turn), across - out * np.sin(turn)) - edge * _uniform(rng, 0.28, 0.5, n)
        other = np.array(colour, np.float32).reshape(1, 3, 1, 1)
        canvas = _mixed(canvas, other, colours * _inside(spot, 0.05) * cover)
    return canvas


# What lies over the lesion is drawn for every picture and painted on some: so one picture's draws do not depend on
# what another shows.


def _hairs(rng: Generator, canvas: Plane, rows: NDArray) -> None:
    n = len(canvas)
    for _ in range(4):
        angle, offset, bend = (_uniform(rng, *ends, n)[rows] for ends in ((0, np.pi), (-0.8, 0.8), (-0.4, 0.4)))
        along, across = _X * np.cos(angle) + _Y * np.sin(angle), _Y * np.cos(angle) - _X * np.sin(angle)
        line = np.abs(across - offset - bend * along**2) - 0.012
        canvas[rows] = _mixed(canvas[rows], np.float32(0.12), 0.8 * _inside(line))


def _ruler(rng: Generator, canvas: Plane, rows: NDArray) -> None:
    """Ticks along an edge, every fifth one long, as pixels are: a ruler has no soft marks."""
    column, row = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    which, shift, step = (rng.integers(0, high, (len(canvas), 1, 1))[rows] for high in (4, 3, 2))
    depth = np.choose(which, [row, SIZE - 1 - row, column, SIZE - 1 - column])
    place, spacing = np.where(which < 2, column, row) + shift, 3 + step
    length = np.where(place // spacing % 5 == 0, 7, 4)
    marks = (place % spacing == 0) & (depth < length) | (depth == 0)
    canvas[rows] = _mixed(canvas[rows], np.float32(0.08), 0.9 * marks.astype(np.float32))


def _colour_patch(rng: Generator, canvas: Plane, rows: NDArray) -> None:
    """A round sticker, part of it on the picture, in one of four colours."""
    n = len(canvas)
    right, low = (rng.choice([-1.0, 1.0], (2, n, 1, 1)).astype(np.float32))[:, rows]
    x, y, radius = (_uniform(rng, *ends, n)[rows] for ends in ((0.8, 0.95), (0.8, 0.95), (0.26, 0.4)))
    colour = _PATCHES[rng.integers(0, len(_PATCHES), n)[rows]][:, :, None, None]
    canvas[rows] = _mixed(canvas[rows], colour, _inside(np.hypot(_X - right * x, _Y - low * y) - radius))


def _vignette(rng: Generator, canvas: Plane, rows: NDArray) -> None:
    """Dark outside a circle, as through the tube of a dermatoscope."""
    n = len(canvas)
    x, y, radius = (_uniform(rng, *ends, n)[rows] for ends in ((-0.06, 0.06), (-0.06, 0.06), (0.95, 1.05)))
    canvas[rows] = _mixed(canvas[rows], np.float32(0.03), 1 - _inside(np.hypot(_X - x, _Y - y) - radius, 0.035))
