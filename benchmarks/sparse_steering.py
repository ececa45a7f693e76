"""Steering of the planted Sparse CLIP and of a captioner that reads it: `python -m benchmarks.sparse_steering`.

Sections `sparse_steering` and `sparse_captions`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import GPT2Config

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.sparse_findings import FAILS, HOLDS, OPEN, Interval, counted, over
from benchmarks.sparse_setup import N_TEST, TEMPLATE, WIDTH, Setup, codes_of, setup, train
from clip_lens_ext.sparse_clip import (
    CaptionSteering,
    SteeringData,
    caption_steering,
    features_of,
    sparse_captioner,
    steering_effect,
    train_captioner,
)

STRENGTHS, FEATURES, N_CAPTION_STEPS, N_STEERED = (0.5, 1.0, 2.0, 4.0, 8.0), (1, 2, 4, 8), 600, 400
RECOMMENDED = (2, 2.0)  # by the paper: two features at strength 2.0
STEERS = 0.5  # share of the pictures from which on a setting steers
SHOWN = {"success": "says the new class", "kept": "still the old one", "own_caption": "nearest caption its own",
         "new_caption": "one of the new class"}  # fmt: skip
SAID = {"success": "success", "kept": "kept", "corrupted": "corrupted"}


def steered_pictures(data: Setup) -> tuple[list[str], Tensor, Tensor]:
    """Names of the classes whose name is one object alone; held-out pictures of these, and the name of each."""
    once = [entry.name for entry in data.world.unambiguous_classes]
    names = [name for name in data.names if name in once]
    kept = torch.tensor([data.names[int(label)] in names for label in data.labels]).nonzero().flatten()[:N_STEERED]
    return names, kept, torch.tensor([names.index(data.names[int(label)]) for label in data.labels[kept]])


def steering_data(sparse: cle.HookedCLIP, data: Setup, k: int) -> SteeringData:
    """Those pictures in the code of a Sparse CLIP, with the `k` features of each class."""
    names, kept, labels = steered_pictures(data)
    codes = codes_of(sparse, data)
    prompts = codes.prompts[torch.tensor([data.names.index(name) for name in names])]
    concepts = features_of(sparse, names, k, template=TEMPLATE)
    return SteeringData(codes.images[kept], labels, concepts, prompts, codes.captions[data.caption_of[kept]])


def measured(row: Any, name: str) -> Interval:
    """A mean of a frame's row with its interval."""
    return Interval(*(float(row[f"{name}{end}"]) for end in ("", "_low", "_high")))


def rows_of(frames: dict[int, pd.DataFrame], columns: dict[str, str], *, number: str = "") -> list[list[str]]:
    """Rows of a table: pictures as they are once, then each number of features and strength; `number` is no share."""
    rows = []
    for k, frame in frames.items():
        for _, row in frame.iterrows():
            as_is = row.arm == "as is"
            if as_is and k != FEATURES[0]:
                continue
            cells = [measured(row, name).percent for name in columns]
            rows.append(["" if as_is else str(k), "" if as_is else f"{row.strength:g}", row.arm, *cells,
                         *([f"{row[number]:.3f}"] if number else [])])  # fmt: skip
    return rows


def at(frames: dict[int, pd.DataFrame], k: int, strength: float, arm: str, name: str) -> Interval:
    """One measure of one setting."""
    frame = frames[k]
    return measured(frame[(frame.strength == strength) & (frame.arm == arm)].iloc[0], name)


def count(k: int) -> str:
    """So many features."""
    return f"{k} feature{'s' if k > 1 else ''}"


def findings(frames: dict[int, pd.DataFrame], typical: dict[int, float]) -> list[str]:
    """Whether the setting that the paper recommends steers, and which do; decided by the rows."""
    k, strength = RECOMMENDED
    success, control = (at(frames, k, strength, arm, "success") for arm in ("concept", "control"))
    more = at(frames, k, strength, "concept", "success_over_control")
    found = [f"- *Two features at strength {strength:g} steer* (the new class on more than {STEERS:.0%} of the "
             f"pictures; {strength / typical[k]:.1f} times the median activation here): {success.above(STEERS)}. "
             f"{success.percent} are given the new class, and {control.percent} by the control; more than by "
             f"the control: {more.above()}."]  # fmt: skip
    steer = []
    for k in frames:
        strong = [s for s in STRENGTHS if at(frames, k, s, "concept", "success").above(STEERS) == HOLDS]
        steer += [(k, min(strong))] if strong else []
    if not steer:
        return [*found, f"- No setting of the table steers more than {STEERS:.0%} of the pictures."]
    return [*found, f"- What does: the least strength that steers more than {STEERS:.0%} is "
            + ", ".join(f"{strength:g} with {count(k)} ({at(frames, k, strength, 'concept', 'success').percent})"
                        for k, strength in steer)
            + "".join(f"; none of the table with {count(k)}" for k in frames if k not in dict(steer)) + "."]  # fmt: skip


def caption_findings(found: dict[int, CaptionSteering], frames: dict[int, pd.DataFrame]) -> list[str]:
    """Whether steering changes the subject, and whether captions break by the strength or by the concept."""
    k, strength = RECOMMENDED
    success, corrupted = (at(frames, k, strength, "concept", name) for name in ("success", "corrupted"))
    best = max(((k, s) for k in frames for s in STRENGTHS), key=lambda one: at(frames, *one, "concept", "success").mean)
    broken, above, said = [], [], []
    for k_now, steering in found.items():
        before = steering.judged_before[2].double()
        for number, now in enumerate(steering.strengths):
            concept, control = steering.corrupted[number, 0].double(), steering.corrupted[number, 1:].double().mean(0)
            if over(concept - before).above() == HOLDS:
                broken.append((k_now, now))
                above.append(over(concept - control).above())
                shares = [f"{100 * float(values.mean()):.0f}%" for values in (concept, control)]
                said.append(f"{' and '.join(shares)} with {count(k_now)} at {now:g}")
    more, less, same = counted(above)
    verdict = OPEN if not broken else HOLDS if not more else FAILS if more == len(broken) else "holds in some of them"
    return [
        f"- *Two features at strength {strength:g} change the subject* (of more than {STEERS:.0%} of the captions): "
        f"{success.above(STEERS)}. Success {success.percent}, corrupted {corrupted.percent}.",
        f"- The greatest success, with {count(best[0])} at {best[1]:g}: "
        + ", ".join(f"{arm} {at(frames, *best, arm, 'success').percent} and "
                    f"{at(frames, *best, arm, 'corrupted').percent} corrupted" for arm in ("concept", "control")) + ".",
        f"- *Captions break by the strength, not by the concept* (where steering corrupts more captions than are as "
        "they stand, the concept is in no setting shown to corrupt more than the control does at the same strength): "
        f"{verdict}. Such settings are {len(broken)} of {len(found) * len(STRENGTHS)}: the concept corrupts more than "
        f"the control in {more}, fewer in {less}, and is not told apart in {same}."
        + (f" Concept and control: {'; '.join(said)}." if said else ""),
    ]  # fmt: skip


def main() -> None:
    """Train what is not trained yet, steer, and write the sections."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    sparse = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU").clip
    given = {k: steering_data(sparse, data, k) for k in FEATURES}
    typical = {k: one.typical_activation for k, one in given.items()}
    frames = {k: steering_effect(one, strengths=STRENGTHS, seed=1).to_frame() for k, one in given.items()}
    write_section("sparse_steering", page(frames, typical))
    native: Any = sparse.native
    tokenizer: Any = data.dense.tokenizer
    pairs = data.pairs
    with torch.no_grad():
        codes = native.image_head(pairs.images)
    captions = [pairs.captions[int(pairs.entries[int(first)])] for first in pairs.first[:-1]]
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=48, n_embd=96, n_layer=2, n_head=4,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    captioner = sparse_captioner(config, tokenizer, d_code=codes.shape[1])
    training = train_captioner(captioner, codes, captions, joint_steps=N_CAPTION_STEPS,
                               checkpoint=runs / "captioner.pt")  # fmt: skip
    said = {k: caption_steering(captioner, one, longest=training.longest, strengths=STRENGTHS, seed=1)
            for k, one in given.items()}  # fmt: skip
    write_section("sparse_captions", captions_page(said, repr(training), training.longest))


def page(frames: dict[int, pd.DataFrame], typical: dict[int, float]) -> str:
    """The section of zero-shot and retrieval."""
    return "\n".join([
        f"Up to {N_STEERED} of {N_TEST:,} held-out pictures of classes with a name of their own: the features of the "
        "picture's class to 0, those of another class to the strength, and zero-shot and retrieval again. The control "
        "sets as many random features of like activation. *Nearest caption*: of those of all these pictures, the one "
        "that is nearest to the steered one; a caption that is equal to its own is its own. R@1 is of the *other* "
        "pictures' captions, with this one steered. Median activation of a picture's own features where active: "
        + ", ".join(f"{value:.2f} with {k}" for k, value in typical.items()) + ".", "",
        table(["features", "strength", "", *SHOWN.values(), "R@1 of other pictures"],
              rows_of(frames, SHOWN, number="retrieval")),
        "", "By the rows, and their 95% intervals:", "", *findings(frames, typical),
    ])  # fmt: skip


def captions_page(said: dict[int, CaptionSteering], training: str, longest: int) -> str:
    """The section of the captioner."""
    frames = {k: one.to_frame() for k, one in said.items()}
    return "\n".join([
        "A causal language model of two layers, from a config, reads the code of a picture through a two-layer adapter "
        f"and was trained to caption: {training}. *Success*: the caption names the new subject and not the old one. "
        f"*Corrupted*: it names no subject, is longer than the longest training caption ({longest} words), or does not "
        "end. The control steers as many random features of like activation at the same strength: what it corrupts, "
        "the strength corrupts.", "",
        table(["features", "strength", "", *SAID.values()], rows_of(frames, SAID)),
        "", "By the rows, and their 95% intervals:", "", *caption_findings(said, frames),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
