"""An accumulator for `run_pass` of what is kept row by row: named tuples of tensors and lists, joined in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Rows = TypeVar("Rows", bound=Any)
_FIRST: Mapping[str, int] = MappingProxyType({})


class RowAccumulator(Generic[Rows]):
    """Rows in the order of a pass.

    Args:
        kind: a `NamedTuple` of tensors and lists.
        axes: of a tensor whose rows are not its first axis, which axis they are.

    Example:
        >>> from typing import NamedTuple
        >>> class Seen(NamedTuple):
        ...     value: torch.Tensor
        ...     name: list[str]
        >>> found = RowAccumulator(Seen)
        >>> found.update(Seen(torch.tensor([1.0]), ["a"]))
        >>> found.update(Seen(torch.tensor([2.0, 3.0]), ["b", "c"]))
        >>> found.result()
        Seen(value=tensor([1., 2., 3.]), name=['a', 'b', 'c'])
    """

    def __init__(self, kind: Callable[..., Rows], axes: Mapping[str, int] = _FIRST) -> None:
        self._kind, self._axes = kind, axes
        self._parts: list[Rows] = []

    def update(self, part: Rows, /) -> None:
        """Take in the rows of a batch."""
        self._parts.append(part)

    def merge(self, other: RowAccumulator[Rows], /) -> RowAccumulator[Rows]:
        """Take in later rows of the same data, and return itself."""
        for part in other._parts:
            self.update(part)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return self.result()._asdict()

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what another one of the same settings was."""
        self._parts = []
        self.update(self._kind(**state))

    def result(self) -> Rows:
        """All rows so far, of one batch at least."""
        if len(self._parts) > 1:
            joined = {name: self._joined(name, [getattr(part, name) for part in self._parts])
                      for name in self._parts[0]._fields}  # fmt: skip
            self._parts = [self._kind(**joined)]
        return self._parts[0]

    def _joined(self, name: str, column: list[Any]) -> Any:
        if isinstance(column[0], Tensor):
            return torch.cat(column, dim=self._axes.get(name, 0))
        return [entry for part in column for entry in part]
