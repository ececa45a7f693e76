"""The settings of a training of a Sparse CLIP, checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, get_args

from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip.head import LARGEST_SCALE

Trained = Literal["heads", "all"]
Precision = Literal["float32", "bfloat16", "float16"]
_NOT_COMPARED = ("checkpoint_every", "n_workers", "n_accumulated")


@dataclass(frozen=True)
class TrainingSettings:
    """The keywords of `train_sparse_clip` that do not depend on model or data, as it documents them.

    Raises:
        InputError: a setting is out of range.
    """

    trained: Trained
    n_epochs: float
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    largest_logit_scale: float
    l1: float
    clip_gradient: float | None
    precision: Precision
    n_accumulated: int
    checkpoints: tuple[float, ...]
    checkpoint_every: int
    n_workers: int
    seed: int

    def __post_init__(self) -> None:
        for name, choice, choices in (
            ("trained", self.trained, get_args(Trained)), ("precision", self.precision, get_args(Precision)),
        ):  # fmt: skip
            if choice not in choices:
                raise InputError(f"{name} is one of {', '.join(choices)}, got {choice!r}")
        for name, least in (("batch_size", 2), ("n_accumulated", 1), ("checkpoint_every", 1), ("n_workers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is an integer, {least} or more; got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed is an integer, 0 or more; got {self.seed!r}")
        for name in ("n_epochs", "lr", "weight_decay", "l1", "warmup", "largest_logit_scale", "clip_gradient"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real | None if name == "clip_gradient" else Real):
                raise InputError(f"{name} is a number, got {value!r}")
        for name in ("n_epochs", "lr", *(["clip_gradient"] if self.clip_gradient is not None else [])):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name} is a number above 0, got {getattr(self, name)!r}")
        for name in ("weight_decay", "l1"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name} is a number, 0 or more; got {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup is a share of the steps, in [0, 1); got {self.warmup!r}")
        if not 1 <= self.largest_logit_scale <= LARGEST_SCALE:
            raise InputError("largest_logit_scale caps the factor itself, and not its logarithm, in "
                             f"[1, {LARGEST_SCALE:g}]; got {self.largest_logit_scale!r}")  # fmt: skip
        if any(not 0 < share <= 1 for share in self.checkpoints) or list(self.checkpoints) != sorted(
            set(self.checkpoints)
        ):
            raise InputError(f"checkpoints are ascending shares of the training in (0, 1], got {self.checkpoints}")

    @property
    def compared(self) -> dict[str, Any]:
        """The settings by which two runs are the same run, as JSON values."""
        found = {key: value for key, value in asdict(self).items() if key not in _NOT_COMPARED}
        return {**found, "checkpoints": list(self.checkpoints)}

    def steps_per_epoch(self, n_pairs: int) -> int:
        """Whole batches of `n_pairs`.

        Raises:
            InputError: there are fewer pairs than in a batch.
        """
        if n_pairs < self.batch_size:
            raise InputError(f"a batch of {self.batch_size} pairs, and there are {n_pairs}: pass a smaller batch_size")
        return n_pairs // self.batch_size

    def n_steps(self, n_pairs: int) -> int:
        """Steps of the whole training, 1 or more."""
        return max(1, round(self.n_epochs * self.steps_per_epoch(n_pairs)))

    def lr_at(self, step: int, n_steps: int) -> float:
        """Linear over the warm-up, then half a cosine to nothing."""
        n_warmup = round(self.warmup * n_steps)
        if step < n_warmup:
            return self.lr * (step + 1) / n_warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))

    def kept(self, n_steps: int) -> dict[int, float]:
        """The steps after which the weights are kept, and the share of the training that each is."""
        return {max(1, math.ceil(share * n_steps)): share for share in self.checkpoints}
