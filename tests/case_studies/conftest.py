"""The case study is a folder of scripts: its modules are found where the command finds them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "case-studies" / "skin_lesions"))
