"""The printed table and the contact sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_lens_ext.planted import PlantedWorld
from clip_lens_ext.planted.show import class_table, contact_sheet, main


def test_table_has_a_row_for_every_class_and_names_every_plant() -> None:
    world = PlantedWorld(3)
    rows = class_table(world).splitlines()[2:]
    assert len(rows) == len(world.classes)
    for entry, row in zip(world.classes, rows, strict=True):
        assert row.startswith(f"| {entry.index} | {entry.name} | {entry.object} |")
    table = "\n".join(rows)
    for planted in (*world.key.artifacts.values(), *world.key.spurious.values()):
        assert planted in table
    assert table.count("polysemous: also names") == 8
    assert table.count("alone names the") == 3


def test_sheet_holds_the_pictures_in_reading_order() -> None:
    images = PlantedWorld(0).sample(5, seed=0).images
    sheet = torch.from_numpy(np.array(contact_sheet(images, n_columns=3, zoom=2))).permute(2, 0, 1)
    assert sheet.shape == (3, 200, 300)
    for index, image in enumerate(images):
        top, left = 100 * (index // 3) + 2, 100 * (index % 3) + 2
        assert torch.equal(sheet[:, top : top + 96 : 2, left : left + 96 : 2], image)
    assert (sheet[:, 100:, 200:] == 255).all()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seed", "4", "--sheet", str(tmp_path / "sheet.png")])
    assert capsys.readouterr().out.strip() == class_table(PlantedWorld(4))
    assert Image.open(tmp_path / "sheet.png").size == (1000, 600)
