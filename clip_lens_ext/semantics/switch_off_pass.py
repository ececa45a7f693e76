"""Predictions without latents, added up batch by batch: an accumulator for `run_pass`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class OffBatch(NamedTuple):
    """What one batch of samples gives; tensors as in `SwitchedOff`."""

    before: Tensor
    """`[sample prompt]`."""
    after: Tensor
    """`[set sample prompt]`."""
    control: Tensor
    """`[set draw sample prompt]`."""
    n_off: Tensor
    """`[set sample]`."""
    activation: Tensor
    """`[set sample]`."""
    control_activation: Tensor
    """`[set draw sample]`."""
    indexes: Tensor
    """`[sample]`."""
    names: list[str]
    """One per sample."""


_AXES = {"before": 0, "after": 1, "control": 2, "n_off": 1, "activation": 1, "control_activation": 2, "indexes": 0}


class OffAccumulator:
    """Samples in the order of a pass."""

    def __init__(self) -> None:
        self._parts: list[OffBatch] = []

    def update(self, part: OffBatch, /) -> None:
        """Take in the samples of a batch."""
        self._parts.append(part)

    def merge(self, other: OffAccumulator, /) -> OffAccumulator:
        """Take in later samples of the same data, and return itself."""
        self._parts += other._parts
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return self.result()._asdict()

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what another one of the same settings was."""
        self._parts = [OffBatch(**state)]

    def result(self) -> OffBatch:
        """All samples so far, at least one batch."""
        if len(self._parts) > 1:
            tensors = {name: torch.cat([getattr(part, name) for part in self._parts], dim=axis)
                       for name, axis in _AXES.items()}  # fmt: skip
            self._parts = [OffBatch(**tensors, names=[name for part in self._parts for name in part.names])]
        return self._parts[0]
