"""The result of `concept_drift`: what became of every feature's concept over training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import load_result, save_result

KINDS = ("birth", "revival", "death", "switch", "merge")


@dataclass(frozen=True)
class DriftEvent:
    """Something that happened to a feature between a checkpoint and the one before it.

    Attributes:
        kind: `"birth"`, `"revival"`, `"death"`, `"switch"` or `"merge"`; `concept_drift` defines them.
        step: number of the checkpoint at which it is seen, from 1.
        feature: whose; of a merge the lower of the two.
        other: the other feature of a merge; -1 for other kinds.
        before, after: the feature's names at the checkpoint before and at this one; of a merge the names of the two
            features now.
        overlap: of pictures: of a switch with those before, of a merge between the two; NaN for other kinds.
    """

    kind: str
    step: int
    feature: int
    other: int
    before: str | None
    after: str | None
    overlap: float


@dataclass(frozen=True, eq=False)
class ConceptDrift:
    """Names, numbers and events of every feature over checkpoints; overlaps are Jaccard, in [0, 1].

    Attributes:
        labels: of the checkpoints, in the order of training.
        word: number of each feature's name, `[checkpoint d_code]`; -1 where it has none.
        alive: whether a word and a picture activate it, `[checkpoint d_code]`.
        modality, density: as in `ConceptNames`, float64 `[checkpoint d_code]`.
        word_stability, image_stability: overlap of its words, and of its pictures, with those of the last checkpoint,
            float64 `[checkpoint d_code]`; NaN unless it is alive at both.
        word_control, image_control: the same with those of all other features at the last checkpoint, in the mean.
        step_overlap: overlap of its pictures with those of the checkpoint before, `[checkpoint d_code]`; NaN in the
            first row, and unless it is alive at both.
        events: by checkpoint, then kind, then feature.
        terms: the vocabulary.
        settings: `max_overlap`, `min_overlap`, `n_min`, and how many words and pictures a feature has at most.
    """

    labels: tuple[str, ...]
    word: Tensor
    alive: Tensor
    modality: Tensor
    density: Tensor
    word_stability: Tensor
    image_stability: Tensor
    word_control: Tensor
    image_control: Tensor
    step_overlap: Tensor
    events: tuple[DriftEvent, ...]
    terms: tuple[str, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        counts = self.counts().sum()
        found = ", ".join(f"{counts[kind]} {_plural(kind)}" for kind in KINDS)
        return f"ConceptDrift({self.d_code} features over {len(self)} checkpoints: {found})"

    @property
    def d_code(self) -> int:
        """Features."""
        return self.word.shape[1]

    def names(self, feature: int) -> tuple[str | None, ...]:
        """The name of one feature at each checkpoint; None where it has none.

        Raises:
            InputError: there is no such feature.
        """
        if isinstance(feature, bool) or not 0 <= feature < self.d_code:
            raise InputError(f"features are 0 to {self.d_code - 1}, got {feature}")
        return tuple(None if word < 0 else self.terms[word] for word in self.word[:, feature].tolist())

    def of(self, feature: int) -> tuple[DriftEvent, ...]:
        """What happened to one feature, merges with either place included.

        Raises:
            InputError: there is no such feature.
        """
        self.names(feature)
        return tuple(event for event in self.events if feature in (event.feature, event.other))

    def counts(self) -> pd.DataFrame:
        """How many events of each kind there are at each checkpoint; none at the first."""
        table = pd.DataFrame(0, index=pd.Index(self.labels, name="checkpoint"), columns=list(KINDS))
        for event in self.events:
            table.iloc[event.step, KINDS.index(event.kind)] += 1
        return table

    def to_frame(self) -> pd.DataFrame:
        """A row for each checkpoint and feature."""
        n = self.d_code
        names = [None if word < 0 else self.terms[word] for word in self.word.flatten().tolist()]
        columns = ("alive", "modality", "density", "word_stability", "word_control", "image_stability",
                   "image_control", "step_overlap")  # fmt: skip
        return pd.DataFrame({
            "checkpoint": [label for label in self.labels for _ in range(n)],
            "feature": list(range(n)) * len(self), "name": pd.Series(names, dtype=object),
            **{name: getattr(self, name).flatten().numpy() for name in columns},
        })  # fmt: skip

    def events_frame(self) -> pd.DataFrame:
        """A row for each event, with the label of its checkpoint."""
        names = ("kind", "checkpoint", "feature", "other", "before", "after", "overlap")
        rows = [
            (one.kind, self.labels[one.step], one.feature, one.other, one.before, one.after, one.overlap)
            for one in self.events
        ]
        return pd.DataFrame(rows, columns=list(names))

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> ConceptDrift:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        shape = (len(self.labels), self.d_code)
        same = all(getattr(self, name).shape == shape for name in ("word", "alive", "modality", "step_overlap"))
        return same and all(event.kind in KINDS and 0 < event.step < len(self) for event in self.events)


def _plural(kind: str) -> str:
    return f"{kind}es" if kind == "switch" else f"{kind}s"
