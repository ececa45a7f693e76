"""Mean and covariance of rows that come batch by batch, in memory that does not grow with their number.

Rows are multiplied two thousand at a time, shifted by their own mean first, so a mean that is many times the
spread costs no digits: products run in float32 where the rows are float32, and what is kept between them is float64
around the mean of all rows so far (Chan, Golub and LeVeque's update). Fewer rows wait for more, so that small batches
cost no more than large ones, and where the batches are cut does not change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.covariance_result import Covariance

_ROWS = 2048  # of one float32 product: what is rounded in it does not add up over more
_COLUMNS = 128  # of one product
_TINY = 1e-30  # a float32 sum of squares below it has lost addends to underflow
_HUGE = 1e140  # the squares of float64 values beyond it, summed up, overflow


class StreamingCovariance:
    """Count, mean and covariance of rows `[row d]`, taken in batch by batch; an accumulator for `run_pass`.

    `S = sum_i (x_i - m)(x_i - m)' / (n - 1)` with `m = sum_i x_i / n`. Split, reordered or merged, the rows give the
    same up to rounding.

    Args:
        d: length of a row.
        device: where the state is kept and the products are made; rows are moved there. None: the CPU.

    Attributes:
        d: as passed in.

    Raises:
        InputError: `d` is no positive integer.

    Example:
        >>> rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) + 60
        >>> whole, left = StreamingCovariance(3), StreamingCovariance(3)
        >>> whole.update(rows)
        >>> left.update(rows[:10])
        >>> right = StreamingCovariance(3)
        >>> right.update(rows[10:])
        >>> torch.allclose(left.merge(right).covariance(), whole.covariance(), rtol=1e-5)
        True
        >>> left.count, left.mean().dtype
        (100, torch.float64)

    Reference:
        Chan, Golub, LeVeque (1983), Algorithms for computing the sample variance.
    """

    def __init__(self, d: int, *, device: torch.device | str | None = None) -> None:
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise InputError(f"d is the length of a row, a positive integer; got {d!r}")
        self.d = d
        self._device = torch.device("cpu" if device is None else device)
        self._sums = _Sums.empty(d, self._device)
        self._room = torch.empty(0, d, device=self._device)
        self._n_waiting = 0

    def __repr__(self) -> str:
        return f"StreamingCovariance(d={self.d}, count={self.count})"

    @property
    def count(self) -> int:
        """Rows so far."""
        return self._sums.count + self._n_waiting

    @torch.no_grad()
    def update(self, rows: Tensor, /) -> None:
        """Take in a batch.

        Products of float64 rows are made in float64. Those of float32 and half-precision rows are made in float32,
        save where float32 would overflow or underflow, or where torch is set to round it (TF32): there in float64.

        Args:
            rows: floats `[row d]`; none at all is allowed.

        Raises:
            InputError: wrong type, shape or dtype, or a NaN or infinite value; it names the row. Nothing of such a
                batch is taken in.
        """
        rows = self._checked(rows)
        if rows.dtype != self._room.dtype or len(self._room) == 0:
            self._sums.add(self._waiting)
            self._n_waiting, self._room = 0, torch.empty(_ROWS, self.d, dtype=rows.dtype, device=self._device)
        while len(rows):
            if self._n_waiting == 0 and len(rows) >= _ROWS:
                self._sums.add(rows[:_ROWS])
                rows = rows[_ROWS:]
                continue
            taken = rows[: _ROWS - self._n_waiting]
            self._room.narrow(0, self._n_waiting, len(taken)).copy_(taken)
            self._n_waiting += len(taken)
            rows = rows[len(taken) :]
            if self._n_waiting == _ROWS:
                self._sums.add(self._waiting)
                self._n_waiting = 0

    def merge(self, other: StreamingCovariance, /) -> StreamingCovariance:
        """Take in the rows of another one, and return itself.

        Raises:
            InputError: its rows have another length.
        """
        if not isinstance(other, StreamingCovariance) or other.d != self.d:
            found = f"rows of length {other.d}" if isinstance(other, StreamingCovariance) else type(other).__name__
            raise InputError(f"a covariance of rows of length {self.d} cannot take in one of {found}")
        self._sums.add_sums(other._all())
        return self

    def mean(self) -> Tensor:
        """The mean of all rows so far, float64 `[d]`.

        Raises:
            InputError: there is no row.
        """
        if self.count == 0:
            raise InputError("no row was taken in, so there is no mean: call update(rows) first")
        return self._all().mean

    def covariance(self, *, correction: int = 1) -> Tensor:
        """The covariance of all rows so far, float64 `[d d]`, symmetric.

        Args:
            correction: the sum of squares is divided by `count - correction`: 1 is unbiased, as in `torch.cov`.

        Raises:
            InputError: there are too few rows.
        """
        if self.count <= max(correction, 0):
            raise InputError(f"a covariance with correction={correction} needs more than {max(correction, 0)} rows, "
                             f"got {self.count}")  # fmt: skip
        upper = self._all().scatter.triu_()
        return (upper + upper.triu(1).T) / (self.count - correction)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, for a checkpoint."""
        sums = self._sums
        return {"d": self.d, "count": sums.count, "mean": sums.mean.clone(), "scatter": sums.scatter.clone(),
                "waiting": self._waiting.clone()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said.

        Raises:
            InputError: the state is of rows of another length.
        """
        if state["d"] != self.d:
            raise InputError(f"this is a covariance of rows of length {self.d}, the state of {state['d']}")
        mean, scatter = (state[name].to(self._device, copy=True) for name in ("mean", "scatter"))
        self._sums = _Sums(int(state["count"]), mean, scatter)
        waiting = state["waiting"].to(self._device)
        self._room = torch.empty(_ROWS, self.d, dtype=waiting.dtype, device=self._device)
        self._room[: len(waiting)] = waiting
        self._n_waiting = len(waiting)

    def result(self) -> Covariance:
        """Mean and unbiased covariance so far, on the CPU.

        Raises:
            InputError: there are fewer than two rows.
        """
        return Covariance(mean=self.mean().cpu(), covariance=self.covariance().cpu(), count=self.count)

    @classmethod
    def of(cls, found: Covariance) -> StreamingCovariance:
        """What has given this result, to go on with more rows."""
        self = cls(found.d)
        self._sums = _Sums(found.count, found.mean.clone(), found.covariance * (found.count - 1))
        return self

    def _checked(self, rows: Tensor) -> Tensor:
        if not isinstance(rows, Tensor):
            raise InputError(f"rows are a float tensor [row {self.d}], got a {type(rows).__name__}")
        if rows.dim() != 2 or rows.shape[1] != self.d or not rows.is_floating_point():
            raise InputError(f"rows are floats [row {self.d}], got {rows.dtype} {list(rows.shape)}")
        rows = rows.detach().to(self._device, rows.dtype if rows.dtype == torch.float64 else torch.float32)
        # Small batches come by the thousand: one number is read, and a sum may overflow where no row does.
        if not math.isfinite(rows.sum().item()) and not torch.isfinite(rows).all():
            bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
            more = f" and {len(bad) - 1} more" if bad[1:] else ""
            raise InputError(f"row {bad[0]} of this batch{more} holds NaN or infinite values; none of it was taken in")
        if rows.dtype == torch.float64 and bool((rows.abs() > _HUGE).any()):
            raise InputError(f"the squares of these rows overflow float64 ({float(rows.abs().max()):.0e}): scale them")
        return rows

    @property
    def _waiting(self) -> Tensor:
        return self._room[: self._n_waiting]

    @torch.no_grad()
    def _all(self) -> _Sums:
        """The sums with those of the waiting rows, in tensors of their own."""
        sums = _Sums(self._sums.count, self._sums.mean.clone(), self._sums.scatter.clone())
        sums.add(self._waiting)
        return sums


@dataclass
class _Sums:
    """Count, mean `[d]` and scatter `[d d]` about that mean, in float64; of the scatter the upper triangle is right."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, d: int, device: torch.device) -> _Sums:
        """Those of no rows."""
        zeros = torch.zeros(d, d, dtype=torch.float64, device=device)
        return cls(0, zeros.sum(dim=0), zeros)

    def add(self, rows: Tensor) -> None:
        """Take in rows `[row d]`, all finite."""
        if len(rows) == 0:
            return
        # The mean is taken from the first row on, so that a constant column is left exactly zero; a mean in float64
        # would do that as well, and cost a fifth of the products.
        shift = rows[0] + (rows - rows[0]).mean(dim=0)
        if not torch.isfinite(shift).all():  # the sum of huge rows overflows float32
            shift = rows.mean(dim=0, dtype=torch.float64).to(rows.dtype)
        centred = rows - shift
        # The shift is near the mean; what is missing of it is small, and so is its own error.
        rest = centred.mean(dim=0).double()
        self._chan(len(rows), shift.double() + rest)
        for start, block in _products(centred):
            self.scatter[start : start + len(block), start:].add_(block)
        if rest.any():
            self.scatter.addr_(rest, rest, alpha=-len(rows))

    def add_sums(self, other: _Sums) -> None:
        """Take in the rows of others."""
        if other.count:
            self._chan(other.count, other.mean.to(self.mean.device))
            self.scatter.add_(other.scatter.to(self.mean.device))

    def _chan(self, count: int, mean: Tensor) -> None:
        """Two means become one, and the distance between them adds to the scatter: Chan's update."""
        whole = self.count + count
        away = mean - self.mean
        if self.count:
            self.scatter.addr_(away, away, alpha=self.count * count / whole)
        self.mean = self.mean + away * (count / whole)
        self.count = whole


def _products(centred: Tensor) -> list[tuple[int, Tensor]]:
    """`centred' centred` in float32 or float64: blocks of rows by their first row, each from the diagonal on."""
    with torch.autocast(centred.device.type, enabled=False):
        if centred.dtype == torch.float32 and _is_exact(centred.device):
            found = _blocks(centred)
            squares = torch.cat([block.diagonal() for _, block in found])
            small = squares < _TINY
            if torch.isfinite(squares).all() and not (small.any() and bool((centred[:, small] != 0).any())):
                return found
        return _blocks(centred.double())


def _blocks(centred: Tensor) -> list[tuple[int, Tensor]]:
    # The matrix is symmetric: what is below the diagonal need not be computed, save inside of the blocks.
    starts = range(0, centred.shape[1], _COLUMNS)
    return [(start, centred[:, start : start + _COLUMNS].T @ centred[:, start:]) for start in starts]


def _is_exact(device: torch.device) -> bool:
    """Whether torch multiplies float32 matrices in float32 there, and not in TF32 or bfloat16."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn
    kind = getattr(getattr(backend, "matmul", backend), "fp32_precision", None)  # from torch 2.9 on
    if kind is not None and kind != "none":
        return kind == "ieee"
    return torch.get_float32_matmul_precision() == "highest"
