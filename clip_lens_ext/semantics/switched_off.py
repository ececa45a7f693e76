"""The result of `switch_off`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.image_files import Skipped
from clip_lens_ext.result_files import load_result, save_result


@dataclass(frozen=True, eq=False)
class SwitchedOff:
    """Predictions with sets of latents at zero, beside as many random latents of like activation at zero.

    Attributes:
        sets: names of the sets.
        latents: by set, the latents that were set to zero.
        prompts: what is predicted.
        names: of the samples.
        indexes: their positions in the data, `[sample]`.
        before: predictions as they are, `[sample prompt]`.
        after: with each set at zero, `[set sample prompt]`.
        control: with random active latents at zero instead, `[set draw sample prompt]`.
        n_off: latents of the set that were active, which is as many as each control has, `[set sample]`; a control has
            fewer where a sample has no more active ones.
        activation: what they were worth: activations times the norms of their decoder rows, summed over the SAE's
            tokens, `[set sample]`.
        control_activation: the same of the controls, `[set draw sample]`.
        hook_name, token_scope: where the SAE reads.
        seed: of the controls.
        skipped: what could not be read.
        provenance: model, SAE hash, data fingerprint, versions.
    """

    sets: tuple[str, ...]
    latents: dict[str, list[int]]
    prompts: tuple[str, ...]
    names: tuple[str, ...]
    indexes: Tensor
    before: Tensor
    after: Tensor
    control: Tensor
    n_off: Tensor
    activation: Tensor
    control_activation: Tensor
    hook_name: str
    token_scope: str
    seed: int
    skipped: tuple[Skipped, ...]
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        return (
            f"SwitchedOff({', '.join(f'{name}: {len(latents)} latents' for name, latents in self.latents.items())}; "
            f"{len(self.names)} samples, {len(self.prompts)} prompts, {self.control.shape[1]} controls)"
        )

    @property
    def winner(self) -> Tensor:
        """Number of the greatest prompt before, `[sample]`."""
        return self.before.argmax(dim=-1)

    @property
    def winner_after(self) -> Tensor:
        """Number of the greatest prompt with each set at zero, `[set sample]`."""
        return self.after.argmax(dim=-1)

    @property
    def winner_control(self) -> Tensor:
        """Number of the greatest prompt with random latents at zero, `[set draw sample]`."""
        return self.control.argmax(dim=-1)

    def number(self, name: str) -> int:
        """The number of a set.

        Raises:
            InputError: no such set.
        """
        if name not in self.sets:
            raise InputError(f"no set {name!r}{near(name, self.sets)}; there are {', '.join(self.sets)}")
        return self.sets.index(name)

    def to_frame(self) -> pd.DataFrame:
        """One row for each set: how often the greatest prompt changes, and what was taken away, beside the controls."""
        changed = (self.winner_after != self.winner).double().mean(dim=-1)
        by_chance = (self.winner_control != self.winner).double().mean(dim=(-2, -1))
        ratio = self.control_activation.double().mean(dim=(-2, -1)) / self.activation.double().mean(dim=-1)
        return pd.DataFrame({
            "set": self.sets, "n_latents": [len(self.latents[name]) for name in self.sets],
            "n_off": self.n_off.double().mean(dim=-1).numpy(), "changed": changed.numpy(),
            "changed_by_controls": by_chance.numpy(), "control_activation": ratio.numpy(),
        })  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> SwitchedOff:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        n_set, n_sample, n_prompt = len(self.sets), len(self.names), len(self.prompts)
        return (
            self.after.shape == (n_set, n_sample, n_prompt)
            and self.before.shape == (n_sample, n_prompt)
            and self.control.shape[2:] == (n_sample, n_prompt)
            and torch.Size((n_set, n_sample)) == self.n_off.shape
            and set(self.sets) == set(self.latents)
        )
