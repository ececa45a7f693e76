"""Predictions without latents, a batch at a time: the rows of a pass."""

from __future__ import annotations

from typing import Final, NamedTuple

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


AXES: Final = {"after": 1, "control": 2, "n_off": 1, "activation": 1, "control_activation": 2}  # others: the first
