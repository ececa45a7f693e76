"""Trains the SAEs of a planted dual encoder with `train_sae`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from clip_lens_ext.planted.load import preprocess
from clip_lens_ext.planted.store import read_clip
from clip_lens_ext.planted.world import PlantedWorld, normalise
from clip_lens_ext.saes.train import train_sae
from clip_lens_ext.towers.clip import HookedCLIP

__all__ = ["SAES", "SaeConfig", "train_saes"]

_FIRST_SEED: Final = 2**40
"""Beyond the seeds of the dual encoder's batches: the SAEs see training pictures that it never saw."""


@dataclasses.dataclass(frozen=True)
class SaeConfig:
    """One SAE: at which hook, how large, and on how much it is trained."""

    tower: Literal["vision", "text"]
    hook_name: str
    token_scope: Literal["all", "cls"]
    d_sae: int
    k: int
    n_samples: int
    """Pictures or captions."""
    n_training_tokens: int
    batch_size: int


SAES: Final = (
    SaeConfig(
        "vision",
        "blocks.2.hook_resid_post",
        "all",
        1024,
        16,
        n_samples=10_000,
        n_training_tokens=4_000_000,
        batch_size=4096,
    ),
    SaeConfig(
        "vision",
        "blocks.3.hook_resid_post",
        "cls",
        512,
        8,
        n_samples=20_000,
        n_training_tokens=2_000_000,
        batch_size=1024,
    ),
    SaeConfig(
        "text",
        "blocks.1.hook_resid_post",
        "all",
        256,
        8,
        n_samples=20_000,
        n_training_tokens=2_000_000,
        batch_size=4096,
    ),
)
"""The SAEs that ship."""


def train_saes(
    out: Path, configs: Sequence[SaeConfig] = SAES, *, work: Path, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Trains the SAEs of the dual encoder in a folder, and writes them beside it in SAELens' layout.

    Args:
        out: Folder with `clip.safetensors`; an SAE goes to `saes/<tower>/<hook name>`.
        configs: Which ones.
        work: Folder of the checkpoints; a training that was cut short goes on from there, and one that is finished
            is not done again.
        progress: Show progress bars.

    Returns:
        For each SAE what was measured on held-out samples: explained variance, cosine, L0 and the share of dead
        latents.

    Raises:
        LoadError: If there is no dual encoder in the folder.
    """
    native, tokenizer, metadata = read_clip(out / "clip.safetensors")
    seed = metadata["training"]["world_seed"]
    world = PlantedWorld(seed)
    clip = HookedCLIP(native, preprocess=preprocess, tokenizer=tokenizer, model_name=f"planted-{seed}")
    figures = {}
    for config in configs:
        place = Path("saes", config.tower, config.hook_name)
        (work / place).mkdir(parents=True, exist_ok=True)
        tower = clip.vision if config.tower == "vision" else clip.text
        assert tower is not None  # a planted dual encoder has both
        sae = train_sae(
            tower,
            _samples(world, clip, config),
            hook_name=config.hook_name,
            d_sae=config.d_sae,
            k=config.k,
            token_scope=config.token_scope,
            n_training_tokens=config.n_training_tokens,
            batch_size=config.batch_size,
            image_batch_size=256,
            seed=seed,
            output_dir=work / place,
            progress=progress,
        )
        (out / place).mkdir(parents=True, exist_ok=True)
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            shutil.copyfile(work / place / name, out / place / name)
        measured = ("explained_variance", "cosine", "l0", "dead_latents")
        figures[place.as_posix()] = {name: getattr(sae.cfg.metadata, name) for name in measured}
    return figures


def _samples(world: PlantedWorld, clip: HookedCLIP, config: SaeConfig) -> torch.Tensor:
    """Training pictures `[sample 3 48 48]`, or training captions `[sample context]` as token ids."""
    parts = []
    for index in range(-(-config.n_samples // 1000)):
        batch = world.sample(1000, seed=_FIRST_SEED + index)
        parts.append(normalise(batch.images) if config.tower == "vision" else clip.tokenize(batch.captions))
    return torch.cat(parts)[: config.n_samples]
