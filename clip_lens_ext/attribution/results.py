"""The result of an attribution method: sparse, labelled, with its sign, unit and origin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens_ext.errors import InputError, LoadError

_TENSORS = ("sample", "latent", "value", "activation", "prediction")
_OPTIONAL_TENSORS = ("token", "completeness_gap")


class Top(NamedTuple):
    """The greatest attributions of each sample and target, as `torch.topk` gives them.

    Where fewer latents are active than asked for, the rest has value NaN and latent -1.
    """

    values: Tensor
    latents: Tensor


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each active latent matters to each target, `[sample target latent]`, stored as (sample, latent) pairs.

    **Sign**: positive where the latent raises the prediction. Gradient methods give `z_i * dy/dz_i`, which
    approximates `y(as is) - y(latent i set to zero)`; exact ablation is that difference.

    Attributes:
        method: name of the method.
        sample, latent: the pairs `[pair]`, sorted by sample, (token,) latent.
        value: attribution `[pair target]`, in `unit`; summed over the SAE's tokens unless `token` is there.
        activation: the latent's activation, summed likewise, `[pair]`.
        prediction: the explained number before any edit, `[sample target]`.
        labels: one per target.
        n_sample, d_sae: sizes of the dense result.
        hook_name, tower, token_scope: the site.
        error_term: `"kept"` or `"dropped"`.
        unit: what value and prediction are measured in.
        token: index along the SAE's token axis of each pair, or None.
        n_token: size of that axis.
        seed: of a random method, else None.
        sample_names: one per sample, or empty.
        provenance: model, SAE hash, data fingerprint, versions.
        completeness_gap: of integrated gradients, `[sample target]`: the sum of the attributions minus the change of
            the prediction between baseline and input; else None.
        settings: further settings of the method, as plain JSON values: number of steps, variant, baseline, ...
    """

    method: str
    sample: Tensor
    latent: Tensor
    value: Tensor
    activation: Tensor
    prediction: Tensor
    labels: tuple[str, ...]
    n_sample: int
    d_sae: int
    hook_name: str
    tower: str
    token_scope: str
    error_term: str
    unit: str
    token: Tensor | None = None
    n_token: int = 1
    seed: int | None = None
    sample_names: tuple[str, ...] = ()
    provenance: dict[str, Any] | None = None
    completeness_gap: Tensor | None = None
    settings: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.sample)

    def __repr__(self) -> str:
        return (
            f"Attribution({self.method!r}, {self.n_sample} samples, {len(self.labels)} targets, "
            f"{len(self)} active pairs, {self.hook_name} of the {self.tower} tower, error term {self.error_term})"
        )

    def top(self, k: int = 10, *, absolute: bool = False) -> Top:
        """The `k` greatest attributions of each sample and target, most positive first.

        Args:
            k: how many.
            absolute: by magnitude instead; the values keep their sign.

        Returns:
            `Top` with values and latents, both `[sample target k]`.
        """
        if self.token is not None:
            raise InputError("top() ranks latents; this result is per token: ask the method for per_token=False")
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        shape = (self.n_sample, len(self.labels), k)
        values, latents = self.value.new_full(shape, torch.nan), torch.full(shape, -1, dtype=torch.int64)
        for sample in range(self.n_sample):
            own = (self.sample == sample).nonzero().flatten()
            found = self.value[own].T
            order = (found.abs() if absolute else found).argsort(dim=-1, descending=True, stable=True)[:, :k]
            values[sample, :, : order.shape[1]] = found.gather(1, order)
            latents[sample, :, : order.shape[1]] = self.latent[own].cpu()[order.cpu()]
        return Top(values, latents)

    def dense(self) -> Tensor:
        """`[sample target d_sae]`, zero where a latent is not active; `[sample target token d_sae]` if per token."""
        tokens = () if self.token is None else (self.n_token,)
        out = self.value.new_zeros(self.n_sample, len(self.labels), *tokens, self.d_sae)
        for target in range(len(self.labels)):
            index = (self.sample, self.latent) if self.token is None else (self.sample, self.token, self.latent)
            out[:, target][index] = self.value[:, target]
        return out

    def to_frame(self) -> pd.DataFrame:
        """One row for each pair and target, with the columns sample, target, latent, activation, attribution."""
        n_target = len(self.labels)
        frame = pd.DataFrame(
            {
                "sample": self.sample.repeat_interleave(n_target).cpu().numpy(),
                "target": list(self.labels) * len(self),
                "latent": self.latent.repeat_interleave(n_target).cpu().numpy(),
                "activation": self.activation.repeat_interleave(n_target).float().cpu().numpy(),
                "attribution": self.value.flatten().float().cpu().numpy(),
            }
        )
        if self.token is not None:
            frame.insert(1, "token", self.token.repeat_interleave(n_target).cpu().numpy())
        if self.sample_names:
            frame.insert(1, "name", [self.sample_names[i] for i in frame["sample"]])
        return frame

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; the labels and the origin are JSON in its header."""
        tensors = {name: getattr(self, name).contiguous().cpu() for name in _TENSORS}
        given = {name: getattr(self, name) for name in _OPTIONAL_TENSORS}
        tensors |= {name: value.contiguous().cpu() for name, value in given.items() if value is not None}
        fields = {key: value for key, value in self.__dict__.items() if key not in (*_TENSORS, *_OPTIONAL_TENSORS)}
        save_file(tensors, path, metadata={"clip_lens_ext.Attribution": json.dumps(fields)})

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, or it holds no attribution.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            fields = json.loads(metadata["clip_lens_ext.Attribution"])
            fields["labels"], fields["sample_names"] = tuple(fields["labels"]), tuple(fields["sample_names"])
            return cls(**fields, **tensors)
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise LoadError(f"{path} is no file of Attribution.save: {type(error).__name__}: {error}") from error
