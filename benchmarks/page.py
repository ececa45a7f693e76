"""docs/results.md: every section between its markers is written by the command that it names, never by hand."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between the markers of one section; a page without them is an error.

    Args:
        name: the section's name in its markers, `<!-- begin NAME -->` and `<!-- end NAME -->`.
        text: Markdown.
        page: the file.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before = page.read_text()
    if before.count(begin) != 1 or before.count(end) != 1:
        raise ValueError(f"{page} has no section {name!r}: it needs the lines {begin} and {end}")
    head, rest = before.split(begin)
    tail = rest.split(end)[1]
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}")
    print(f"wrote the section {name!r} of {page}")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
