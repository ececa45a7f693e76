"""A spectrum: values of directions, greatest first, and what a cut may know of how they came about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.subspaces import signed

Kind = Literal["covariance", "cross", "ratio"]
Null = Callable[[torch.Generator, int], float]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Directions by their value, and what is known of it.

    Attributes:
        label: of what: `"image"`, `"text"`, `"pooled"`, ...
        values: float64 `[d]`, not negative, greatest first: the last is the most like noise.
        vectors: their directions, columns `[d d]`; orthonormal save for kind `"ratio"`.
        kind: `"covariance"`: eigenvalues, variances; `"cross"`: singular values of a cross-covariance; `"ratio"`:
            variance under real input over variance under control input.
        n: rows that vary freely (one less than rows where their mean was taken off).
        n_control: those of the control, for `"ratio"`.
        null: the greatest value of one random draw without structure, after the given number of greatest directions
            were taken out of the rows; None where the rows are not known.
        progress: whether a cut that takes long draws a bar.
    """

    label: str
    values: Tensor
    vectors: Tensor
    kind: Kind
    n: float
    n_control: float = 0.0
    null: Null | None = None
    progress: bool = True

    @property
    def d(self) -> int:
        """Number of directions."""
        return len(self.values)

    @property
    def n_filled(self) -> int:
        """Directions in which the rows can vary at all: fewer than `d` where there are fewer rows."""
        return self.d if self.kind == "ratio" else min(self.d, int(self.n))

    def noise(self, n_noise: int) -> Tensor:
        """The last `n_noise` directions `[d n_noise]`."""
        return self.vectors[:, self.d - n_noise :]


def eigen_spectrum(
    label: str, matrix: Tensor, n: float, *, null: Null | None = None, progress: bool = True
) -> Spectrum:
    """The spectrum of a covariance `[d d]`."""
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding leaves eigenvalues of about -1e-17 where a covariance has none.
    return Spectrum(label, values.flip(0).clamp(min=0), signed(vectors.flip(1)), "covariance", n, null=null,
                    progress=progress)  # fmt: skip


def greatest_eigenvalue(matrix: Tensor) -> float:
    """Of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(matrix)[-1])


def check_varies(spectrum: Spectrum) -> None:
    """Raise `InputError` where nothing varies, so that there is neither signal nor noise."""
    if float(spectrum.values[0]) == 0:
        raise InputError(f"the {spectrum.label} rows are all equal: there is no variance to split")
