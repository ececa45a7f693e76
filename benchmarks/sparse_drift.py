"""How concepts change while a Sparse CLIP is trained: `python -m benchmarks.sparse_drift`; section `sparse_drift`."""

from __future__ import annotations

import argparse
from pathlib import Path

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.sparse_setup import N_TEST, NOT_JUDGED, WIDTH, codes_of, row_of, setup, train
from clip_lens_ext.planted import normalise
from clip_lens_ext.plots import plot_drift
from clip_lens_ext.sparse_clip import concept_drift, name_concepts

FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def main() -> None:
    """Name the features at every checkpoint of the training, compare, and write table and figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    training = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU")
    words = cle.Vocabulary.from_terms([word for word in data.world.vocabulary if word not in NOT_JUDGED])
    pictures, names, rows = normalise(data.batch.images), {}, []
    for kept in training.checkpoints:
        clip = training.open(kept)
        label = f"{kept.share:.0%}"
        names[label] = name_concepts(clip, words, pictures, texts=data.batch.captions,
                                     checkpoint=runs / f"names_{kept.step}", batch_size=250)  # fmt: skip
        row = row_of(codes_of(clip, data), data)
        rows.append([
            label, f"{row['zero-shot']:.3f}", f"{row['L0 image']:.0f}", f"{row['L0 text']:.0f}",
            *(f"{100 * row[key]:.0f}%" for key in ("bimodal", "bimodal chance", "truth", "truth chance")),
            f"{names[label].mean_agreement:.3f}", f"{names[label].mean_control:.3f}",
            f"{names[label].retrieval_accuracy:.3f}", f"{names[label].retrieval_chance:.3f}",
        ])  # fmt: skip
    drift = concept_drift(names)
    plot_drift(drift).savefig(FIGURES / "sparse_drift.png", dpi=110)
    counts = drift.counts()
    counted = table(["up to", *map(str, counts.columns)], [[str(i), *map(str, row)] for i, row in zip(counts.index, counts.to_numpy().tolist(), strict=True)])
    write_section("sparse_drift", "\n".join([
        f"Checkpoints of one training, on {N_TEST:,} held-out pictures. *Agreement*: mean cosine, by the dense model, of a "
        "feature's top words with its top pictures; the control has the words of other features. *Retrieval*: share of "
        "features whose own words fit its pictures best among those of all.", "",
        table(["training", "zero-shot", "L0 of pictures", "of texts", "bimodal", "by chance", "name is there", "by chance",
               "agreement", "control", "retrieval", "by chance"], rows),
        "", "Events between checkpoints:", "", counted, "", "![drift](figures/sparse_drift.png)",
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
