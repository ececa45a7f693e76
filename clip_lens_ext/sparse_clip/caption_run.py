"""What a training of a captioner is made of: its pairs in the order of the steps, and its state between two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import staged
from clip_lens_ext.sparse_clip.captioner import SparseCaptioner
from clip_lens_ext.sparse_clip.checks import checked_codes

_WARM_UP = 0.05
_LARGEST_GRADIENT = 1.0
_ADAPTER, _JOINT = 0, 1


class Pairs:
    """Codes with the ids of their captions, split and in the order of the steps."""

    def __init__(
        self, captioner: SparseCaptioner, codes: Tensor, captions: Sequence[str], held_out: float, seed: int
    ) -> None:
        self.captioner, self.codes, self.seed = captioner, checked_codes(codes, captioner.d_code), seed
        if isinstance(captions, str) or len(captions) != len(codes):
            raise InputError(f"{len(codes)} codes have as many captions, got {len(captions)}")
        empty = [i for i, text in enumerate(captions) if not isinstance(text, str) or not text.strip()]
        if empty:
            raise InputError(f"the caption number {empty[0]} is {captions[empty[0]]!r}: there is nothing to say")
        ids = [[*captioner.tokenizer.to_ids(text), captioner.tokenizer.end_id] for text in captions]
        room = captioner.n_positions
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if room is not None and captioner.n_prefix + len(ids[longest]) - 1 > room:
            raise InputError(f"the caption {captions[longest]!r} has {len(ids[longest]) - 1} tokens, which with the "
                             f"prefix do not fit into the {room} places of the language model")  # fmt: skip
        self.n_tokens = torch.tensor([len(row) for row in ids])
        self.ids = torch.full((len(ids), int(self.n_tokens.max())), captioner.tokenizer.end_id)
        for row, own in zip(self.ids, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        n_held = math.ceil(held_out * len(ids))
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        self.held, self.train = order[:n_held], order[n_held:]
        if len(self.train) == 0:
            raise InputError(f"of {len(ids)} pairs none is left to train on: hold out less than {held_out}")
        self.longest = int(self.n_tokens[self.train].max()) - 1
        self._orders: dict[int, Tensor] = {}

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of a step, a function of seed and step alone."""
        n = len(self.train)
        places = range(step * size, (step + 1) * size)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch)
                        for epoch in {place // n for place in places}}  # fmt: skip
        return self._rows(self.train[torch.stack([self._orders[place // n][place % n] for place in places])])

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + epoch)
        return torch.randperm(len(self.train), generator=generator)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over all tokens of the pairs that are not trained on, without dropout."""
        self.captioner.eval()
        total = 0.0
        for part in self.held.split(256):
            rows = self._rows(part)
            total += float(self.captioner.loss(*rows)) * int(rows[2].sum())
        self.captioner.train()
        return total / int(self.n_tokens[self.held].sum())

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = next(self.captioner.adapter.parameters()).device
        n_tokens = self.n_tokens[rows]
        ids = self.ids[rows, : int(n_tokens.max())]
        return self.codes[rows.to(self.codes.device)].to(device), ids.to(device), n_tokens.to(device)


class Run:
    """The state between two steps, and what a checkpoint has of it."""

    def __init__(self, captioner: SparseCaptioner, settings: dict[str, Any]) -> None:
        self.captioner, self.settings, self.done = captioner, settings, 0
        self.losses: list[float] = []
        self.measured: list[tuple[int, float]] = []
        self.stage: int | None = None
        self.optimizer: torch.optim.AdamW

    def step(self, codes: Tensor, ids: Tensor, n_tokens: Tensor) -> None:
        """One step of the optimizer.

        Raises:
            InputError: the loss is NaN or infinite.
        """
        first = self.settings["adapter_steps"]
        self._enter(_ADAPTER if self.done < first else _JOINT)
        name, start = ("adapter", 0) if self.done < first else ("joint", first)
        rate = _learning_rate(self.done - start, self.settings[f"{name}_steps"]) * self.settings[f"{name}_lr"]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        devices = [codes.device] if codes.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings["seed"] * 1_000_003 + self.done)  # dropout, the same after a resume
            loss = self.captioner.loss(codes, ids, n_tokens)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is NaN or infinite at step {self.done}: is the learning rate too high?")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.captioner.parameters(), _LARGEST_GRADIENT)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.done += 1

    def _enter(self, stage: int) -> None:
        """A new optimizer for a new stage."""
        if stage == self.stage:
            return
        self.stage = stage
        self.captioner.language_model.requires_grad_(stage == _JOINT)
        self.captioner.adapter.requires_grad_(True)
        weights = [weight for weight in self.captioner.parameters() if weight.requires_grad]
        decay = self.settings["weight_decay"]
        groups = [{"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": decay},
                  {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write everything that `resume` needs; a kill leaves the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"captioner": self.captioner.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "stage": self.stage, "done": self.done, "losses": self.losses, "measured": self.measured,
                 "about": about}  # fmt: skip
        with staged(path) as part:
            torch.save(state, part)

    def resume(self, path: Path, about: dict[str, Any]) -> None:
        """Go on where a file was written, if there is one.

        Raises:
            InputError: it is no checkpoint, or one of another training; it says what differs.
        """
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            found = state["about"]
        except Exception as error:  # torch and pickle each have their own
            raise InputError(f"{str(path)!r} is no checkpoint of a captioner: {type(error).__name__}: {error}")\
                from error  # fmt: skip
        differ = [name for name in about if found.get(name) != about[name]]
        if differ:
            shown = "; ".join(f"{name} was {found.get(name)!r} and is now {about[name]!r}" for name in differ)
            raise InputError(f"{str(path)!r} is the checkpoint of another training: {shown}; give the name of another "
                             "file, or delete it")  # fmt: skip
        self.captioner.load_state_dict(state["captioner"], strict=True)
        self._enter(state["stage"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.losses = state["done"], state["losses"]
        self.measured = [(int(step), float(loss)) for step, loss in state["measured"]]


def _learning_rate(step: int, n_steps: int) -> float:
    """Share of the highest rate: a linear rise, and a cosine down to zero."""
    warm = max(1, round(_WARM_UP * n_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))
