"""Passes that are stopped and go on: data that stop one, and results that are the same to the last bit."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from torch import Tensor, equal


class Stopping:
    """Pictures of which one stops the pass, as a kill between two batches would."""

    def __init__(self, pixels, at):
        self.pixels, self.at = pixels, at

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return self.pixels[index]


def same(one, other):
    """Two results are equal field by field: tensors in bits and dtype, NaN where NaN is, all else in value and type."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert type(a) is type(b), field.name
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype, field.name
            assert equal(a.isnan(), b.isnan()), field.name
            assert equal(a[~a.isnan()], b[~b.isnan()]), field.name
        elif is_dataclass(a):
            same(a, b)
        else:
            assert a == b, field.name
