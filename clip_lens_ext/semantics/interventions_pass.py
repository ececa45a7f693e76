"""Edits measured one after another: what `run_pass` goes over, adds up, and knows a checkpoint by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from clip_lens_ext.image_files import Skipped
from clip_lens_ext.pass_rows import RowAccumulator
from clip_lens_ext.provenance import fingerprint

if TYPE_CHECKING:
    from clip_lens_ext.semantics.interventions import Edited, Intervention


class EditBatch(NamedTuple):
    """One edit, as a batch of a pass."""

    edit: Intervention
    pixels: Tensor
    """The pictures before, `[pair 3 height width]`."""
    names: Sequence[str]
    """Of the edit: it counts as one sample."""
    indexes: Sequence[int]


class EditBatches:
    """Edits in their order, as the batches of a pass."""

    skipped: tuple[Skipped, ...] = ()
    fingerprint: str | None = None

    def __init__(self, edits: Sequence[Intervention]) -> None:
        self._edits = edits
        self.n_samples: int | None = len(edits)

    def __iter__(self) -> Iterator[EditBatch]:
        for number, edit in enumerate(self._edits):
            yield EditBatch(edit, edit.before, [edit.name], [number])


class EffectRows(NamedTuple):
    """The rows and entries of some edits: fields as those of `InterventionEffects`."""

    names: list[str]
    kinds: list[str]
    subjects: list[str]
    against: list[str]
    n_pairs: Tensor
    latent_before: Tensor
    latent_after: Tensor
    latent_change: Tensor
    latent_error: Tensor
    prediction_before: Tensor
    prediction_after: Tensor
    prediction_change: Tensor
    prediction_error: Tensor
    through_row: Tensor
    through_prompt: Tensor
    through_latent: Tensor
    through_change: Tensor
    through_error: Tensor


class EffectAccumulator(RowAccumulator[EffectRows]):
    """Edits in the order of a pass, whose entries count rows."""

    def __init__(self) -> None:
        super().__init__(EffectRows)

    def update(self, part: EffectRows, /) -> None:
        """Take in the rows of an edit, or of several, whose entries count from their own first row."""
        n_rows = sum(len(known.names) for known in self._parts)
        super().update(part._replace(through_row=part.through_row + n_rows))

    def merge(self, other: RowAccumulator[EffectRows], /) -> RowAccumulator[EffectRows]:
        """Take in later edits, and return itself."""
        if other._parts:
            self.update(other.result())
        return self


def known_by(edits: Sequence[Intervention]) -> dict[str, Any]:
    """What tells edits from others, as settings of a pass: of pictures their hash, of functions no more than a name."""
    hashes: dict[int, str] = {}

    def what(edited: Edited) -> str:
        if not isinstance(edited, Tensor):
            return f"function {getattr(edited, '__qualname__', type(edited).__name__)}"
        if id(edited) not in hashes:  # many words are drawn on the same neutral pictures
            hashes[id(edited)] = fingerprint(edited)
        return hashes[id(edited)]

    found: dict[str, Any] = {"edits": [edit.name for edit in edits]}
    for edit in edits:
        about = {
            "kind": edit.kind, "subject": edit.subject, "pictures before": what(edit.before),
            "pictures after": what(edit.after), "controls": list(edit.controls),
            **{f"control {label!r}": what(control) for label, control in edit.controls.items()},
        }  # fmt: skip
        found |= {f"{name} of {edit.name!r}": value for name, value in about.items()}
    return found
