"""Teaching a captioner what codes say: pairs of codes and captions, in two stages, resumed to the last bit."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint, module_sha256, versions
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.sparse_clip.caption_run import Pairs, Run
from clip_lens_ext.sparse_clip.captioner import SparseCaptioner
from clip_lens_ext.sparse_clip.checks import below_float32, checked_count


@dataclass(frozen=True, eq=False)
class CaptionTraining:
    """How a captioner was trained.

    Attributes:
        loss: of each step's batch, nats a token, `[step]`.
        stage: 0 where the adapter alone was trained, 1 where all was, `[step]`.
        held_out_loss: on the pairs that were held out, `[evaluation]`.
        held_out_step: after how many steps, `[evaluation]`.
        n_train, n_held_out: pairs.
        longest: tokens of the longest training caption, without its end: what is longer was never seen.
        settings: as asked for.
        provenance: hashes of what went in, and versions.
    """

    loss: Tensor
    stage: Tensor
    held_out_loss: Tensor
    held_out_step: Tensor
    n_train: int
    n_held_out: int
    longest: int
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """A row for each step; `held_out_loss` is NaN where nothing was measured."""
        frame = pd.DataFrame({"step": range(1, len(self.loss) + 1), "stage": self.stage.numpy(),
                              "loss": self.loss.numpy()})  # fmt: skip
        measured = dict(zip(self.held_out_step.tolist(), self.held_out_loss.tolist(), strict=True))
        frame["held_out_loss"] = [measured.get(step, float("nan")) for step in frame.step]
        return frame

    def __repr__(self) -> str:
        held = f", held out {float(self.held_out_loss[-1]):.3f}" if len(self.held_out_loss) else ""
        return f"CaptionTraining({len(self.loss)} steps on {self.n_train} pairs, loss {float(self.loss[-1]):.3f}{held})"

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> CaptionTraining:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=lambda found: found.loss.shape == found.stage.shape)


def train_captioner(
    captioner: SparseCaptioner,
    codes: Tensor,
    captions: Sequence[str],
    *,
    adapter_steps: int = 0,
    joint_steps: int = 1000,
    adapter_lr: float = 1e-3,
    joint_lr: float = 1e-3,
    batch_size: int = 64,
    weight_decay: float = 0.01,
    held_out: float = 0.1,
    evaluate_every: int = 200,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 200,
    stop_after: int | None = None,
    progress: bool = True,
) -> CaptionTraining:
    """Train a captioner in place, to say the caption of each code; AdamW, warm-up and a cosine in each stage.

    Stage 1 trains the adapter alone, with the language model frozen; stage 2 trains both. The paper does both with a
    pretrained language model. One that starts from a config knows no words yet: leave stage 1 out.

    Args:
        captioner: made by `sparse_captioner`; in evaluation mode afterwards.
        codes: of pictures, un-normalised and not steered, `[sample d_code]`; the CLIP itself is not trained.
        captions: one for each.
        adapter_steps, joint_steps: of the two stages.
        adapter_lr, joint_lr: their learning rates at their highest; a pretrained language model takes some 2e-5.
        batch_size: pairs in a batch.
        weight_decay: of AdamW, on matrices.
        held_out: share of the pairs that are only measured on, in [0, 1).
        evaluate_every: steps between two such measures; one is also made at the end.
        seed: of the split, the order and dropout; PyTorch's global generator is left alone.
        checkpoint: a file that the state is written to, and gone on from if it is there: the same call, with a
            captioner that was made in the same way, ends with the same weights to the last bit (on one machine).
        checkpoint_every: steps between checkpoints; one is also written at the end.
        stop_after: end early, after this step; the schedule stays that of the whole training.
        progress: draw a bar with the loss.

    Returns:
        `CaptionTraining`.

    Raises:
        InputError: other numbers of codes and captions, a setting out of range, weights below float32 that are to be
            trained, a caption that is empty or too long for
            the language model, a checkpoint of another run (it says what differs), or a loss that diverges.

    Example:
        >>> from transformers import GPT2Config
        >>> from clip_lens_ext.planted import WordTokenizer
        >>> from clip_lens_ext.sparse_clip import sparse_captioner
        >>> words = WordTokenizer(["a", "red", "blue", "star"])
        >>> config = GPT2Config(vocab_size=words.vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        >>> captioner, codes = sparse_captioner(config, words, d_code=2), torch.eye(2)
        >>> training = train_captioner(captioner, codes, ["a red star", "a blue star"], joint_steps=100, held_out=0,
        ...                            batch_size=2, joint_lr=1e-2, progress=False)
        >>> captioner.generate(codes, max_tokens=8).texts
        ('a red star', 'a blue star')

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075.
    """
    settings = {
        "adapter_steps": checked_count(adapter_steps, "adapter_steps", 0),
        "joint_steps": checked_count(joint_steps, "joint_steps", 0), "adapter_lr": adapter_lr, "joint_lr": joint_lr,
        "batch_size": checked_count(batch_size, "batch_size"), "weight_decay": weight_decay, "held_out": held_out,
        "evaluate_every": checked_count(evaluate_every, "evaluate_every"), "seed": seed,
    }  # fmt: skip
    n_steps = adapter_steps + joint_steps
    checked_count(n_steps, "adapter_steps + joint_steps")
    checked_count(checkpoint_every, "checkpoint_every")
    if not (0 < adapter_lr < math.inf and 0 < joint_lr < math.inf and 0 <= weight_decay < math.inf):
        raise InputError(f"learning rates are above zero and weight_decay is not below, got {adapter_lr}, {joint_lr} "
                         f"and {weight_decay}")  # fmt: skip
    if not 0 <= held_out < 1:
        raise InputError(f"held_out is a share in [0, 1), got {held_out!r}")
    _check_dtypes(captioner, joint=joint_steps > 0)
    pairs = Pairs(captioner, codes, captions, held_out, seed)
    origin = {
        "captioner": module_sha256(captioner), "codes": fingerprint(codes),
        "captions": hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:16],
    }  # fmt: skip
    last = n_steps if stop_after is None else min(checked_count(stop_after, "stop_after"), n_steps)
    run = Run(captioner, settings)
    path = None if checkpoint is None else Path(checkpoint)
    required = [weight.requires_grad for weight in captioner.parameters()]
    try:
        if path is not None:
            run.resume(path, {**settings, **origin})  # goes to its stage, which says what is trained
        captioner.train()
        steps = range(run.done, last)
        with tqdm(steps, initial=run.done, total=n_steps, desc="captioner", disable=not progress) as bar:
            for step in bar:
                run.step(*pairs.batch(step, batch_size))
                if len(pairs.held) and (run.done % evaluate_every == 0 or run.done == n_steps):
                    run.measured.append((run.done, pairs.held_out_loss()))
                if progress and step % 10 == 0:
                    bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
                if path is not None and (run.done % checkpoint_every == 0 or run.done == last):
                    run.save(path, {**settings, **origin})
    finally:
        for weight, needed in zip(captioner.parameters(), required, strict=True):
            weight.requires_grad_(needed)
            weight.grad = None
        captioner.eval()
    return CaptionTraining(
        torch.tensor(run.losses, dtype=torch.float64), (torch.arange(run.done) >= adapter_steps).long(),
        torch.tensor([loss for _, loss in run.measured], dtype=torch.float64),
        torch.tensor([step for step, _ in run.measured], dtype=torch.int64), len(pairs.train), len(pairs.held),
        pairs.longest, settings, {**origin, "versions": versions()},
    )  # fmt: skip


def _check_dtypes(captioner: SparseCaptioner, *, joint: bool) -> None:
    trained = captioner if joint else captioner.adapter
    for name, weight in trained.named_parameters():
        if below_float32(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise InputError(f"{name} is {dtype}, in which AdamW's small steps are rounded away: pass "
                             "sparse_captioner(..., dtype=torch.float32), or train captioner.float()")  # fmt: skip
