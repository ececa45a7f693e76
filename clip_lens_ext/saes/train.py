"""SAEs by training: activations of a tower into `sae_lens.SAETrainer`, measured on images that were held out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE

from clip_lens_ext.data import Preprocess
from clip_lens_ext.errors import InputError, near
from clip_lens_ext.saes.training_run import train_at_hooks
from clip_lens_ext.saes.training_settings import TrainingSettings
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def train_sae(
    tower: HookedTower,
    images: Any,
    *,
    hook_name: str,
    d_sae: int,
    architecture: str = "topk",
    k: int = 32,
    token_scope: TokenScope = "all",
    preprocess: Preprocess | None = None,
    n_training_tokens: int | None = None,
    batch_size: int = 4096,
    lr: float = 1e-3,
    held_out: float = 0.1,
    normalize_activations: str = "expected_average_only_in",
    dead_feature_window: int | None = None,
    sae_kwargs: Mapping[str, Any] | None = None,
    image_batch_size: int = 32,
    buffer_images: int = 512,
    memory_limit: int = 2 << 30,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> SAE[Any]:
    """Train a sparse autoencoder on a tower's activations at one hook, with `sae_lens.SAETrainer`.

    The tower runs without gradients and is as before afterwards. A share of the *images* is held out and neither
    trained on nor used to initialise anything; on their activations the SAE is measured. The decoder bias starts at
    the mean activation. Learning rate: linear warm-up over the first 5% of the steps, linear decay over the last 20%.

    Args:
        tower: the tower.
        images: whatever `image_batches` takes; token ids for a text tower.
        hook_name: a hook that gives `[batch token d]` or `[batch d]`.
        d_sae: number of latents.
        architecture: "topk" (k active latents in a token), "batchtopk" (k on average over a batch), "matryoshka"
            (batchtopk whose first d_sae / 16, / 8, / 4 and / 2 latents each reconstruct alone as well, unless
            `sae_kwargs` gives other `matryoshka_widths`) or "jumprelu" (a learnt threshold for each latent, drawn to an
            L0 of k by SAELens' quadratic loss, unless `sae_kwargs` chooses another loss). All but the first come back
            as JumpReLU SAEs, as SAELens exports them.
        k: active latents in a token, 1..d_sae: exactly at most, on average, or as a target.
        token_scope: "cls", "patches", "all", "eot" or "pooled"; "all" at a hook without a token axis means "pooled".
        preprocess: PIL image -> tensor, for images that are not tensors yet.
        n_training_tokens: tokens to train on, rounded up to whole batches; a token may be seen many times. By default
            ten times the tokens there are, and at least 1,000 batches.
        batch_size: tokens in a training batch.
        lr: the learning rate at its highest.
        held_out: share of the images to hold out, in 0..1 exclusive; at least one image is, two for one-token scopes.
        normalize_activations: "expected_average_only_in" scales the inputs so that their mean norm is sqrt(d) while
            training, and folds the scale into the weights afterwards; "layer_norm" centres and scales every input, in
            the loss as well, and the SAE does so itself later; "none" trains on the raw inputs.
        dead_feature_window: steps without a firing after which SAELens' auxiliary loss revives a latent; by default a
            tenth of the steps, within 10..1000.
        sae_kwargs: further fields of SAELens' training config of the architecture, e.g. `{"l0_coefficient": 5.0}`.
        image_batch_size: images in a forward pass of the tower; `ImageBatches` keep their own.
        buffer_images: images whose tokens are shuffled together where not all fit into memory.
        memory_limit: bytes of activations that are kept; if there are more, every epoch runs the tower again, or reads
            them from `cache_dir`.
        cache_dir: a folder for activations on disk, which later calls on the same images read instead of running the
            tower; it holds a folder for each hook. A pass that is killed goes on after what it has written.
        seed: of the split, the order and the initial weights. PyTorch's global generator is left alone.
        output_dir: where checkpoints go, and at the end the SAE in SAELens' layout. The same call again resumes at the
            last checkpoint, to the same weights to the last bit, or gives back the SAE if it is finished.
        checkpoint_every: steps between checkpoints; by default a tenth of the steps, at most 1,000.
        progress: draw progress bars.

    Returns:
        A `sae_lens.SAE` in evaluation mode, input scaling folded in. `cfg.metadata` has `model_name`, `tower`,
        `hook_name`, `token_scope`, `format`, `sha256`; measured on the held-out images `explained_variance` (None
        where they do not vary), `cosine`, `l0` and `dead_latents` (a share); and `n_held_out_images`,
        `n_training_images`, `n_skipped_images`, `n_training_tokens`, `seed`, `data_fingerprint` and `versions`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: a setting out of range, too few images, an activation that is NaN (it names the image), a hook and
            a scope that do not go together, an `output_dir` of a run with other settings, or a loss that diverges.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, world = cle.planted_clip(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(60, seed=0, split="train").images)
        >>> sae = train_sae(clip.vision, pixels, hook_name="blocks.1.hook_resid_post", d_sae=128, k=16, lr=5e-3,
        ...                 n_training_tokens=6400, batch_size=64, progress=False)
        >>> sae.cfg.architecture(), sae.cfg.metadata.token_scope, sae.cfg.metadata.n_held_out_images
        ('topk', 'all', 6)
        >>> sae.cfg.metadata.explained_variance > 0.6
        True
    """
    settings = TrainingSettings(
        d_sae=d_sae, architecture=architecture, k=k, token_scope=token_scope, n_training_tokens=n_training_tokens,
        batch_size=batch_size, lr=lr, held_out=held_out, normalize_activations=normalize_activations,
        dead_feature_window=dead_feature_window, sae_kwargs=dict(sae_kwargs or {}), image_batch_size=image_batch_size,
        buffer_images=buffer_images, memory_limit=memory_limit, seed=seed, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    folders = {hook_name: output_dir}
    return train_at_hooks(tower, images, folders, settings, preprocess, cache_dir, progress)[hook_name]


def train_saes(
    tower: HookedTower,
    images: Any,
    *,
    hook_names: Sequence[str],
    d_sae: int,
    output_dir: str | os.PathLike[str] | None = None,
    preprocess: Preprocess | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, SAE[Any]]:
    """Train one SAE at each of several hooks, all in one pass over the images.

    The tower runs once for all hooks, and all SAEs take their steps side by side: each is the SAE that `train_sae`
    would have made alone, from the same weights and batches. Activations of the residual stream are the same to the
    last bit in all but a few families; at hooks inside a block they may differ by rounding.

    Args:
        tower, images, d_sae, preprocess, cache_dir, progress: as in `train_sae`.
        hook_names: the hooks; each gives as many tokens as the others.
        output_dir: a folder that gets one folder for each hook, named after it.
        settings: every other keyword of `train_sae`, the same for all hooks.

    Returns:
        The SAE of each hook, in the order of `hook_names`.

    Raises:
        HookNameError, InputError: as in `train_sae`; or no hook, one named twice, or an unknown keyword.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, world = cle.planted_clip(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(60, seed=0, split="train").images)
        >>> hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
        >>> found = train_saes(clip.vision, pixels, hook_names=hooks, d_sae=128, k=16, lr=5e-3,
        ...                    n_training_tokens=6400, batch_size=64, progress=False)
        >>> [sae.cfg.metadata.hook_name for sae in found.values()] == hooks
        True
        >>> min(sae.cfg.metadata.explained_variance for sae in found.values()) > 0.6
        True
    """
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    if not names or len(set(names)) < len(names):
        raise InputError(f"hook_names must be different hooks, at least one, not {names}")
    known = {field.name for field in dataclasses.fields(TrainingSettings)}
    for name in settings:
        if name not in known:
            raise InputError(f"train_saes has no keyword {name!r}{near(name, known)}")
    settings["sae_kwargs"] = dict(settings.get("sae_kwargs") or {})
    folders = {name: None if output_dir is None else Path(output_dir, name) for name in names}
    return train_at_hooks(
        tower, images, folders, TrainingSettings(d_sae=d_sae, **settings), preprocess, cache_dir, progress
    )
