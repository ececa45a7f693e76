"""The steps of a training of a Sparse CLIP."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip.checks import below_float32
from clip_lens_ext.sparse_clip.contrastive import Step, contrastive_step
from clip_lens_ext.sparse_clip.paired_captions import order_of
from clip_lens_ext.sparse_clip.processes import Processes
from clip_lens_ext.sparse_clip.training_data import Share, TrainingData
from clip_lens_ext.sparse_clip.training_settings import TrainingSettings
from clip_lens_ext.towers.families.headed import HeadedCLIP

COLUMNS: Final = ("step", "epoch", "loss", "l0_image", "l0_text", "logit_scale", "lr")
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """Model, optimiser and history, between two steps.

    Args:
        native: the model; what is trained of it is changed in place.
        data: the pairs.
        settings: how.
        processes: which process this is.
        device: of the model.

    Attributes:
        done: steps so far.
        n_steps: steps of the whole training.
        history: a row of `COLUMNS` for each step.
        whole: whether weights, optimiser and history are of the same step; not while one is taken, nor after one that
            was interrupted.
    """

    def __init__(
        self, native: HeadedCLIP, data: TrainingData, settings: TrainingSettings, processes: Processes,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._native, self._data, self._settings, self._processes = native, data, settings, processes
        self._device = device
        self._trained = trained_part(native, settings)
        self._parameters = [weight for weight in self._trained.parameters() if weight.requires_grad]
        groups = [{"params": [p for p in self._parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
                  {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        # As in CLIP: gains, biases and the logit scale do not decay.
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), eps=1e-6)
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self._loss = processes.loss()
        self.n_steps = settings.n_steps(data.n)
        self.done = 0
        self.history: list[list[float]] = []
        self.whole = True
        self._said_dead = False
        # Running means change with a forward pass, all else with the optimiser alone.
        self._forward_changes = any(isinstance(part, _BatchNorm) for part in self._trained.modules())

    def run(self, last: int, after_step: Callable[[], None], *, progress: bool) -> None:
        """Go on until `last` steps are done, and call `after_step` after each."""
        first = self.done
        bar = tqdm(total=self.n_steps, initial=first, desc="Sparse CLIP", unit="step", disable=not progress)
        shares = self._shares(first, last)
        with bar, in_mode(self._native, self._settings.trained == "all"):
            for images, texts in self._data.batches(shares):
                row = self._step(images, texts)
                self.done += 1
                self.history.append(row)
                self.whole = True
                bar.update()
                l0 = f"{row[3]:.0f}/{row[4]:.0f}"
                bar.set_postfix(loss=f"{row[2]:.3f}", L0=l0, scale=f"{row[5]:.1f}", refresh=False)
                after_step()

    def _shares(self, first: int, last: int) -> Iterator[Share]:
        """This process' pairs in each step to come, one epoch's order at a time."""
        per_epoch = self._settings.steps_per_epoch(self._data.n)
        order, draws, drawn = torch.empty(0), torch.empty(0), -1
        for step in range(first, last):
            epoch, place = divmod(step, per_epoch)
            if epoch != drawn:
                order, draws = order_of(self._data.n, self._settings.seed, epoch)
                drawn = epoch
            batch = order[place * self._settings.batch_size : (place + 1) * self._settings.batch_size]
            own = torch.cat(list(self._processes.share(batch, self._settings.n_accumulated)))
            yield Share(own, draws[own])

    def _step(self, images: Tensor, texts: Tensor) -> list[float]:
        settings, scale = self._settings, self._native.logit_scale
        lr = settings.lr_at(self.done, self.n_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        n_parts = settings.n_accumulated
        parts = list(enumerate(zip(images.chunk(n_parts), texts.chunk(n_parts), strict=True)))
        self._optimizer.zero_grad(set_to_none=True)
        self.whole = not self._forward_changes
        seen = contrastive_step(
            self._encode, parts, scale, l1=settings.l1, loss_of=self._loss,
            backward=lambda loss: self._scaler.scale(loss).backward(),
        )  # fmt: skip
        self._processes.average_gradients(self._parameters)
        self.whole = False
        self._scaler.unscale_(self._optimizer)
        if settings.clip_gradient is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, settings.clip_gradient)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            scale.clamp_(0, torch.tensor(settings.largest_logit_scale).log().item())
        seen = Step(*self._processes.mean([seen.loss, seen.l0_image, seen.l0_text], self._device))
        self._say_dead(seen)
        epoch = (self.done + 1) / settings.steps_per_epoch(self._data.n)
        return [self.done + 1, epoch, seen.loss, seen.l0_image, seen.l0_text, float(scale.detach().exp()), lr]

    def _say_dead(self, seen: Step) -> None:
        """One warning where the codes of a whole batch have become zero, which no gradient brings back."""
        dead = [name for name, l0 in (("pictures", seen.l0_image), ("texts", seen.l0_text)) if l0 == 0]
        if dead and not self._said_dead and self._processes.rank == 0:
            self._said_dead = True
            warnings.warn(f"step {self.done + 1}: every code of {' and '.join(dead)} is zero: nothing is learnt any "
                          "more; lower l1 or lr", stacklevel=6)  # fmt: skip

    def _encode(self, numbered: tuple[int, Any]) -> tuple[Tensor, Tensor]:
        """Codes of one part; what is random in a tower is the same each time, and in a training that was resumed."""
        number, part = numbered
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._precision():
            torch.manual_seed(hash((self._settings.seed, self.done, self._processes.rank, number)) % 2**63)
            return self._data.encode(part)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, _DTYPES[self._settings.precision])

    def state(self) -> dict[str, Any]:
        """All that `load` needs."""
        return {
            "weights": self._trained.state_dict(), "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(), "done": self.done,
            "history": torch.tensor(self.history, dtype=torch.float64),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Become what was between two steps."""
        self._trained.load_state_dict(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.done, self.history = int(state["done"]), state["history"].tolist()


def trained_part(native: HeadedCLIP, settings: TrainingSettings) -> nn.Module:
    """What of a Sparse CLIP is trained: all of it, or its heads and the factor."""
    if settings.trained == "all":
        return native
    part = nn.Module()
    part.image_head, part.text_head, part.logit_scale = native.image_head, native.text_head, native.logit_scale
    return part


def check_dtypes(native: HeadedCLIP, settings: TrainingSettings) -> None:
    """Raise `InputError` where what is trained is below float32: the optimiser's small steps would be rounded away."""
    for name, weight in trained_part(native, settings).named_parameters():
        if weight.requires_grad and below_float32(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            asked = settings.precision if settings.precision != "float32" else dtype
            raise InputError(f"{name} is {dtype}, in which AdamW's small steps are rounded away: load the model in "
                             f"float32 and pass precision={asked!r}, which is of the forward pass")  # fmt: skip


@contextmanager
def in_mode(native: HeadedCLIP, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside, with gradients; evaluation mode after."""
    with torch.inference_mode(False), torch.enable_grad():
        native.train(training)
        try:
            yield
        finally:
            native.eval()
