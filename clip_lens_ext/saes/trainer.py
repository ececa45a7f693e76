"""`sae_lens.SAETrainer` on activations of a tower: made, started at the data's mean, stepped, and exported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from sae_lens import SAE, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.run_folder import RunFolder
from clip_lens_ext.saes.shuffled_rows import ShuffledRows
from clip_lens_ext.saes.training_settings import ARCHITECTURES, TrainingSettings
from clip_lens_ext.towers.tower import HookedTower


@dataclass(frozen=True, eq=False)
class Run:
    """The SAE of one hook on its way: its trainer, and the folder where it is checkpointed."""

    hook_name: str
    trainer: SAETrainer[Any, Any]
    folder: RunFolder | None
    normalize_activations: str

    def inputs(self, rows: Tensor) -> Tensor:
        """Rows `[row d]` as the trainer gets them."""
        return layer_norm(rows) if self.normalize_activations == "layer_norm" else rows


def layer_norm(rows: Tensor) -> Tensor:
    """Rows `[row d]` centred and over their standard deviation, as SAELens' `layer_norm` does it at run time."""
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred / (centred.std(dim=-1, keepdim=True) + 1e-5)


def make_trainer(
    tower: HookedTower, d_in: int, n_steps: int, metadata: SAEMetadata, settings: TrainingSettings
) -> SAETrainer[Any, Any]:
    """A trainer for `n_steps` steps, its SAE freshly initialised from PyTorch's global generator.

    Raises:
        InputError: SAELens refuses the configuration.
    """
    sae_class, config_class = ARCHITECTURES[settings.architecture]
    # Adam's steps round away in half precision; the weights of an SAE are float32 at least.
    dtype = torch.promote_types(tower.cfg.dtype, torch.float32)
    device, normalization = str(tower.cfg.device), settings.normalize_activations
    try:
        config = config_class(
            d_in=d_in,
            d_sae=settings.d_sae,
            dtype=dtype_to_str(dtype),
            device=device,
            # SAELens' auxiliary loss and inner levels do not go with a layer norm inside the SAE: while training the
            # rows are normalised on their way in, and `fit` says so in the finished SAE.
            normalize_activations="none" if normalization == "layer_norm" else normalization,
            metadata=metadata,
            **settings.config_fields(),
        )
        sae = sae_class(config)
    except ValueError as error:
        raise InputError(f"SAELens refuses this {settings.architecture} SAE: {error}") from error
    warm_up = n_steps // 20
    return SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=n_steps * settings.batch_size,
            train_batch_size_samples=settings.batch_size,
            lr=settings.lr,
            lr_end=settings.lr,
            lr_warm_up_steps=warm_up if warm_up > 1 else 0,
            lr_decay_steps=n_steps // 5,
            device=device,
            dead_feature_window=settings.dead_feature_window or min(1000, max(10, n_steps // 10)),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),  # steps are taken one by one, each with the batch of its number
    )


@torch.no_grad()
def initialise(run: Run, provider: ShuffledRows) -> None:
    """Scale the inputs to a mean norm of sqrt(d), if asked to, and start the decoder bias at their mean."""
    trainer = run.trainer
    mean, mean_norm = provider.statistics(run.hook_name, run.inputs)
    if not mean_norm > 0:
        raise InputError(f"every activation at {run.hook_name} is zero")
    scale = 1.0
    if trainer.sae.cfg.normalize_activations == "expected_average_only_in":
        scale = trainer.activation_scaler.scaling_factor = trainer.sae.cfg.d_in**0.5 / mean_norm
    # The first gradient steps need not spend themselves on the mean, which is far larger than the spread.
    trainer.sae.b_dec.copy_(mean * scale)


def fit(
    runs: Sequence[Run], provider: ShuffledRows, n_steps: int, checkpoint_every: int | None, progress: bool
) -> None:
    """Take the steps that are left of every run, batch by batch, then fold the input scale into the weights.

    Raises:
        InputError: a loss is NaN or infinite.
    """
    # SAETrainer.fit always draws a bar, and checkpoints before it counts the step, so that resuming would not be
    # exact; these are the public steps that it is made of.
    every = checkpoint_every or max(1, min(1000, n_steps // 10))
    start = min(run.trainer.n_training_steps for run in runs)
    what = "training the SAE" if len(runs) == 1 else f"training {len(runs)} SAEs"
    with tqdm(total=n_steps, initial=start, desc=what, unit="step", disable=not progress) as bar:
        for number in range(start, n_steps):
            rows = provider.batch(number)
            losses = [
                # A run that was killed between two checkpoints may be ahead of the others.
                _step(run, rows[run.hook_name], every, n_steps)
                for run in runs
                if run.trainer.n_training_steps == number
            ]
            shown = [loss for loss in losses if loss is not None]
            if shown:
                bar.set_postfix(loss=f"{sum(shown) / len(shown):.4g}")
            bar.update()
    for run in runs:
        scaler, sae = run.trainer.activation_scaler, run.trainer.sae
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        sae.cfg.normalize_activations = "layer_norm" if run.normalize_activations == "layer_norm" else "none"


def _step(run: Run, rows: Tensor, every: int, n_steps: int) -> float | None:
    """One step of one run; its loss, where it is looked at."""
    trainer, loss = run.trainer, None
    trainer.maybe_reset_sparsity()
    output = trainer.step(run.inputs(rows.to(trainer.sae.dtype)))
    trainer.n_training_steps += 1
    step = trainer.n_training_steps
    if step % 20 == 0 or step == n_steps or step % every == 0:
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss at {run.hook_name} is {loss} at step {step}: lower lr, or normalise the activations"
            )
    if run.folder is not None and step % every == 0 and step < n_steps:
        run.folder.checkpoint(trainer)
    return loss


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
