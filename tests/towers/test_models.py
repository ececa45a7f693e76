"""Every model config of open_clip, built on torch's meta device, is read by a family, and docs/models.md says which."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import open_clip
import pytest

from benchmarks.models import coverage

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_every_model_of_open_clip() -> None:
    # Other tests add configs of their own to open_clip.list_models().
    models = sorted(path.stem for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
    rows = list(coverage(models, progress=False))
    assert len(rows) == 2 * len(models) > 250
    fetched = [row for row in rows if row.native.startswith("HFTextEncoder")]
    unread = [(row.model, row.tower, row.why_not) for row in rows if row.cfg is None and row not in fetched]
    assert not unread
    hooks = Counter((row.tower, row.cfg.hooks) for row in rows if row.cfg is not None)
    page = PAGE.read_text(encoding="utf-8")
    if f"open_clip {open_clip.__version__}," not in page:
        pytest.skip(f"docs/models.md is of another open_clip than {open_clip.__version__}: run make models")
    listed: Counter[tuple[str, str]] = Counter()
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ("vision", "text") and len(cells) == 6:
            names = [name.strip(" `") for name in cells[5].split(",")]
            assert len(names) == int(cells[4])
            assert set(names) <= set(models)
            if cells[1] != "HFTextEncoder":
                listed[cells[0], "full" if cells[2] == "every hook" else "residual"] += len(names)
    assert listed == hooks
