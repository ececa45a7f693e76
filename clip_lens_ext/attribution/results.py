"""The result of an attribution method: sparse, labelled, with its sign, unit and origin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.attribution.shards import check_mergeable, joined_origin, same_origin
from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import load_result, save_result

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

    def merge(self, other: Attribution) -> Attribution:
        """The attributions of both, the samples of `other` after one's own.

        Args:
            other: of the same method and settings, site, SAE and target, on other samples.

        Raises:
            InputError: the two differ in more than their samples; it names in what.
        """
        check_mergeable("attributions", self._settings(), other._settings())
        shifted = {"sample": other.sample + self.n_sample}
        tensors: dict[str, Any] = {
            name: torch.cat([mine, shifted.get(name, getattr(other, name)).to(mine.device)])
            for name in (*_TENSORS, *_OPTIONAL_TENSORS)
            if (mine := getattr(self, name)) is not None
        }
        return replace(
            self,
            **tensors,
            n_sample=self.n_sample + other.n_sample,
            sample_names=self.sample_names + other.sample_names,
            provenance=None if self.provenance is None else joined_origin(self.provenance, other.provenance or {}),
        )

    def _settings(self) -> dict[str, Any]:
        same = ("method", "settings", "seed", "labels", "unit", "hook_name", "tower", "token_scope", "error_term",
                "d_sae", "n_token")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in same},
            "per_token": self.token is not None,
            "completeness_gap": None if self.completeness_gap is None else "there",
            "sample_names": "there" if self.sample_names else "missing",
            **same_origin(self.provenance),
        }

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or it holds no attribution.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        n_target = len(self.labels)
        columns = {self.sample.shape, self.latent.shape, self.activation.shape, self.value.shape[:-1]}
        columns |= set() if self.token is None else {self.token.shape}
        sizes = ((self.sample, self.n_sample), (self.latent, self.d_sae), (self.token, self.n_token))
        within = all(len(column) == 0 or int(column.max()) < size for column, size in sizes if column is not None)
        same = len(columns) == 1 and self.value.shape[-1] == n_target
        return same and within and self.prediction.shape == (self.n_sample, n_target)
