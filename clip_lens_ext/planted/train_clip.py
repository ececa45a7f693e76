"""Trains the dual encoder of a planted world on pictures that are drawn as it goes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.planted.model import CONTEXT_LENGTH, ClipConfig, build_clip
from clip_lens_ext.planted.tokenizer import WordTokenizer
from clip_lens_ext.planted.world import PlantedWorld, normalise

__all__ = ["TrainConfig", "train_clip"]

_MAX_LOGIT_SCALE: Final = math.log(100)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the dual encoder is trained."""

    n_steps: int = 5500
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    n_warmup: int = 150
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the forward pass. bfloat16 is faster on a CPU that multiplies in it (AMX), and slower on others."""
    model: ClipConfig = dataclasses.field(default_factory=ClipConfig)


def train_clip(
    world: PlantedWorld,
    config: TrainConfig | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    stop_after: int | None = None,
    progress: bool = True,
) -> CLIP:
    """Trains a model, or goes on with a training that was cut short.

    Batch i is a pure function of (world seed, i), and nothing else is random after the initial weights. So on one
    machine a training that was killed and resumed ends with the same bits as one that ran through.

    Args:
        world: Draws the pictures, and seeds the initial weights.
        config: How to train; the shipped weights have the defaults.
        checkpoint: A file that the state is written to, and gone on from if it is there.
        checkpoint_every: Steps between two checkpoints; one is also written at the end.
        stop_after: Ends early, after this step; the schedule stays that of the whole training.
        progress: Show a progress bar with the loss.

    Returns:
        The model in evaluation mode, in float32.

    Raises:
        LoadError: If the checkpoint is of another world or another config.
    """
    config = config or TrainConfig()
    if config.n_steps < 1 or config.batch_size < 2 or checkpoint_every < 1:
        raise InputError(
            f"training takes at least 1 step, 2 pictures per batch and 1 step per checkpoint, "
            f"and not {config.n_steps}, {config.batch_size} and {checkpoint_every}"
        )
    tokenizer = WordTokenizer(world.vocabulary, CONTEXT_LENGTH)
    clip = build_clip(config.model, tokenizer, seed=world.seed).train()
    optimizer = _optimizer(clip, config)
    path = None if checkpoint is None else Path(checkpoint)
    origin = {"world_seed": world.seed, "config": dataclasses.asdict(config)}
    done = 0 if path is None else _resume(path, clip, optimizer, origin)
    last = config.n_steps if stop_after is None else min(stop_after, config.n_steps)
    loss_of = ClipLoss()
    bar = tqdm(range(done, last), initial=done, total=config.n_steps, desc="CLIP", disable=not progress)
    for step in bar:
        batch = world.sample(config.batch_size, seed=step)
        tokens = tokenizer(batch.captions)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, config)
        with _precision(config.precision):
            image, text, scale = clip(normalise(batch.images), tokens)
        loss = loss_of(image.float(), text.float(), scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)
        done = step + 1
        if progress and step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if path is not None and (done % checkpoint_every == 0 or done == last):
            _save(path, clip, optimizer, done, origin)
    return clip.eval()


def _optimizer(clip: CLIP, config: TrainConfig) -> torch.optim.AdamW:
    # As in CLIP: gains, biases and the logit scale do not decay.
    decayed = [weight for weight in clip.parameters() if weight.ndim >= 2]
    others = [weight for weight in clip.parameters() if weight.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6)


def _learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.n_warmup:
        return config.lr * (step + 1) / config.n_warmup
    along = (step - config.n_warmup) / max(1, config.n_steps - config.n_warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


@contextlib.contextmanager
def _precision(precision: str) -> Iterator[None]:
    if precision == "float32":
        yield
        return
    # The fused attention's backward is many times slower than the plain one in bfloat16 on a CPU.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        yield


def _save(path: Path, clip: CLIP, optimizer: torch.optim.Optimizer, done: int, origin: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(path.name + ".part")
    torch.save({"clip": clip.state_dict(), "optimizer": optimizer.state_dict(), "done": done, **origin}, half_written)
    # A kill while writing leaves the old checkpoint whole.
    half_written.replace(path)


def _resume(path: Path, clip: CLIP, optimizer: torch.optim.Optimizer, origin: dict[str, object]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    found = {name: state.get(name) for name in origin}
    if found != origin:
        raise LoadError(f"the checkpoint {path} is of {found}, and not of {origin}; delete it, or train elsewhere")
    clip.load_state_dict(state["clip"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["done"])
