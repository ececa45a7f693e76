"""The result of `steering_effect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import load_result, save_result


@dataclass(frozen=True, eq=False)
class SteeringEffect:
    """Zero-shot and retrieval with pictures steered from their class to another one.

    The axis `arm` has the features of the concepts first, and then the controls.

    Attributes:
        classes: in label order.
        strengths: what boosted features were set to.
        labels: the class of each picture, `[picture]`.
        new_labels: the class that it was steered to, `[picture]`.
        predicted_before: the class that zero-shot gives it as it is, `[picture]`; -1: two are equally near.
        cosine_before: with its own class and with the new one, `[picture 2]`.
        retrieval_before: R@1 of the other pictures' captions, `[picture]`; NaN without captions.
        own_caption_before: 1 where the caption nearest to the picture is its own, else 0, `[picture]`; NaN without
            captions. Captions that are equal to its own are its own, and other ties count as nearer.
        new_caption_before: 1 where the nearest caption is one of a picture of the new class, else 0, `[picture]`.
        predicted: with the picture steered, `[strength arm picture]`.
        cosine: likewise, `[strength arm picture 2]`.
        retrieval: R@1 of the other pictures' captions with this picture steered, `[strength arm picture]`.
        harmed: share of them that found their picture before and do not now, `[strength arm picture]`.
        own_caption, new_caption: as before, of the steered picture, `[strength arm picture]`.
        removed: sum of the activations that were suppressed, `[arm picture]`.
        k: features of each concept.
        n_bootstrap, confidence, seed: of the intervals, and of what was drawn.
        provenance: model, fingerprint of the codes, versions.
    """

    classes: tuple[str, ...]
    strengths: tuple[float, ...]
    labels: Tensor
    new_labels: Tensor
    predicted_before: Tensor
    cosine_before: Tensor
    retrieval_before: Tensor
    own_caption_before: Tensor
    new_caption_before: Tensor
    predicted: Tensor
    cosine: Tensor
    retrieval: Tensor
    harmed: Tensor
    own_caption: Tensor
    new_caption: Tensor
    removed: Tensor
    k: int
    n_bootstrap: int
    confidence: float
    seed: int
    provenance: dict[str, Any]

    @property
    def success(self) -> Tensor:
        """Whether zero-shot says the new class, bool `[strength arm picture]`."""
        return self.predicted == self.new_labels

    @property
    def kept(self) -> Tensor:
        """Whether it still says the picture's own class, bool `[strength arm picture]`."""
        return self.predicted == self.labels

    def to_frame(self) -> pd.DataFrame:
        """A row for the pictures as they are, and for each strength one of the concepts and one of the controls.

        Columns: `success`, `kept`: shares of the pictures; `change_old`, `change_new`: of the cosine with the two
        classes, positive where it rises; `own_caption`, `new_caption`: shares of the pictures whose nearest caption is
        their own, or one of the new class; `retrieval`, `harmed`: of the other pictures' captions; `removed`: the
        activation that was suppressed; `success_over_control`: difference on the same pictures. Each mean with `_low`
        and `_high`.
        """
        cosine = self.cosine - self.cosine_before
        values = {
            "success": (self.predicted_before == self.new_labels, self.success),
            "kept": (self.predicted_before == self.labels, self.kept),
            "change_old": (torch.zeros(len(self.labels)), cosine[..., 0]),
            "change_new": (torch.zeros(len(self.labels)), cosine[..., 1]),
            "own_caption": (self.own_caption_before, self.own_caption),
            "new_caption": (self.new_caption_before, self.new_caption),
            "retrieval": (self.retrieval_before, self.retrieval),
            "harmed": (torch.zeros_like(self.retrieval_before) + 0 * self.retrieval_before, self.harmed),
            "removed": (torch.zeros(len(self.labels)), self.removed.expand(len(self.strengths), -1, -1)),
        }
        return arms_frame(
            values, self.strengths, over_control="success", n_bootstrap=self.n_bootstrap, confidence=self.confidence,
            seed=self.seed,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"SteeringEffect({len(self.labels)} pictures, {len(self.classes)} classes, strengths "
            f"{', '.join(f'{one:g}' for one in self.strengths)}, {self.predicted.shape[1] - 1} controls)"
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> SteeringEffect:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        shape = (len(self.strengths), self.predicted.shape[1], len(self.labels))
        parts = (self.predicted, self.cosine, self.retrieval, self.harmed, self.own_caption, self.new_caption)
        same = all(part.shape[:3] == shape for part in parts)
        return same and self.removed.shape == shape[1:] and len(self.new_labels) == len(self.labels)


def check_interval(confidence: float) -> None:
    """Raise `InputError` where an interval cannot have this confidence."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence is in (0, 1), got {confidence!r}")


def arms_frame(
    values: dict[str, tuple[Tensor, Tensor]],
    strengths: Sequence[float],
    *,
    over_control: str,
    n_bootstrap: int,
    confidence: float,
    seed: int,
) -> pd.DataFrame:
    """Means over pictures with their intervals: a row as is, and of each strength the concept's and the controls'.

    Args:
        values: by name, those of the pictures as they are `[picture]` and steered `[strength arm picture]`; NaN are
            left out.
        strengths: of the rows.
        over_control: the measure whose difference to the controls is given too.
        n_bootstrap, confidence, seed: of the intervals; all rows see the same draws.
    """
    n_control = next(iter(values.values()))[1].shape[1] - 1
    arms = ["concept", "control"][: 2 if n_control else 1]
    frame = pd.DataFrame({
        "arm": ["as is", *(arm for _ in strengths for arm in arms)],
        "strength": [float("nan"), *(strength for strength in strengths for _ in arms)],
    })  # fmt: skip

    def add(name: str, rows: list[Tensor]) -> None:
        means = [float(row.nanmean()) for row in rows]
        ends = [bootstrap_intervals(row[None], n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)[0]
                for row in rows]  # fmt: skip
        frame[name], frame[f"{name}_low"], frame[f"{name}_high"] = (
            means, [float(end[0]) for end in ends], [float(end[1]) for end in ends],
        )  # fmt: skip

    for name, (before, after) in values.items():
        rows = [before.double()]
        for found in after.double():
            rows += [found[0], found[1:].T][: len(arms)]  # a picture's controls go with it
        add(name, rows)
        if name == over_control and n_control:
            nothing = torch.full_like(before.double(), torch.nan)
            rows = [nothing]
            for found in after.double():
                rows += [found[0] - found[1:].mean(dim=0), nothing]
            add(f"{name}_over_control", rows)
    return frame
