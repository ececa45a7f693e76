"""The conventions of every SAE format, from the registry, into docs/sae_formats.md: `python -m benchmarks.sae_formats`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.page import write_section
from clip_lens_ext.saes.formats import formats

PAGE = Path(__file__).parent.parent / "docs" / "sae_formats.md"


def section() -> str:
    """Name, layout and function of each format, as its own file says them."""
    parts = [f"{len(formats)} formats: {', '.join(f'`{name}`' for name in formats)}."]
    for name, family in formats.items():
        parts.append(f"### `{name}`\n\n{(family.__doc__ or '').strip()}")
    return "\n\n".join(parts)


def main() -> None:
    """Write the section."""
    write_section("formats", section(), PAGE)


if __name__ == "__main__":
    main()
