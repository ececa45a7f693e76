"""Shows a planted world: `python -m clip_lens_ext.planted.show --seed 0 --sheet sheet.png --figures`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image

from clip_lens_ext.planted.load import WEIGHTS
from clip_lens_ext.planted.measure import Intervention, PlantedReport, measure_clip
from clip_lens_ext.planted.roles import PlantedClass, PlantedKey
from clip_lens_ext.planted.store import read_clip
from clip_lens_ext.planted.world import PlantedWorld

__all__ = ["class_table", "contact_sheet", "figure_table", "main"]

_GAP = 1


def class_table(world: PlantedWorld) -> str:
    """The classes of a world and what is planted on each, as a Markdown table.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld
        >>> from clip_lens_ext.planted.show import class_table
        >>> print("\\n".join(class_table(PlantedWorld(0)).splitlines()[:4]))
        | label | name in captions | object | category | texture | planted |
        |---|---|---|---|---|---|
        | 0 | bat | star | plant | striped | polysemous: also names the fork |
        | 1 | bat | fork | toy | plain | polysemous: also names the star |
    """
    lines = ["| label | name in captions | object | category | texture | planted |", "|---|---|---|---|---|---|"]
    for entry in world.classes:
        cells = (entry.index, entry.name, entry.object, entry.category, entry.texture, _planted_on(entry, world.key))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _planted_on(entry: PlantedClass, key: PlantedKey) -> str:
    if entry.kind == "polysemous":
        other = next(sense for sense in key.polysemous[entry.name] if sense != entry.object)
        return f"polysemous: also names the {other}"
    if entry.kind == "compound":
        compound = next(compound for compound in key.compounds if compound.phrase == entry.name)
        return f"compound: its {compound.named_part} alone names the {compound.part_object}"
    if entry.kind == "artifact":
        return f"artifact: overlay {key.artifacts[entry.name]}"
    if entry.kind == "spurious":
        return f"spurious: background {key.spurious[entry.name]}"
    parts = {compound.part_object for compound in key.compounds}
    names_part = "nothing; its word is part of a compound" if entry.object in parts else "nothing"
    return {"typographic": "typographic: its name is drawn", "control": "control"}.get(entry.kind, names_part)


def figure_table(report: PlantedReport) -> str:
    """Measured figures as a Markdown table."""
    return "\n".join(
        ["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in _figures(report))]
    )


def _figures(report: PlantedReport) -> Iterator[tuple[str, str]]:
    yield "zero-shot accuracy on held-out pictures, mean over the unambiguous classes", f"{report.unambiguous:.3f}"
    yield "worst unambiguous class", f"{report.worst_class[0]} {report.worst_class[1]:.2f}"
    for kind, accuracy in report.accuracy.items():
        without = report.decorrelated[kind]
        yield f"zero-shot accuracy, {kind}", f"{accuracy:.3f} (test pictures, nothing correlated: {without:.3f})"
    for word, senses in report.senses.items():
        yield f"*{word}* finds", ", ".join(f"{share:.0%} of the {shown}s" for shown, share in senses.items())
    for phrase, cosines in report.compounds.items():
        yield f"cosine of *{phrase}* with", ", ".join(f"{group} {cosine:.2f}" for group, cosine in cosines.items())
    yield "drawn typographic word is the nearest name, on an empty background", f"{report.signs:.3f}"
    groups: tuple[tuple[str, Sequence[Intervention]], ...] = (
        ("typographic word drawn", report.reading),
        ("other word drawn", report.undrawn),
        ("planted overlay", report.artifacts),
        ("other overlay", report.control_overlays),
        ("planted background", report.spurious),
    )
    for what, changes in groups:
        for change in changes:
            figure = f"{change.lift:+.3f} (other prompts {change.elsewhere:+.3f})"
            yield f"{what}: {change.change} on prompt *{change.name}*", figure


def contact_sheet(
    images: UInt8[torch.Tensor, "batch 3 row column"], *, n_columns: int = 10, zoom: int = 2
) -> Image.Image:
    """Pictures side by side, row by row; the last row is filled with white.

    Args:
        images: What to show.
        n_columns: Pictures in a row.
        zoom: Pixels on the sheet per pixel, along each axis.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld
        >>> from clip_lens_ext.planted.show import contact_sheet
        >>> contact_sheet(PlantedWorld(0).sample(5, seed=0).images, n_columns=3, zoom=1).size
        (150, 100)
    """
    n_rows = -(-len(images) // n_columns)
    framed = torch.nn.functional.pad(images, (_GAP,) * 4, value=255)
    height, width = framed.shape[-2:]
    full = framed.new_full((n_rows * n_columns, 3, height, width), 255)
    full[: len(images)] = framed
    grid = full.view(n_rows, n_columns, 3, height, width).permute(0, 3, 1, 4, 2)
    sheet = Image.fromarray(grid.reshape(n_rows * height, n_columns * width, 3).numpy())
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what is planted in a world, draws its pictures, and measures a dual encoder that was trained on it."""
    parser = argparse.ArgumentParser(prog="python -m clip_lens_ext.planted.show", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the world (default 0)")
    parser.add_argument("--sheet", type=Path, help="write training pictures, two of each class, to this PNG")
    parser.add_argument("--figures", action="store_true", help="measure the dual encoder in --weights")
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="folder of clip.safetensors (default: as shipped)"
    )
    parser.add_argument("--per-class", type=int, default=100, help="test pictures of each class (default %(default)s)")
    asked = parser.parse_args(arguments)
    world = PlantedWorld(asked.seed)
    print(class_table(world))
    if asked.sheet is not None:
        labels = [entry.index for entry in world.classes]
        contact_sheet(world.sample(2 * len(labels), seed=0, classes=labels).images).save(asked.sheet)
    if asked.figures:
        clip, tokenizer, _ = read_clip(asked.weights / "clip.safetensors", vocabulary=world.vocabulary)
        print()
        print(figure_table(measure_clip(clip, world, tokenizer, n_per_class=asked.per_class)))


if __name__ == "__main__":
    main()
