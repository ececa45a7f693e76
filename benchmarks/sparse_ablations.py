"""The paper's ablations, on heads of the planted CLIP: `python -m benchmarks.sparse_ablations`.

Width with and without the ReLU, the cap on the factor, L1 and TopK. Section `sparse_ablations`.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.page import table, write_section
from benchmarks.sparse_setup import (
    CAP,
    N_TEST,
    N_TRAIN,
    TRAINING,
    WIDTH,
    accuracy,
    codes_of,
    retrieval,
    row_of,
    setup,
    train,
)

WIDTHS, CAPS, L1, TOPK = (1, 2, 4, 8, 16, 32), (100.0, 50.0, 40.0, 20.0, 10.0), (1e-3, 1e-2, 1e-1), (8, 32, 128)
HEAD = ["heads", "zero-shot", "image to text", "text to image", "L0 of pictures", "of texts", "features in use",
        "Clarity", "bimodal", "by chance", "name is there", "by chance"]  # fmt: skip


def cases() -> dict[str, dict[str, Any]]:
    """Settings of each row by its name."""
    found: dict[str, dict[str, Any]] = {}
    for width in WIDTHS:
        for activation in ("relu", "none"):
            name = f"x{width}, {'ReLU' if activation == 'relu' else 'no ReLU'}"
            found[name] = {"width": width, "activation": activation}
    found |= {f"x{WIDTH}, cap {cap:g}": {"cap": cap} for cap in CAPS if cap != CAP}
    found |= {f"x{WIDTH}, L1 {weight:g}": {"l1": weight} for weight in L1}
    found |= {f"x{WIDTH}, TopK {k}": {"activation": "topk", "k": k} for k in TOPK}
    return found


def shown(name: str, row: dict[str, float]) -> list[str]:
    """A row of the table."""
    cells = [name, *(f"{row[key]:.3f}" for key in ("zero-shot", "i2t", "t2i"))]
    if "clarity" not in row:
        return [*cells, *["all", "all"], *["-"] * 6]
    return [
        *cells, f"{row['L0 image']:.0f}", f"{row['L0 text']:.0f}", f"{100 * row['active']:.0f}%",
        f"{row['clarity']:.3f}",
        *(f"{100 * row[key]:.0f}%" for key in ("bimodal", "bimodal chance", "truth", "truth chance")),
    ]  # fmt: skip


def findings(rows: dict[str, dict[str, float]], dense: dict[str, float]) -> list[str]:
    """What of the paper's findings holds in these rows; each sentence is decided by them."""
    relu = [rows[f"x{w}, ReLU"]["zero-shot"] for w in WIDTHS]
    plain = [rows[f"x{w}, no ReLU"]["zero-shot"] for w in WIDTHS]
    l0 = {cap: rows[f"x{WIDTH}, ReLU" if cap == CAP else f"x{WIDTH}, cap {cap:g}"]["L0 image"] for cap in CAPS}
    falls = all(l0[a] > l0[b] for a, b in pairwise(CAPS))
    l0_of_width = [rows[f"x{w}, ReLU"]["L0 image"] for w in WIDTHS]
    growth = l0_of_width[-1] / l0_of_width[-2]
    penalised = [rows[f"x{WIDTH}, L1 {weight:g}"] for weight in L1]
    best = rows[f"x{WIDTH}, ReLU"]
    return [
        f"- *Width helps only with the ReLU*: {holds(relu[-1] - relu[0] > plain[-1] - plain[0] + 0.01)}. From x1 to "
        f"x{WIDTHS[-1]} zero-shot moves {100 * (relu[-1] - relu[0]):+.1f} points with it and "
        f"{100 * (plain[-1] - plain[0]):+.1f} without.",
        f"- *The ReLU without widening hurts*: {holds(relu[0] < plain[0] - 0.01)}. At x1 it moves zero-shot "
        f"{100 * (relu[0] - plain[0]):+.1f} points.",
        f"- *The number of active features levels off with width*: {holds(growth < 1.5)}. From x{WIDTHS[-2]} to "
        f"x{WIDTHS[-1]} it grows {growth:.2f} times, where the width doubles.",
        f"- *A lower cap leaves fewer features active*: {holds(falls)}. L0 of pictures is "
        + ", ".join(f"{value:.0f} at {cap:g}" for cap, value in l0.items()) + ".",
        f"- *L1 ends with lower accuracy at the sparsity it buys*: "
        f"{holds(all(row['zero-shot'] < best['zero-shot'] for row in penalised))}. Zero-shot "
        + ", ".join(f"{row['zero-shot']:.3f} at L0 {row['L0 image']:.0f}" for row in penalised)
        + f"; the ReLU alone {best['zero-shot']:.3f} at L0 {best['L0 image']:.0f}.",
        f"- The dense model has {dense['zero-shot']:.3f}, {dense['i2t']:.3f} and {dense['t2i']:.3f}.",
    ]  # fmt: skip


def holds(does: bool) -> str:
    """In words."""
    return "holds here" if does else "does not hold here"


def main() -> None:
    """Train what is not trained yet, measure, and write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    arguments = parser.parse_args()
    data = setup(arguments.runs)
    rows: dict[str, dict[str, float]] = {}
    for name, settings in cases().items():
        folder = arguments.runs / "ablations" / name.replace(", ", "_").replace(" ", "-")
        found = train(data, output_dir=folder, **settings)
        rows[name] = row_of(codes_of(found.clip, data), data, sparse=settings.get("activation") != "none")
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    to_text, to_image = retrieval(data.images, data.captions, data.own)
    dense = {"zero-shot": accuracy(data.images, data.prompts, data.labels), "i2t": to_text, "t2i": to_image}
    (arguments.runs / "ablations.json").write_text(json.dumps({"dense": dense, **rows}, indent=1))
    baseline = next(row["clarity baseline"] for row in rows.values() if "clarity baseline" in row)
    write_section("sparse_ablations", "\n".join([
        f"Heads on the embeddings of the planted CLIP, trained on {N_TRAIN:,} pairs for {TRAINING['n_epochs']} epochs "
        f"with the cap {CAP:g} unless said, at which the factor begins; measured on {N_TEST:,} held-out pictures. Clarity of all pairs of pictures: "
        f"{baseline:.3f}. *Name is there*: share of a feature's top pictures that have what its top word names, by the "
        "world's own truth.", "",
        table(HEAD, [["dense embedding", *(f"{value:.3f}" for value in dense.values()), *["-"] * 8],
                     *(shown(name, row) for name, row in rows.items())]),
        "", "What the paper found from scratch and at scale, and whether it holds for these heads:", "",
        *findings(rows, dense),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
