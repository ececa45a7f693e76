"""How two subspaces lie to one another: principal angles, overlap, what they share, and what chance alone would give.

A subspace is an orthonormal basis in its columns, float64 `[d k]`; `k` may be 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


class Angles(NamedTuple):
    """Principal angles in radians, smallest first `[min(a, b)]`, and the vectors of either space that make them."""

    angle: Tensor
    first: Tensor
    second: Tensor


def principal_angles(first: Tensor, second: Tensor) -> Angles:
    """The principal angles between two subspaces.

    The cosines are the singular values of `A'B`; the sine of each comes from its own vectors, so that small angles
    keep their digits, which an arc cosine would lose.

    Args:
        first, second: orthonormal columns `[d a]`, `[d b]`.

    Returns:
        `Angles`; `first @ second'` vectors are matched by column, and orthogonal to all others.

    Raises:
        InputError: the spaces are not of one width.

    Example:
        >>> one, other = torch.eye(3, dtype=torch.float64)[:, :1], torch.ones(3, 1, dtype=torch.float64) / 3**0.5
        >>> round(float(principal_angles(one, other).angle.cos()), 6)
        0.57735

    Reference:
        Björck and Golub (1973), Numerical methods for computing angles between linear subspaces.
    """
    _check(first, second)
    u, cosine, vh = torch.linalg.svd(first.T @ second, full_matrices=False)
    a, b = first @ u, second @ vh.T
    sine = (b - a * cosine).norm(dim=0)
    return Angles(torch.atan2(sine, cosine), a, b)


def overlap(first: Tensor, second: Tensor) -> float:
    """`||A'B||_F^2 / min(a, b)`: the mean squared cosine of the principal angles, in [0, 1]; NaN where one is empty.

    Example:
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> overlap(eye[:, :2], eye[:, 1:3])
        0.5
    """
    _check(first, second)
    smaller = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / smaller if smaller else float("nan")


def overlap_by_chance(a: int, b: int, d: int) -> float:
    """The mean of `overlap` over random subspaces of these dimensions (Haar): `max(a, b) / d`; NaN where one is empty.

    Example:
        >>> overlap_by_chance(164, 164, 768) == 164 / 768
        True
    """
    return max(a, b) / d if min(a, b) else float("nan")


def dimension_by_chance(a: int, b: int, d: int) -> int:
    """The dimension that any two subspaces in general position share: `max(0, a + b - d)`.

    Example:
        >>> dimension_by_chance(466, 466, 768)
        164
    """
    return max(0, a + b - d)


def shared_subspace(first: Tensor, second: Tensor, *, min_cosine: float) -> Tensor:
    """The directions that two subspaces have in common, orthonormal `[d k]`.

    Args:
        first, second: orthonormal columns `[d a]`, `[d b]`.
        min_cosine: pairs of principal vectors with at least this cosine are shared; their bisector is the direction.
    """
    found = principal_angles(first, second)
    near = found.angle.cos() >= min_cosine
    middle = found.first[:, near] + found.second[:, near]
    return middle / middle.norm(dim=0)


def complement(basis: Tensor) -> Tensor:
    """Orthonormal columns `[d d-k]` of all that is orthogonal to a subspace `[d k]`."""
    return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]


def signed(vectors: Tensor) -> Tensor:
    """Each column with the sign that makes its greatest entry positive, so that equal input gives equal signs."""
    if vectors.numel() == 0:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)


def _check(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second):
        raise InputError(
            f"subspaces of one space are [d a] and [d b], got {list(first.shape)} and {list(second.shape)}"
        )
