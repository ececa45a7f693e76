"""The result of `measure_interventions`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.result_files import load_result, save_result

UNTOUCHED: Final = "untouched"


@dataclass(frozen=True, eq=False)
class InterventionEffects:
    """What each edit does to latents and predictions; a row is one edit against the untouched pictures or a control.

    **Sign**: positive where the edit raises. Predictions are cosines, activations are in the SAE's units.

    Attributes:
        names, kinds, subjects: of the edit, one per row.
        against: `"untouched"`, or the name of the control whose pictures count as before, one per row.
        prompts: what is predicted.
        n_pairs: pairs of pictures, `[row]`.
        latent_before, latent_after, latent_change, latent_error: means over the pairs, and the standard error of the
            change, float64 `[row d_sae]`.
        prediction_before, prediction_after, prediction_change, prediction_error: likewise `[row prompt]`.
        through_row, through_prompt, through_latent: for which edit, prompt and latent the way through the latent was
            measured, `[entry]`.
        through_change, through_error: the part of the prediction's change that goes through the latent, `[entry]`.
        hook_name, token_scope: where the SAE reads.
        provenance: model, SAE hash, fingerprints of the pictures, versions.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    subjects: tuple[str, ...]
    against: tuple[str, ...]
    prompts: tuple[str, ...]
    n_pairs: Tensor
    latent_before: Tensor
    latent_after: Tensor
    latent_change: Tensor
    latent_error: Tensor
    prediction_before: Tensor
    prediction_after: Tensor
    prediction_change: Tensor
    prediction_error: Tensor
    through_row: Tensor
    through_prompt: Tensor
    through_latent: Tensor
    through_change: Tensor
    through_error: Tensor
    hook_name: str
    token_scope: str
    provenance: dict[str, Any]

    @property
    def latent_t(self) -> Tensor:
        """t values of the changes of latents, `[row d_sae]`; 0 where nothing changes."""
        return _t(self.latent_change, self.latent_error)

    @property
    def prediction_t(self) -> Tensor:
        """t values of the changes of predictions, `[row prompt]`; 0 where nothing changes."""
        return _t(self.prediction_change, self.prediction_error)

    def __repr__(self) -> str:
        return (
            f"InterventionEffects({len(set(self.names))} edits in {len(self.names)} rows, {len(self.prompts)} prompts, "
            f"{self.latent_change.shape[1]} latents, {self.hook_name})"
        )

    def row(self, name: str, against: str = UNTOUCHED) -> int:
        """The number of a row.

        Raises:
            InputError: no edit of this name, or it has no such control.
        """
        found = [i for i, pair in enumerate(zip(self.names, self.against, strict=True)) if pair == (name, against)]
        if not found:
            known = [f"{one} against {other}" for one, other in zip(self.names, self.against, strict=True)]
            hint = near(f"{name} against {against}", known)
            raise InputError(f"no edit {name!r} against {against!r} was measured{hint}")
        return found[0]

    def rows(self, *kinds: str, against: str | None = UNTOUCHED) -> list[int]:
        """The rows of some kinds of edits, against the untouched pictures, one control, or (None) anything."""
        return [
            i
            for i, (kind, other) in enumerate(zip(self.kinds, self.against, strict=True))
            if kind in kinds and against in (None, other)
        ]

    def through(self, row: int, prompt: str) -> dict[int, tuple[float, float]]:
        """Latent -> its part of the change of one prediction, and the standard error; greatest part first.

        Raises:
            InputError: no such prompt was measured.
        """
        if prompt not in self.prompts:
            raise InputError(f"the prompt {prompt!r} was not measured{near(prompt, self.prompts)}")
        number = self.prompts.index(prompt)
        here = ((self.through_row == row) & (self.through_prompt == number)).nonzero().flatten()
        here = here[self.through_change[here].argsort(descending=True, stable=True)]
        return {
            int(self.through_latent[i]): (float(self.through_change[i]), float(self.through_error[i])) for i in here
        }

    def to_frame(self) -> pd.DataFrame:
        """One row for each edit, control and prompt: its prediction before and after, change, error and t value."""
        t = self.prediction_t
        return pd.DataFrame([
            {"intervention": self.names[i], "kind": self.kinds[i], "subject": self.subjects[i],
             "against": self.against[i], "prompt": prompt, "n_pairs": int(self.n_pairs[i]),
             "before": float(self.prediction_before[i, c]), "after": float(self.prediction_after[i, c]),
             "change": float(self.prediction_change[i, c]), "error": float(self.prediction_error[i, c]),
             "t": float(t[i, c])}
            for i in range(len(self.names)) for c, prompt in enumerate(self.prompts)
        ])  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> InterventionEffects:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path)


def _t(change: Tensor, error: Tensor) -> Tensor:
    # Every pair changes by the same amount: no spread at all is no reason for no t value.
    return torch.where(change == 0, 0.0, change / error.clamp(min=1e-12))
