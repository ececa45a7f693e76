"""Crops against a loop over pixels, at the edges, and as an intervention."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import flags as oracle
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics import Intervention, crop_pictures, measure_interventions
from clip_lens_ext.towers import HookedCLIP


def some(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@given(x=st.floats(0, 1), y=st.floats(0, 1), size=st.floats(0.1, 1.0))
@settings(max_examples=25, deadline=None)
def test_every_pixel_is_interpolated_from_the_part(x: float, y: float, size: float) -> None:
    pictures = some(1)
    found = crop_pictures(pictures, x=x, y=y, size=size)
    for channel in range(3):
        expected = oracle.crop(pictures[0, channel].tolist(), x, y, size)
        torch.testing.assert_close(found[0, channel], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_whole_picture_stays_as_it_is() -> None:
    pictures = some()
    torch.testing.assert_close(crop_pictures(pictures, size=1.0), pictures, rtol=0, atol=1e-14)
    whole = (pictures * 255).to(torch.uint8)
    assert torch.equal(crop_pictures(whole, x=0.1, y=0.9, size=1.0), whole)


def test_each_picture_has_its_own_middle() -> None:
    pictures = some(3)
    x, y = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.9, 0.1, 0.4])
    found = crop_pictures(pictures, x=x, y=y, size=0.4)
    for row in range(3):
        alone = crop_pictures(pictures[row : row + 1], x=float(x[row]), y=float(y[row]), size=0.4)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=0, atol=1e-7)  # x and y come in float32
    assert torch.equal(pictures, some(3))


def test_bytes_are_rounded() -> None:
    whole = (some() * 255).to(torch.uint8)
    found = crop_pictures(whole, size=0.7)
    assert found.dtype == torch.uint8
    # float32 may round one half to either side.
    assert float((found.double() - crop_pictures(whole.double(), size=0.7)).abs().max()) <= 0.5 + 1e-4


def test_an_intervention(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    edit = Intervention("crop", "crop", pixels[:3], partial(crop_pictures, size=0.5))
    found = measure_interventions(clip, sae, ["a crane", "a duck"], edit, progress=False)
    same = Intervention("crop", "crop", pixels[:3], crop_pictures(pixels[:3], size=0.5))
    again = measure_interventions(clip, sae, ["a crane", "a duck"], same, progress=False)
    assert torch.equal(found.prediction_change, again.prediction_change)
    assert found.prediction_change.abs().max() > 0


def test_wrong_input() -> None:
    pictures = some()
    for settings_, message in [
        ({"size": 0.0}, "size is a fraction"), ({"size": 1.1}, "size is a fraction"), ({"x": -0.1}, "x is a fraction"),
        ({"y": torch.tensor([0.1, 0.2, 0.3])}, "one for each of 2"), ({"x": float("nan")}, "x is a fraction"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            crop_pictures(pictures, **settings_)  # type: ignore[arg-type]
    for wrong in (pictures[0], pictures[:, :2], pictures.long()):
        with pytest.raises(InputError, match="expected pictures"):
            crop_pictures(wrong)


def test_what_is_outside_is_gone() -> None:
    framed = torch.zeros(1, 3, 8, 8)
    framed[:, :, 2:6, 2:6] = 0.5
    assert crop_pictures(framed, size=0.5).unique().tolist() == [0.5]
