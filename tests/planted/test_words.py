"""Drawn words can be read back from the pixels at their box."""

from __future__ import annotations

import pytest
import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import PlantedWorld
from clip_lens_ext.planted.font import word_mask

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def read(picture: torch.Tensor, box: torch.Tensor) -> str:
    """Reads a plate: cells of 2 x 2 pixels, letters of 3 x 5 cells, one cell between letters, one pixel around."""
    left, top, right, bottom = box.tolist()
    plate = picture[:, top:bottom, left:right].float().mean(dim=0)
    ink = (plate - plate[0, 0]).abs()[1:-1, 1:-1] > 100
    cells = ink[::2, ::2]
    assert torch.equal(cells.repeat_interleave(2, 0).repeat_interleave(2, 1), ink)
    glyphs = {letter: torch.from_numpy(word_mask(letter, scale=1)) for letter in ALPHABET}
    letters = [cells[:, start : start + 3] for start in range(0, cells.shape[1], 4)]
    return "".join(next(letter for letter, glyph in glyphs.items() if torch.equal(glyph, found)) for found in letters)


def test_letters_differ() -> None:
    assert len({word_mask(letter).tobytes() for letter in ALPHABET}) == 26


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_words_can_be_read(seed: int) -> None:
    world = PlantedWorld(seed)
    batch = world.sample(400, seed=8, overlay=None)
    drawn = [i for i, word in enumerate(batch.words) if word]
    assert len(drawn) > 30
    assert len({batch.words[i] for i in drawn}) == 5
    assert all(read(batch.images[i], batch.word_boxes[i]) == batch.words[i] for i in drawn)
    without = [i for i, word in enumerate(batch.words) if not word]
    assert (batch.word_boxes[without] == -1).all()


@pytest.mark.parametrize("overlay", ["corners", "film", "frame"])
def test_borders_leave_words_readable(overlay: str) -> None:
    batch = PlantedWorld(0).sample(100, seed=8, overlay=overlay, word="heart")
    readable = [read(picture, box) == "heart" for picture, box in zip(batch.images, batch.word_boxes, strict=True)]
    assert all(readable) or overlay == "corners"
    assert sum(readable) > 40


def test_any_word_can_be_forced_or_forbidden() -> None:
    world = PlantedWorld(0)
    forced = world.sample(20, seed=8, split="test", word="zebra")
    assert forced.words == ["zebra"] * 20
    forbidden = world.sample(200, seed=8, word=None)
    assert set(forbidden.words) == {None}
    assert "sign" not in " ".join(forbidden.captions).split()


def test_draw_word_changes_the_plate_alone() -> None:
    world = PlantedWorld(0)
    plain = world.backdrops(3, seed=1)
    for x, y, dark in ((0, 0, True), (1, 1, False), (0.5, 0.25, True)):
        written = world.draw_word(plain, "kite", x=x, y=y, dark=dark)
        rows, columns = (written != plain).any(dim=1).any(dim=0).nonzero().T
        box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert box[2] - box[0] == 32
        assert box[3] - box[1] == 12
        assert [read(picture, box) for picture in written] == ["kite"] * 3
    assert torch.equal(plain, world.backdrops(3, seed=1))


def test_wrong_words() -> None:
    pictures = PlantedWorld(0).backdrops(2, seed=1)
    for wrong in ("", "toolong", "a b", "é"):
        with pytest.raises(InputError, match="cannot draw"):
            PlantedWorld(0).draw_word(pictures, wrong)
