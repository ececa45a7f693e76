"""The result of `caption_steering`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.sparse_clip.steering_result import arms_frame


@dataclass(frozen=True, eq=False)
class CaptionSteering:
    """Captions of pictures that were steered from their class to another one.

    The axis `arm` has the features of the concepts first, and then the controls.

    Attributes:
        classes: in label order.
        strengths: what boosted features were set to.
        labels: the class of each picture, `[picture]`.
        new_labels: the class that it was steered to, `[picture]`.
        texts_before: the caption of each picture as it is.
        texts: the captions of steered pictures, strength by strength, arm by arm; see `text`.
        judged_before: whether each caption of a picture as it is names the old class, the new one, and is corrupted,
            bool `[3 picture]`.
        names_old, names_new: whether a caption names the class, bool `[strength arm picture]`.
        corrupted: whether it names no class, has more than `longest` tokens, or no end, `[strength arm picture]`.
        longest: tokens of the longest caption that counts as whole.
        k: features of each concept.
        n_bootstrap, confidence, seed: of the intervals, and of what was drawn.
        provenance: model, captioner, fingerprint of the codes, versions.
    """

    classes: tuple[str, ...]
    strengths: tuple[float, ...]
    labels: Tensor
    new_labels: Tensor
    texts_before: tuple[str, ...]
    texts: tuple[str, ...]
    judged_before: Tensor
    names_old: Tensor
    names_new: Tensor
    corrupted: Tensor
    longest: int
    k: int
    n_bootstrap: int
    confidence: float
    seed: int
    provenance: dict[str, Any]

    @property
    def success(self) -> Tensor:
        """Whether a caption names the new class and not the old one, bool `[strength arm picture]`."""
        return self.names_new & ~self.names_old

    @property
    def kept(self) -> Tensor:
        """Whether it names the old class and not the new one, bool `[strength arm picture]`."""
        return self.names_old & ~self.names_new

    def text(self, picture: int, strength: float, *, arm: int = 0) -> str:
        """The caption of a steered picture.

        Raises:
            InputError: no such picture, strength or arm.
        """
        _, n_arm, n_picture = self.names_old.shape
        if strength not in self.strengths or not 0 <= arm < n_arm or not 0 <= picture < n_picture:
            raise InputError(f"there are the strengths {self.strengths}, {n_arm} arms and {n_picture} pictures; got "
                             f"{strength}, {arm} and {picture}")  # fmt: skip
        return self.texts[(self.strengths.index(strength) * n_arm + arm) * n_picture + picture]

    def to_frame(self) -> pd.DataFrame:
        """A row for the pictures as they are, and for each strength one of the concepts and one of the controls.

        Columns, shares of the pictures in 0..1: `success`, `kept`, `both` (names both classes), `corrupted`, and
        `success_over_control`, the difference on the same pictures. Each mean with `_low` and `_high`.
        """
        old, new, corrupted = self.judged_before
        values = {
            "success": (new & ~old, self.success), "kept": (old & ~new, self.kept),
            "both": (old & new, self.names_old & self.names_new), "corrupted": (corrupted, self.corrupted),
        }  # fmt: skip
        return arms_frame(
            values, self.strengths, over_control="success", n_bootstrap=self.n_bootstrap, confidence=self.confidence,
            seed=self.seed,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"CaptionSteering({len(self.labels)} pictures, {len(self.classes)} classes, strengths "
            f"{', '.join(f'{one:g}' for one in self.strengths)}, {self.names_old.shape[1] - 1} controls)"
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> CaptionSteering:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        shape = (len(self.strengths), self.names_old.shape[1], len(self.labels))
        same = all(part.shape == shape for part in (self.names_old, self.names_new, self.corrupted))
        return same and len(self.texts) == shape[0] * shape[1] * shape[2] and len(self.texts_before) == shape[2]
