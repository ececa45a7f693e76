"""The split of a space into signal and noise, as a result that can be kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.spectrum.subspaces import complement


@dataclass(frozen=True, eq=False)
class NoiseSplit:
    """A subspace of noise, and what a reader needs to doubt it.

    Attributes:
        basis: orthonormal columns that span the noise, float64 `[d rank]`; its complement is the signal.
        eigenvalues: the spectra that were cut, greatest first, `[spectrum d]`: variances in the units of the rows
            squared, singular values of the cross-covariance, or ratios of variances, as the rule says.
        labels: of what each spectrum is.
        threshold: at which value of each spectrum noise begins, in its units.
        n_noise: how many directions of each spectrum lie below.
        modalities: `("image", "text")`, or one of them for one tower alone (`"image"` where that is not known).
        n: rows of each modality.
        means: mean row of each modality, `[modality d]`.
        rule, cut: by which names.
        settings: every setting of both, `min_cosine` and `centre`.
        space_dimensions: dimension of the noise of each modality by itself.
        n_by_chance: the dimension that two spaces of these dimensions share in any case, `max(0, a + b - d)`; None for
            one modality.
        overlap: `||A'B||_F^2 / min(a, b)` of the two, in [0, 1]; NaN where one is empty, None for one modality.
        overlap_by_chance: its mean for random (Haar) subspaces of these dimensions.
        hook_name, token_scope, tower: where the rows are from, if `collect_covariance` made them.
        warnings: sentences on what weakens the result.
        provenance: model, data fingerprints, versions.
    """

    basis: Tensor
    eigenvalues: Tensor
    labels: tuple[str, ...]
    threshold: tuple[float, ...]
    n_noise: tuple[int, ...]
    modalities: tuple[str, ...]
    n: tuple[int, ...]
    means: Tensor
    rule: str
    cut: str
    settings: dict[str, Any]
    space_dimensions: tuple[int, ...]
    n_by_chance: int | None
    overlap: float | None
    overlap_by_chance: float | None
    hook_name: str | None
    token_scope: str | None
    tower: str | None
    warnings: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def rank(self) -> int:
        """Dimension of the noise."""
        return self.basis.shape[1]

    @property
    def d(self) -> int:
        """Dimension of the space."""
        return self.basis.shape[0]

    @property
    def excess_overlap(self) -> float | None:
        """Observed overlap of the two modalities' noise minus that of random subspaces; None for one modality."""
        if self.overlap is None or self.overlap_by_chance is None:
            return None
        return self.overlap - self.overlap_by_chance

    @property
    def signal_basis(self) -> Tensor:
        """Orthonormal columns that span the signal, `[d d-rank]`."""
        return complement(self.basis)

    def remove(self, rows: Tensor, *, mean: Tensor | None = None) -> Tensor:
        """Rows without their noise: `x - U U'(x - mean)`.

        Args:
            rows: `[... d]`.
            mean: what is kept of the noise subspace, `[d]`; None: nothing.

        Raises:
            InputError: the rows have another length.
        """
        if rows.shape[-1] != self.d:
            raise InputError(f"rows of length {rows.shape[-1]}, and the split is of a space of {self.d} dimensions")
        basis = self.basis.to(rows)
        away = rows if mean is None else rows - mean.to(rows)
        return rows - (away @ basis) @ basis.T

    def variance_share(self, rows: Tensor) -> float:
        """Share of the variance of rows `[n d]` that lies in the noise, in 0..1."""
        if rows.shape[-1] != self.d:
            raise InputError(f"rows of length {rows.shape[-1]}, and the split is of a space of {self.d} dimensions")
        centred = rows.double() - rows.double().mean(dim=0)
        return float((centred @ self.basis.to(centred)).square().sum() / centred.square().sum())

    def summary(self) -> str:
        """The split in a few sentences."""
        parts = [f"{self.rank} of {self.d} dimensions are noise by the rule {self.rule!r}, cut by {self.cut!r}."]
        if self.excess_overlap is not None:
            a, b = self.space_dimensions
            parts.append(
                f"The noise of {self.modalities[0]}s has {a} dimensions, that of {self.modalities[1]}s {b}: "
                f"{self.n_by_chance} would be shared by counting alone; overlap {self.overlap:.3f}, "
                f"by chance {self.overlap_by_chance:.3f}."
            )
        return " ".join([*parts, *self.warnings])

    def __repr__(self) -> str:
        where = f", {self.hook_name}" if self.hook_name else ""
        return f"NoiseSplit({self.rank} of {self.d} dimensions, {self.rule}, {self.cut}{where})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NoiseSplit:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        return self.basis.ndim == self.means.ndim == self.eigenvalues.ndim == 2 and (
            self.d == self.means.shape[1] == self.eigenvalues.shape[1]
        )
