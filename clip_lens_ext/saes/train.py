"""SAEs by training: activations of a tower into `sae_lens.SAETrainer`, measured on images that were held out."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from torch import nn
from tqdm.auto import tqdm

from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.errors import InputError, near
from clip_lens_ext.provenance import versions
from clip_lens_ext.saes.activations import ActivationRows, ShuffledRows, split_samples
from clip_lens_ext.saes.load import load_sae
from clip_lens_ext.saes.quality import Reconstruction
from clip_lens_ext.saes.run_folder import RunFolder
from clip_lens_ext.saes.trainer import ARCHITECTURES, NORMALIZATIONS, fit, inference_sae, initialise, make_trainer
from clip_lens_ext.towers.positions import TOKEN_SCOPES, TokenScope
from clip_lens_ext.towers.tower import HookedTower

logger = logging.getLogger(__name__)

# Below this share of the variance, what the latents say is not what the model says.
_POOR_EXPLAINED_VARIANCE = 0.5


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
        architecture: "topk" (k active latents in a token), "batchtopk" (k on average over a batch; comes back as a
            JumpReLU SAE, as SAELens exports it) or "jumprelu" (a learnt threshold for each latent, drawn to an L0 of k
            by SAELens' quadratic loss, unless `sae_kwargs` chooses another loss).
        k: active latents in a token, 1..d_sae: exactly at most, on average, or as a target.
        token_scope: "cls", "patches", "all", "eot" or "pooled"; "all" at a hook without a token axis means "pooled".
        preprocess: PIL image -> tensor, for images that are not tensors yet.
        n_training_tokens: tokens to train on, rounded up to whole batches; a token may be seen many times. By default
            ten times the tokens there are, and at least 1,000 batches.
        batch_size: tokens in a training batch.
        lr: the learning rate at its highest.
        held_out: share of the images to hold out, in 0..1 exclusive; at least one image is, two for one-token scopes.
        normalize_activations: "expected_average_only_in" scales the inputs so that their mean norm is sqrt(d) while
            training, and folds the scale into the weights afterwards; "none" trains on the raw inputs.
        dead_feature_window: steps without a firing after which SAELens' auxiliary loss revives a latent; by default a
            tenth of the steps, within 10..1000.
        sae_kwargs: further fields of SAELens' training config of the architecture, e.g. `{"l0_coefficient": 5.0}`.
        image_batch_size: images in a forward pass of the tower; `ImageBatches` keep their own.
        buffer_images: images whose tokens are shuffled together where not all fit into memory.
        memory_limit: bytes of activations that are kept; if there are more, every epoch runs the tower again.
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
        >>> import open_clip, torch
        >>> from clip_lens_ext.towers.tower import HookedTower
        >>> native = open_clip.transformer.VisionTransformer(16, 8, 32, 2, 2, mlp_ratio=2.0, output_dim=16).eval()
        >>> images = torch.randn(12, 3, 16, 16)
        >>> sae = train_sae(HookedTower(native), images, hook_name="blocks.0.hook_resid_post", d_sae=64, k=4,
        ...                 n_training_tokens=6400, batch_size=64, progress=False)
        >>> sae.cfg.architecture(), sae.cfg.metadata.token_scope, sae.cfg.metadata.n_held_out_images
        ('topk', 'all', 1)
    """
    settings = {name: value for name, value in locals().items() if name in _COMPARED}
    settings["sae_kwargs"] = dict(sae_kwargs or {})
    _check_settings(**settings, checkpoint_every=checkpoint_every)
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < 0:
        raise InputError(f"memory_limit must be a number of bytes, not {memory_limit!r}")
    tower.check_hook_name(hook_name)
    folder = None
    if output_dir is not None:
        folder = RunFolder(output_dir, {**settings, "model_name": tower.cfg.model_name, "tower": tower.cfg.tower})
        folder.settle({"tower_sha256": _module_sha256(tower.native)})
    batches = image_batches(images, preprocess=preprocess, batch_size=image_batch_size)
    finished = folder is not None and folder.finished

    with _isolated(tower, seed):
        activations = ActivationRows(
            tower,
            batches,
            hook_name=hook_name,
            token_scope=token_scope,
            memory_limit=0 if finished else memory_limit,
            progress=progress,
        )
        if folder is not None:
            folder.settle({"data_fingerprint": activations.fingerprint})
            if finished:
                logger.info("the run in %s is finished: its SAE is loaded, not trained again", folder.path)
                return load_sae(folder.path, device=tower.cfg.device)
            folder.settle({"kept_in_memory": activations.stored is not None})
            folder.begin()

        at_least = 1 if activations.n_tokens > 1 else 2  # one row has no variance to explain
        train, held = split_samples(activations.n_samples, held_out, seed=seed, at_least=at_least)
        provider = ShuffledRows(activations, train, batch_size=batch_size, seed=seed, buffer_images=buffer_images)
        n_steps = _n_steps(n_training_tokens, batch_size, provider.n_rows)
        metadata = SAEMetadata(
            model_name=tower.cfg.model_name,
            tower=tower.cfg.tower,
            hook_name=hook_name,
            token_scope=activations.token_scope,
            format="sae_lens",
            n_training_images=len(train),
            n_held_out_images=len(held),
            n_skipped_images=activations.n_skipped,
            n_training_tokens=n_steps * batch_size,
            seed=seed,
            data_fingerprint=activations.fingerprint,
            versions=versions(),
        )
        torch.manual_seed(seed)  # again, for the initial weights: a DataLoader draws from the generator on its way
        trainer = make_trainer(tower, activations.d, n_steps, metadata, settings)
        if folder is None or not folder.resume(trainer):
            initialise(trainer, provider)
        fit(trainer, provider, n_steps, folder, checkpoint_every, progress)
        sae = inference_sae(trainer)
        _measure(sae, activations, held, image_batch_size, progress)
    if folder is not None:
        folder.finish(sae)
    return sae


_COMPARED = (
    *("hook_name", "token_scope", "architecture", "d_sae", "k", "n_training_tokens", "batch_size", "lr", "held_out"),
    *("normalize_activations", "dead_feature_window", "image_batch_size", "buffer_images", "seed"),
)


def _check_settings(
    *, d_sae: int, architecture: str, k: int, token_scope: str, held_out: float, lr: float, seed: int,
    normalize_activations: str, sae_kwargs: Mapping[str, Any], **counts: Any,
) -> None:  # fmt: skip
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = near(str(architecture), ARCHITECTURES)
        raise InputError(f"unknown SAE architecture {architecture!r}: known are {known}{hint}")
    for name, choice, choices in (
        ("token_scope", token_scope, TOKEN_SCOPES),
        ("normalize_activations", normalize_activations, NORMALIZATIONS),
    ):
        if choice not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, not {choice!r}")
    del counts["hook_name"]
    for name, value in {"d_sae": d_sae, "k": k, **counts}.items():
        if value is None and name in ("n_training_tokens", "dead_feature_window", "checkpoint_every"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, not {value!r}")
    if k > d_sae:
        raise InputError(f"k must be at most d_sae = {d_sae}, not {k}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be an integer, not {seed!r}")
    if not 0 < held_out < 1:
        raise InputError(f"held_out must lie between 0 and 1, not {held_out!r}")
    if not (lr > 0 and math.isfinite(lr)):
        raise InputError(f"lr must be positive, not {lr!r}")
    config = ARCHITECTURES[architecture][1]
    ours = {"d_in", "d_sae", "k", "dtype", "device", "metadata", "normalize_activations", "reshape_activations"}
    free = {field.name for field in dataclasses.fields(config)} - ours
    for name in sae_kwargs:
        if name not in free:
            raise InputError(f"{name!r} is no field of {config.__name__} that sae_kwargs can set{near(name, free)}")


def _n_steps(n_training_tokens: int | None, batch_size: int, n_rows: int) -> int:
    if n_training_tokens is None:
        return max(1000, math.ceil(10 * n_rows / batch_size))
    return math.ceil(n_training_tokens / batch_size)


@torch.no_grad()
def _measure(sae: SAE[Any], activations: ActivationRows, held: list[int], n_images: int, progress: bool) -> None:
    seen = Reconstruction(sae.cfg.d_sae)
    with tqdm(total=len(held), desc="measuring the SAE", unit="image", disable=not progress) as bar:
        for start in range(0, len(held), n_images):
            for rows in activations.take(held[start : start + n_images]).flatten(0, 1).split(4096):
                x = rows.to(sae.device, sae.dtype)
                codes = sae.encode(x)
                seen.update(x, sae.decode(codes), codes)
            bar.update(min(n_images, len(held) - start))
    quality = seen.result()
    explained = quality.explained_variance
    for name in ("cosine", "l0", "dead_latents"):
        sae.cfg.metadata[name] = getattr(quality, name)
    sae.cfg.metadata.explained_variance = None if math.isnan(explained) else explained
    if explained < _POOR_EXPLAINED_VARIANCE:
        warnings.warn(
            f"the SAE explains {explained:.1%} of the variance of held-out activations: train longer, or with more "
            "latents, before its latents are read as the model's",
            stacklevel=3,
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


def _module_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
