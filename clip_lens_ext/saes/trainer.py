"""`sae_lens.SAETrainer` on activations of a tower: made, started at the data's mean, stepped, and exported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainingSAEConfig
from sae_lens.util import dtype_to_str
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.activations import ShuffledRows
from clip_lens_ext.saes.run_folder import RunFolder
from clip_lens_ext.towers.tower import HookedTower

ARCHITECTURES: dict[str, tuple[type[TrainingSAE[Any]], type[TrainingSAEConfig]]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}
NORMALIZATIONS = ("expected_average_only_in", "none")


def make_trainer(
    tower: HookedTower,
    d_in: int,
    n_steps: int,
    metadata: SAEMetadata,
    settings: Mapping[str, Any],
) -> SAETrainer[Any, Any]:
    """A trainer for `n_steps` steps, its SAE freshly initialised from PyTorch's global generator."""
    sae_class, config_class = ARCHITECTURES[settings["architecture"]]
    # Adam's steps round away in half precision; the weights of an SAE are float32 at least.
    dtype = torch.promote_types(tower.cfg.dtype, torch.float32)
    own: dict[str, Any] = {"k": settings["k"]}
    if settings["architecture"] == "jumprelu":
        own = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(settings["k"])}
    device = str(tower.cfg.device)
    config = config_class(
        d_in=d_in,
        d_sae=settings["d_sae"],
        dtype=dtype_to_str(dtype),
        device=device,
        normalize_activations=settings["normalize_activations"],
        metadata=metadata,
        **{**own, **settings["sae_kwargs"]},
    )
    batch_size, lr = settings["batch_size"], settings["lr"]
    warm_up = n_steps // 20
    return SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=n_steps * batch_size,
            train_batch_size_samples=batch_size,
            lr=lr,
            lr_end=lr,
            lr_warm_up_steps=warm_up if warm_up > 1 else 0,
            lr_decay_steps=n_steps // 5,
            device=device,
            dead_feature_window=settings["dead_feature_window"] or min(1000, max(10, n_steps // 10)),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae_class(config),
        data_provider=iter(()),  # steps are taken one by one, each with the batch of its number
    )


@torch.no_grad()
def initialise(trainer: SAETrainer[Any, Any], provider: ShuffledRows) -> None:
    """Scale the inputs to a mean norm of sqrt(d), if asked to, and start the decoder bias at their mean."""
    mean, mean_norm = provider.statistics()
    if not mean_norm > 0:
        raise InputError(f"every activation at {trainer.sae.cfg.metadata.hook_name} is zero")
    scale = 1.0
    if trainer.sae.cfg.normalize_activations == "expected_average_only_in":
        scale = trainer.activation_scaler.scaling_factor = trainer.sae.cfg.d_in**0.5 / mean_norm
    # The first gradient steps need not spend themselves on the mean, which is far larger than the spread.
    trainer.sae.b_dec.copy_(mean * scale)


def fit(
    trainer: SAETrainer[Any, Any],
    provider: ShuffledRows,
    n_steps: int,
    folder: RunFolder | None,
    checkpoint_every: int | None,
    progress: bool,
) -> None:
    """Take the steps that are left, then fold the input scale into the weights.

    Raises:
        InputError: the loss is NaN or infinite.
    """
    # SAETrainer.fit always draws a bar, and checkpoints before it counts the step, so that resuming would not be
    # exact; these are the public steps that it is made of.
    every = checkpoint_every or max(1, min(1000, n_steps // 10))
    sae = trainer.sae
    start = trainer.n_training_steps
    with tqdm(total=n_steps, initial=start, desc="training the SAE", unit="step", disable=not progress) as bar:
        while trainer.n_training_steps < n_steps:
            trainer.maybe_reset_sparsity()
            output = trainer.step(provider.batch(trainer.n_training_steps).to(sae.dtype))
            trainer.n_training_steps += 1
            step = trainer.n_training_steps
            if step % 20 == 0 or step == n_steps or step % every == 0:
                loss = output.loss.item()
                if not math.isfinite(loss):
                    raise InputError(f"the loss is {loss} at step {step}: lower lr, or normalise the activations")
                bar.set_postfix(loss=f"{loss:.4g}")
            if folder is not None and step % every == 0 and step < n_steps:
                folder.checkpoint(trainer)
            bar.update()
    if trainer.activation_scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        trainer.activation_scaler.scaling_factor = None
    sae.cfg.normalize_activations = "none"


@torch.no_grad()
def inference_sae(trainer: SAETrainer[Any, Any]) -> SAE[Any]:
    """The SAE as `TrainingSAE.save_inference_model` writes it, without the way over the disk."""
    training = trainer.sae
    state = {name: weight.detach().clone() for name, weight in training.state_dict().items()}
    training.process_state_dict_for_saving_inference(state)
    sae: SAE[Any] = SAE.from_dict(training.cfg.get_inference_sae_cfg_dict())
    sae.load_state_dict(state)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        sae.cfg.rescale_acts_by_decoder_norm = False  # the norms were folded into the weights just now
    state = {name: weight.cpu().contiguous() for name, weight in sae.state_dict().items()}
    sae.cfg.metadata.sha256 = hashlib.sha256(safetensors.torch.save(state)).hexdigest()
    return sae.eval()
