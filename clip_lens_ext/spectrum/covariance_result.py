"""The mean and the covariance of rows at one hook, as a result that can be kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.result_files import load_result, save_result


@dataclass(frozen=True, eq=False)
class Covariance:
    """Mean and unbiased covariance of rows.

    Attributes:
        mean: in the units of the rows, float64 `[d]`.
        covariance: in their square, divided by `count - 1`; float64 `[d d]`, symmetric.
        count: rows.
        hook_name, token_scope, tower: where the rows are from, if a tower gave them; else None.
        unit_length: whether each row was divided by its length first.
        provenance: model, data fingerprint, versions.

    Example:
        >>> from clip_lens_ext.spectrum import StreamingCovariance
        >>> found = StreamingCovariance(2)
        >>> found.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> found.result()
        Covariance(2 rows of length 2)
        >>> found.result().covariance.tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """

    mean: Tensor
    covariance: Tensor
    count: int
    hook_name: str | None = None
    token_scope: str | None = None
    tower: str | None = None
    unit_length: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def d(self) -> int:
        """Length of a row."""
        return len(self.mean)

    @property
    def total_variance(self) -> float:
        """Trace of the covariance: mean squared distance of a row from the mean."""
        return float(self.covariance.trace())

    def __repr__(self) -> str:
        where = f", {self.tower} {self.hook_name}, {self.token_scope} tokens" if self.hook_name else ""
        return f"Covariance({self.count} rows of length {self.d}{where})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Covariance:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        return tuple(self.covariance.shape) == (self.d, self.d) and self.mean.dtype == torch.float64
