"""The covariances of two kinds of rows that come in pairs, and the cross-covariance between them, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.covariance import StreamingCovariance
from clip_lens_ext.spectrum.covariance_result import Covariance


@dataclass(frozen=True, eq=False)
class PairCovariance:
    """Covariances of the rows of either kind, and between them.

    Attributes:
        image, text: mean and covariance of each.
        cross: `sum_i (x_i - m_x)(t_i - m_t)' / (n - 1)`, float64 `[d_image d_text]`.
        count: pairs.
    """

    image: Covariance
    text: Covariance
    cross: Tensor
    count: int

    def __repr__(self) -> str:
        return f"PairCovariance({self.count} pairs of lengths {self.image.d} and {self.text.d})"


class StreamingPairCovariance:
    """`StreamingCovariance` of two kinds of rows that belong together; an accumulator for `run_pass`.

    Args:
        d_image: length of a row of the first kind.
        d_text: length of a row of the second kind.
        device: as in `StreamingCovariance`.

    Example:
        >>> pairs = StreamingPairCovariance(2, 3)
        >>> rows = torch.randn(10, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> pairs.update(rows[:, :2], rows[:, 2:])
        >>> torch.allclose(pairs.result().cross, torch.cov(rows.T)[:2, 2:])
        True
    """

    def __init__(self, d_image: int, d_text: int, *, device: torch.device | str | None = None) -> None:
        for d in (d_image, d_text):
            StreamingCovariance(d)
        self.d_image, self.d_text = d_image, d_text
        # The rows of a pair behind one another: their covariance holds both covariances and the one between them.
        self._both = StreamingCovariance(d_image + d_text, device=device)

    @property
    def count(self) -> int:
        """Pairs so far."""
        return self._both.count

    def update(self, image: Tensor, text: Tensor) -> None:
        """Take in a batch of pairs.

        Args:
            image: floats `[pair d_image]`.
            text: floats `[pair d_text]`.

        Raises:
            InputError: wrong type, shape or dtype, unequal numbers of rows, or a NaN or infinite value.
        """
        for name, rows, d in (("image", image, self.d_image), ("text", text, self.d_text)):
            if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != d or not rows.is_floating_point():
                found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
                raise InputError(f"{name} rows are floats [pair {d}], got {found}")
        if len(image) != len(text):
            raise InputError(f"{len(image)} image rows and {len(text)} text rows are no pairs")
        self._both.update(torch.cat([image, text.to(image.device)], dim=1))

    def merge(self, other: StreamingPairCovariance, /) -> StreamingPairCovariance:
        """Take in the pairs of another one, and return itself.

        Raises:
            InputError: its rows have other lengths.
        """
        mine = (self.d_image, self.d_text)
        if not isinstance(other, StreamingPairCovariance) or (other.d_image, other.d_text) != mine:
            raise InputError(f"pairs of lengths {mine} take in pairs of the same lengths alone")
        self._both.merge(other._both)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, for a checkpoint."""
        return {**self._both.state_dict(), "d_image": self.d_image}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said.

        Raises:
            InputError: the state is of other lengths.
        """
        if state["d_image"] != self.d_image:
            raise InputError(f"these are pairs of image rows of length {self.d_image}, the state of {state['d_image']}")
        self._both.load_state_dict(state)

    def result(self) -> PairCovariance:
        """The three covariances so far, on the CPU.

        Raises:
            InputError: there are fewer than two pairs.
        """
        both, d = self._both.result(), self.d_image
        image = Covariance(both.mean[:d].clone(), both.covariance[:d, :d].clone(), both.count)
        text = Covariance(both.mean[d:].clone(), both.covariance[d:, d:].clone(), both.count)
        return PairCovariance(image, text, both.covariance[:d, d:].clone(), both.count)
