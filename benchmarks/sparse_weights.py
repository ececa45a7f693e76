"""The heads that ship with the planted CLIP: `python -m benchmarks.sparse_weights` trains and writes them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.sparse_scores import numbers, row_of
from benchmarks.sparse_setup import CAP, N_TRAIN, TRAINING, codes_of, setup, train
from clip_lens_ext.planted.load import SPARSE, WEIGHTS
from clip_lens_ext.planted.store import write_manifest
from clip_lens_ext.sparse_clip import load_sparse_clip, save_sparse_clip
from clip_lens_ext.towers import from_sparse

WIDTH = 8  # half a megabyte


def main() -> None:
    """Train, round to half precision, measure what is on disk, and write it with the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    found = train(data, width=WIDTH, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU")
    about = {"n_pairs": N_TRAIN, "largest_logit_scale": CAP, **TRAINING}
    folder, file = WEIGHTS / SPARSE, WEIGHTS / SPARSE / from_sparse.WEIGHTS
    save_sparse_clip(found.clip, folder, towers=False, training=about)
    half = {name: value.to(torch.float16) for name, value in load_file(file).items()}
    save_file(half, file)
    stored = load_sparse_clip(folder, data.dense)
    figures = numbers(row_of(codes_of(stored, data), data))
    save_sparse_clip(stored, folder, towers=False, training={**about, "figures": figures})
    save_file(half, file)
    write_manifest(WEIGHTS)
    print({name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    main()
