"""The result of `train_sparse_clip`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clip_lens_ext.data import Skipped
from clip_lens_ext.sparse_clip.head import dense_clip
from clip_lens_ext.sparse_clip.store import load_sparse_clip
from clip_lens_ext.towers.clip import HookedCLIP


@dataclass(frozen=True)
class SparseCheckpoint:
    """Weights that were kept on the way.

    Attributes:
        step: steps that were done.
        share: of the training, in (0, 1].
        path: folder, for `load_sparse_clip`.
    """

    step: int
    share: float
    path: Path


@dataclass(frozen=True, eq=False)
class SparseTraining:
    """A training of a Sparse CLIP.

    Attributes:
        clip: the model after the last step, in evaluation mode.
        history: for each step its `loss`, mean active features `l0_image` and `l0_text` in a code of the batch, the
            factor `logit_scale` on the cosines after it, and `lr`.
        checkpoints: what was kept on the way, ascending; empty without an `output_dir`.
        n_steps: steps of the whole training; the history is shorter where `stop_after` ended it.
        skipped: pictures that could not be read.
        settings: of the training, the seed among them.
        provenance: the model that it began with, hashes of that and of the data, versions.
    """

    clip: HookedCLIP
    history: pd.DataFrame
    checkpoints: tuple[SparseCheckpoint, ...]
    n_steps: int
    skipped: tuple[Skipped, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return len(self.history) == self.n_steps

    def open(self, checkpoint: SparseCheckpoint) -> HookedCLIP:
        """The model at a checkpoint, on the dense model of `clip`."""
        return load_sparse_clip(checkpoint.path, dense_clip(self.clip))

    def __repr__(self) -> str:
        if not len(self.history):
            return f"SparseTraining(0 of {self.n_steps} steps)"
        last = self.history.iloc[-1]
        return (
            f"SparseTraining({len(self.history)} of {self.n_steps} steps, loss {last.loss:.3f}, L0 {last.l0_image:.1f} "
            f"of pictures and {last.l0_text:.1f} of texts, {len(self.checkpoints)} checkpoints)"
        )
