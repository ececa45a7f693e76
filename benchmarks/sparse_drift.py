"""How concepts change while a Sparse CLIP is trained: `python -m benchmarks.sparse_drift`; section `sparse_drift`."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.sparse_findings import DECIDED, FAILS, HOLDS, between, both, over
from benchmarks.sparse_scores import JUDGES, THERE, row_of
from benchmarks.sparse_setup import N_TEST, NOT_JUDGED, WIDTH, codes_of, setup, train
from clip_lens_ext.planted import normalise
from clip_lens_ext.plots import plot_drift
from clip_lens_ext.sparse_clip import ConceptDrift, ConceptNames, concept_drift, name_concepts

FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def head(row: dict[str, Any]) -> list[str]:
    """Of the table; what chance gives to every row alike is in it."""
    return ["training", "zero-shot", "L0 of pictures", "of texts", "density",
            f"Clarity ({row['clarity baseline']:.3f} by chance)",
            f"same class ({100 * row['same class chance']:.0f}% by chance)", "bimodal", "by chance", "name is there",
            "by chance", "agreement", "control", "retrieval", "by chance"]  # fmt: skip


def cells(label: str, row: dict[str, Any], names: ConceptNames) -> list[str]:
    """A row of the table."""
    return [
        label, over(row["hits"]).number, f"{row['L0 image']:.0f}", f"{row['L0 text']:.0f}", f"{row['density']:.3f}",
        f"{row['clarity']:.3f}",
        *(f"{100 * row[key]:.0f}%" for key in ("same class", "bimodal", "bimodal chance", "truth", "truth chance")),
        f"{names.mean_agreement:.3f}", f"{names.mean_control:.3f}",
        f"{names.retrieval_accuracy:.4f}", f"{names.retrieval_chance:.4f}",
    ]  # fmt: skip


def findings(rows: dict[str, dict[str, Any]], drift: ConceptDrift) -> list[str]:
    """What of the paper's findings holds at these checkpoints; each sentence is decided by them."""
    labels = list(rows)
    first, last = rows[labels[0]], rows[labels[-1]]
    falls = both(*(over((rows[a]["L0s"] - rows[b]["L0s"]).double()).above() for a, b in pairwise(labels)))
    denser = between(first["densities"], last["densities"])
    rises = over(last["bimodals"] - first["bimodals"])
    switches = [event for event in drift.events if event.kind == "switch"]
    counts = drift.counts()["switch"]
    return [
        f"- *The ReLU sparsifies gradually*, from each checkpoint to the next: {falls}. L0 of pictures is "
        + ", ".join(f"{row['L0 image']:.0f} at {label}" for label, row in rows.items()) + ".",
        f"- *Densities are higher at first*: {denser.above()}. The mean over the features in use is "
        f"{first['density'] / last['density']:.1f} times as great at {labels[0]} as at {labels[-1]}; in the paper "
        "about ten.",
        f"- *At {labels[0]} the modality already resembles the final one* (bimodal features within 5 points): "
        f"{both(rises.below(0.05), rises.above(-0.05))}. The share moves {rises.points} until {labels[-1]}, of "
        f"features with a modality at both. Above chance it is {lift(first)} points at {labels[0]} "
        f"and {lift(last)} at {labels[-1]}.",
        f"- *Modality rises towards bimodal*: {rises.above()}.",
        f"- *Some concepts switch*: {HOLDS if switches else FAILS}. {len({event.feature for event in switches})} of "
        f"{drift.d_code} features take another first word and other pictures, "
        + ", ".join(f"{n} up to {label}" for label, n in counts.items() if n) + ".",
    ]  # fmt: skip


def lift(row: dict[str, Any]) -> str:
    """Bimodal features above chance, in points."""
    return f"{100 * (row['bimodal'] - row['bimodal chance']):+.1f}"


def main() -> None:
    """Name the features at every checkpoint of the training, compare, and write table and figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    training = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU")
    words = cle.Vocabulary.from_terms([word for word in data.world.vocabulary if word not in NOT_JUDGED])
    pictures = normalise(data.batch.images)
    names: dict[str, ConceptNames] = {}
    rows: dict[str, dict[str, Any]] = {}
    for kept in training.checkpoints:
        clip = training.open(kept)
        label = f"{kept.share:.0%}"
        names[label] = name_concepts(clip, words, pictures, texts=data.batch.captions,
                                     checkpoint=runs / f"names_{kept.step}", batch_size=250)  # fmt: skip
        rows[label] = row_of(codes_of(clip, data), data)
    drift = concept_drift(names)
    plot_drift(drift).savefig(FIGURES / "sparse_drift.png", dpi=110)
    write_section("sparse_drift", page(rows, names, drift))


def page(rows: dict[str, dict[str, Any]], names: dict[str, ConceptNames], drift: ConceptDrift) -> str:
    """The section."""
    counts = drift.counts()
    events = [[str(label), *map(str, row)] for label, row in zip(counts.index, counts.to_numpy().tolist(), strict=True)]
    first = next(iter(rows.values()))
    return "\n".join([
        f"Checkpoints of one training, on {N_TEST:,} held-out pictures. *Density*: mean of (E_img + E_txt) / 2 over "
        "the features in use, the paper's quantity. *Agreement*: mean cosine, by the dense model, of a feature's top "
        "words with its top pictures; the control has the words of other features. *Retrieval*: share of features "
        "whose own words fit its pictures best among those of all; ties are shared.", "",
        table(head(first), [cells(label, row, names[label]) for label, row in rows.items()]),
        "", JUDGES, "", THERE, "",
        "Events between checkpoints:", "", table(["up to", *map(str, counts.columns)], events), "",
        f"{DECIDED} Intervals of modality and density are over features, that of L0 over pictures.", "",
        *findings(rows, drift), "", "![drift](figures/sparse_drift.png)",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
