"""One training run, at one hook or several: the activations, the steps, the measures, and what a killed run left."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from tqdm.auto import tqdm

from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.provenance import versions
from clip_lens_ext.saes.activations import ActivationRows
from clip_lens_ext.saes.load import load_sae
from clip_lens_ext.saes.quality import Reconstruction
from clip_lens_ext.saes.run_folder import RunFolder
from clip_lens_ext.saes.shuffled_rows import ShuffledRows, split_samples
from clip_lens_ext.saes.trainer import Run, fit, inference_sae, initialise, make_trainer
from clip_lens_ext.saes.training_settings import TrainingSettings
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.tower import HookedTower

logger = logging.getLogger(__name__)

# Below this share of the variance, what the latents say is not what the model says.
_POOR_EXPLAINED_VARIANCE = 0.5


def train_at_hooks(
    tower: HookedTower,
    images: Any,
    output_dirs: Mapping[str, str | os.PathLike[str] | None],
    settings: TrainingSettings,
    preprocess: Preprocess | None,
    cache_dir: str | os.PathLike[str] | None,
    progress: bool,
) -> dict[str, SAE[Any]]:
    """The SAE of each hook of `output_dirs`, whose values are the folders where each run is kept."""
    for hook_name in output_dirs:
        tower.check_hook_name(hook_name)
    model = {"model_name": tower.cfg.model_name, "tower": tower.cfg.tower}
    folders: dict[str, RunFolder] = {}
    if cache_dir is not None or any(path is not None for path in output_dirs.values()):
        model["tower_sha256"] = tower_sha256(tower)
    for hook_name, path in output_dirs.items():
        if path is not None:
            folders[hook_name] = RunFolder(path, {**settings.compared, "hook_name": hook_name, **model})
    finished = {name for name, folder in folders.items() if folder.finished}
    to_train = [name for name in output_dirs if name not in finished]
    batches = image_batches(images, preprocess=preprocess, batch_size=settings.image_batch_size)

    with _isolated(tower, settings.seed):
        activations = ActivationRows(
            tower,
            batches,
            hook_names=to_train or list(output_dirs),
            token_scope=settings.token_scope,
            memory_limit=settings.memory_limit if to_train else 0,
            cache_dir=cache_dir if to_train else None,
            identity=model,
            progress=progress,
        )
        for folder in folders.values():
            folder.settle({"data_fingerprint": activations.fingerprint})
        saes = {name: load_sae(folders[name].path, device=tower.cfg.device) for name in finished}
        for name in finished:
            logger.info("the run in %s is finished: its SAE is loaded, not trained again", folders[name].path)
        if to_train:
            trained = _fit_all(activations, to_train, folders, settings, progress)
            for name in to_train:
                if name in folders:
                    folders[name].finish(trained[name])
            saes |= trained
    return {name: saes[name] for name in output_dirs}


def _fit_all(
    activations: ActivationRows,
    hook_names: Sequence[str],
    folders: Mapping[str, RunFolder],
    settings: TrainingSettings,
    progress: bool,
) -> dict[str, SAE[Any]]:
    """Train and measure the SAEs of some hooks on the same activations."""
    for name in hook_names:
        if name in folders:
            folders[name].settle({"kept_in_memory": activations.stored is not None})
            folders[name].begin()
    at_least = 1 if activations.n_tokens > 1 else 2  # one row has no variance to explain
    train, held = split_samples(activations.n_samples, settings.held_out, seed=settings.seed, at_least=at_least)
    provider = ShuffledRows(
        activations, train, batch_size=settings.batch_size, seed=settings.seed, buffer_images=settings.buffer_images
    )
    n_steps = settings.n_steps(provider.n_rows)
    cfg = activations.tower.cfg
    runs = []
    for name in hook_names:
        metadata = SAEMetadata(
            model_name=cfg.model_name,
            tower=cfg.tower,
            hook_name=name,
            token_scope=activations.token_scope,
            format="sae_lens",
            n_training_images=len(train),
            n_held_out_images=len(held),
            n_skipped_images=activations.n_skipped,
            n_training_tokens=n_steps * settings.batch_size,
            seed=settings.seed,
            data_fingerprint=activations.fingerprint,
            versions=versions(),
        )
        # Again, for the initial weights of each SAE: a DataLoader draws from the generator on its way.
        torch.manual_seed(settings.seed)
        trainer = make_trainer(activations.tower, activations.d[name], n_steps, metadata, settings)
        run = Run(name, trainer, folders.get(name), settings.normalize_activations)
        if run.folder is None or not run.folder.resume(trainer):
            initialise(run, provider)
        runs.append(run)
    fit(runs, provider, n_steps, settings.checkpoint_every, progress)
    saes = {run.hook_name: inference_sae(run.trainer) for run in runs}
    _measure(saes, activations, held, settings.image_batch_size, progress)
    return saes


@torch.no_grad()
def _measure(
    saes: Mapping[str, SAE[Any]], activations: ActivationRows, held: list[int], n_images: int, progress: bool
) -> None:
    seen = {name: Reconstruction(sae.cfg.d_sae) for name, sae in saes.items()}
    what = "measuring the SAE" if len(saes) == 1 else f"measuring {len(saes)} SAEs"
    with tqdm(total=len(held), desc=what, unit="image", disable=not progress) as bar:
        for start in range(0, len(held), n_images):
            taken = activations.take(held[start : start + n_images])
            for name, sae in saes.items():
                for rows in taken[name].flatten(0, 1).split(4096):
                    x = rows.to(sae.device, sae.dtype)
                    codes = sae.encode(x)
                    seen[name].update(x, sae.decode(codes), codes)
            bar.update(min(n_images, len(held) - start))
    for name, sae in saes.items():
        quality = seen[name].result()
        explained = quality.explained_variance
        for measure in ("cosine", "l0", "dead_latents"):
            sae.cfg.metadata[measure] = getattr(quality, measure)
        sae.cfg.metadata.explained_variance = None if math.isnan(explained) else explained
        if explained < _POOR_EXPLAINED_VARIANCE:
            warnings.warn(
                f"the SAE at {name} explains {explained:.1%} of the variance of held-out activations: train longer, or "
                "with more latents, before its latents are read as the model's",
                stacklevel=6,  # whoever called train_sae; a decorator is a frame too
            )


@contextmanager
def _isolated(tower: HookedTower, seed: int) -> Iterator[None]:
    """Seeded randomness and gradients inside, whatever is on outside; the tower in evaluation mode meanwhile."""
    device = tower.cfg.device
    modes = {module: module.training for module in tower.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        tower.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
