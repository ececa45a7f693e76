"""The paper's ablations, on heads of the planted CLIP: `python -m benchmarks.sparse_ablations`.

Width with and without the ReLU, the cap on the factor, L1 and TopK. Section `sparse_ablations`; the rows, with what
zero-shot says of each picture, go to `ablations.json` beside the trainings.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from benchmarks.page import table, write_section
from benchmarks.sparse_findings import DECIDED, FAILS, HOLDS, OPEN, Interval, both, over
from benchmarks.sparse_scores import JUDGES, THERE, hits, numbers, retrieval, row_of
from benchmarks.sparse_setup import CAP, N_TEST, N_TRAIN, TRAINING, WIDTH, codes_of, setup, train

WIDTHS, CAPS, L1, TOPK = (1, 2, 4, 8, 16, 32), (100.0, 50.0, 40.0, 20.0, 10.0), (1e-3, 1e-2, 1e-1), (8, 32, 128)
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
EARLY = 0.1  # of the steps: twice the warm-up
BASE = f"x{WIDTH}, ReLU"
COLLAPSED = 1.0  # features of a picture, of which a code needs one at least
LIKE = 2.0  # rows whose L0 is further apart than by this factor are not compared


def cases() -> dict[str, dict[str, Any]]:
    """Settings of each row by its name."""
    found: dict[str, dict[str, Any]] = {}
    for width in WIDTHS:
        for activation in ("relu", "none"):
            name = f"x{width}, {'ReLU' if activation == 'relu' else 'no ReLU'}"
            found[name] = {"width": width, "activation": activation}
    found |= {of_cap(cap): {"cap": cap} for cap in CAPS if cap != CAP}
    found |= {f"x{WIDTH}, L1 {weight:g}": {"l1": weight} for weight in L1}
    found |= {f"x{WIDTH}, TopK {k}": {"activation": "topk", "k": k} for k in TOPK}
    return found


def of_cap(cap: float) -> str:
    """The row of the ReLU with a cap."""
    return BASE if cap == CAP else f"x{WIDTH}, cap {cap:g}"


def early(history: pd.DataFrame) -> dict[str, float]:
    """L0 of the pictures of the batch after `SHARES` of the steps."""
    return {f"L0 at {share:g}": float(history.l0_image.iloc[max(1, round(share * len(history))) - 1])
            for share in SHARES}  # fmt: skip


def head(row: dict[str, Any]) -> list[str]:
    """Of the table; what chance gives to every row alike is in it."""
    return ["heads", "zero-shot", "image to text", "text to image", "L0 of pictures", "of texts", "features in use",
            f"Clarity ({row['clarity baseline']:.3f} by chance)",
            f"same class ({100 * row['same class chance']:.0f}% by chance)",
            "bimodal", "by chance", "name is there", "by chance"]  # fmt: skip


def shown(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    cells = [name, over(row["hits"]).number, *(f"{row[key]:.3f}" for key in ("i2t", "t2i"))]
    if "clarity" not in row:
        return [*cells, *["all" if name != "dense embedding" else "-"] * 2, *["-"] * 7]
    return [
        *cells, f"{row['L0 image']:.0f}", f"{row['L0 text']:.0f}", f"{100 * row['active']:.0f}%",
        f"{row['clarity']:.3f}",
        *(f"{100 * row[key]:.0f}%" for key in ("same class", "bimodal", "bimodal chance", "truth", "truth chance")),
    ]  # fmt: skip


def findings(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What of the paper's findings holds in these rows; each sentence is decided by them."""
    return [*of_width(rows), *of_caps(rows), *of_penalties(rows)]


def of_width(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Width, with and without the ReLU."""
    relu, plain = (lambda width, kind=kind: rows[f"x{width}, {kind}"]["hits"] for kind in ("ReLU", "no ReLU"))
    first, last = WIDTHS[0], WIDTHS[-1]
    with_it, without = gain(relu(last), relu(first)), gain(plain(last), plain(first))
    narrow = gain(relu(first), plain(first))
    l0 = [rows[f"x{width}, ReLU"]["L0s"].double() for width in WIDTHS]
    levels = over(l0[-1] - 1.1 * l0[-2])
    return [
        f"- *Width helps only with the ReLU* (zero-shot rises with it, and by less than a point without): "
        f"{both(with_it.above(), without.below(0.01))}. From x{first} to x{last} it moves {with_it.points} with the "
        f"ReLU and {without.points} without.",
        f"- *The ReLU without widening hurts*: {narrow.below()}. At x{first} it moves zero-shot {narrow.points}.",
        f"- *The number of active features levels off with width* (the last doubling adds less than a tenth): "
        f"{levels.below()}. L0 of pictures is "
        + ", ".join(f"{float(one.mean()):.0f} at x{width}" for width, one in zip(WIDTHS, l0, strict=True))
        + ". Without the ReLU all features are active.",
    ]  # fmt: skip


def of_caps(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The cap on the factor."""
    l0 = {cap: rows[of_cap(cap)]["L0s"].double() for cap in CAPS}
    falls = both(*(over(l0[high] - l0[low]).above() for high, low in pairwise(CAPS)))
    lost = gain(rows[of_cap(20.0)]["hits"], rows[of_cap(50.0)]["hits"])
    return [
        f"- *A lower cap leaves fewer features active*, at every step: {falls}. L0 of pictures is "
        + ", ".join(f"{float(value.mean()):.0f} at {cap:g}" for cap, value in l0.items()) + ".",
        f"- *Accuracy drops at a cap of 20* (beside 50): {lost.below()}. Zero-shot moves {lost.points}.",
    ]  # fmt: skip


def of_penalties(rows: dict[str, dict[str, Any]]) -> list[str]:
    """L1 and TopK beside the ReLU with the cap whose L0 is nearest, and how early they are sparse."""
    relu = {of_cap(cap): rows[of_cap(cap)] for cap in CAPS}
    wanted = [f"x{WIDTH}, L1 {weight:g}" for weight in L1] + [f"x{WIDTH}, TopK {k}" for k in TOPK]
    collapsed = [name for name in wanted if rows[name]["L0 image"] < COLLAPSED]
    kept = [name for name in wanted if name not in collapsed]
    verdicts, said = [], []
    for name in kept:
        row, nearest = rows[name], nearest_l0(rows[name], relu)
        l0 = row["L0 image"], relu[nearest]["L0 image"]
        beside = f"{short(name)} (L0 {l0[0]:.0f}) beside {short(nearest)} (L0 {l0[1]:.0f})"
        change = gain(row["hits"], relu[nearest]["hits"])
        if abs(math.log(l0[0] / l0[1])) <= math.log(LIKE):
            verdicts.append(change.below())
            said.append(f"{beside} {change.points}")
        else:
            said.append(f"{beside} {change.points}, not counted: the L0 differ by more than {LIKE:g} times")
    crushed = [name for name in kept if rows[name][f"L0 at {EARLY:g}"] < rows[BASE][f"L0 at {EARLY:g}"] / 2]
    found = [
        "- *L1 and TopK end with lower accuracy than the ReLU* at the L0 that is nearest: " + agreed(verdicts)
        + ". Zero-shot: " + "; ".join(said) + ".",
        f"- *L1 and TopK crush L0 early, and the ReLU does not* (after {EARLY:.0%} of the steps L0 is below half of "
        f"the ReLU's): {share_of(len(crushed), len(kept))}. L0 of the batch after "
        + ", ".join(f"{share:.0%}" for share in SHARES) + " of the steps: "
        + "; ".join(f"{short(name)} {', '.join(f'{rows[name][key]:.0f}' for key in steps())}" for name in [BASE, *kept])
        + ". TopK has no choice: k is the most that it lets through, from the first step on.",
    ]  # fmt: skip
    if collapsed:
        found.append(f"- {', '.join(map(short, collapsed))} collapsed: less than one feature of a picture is left, so "
                     "these rows are in no comparison.")  # fmt: skip
    return found


def nearest_l0(row: dict[str, Any], among: dict[str, dict[str, Any]]) -> str:
    """The row whose L0 is nearest, as a ratio."""
    return min(among, key=lambda name: abs(math.log(among[name]["L0 image"] / row["L0 image"])))


def gain(one: Tensor, other: Tensor) -> Interval:
    """Zero-shot of one code less that of another, on the same pictures."""
    return over(one.double() - other.double())


def agreed(verdicts: list[str]) -> str:
    """Of several rows: what all say, or how many say what."""
    if not verdicts:
        return f"{OPEN}, for no row has an L0 like theirs"
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return ", ".join(f"{word} for {verdicts.count(word)}" for word in (HOLDS, FAILS, OPEN) if word in verdicts)


def share_of(n: int, of: int) -> str:
    """Of counts that have no interval: a verdict where all agree, or how many."""
    return OPEN if not of else HOLDS if n == of else FAILS if n == 0 else f"holds for {n} of {of}"


def short(name: str) -> str:
    """Without the width that all of them have."""
    return name.removeprefix(f"x{WIDTH}, ")


def steps() -> list[str]:
    """The keys of `early`."""
    return [f"L0 at {share:g}" for share in SHARES]


def kept_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, with what each picture has."""
    lists = {name: row[name].int().tolist() for name in ("hits", "L0s") if name in row}
    return {**numbers(row), **lists}


def main() -> None:
    """Train what is not trained yet, measure, and write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    rows: dict[str, dict[str, Any]] = {}
    for name, settings in cases().items():
        found = train(data, output_dir=runs / "ablations" / name.replace(", ", "_").replace(" ", "-"), **settings)
        sparse = settings.get("activation") != "none"
        rows[name] = row_of(codes_of(found.clip, data), data, sparse=sparse) | (early(found.history) if sparse else {})
        print(name, {key: round(value, 3) for key, value in numbers(rows[name]).items()}, flush=True)
    to_text, to_image = retrieval(data.images, data.captions, data.own)
    right = hits(data.images, data.prompts, data.labels)
    dense = {"zero-shot": float(right.double().mean()), "i2t": to_text, "t2i": to_image, "hits": right}
    (runs / "ablations.json").write_text(
        json.dumps({name: kept_row(row) for name, row in {"dense": dense, **rows}.items()}, indent=1)
    )
    write_section("sparse_ablations", page(rows, dense))


def page(rows: dict[str, dict[str, Any]], dense: dict[str, Any]) -> str:
    """The section."""
    base = rows[BASE]
    return "\n".join([
        f"Heads on the embeddings of the planted CLIP, trained on {N_TRAIN:,} pairs for {TRAINING['n_epochs']} epochs "
        f"with the cap {CAP:g} unless said, at which the factor begins; measured on {N_TEST:,} held-out pictures. "
        "In brackets the 95% interval of the bootstrap over pictures.", "",
        table(head(base), [shown("dense embedding", dense), *(shown(name, row) for name, row in rows.items())]),
        "", JUDGES, "",
        f"{THERE} Were drawn words to count as well, {100 * base['truth or drawn']:.0f}% instead of "
        f"{100 * base['truth']:.0f}% at {BASE} ({100 * base['truth or drawn chance']:.0f}% by chance).", "",
        f"{DECIDED} The paper trains towers and heads, at scale; here it is heads alone.", "",
        *findings(rows),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
