"""Steering of the planted Sparse CLIP and of a captioner that reads it: `python -m benchmarks.sparse_steering`.

Sections `sparse_steering` and `sparse_captions`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.sparse_setup import N_TEST, TEMPLATE, WIDTH, Setup, codes_of, setup, train
from clip_lens_ext.sparse_clip import (
    SteeringData,
    caption_steering,
    features_of,
    sparse_captioner,
    steering_effect,
    train_captioner,
)

STRENGTHS, FEATURES, N_CAPTION_STEPS, N_STEERED = (0.5, 1.0, 2.0, 4.0, 8.0), (1, 2, 4, 8), 600, 400


def steering_data(sparse: cle.HookedCLIP, data: Setup, k: int) -> tuple[SteeringData, Tensor]:
    """Held-out pictures of classes whose name is one class alone, and which of all they are."""
    once = [entry.name for entry in data.world.unambiguous_classes]
    names = [name for name in data.names if name in once]
    kept = torch.tensor([data.names[int(label)] in names for label in data.labels]).nonzero().flatten()[:N_STEERED]
    codes = codes_of(sparse, data)
    labels = torch.tensor([names.index(data.names[int(label)]) for label in data.labels[kept]])
    prompts = codes.prompts[torch.tensor([data.names.index(name) for name in names])]
    concepts = features_of(sparse, names, k, template=TEMPLATE)
    return SteeringData(codes.images[kept], labels, concepts, prompts, codes.captions[data.caption_of[kept]]), kept


def span(row: object, name: str, percent: bool = True) -> str:
    """A mean with its interval."""
    mean, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return f"{100 * mean:.0f}% ({100 * low:.0f} to {100 * high:.0f})" if percent else f"{mean:.3f}"


def main() -> None:
    """Train what is not trained yet, steer, and write the sections."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    sparse = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU").clip
    rows, natural = [], {}
    for k in FEATURES:
        given, _ = steering_data(sparse, data, k)
        natural[k] = given.typical_activation
        for row in steering_effect(given, strengths=STRENGTHS, seed=1).to_frame().itertuples():
            if row.arm != "as is" or k == FEATURES[0]:
                strength = "" if row.arm == "as is" else f"{row.strength:g}"
                rows.append(["" if row.arm == "as is" else str(k), strength, row.arm, span(row, "success"),
                             span(row, "kept"), span(row, "retrieval", False), f"{row.harmed:.4f}"])  # fmt: skip
    write_section("sparse_steering", "\n".join([
        f"Up to {N_STEERED} of {N_TEST:,} held-out pictures of classes with a name of their own: the features of the "
        "picture's class to 0, those of another class to the strength, and zero-shot again. The control sets as many random "
        "features of like activation. Median activation of a picture's own features where active: "
        + ", ".join(f"{value:.2f} with {k}" for k, value in natural.items()) + ".", "",
        table(["features", "strength", "", "says the new class", "still the old one", "R@1 of other pictures", "harmed"], rows),
    ]))  # fmt: skip
    native: Any = sparse.native
    tokenizer: Any = data.dense.tokenizer
    with torch.no_grad():
        pairs = data.pairs
        codes = native.image_head(pairs.images)
    captions = [pairs.captions[int(pairs.entries[int(first)])] for first in pairs.first[:-1]]
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=48, n_embd=96, n_layer=2, n_head=4,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    captioner = sparse_captioner(config, tokenizer, d_code=codes.shape[1])
    training = train_captioner(captioner, codes, captions, joint_steps=N_CAPTION_STEPS,
                               checkpoint=runs / "captioner.pt")  # fmt: skip
    rows = []
    for k in FEATURES:
        given, _ = steering_data(sparse, data, k)
        found = caption_steering(captioner, given, longest=training.longest, strengths=STRENGTHS, seed=1)
        for row in found.to_frame().itertuples():
            if row.arm != "as is" or k == FEATURES[0]:
                strength = "" if row.arm == "as is" else f"{row.strength:g}"
                rows.append(["" if row.arm == "as is" else str(k), strength, row.arm,
                             *(span(row, name) for name in ("success", "kept", "corrupted"))])  # fmt: skip
    write_section("sparse_captions", "\n".join([
        f"A causal language model of two layers, from a config, reads the code of a picture through a two-layer adapter and "
        f"was trained to caption: {training!r}. *Success*: the caption names the new subject and not the old one. "
        f"*Corrupted*: it names no subject, is longer than the longest training caption ({training.longest} words), or does "
        "not end.", "",
        table(["features", "strength", "", "success", "kept", "corrupted"], rows),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
