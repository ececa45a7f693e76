"""The result of `faithfulness`: curves, areas, ranks and overlaps of several methods, with intervals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.attribution.shards import check_mergeable, joined_origin, same_origin
from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.errors import InputError, near
from clip_lens_ext.result_files import load_result, save_result

Measure = Literal["rank_correlation", "overlap", "deletion_area", "insertion_area"]
MEASURES: tuple[str, ...] = get_args(Measure)
_BY_SAMPLE = {"deletion": 1, "insertion": 1, "rank_correlation": 1, "overlap": 1, "n_active": 0, "n_compared": 0}


class Difference(NamedTuple):
    """One method's mean minus another's over the same images, with the interval of that difference."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How far the order of each method predicts what zeroing latents does, on one set of samples.

    Attributes:
        methods: names, in the order of the first axis everywhere.
        unsigned: those of them that say how much a latent matters and not which way; their rank correlation and overlap
            are with the magnitude of exact ablation.
        steps: after how many latents the curves look, ascending, 0 first.
        deletion: prediction after each step, `[method sample target step]`: step 0 is the unedited prediction, step n
            has the first n latents of the order at zero. It stays at its last value where an order has come to its end.
        insertion: the same from the other side: step 0 has all active latents at zero, step n the first n back.
        rank_correlation: Spearman's with exact ablation over the compared latents, `[method sample target]`; NaN where
            a method's values are all equal or fewer than two latents are compared.
        overlap: share of exact ablation's `k` greatest compared latents that are among the method's `k` greatest,
            `[method sample target]`; NaN where no more than `k` are compared: all are in both, which says nothing.
        n_active: active latents of each sample, `[sample]`.
        n_compared: those of them that exact ablation has a value for, `[sample]`: all, unless it was given for a part.
        labels: one per target.
        unit: of the predictions.
        hook_name, token_scope, error_term: the site; the same for every method.
        k: of the overlap.
        seed: of the random order and of the bootstrap.
        n_bootstrap, confidence: draws and confidence of the intervals.
        provenance: model, SAE hash, data and target fingerprints, versions.
    """

    methods: tuple[str, ...]
    unsigned: tuple[str, ...]
    steps: tuple[int, ...]
    deletion: Tensor
    insertion: Tensor
    rank_correlation: Tensor
    overlap: Tensor
    n_active: Tensor
    n_compared: Tensor
    labels: tuple[str, ...]
    unit: str
    hook_name: str
    token_scope: str
    error_term: str
    k: int
    seed: int
    n_bootstrap: int
    confidence: float
    provenance: dict[str, Any]

    @property
    def n_sample(self) -> int:
        """Number of samples."""
        return self.deletion.shape[1]

    @property
    def n_steps(self) -> int:
        """Latents that an order deletes or inserts at most."""
        return self.steps[-1]

    @property
    def deletion_area(self) -> Tensor:
        """Mean of the deletion curve over `steps`, `[method sample target]`, in `unit`; lower is better."""
        return self.deletion.mean(dim=-1)

    @property
    def insertion_area(self) -> Tensor:
        """Mean of the insertion curve over `steps`, `[method sample target]`, in `unit`; higher is better."""
        return self.insertion.mean(dim=-1)

    def __repr__(self) -> str:
        return (f"Faithfulness({len(self.methods)} methods, {self.n_sample} samples, {len(self.labels)} targets, "
                f"{self.n_steps} steps, {self.hook_name}, error term {self.error_term})")  # fmt: skip

    def mean(self, measure: Measure) -> Tensor:
        """Mean of a measure over samples and targets, float64 `[method]`; NaN values are left out."""
        return self._values(measure).flatten(1).nanmean(dim=1)

    def interval(self, measure: Measure) -> Tensor:
        """Bootstrap interval over the samples of `mean(measure)`, float64 `[method 2]`; NaN for a single sample."""
        return self._intervals(self._values(measure))

    def difference(self, first: str, second: str, measure: Measure = "rank_correlation") -> Difference:
        """The mean of one method minus that of another, over the samples and targets at which both are defined.

        The interval draws both from the same samples, so it can exclude zero where the two intervals overlap.

        Raises:
            InputError: there is no such method or measure.
        """
        values = self._values(measure)
        gap = values[self._row(first)] - values[self._row(second)]
        low, high = self._intervals(gap[None])[0].tolist()
        return Difference(float(gap.nanmean()), low, high)

    def to_frame(self) -> pd.DataFrame:
        """One row per method: the mean of each measure and the ends of its interval, and predictions at three states.

        The means are over samples and targets. `prediction_before` is the unedited one, `prediction_after` that after
        all deletion steps, `prediction_emptied` that with all active latents at zero. `n_undefined` counts rank
        correlations that do not exist, `n_compared` the latents over which ranks were compared, of all samples.
        """
        columns: dict[str, Any] = {"method": self.methods, "signed": [one not in self.unsigned for one in self.methods]}
        values = torch.stack([self._values(measure) for measure in MEASURES])
        means = values.flatten(2).nanmean(dim=2)
        intervals = self._intervals(values.flatten(0, 1)).reshape(*values.shape[:2], 2)
        for row, measure in enumerate(MEASURES):
            columns[measure] = means[row].tolist()
            columns[f"{measure}_low"], columns[f"{measure}_high"] = intervals[row].T.tolist()
        states = {"before": self.deletion[..., 0], "after": self.deletion[..., -1], "emptied": self.insertion[..., 0]}
        for name, state in states.items():
            columns[f"prediction_{name}"] = state.flatten(1).double().mean(dim=1).tolist()
        columns["n_undefined"] = self.rank_correlation.flatten(1).isnan().sum(dim=1).tolist()
        columns["n_compared"] = int(self.n_compared.sum())
        return pd.DataFrame(columns)

    def merge(self, other: Faithfulness) -> Faithfulness:
        """Both on all their samples, those of `other` after one's own.

        Args:
            other: of the same methods, site, target and settings, on other samples. Its random order may have another
                seed; one's own seed is kept for the bootstrap.

        Raises:
            InputError: the two differ in more than their samples; it names in what.
        """
        check_mergeable("comparisons", self._settings(), other._settings())
        joined: dict[str, Any] = {
            name: torch.cat([getattr(self, name), getattr(other, name).to(getattr(self, name).device)], dim=axis)
            for name, axis in _BY_SAMPLE.items()
        }
        provenance = joined_origin(self.provenance, other.provenance)
        return replace(self, **joined, provenance=provenance)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Faithfulness:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        whole = (len(self.methods), self.n_sample, len(self.labels))
        curves = {self.deletion.shape, self.insertion.shape, (*whole, len(self.steps))}
        ranks = {self.rank_correlation.shape, self.overlap.shape, whole}
        counts = {self.n_active.shape, self.n_compared.shape, (self.n_sample,)}
        return len(curves) == len(ranks) == len(counts) == 1

    def _values(self, measure: str) -> Tensor:
        if measure not in MEASURES:
            raise InputError(f"no measure {measure!r}; there are {', '.join(MEASURES)}{near(measure, MEASURES)}")
        return getattr(self, measure).double().cpu()

    def _intervals(self, values: Tensor) -> Tensor:
        return bootstrap_intervals(values, n_bootstrap=self.n_bootstrap, seed=self.seed, confidence=self.confidence)

    def _row(self, method: str) -> int:
        if method not in self.methods:
            raise InputError(f"no method {method!r} in this comparison of {', '.join(self.methods)}"
                             f"{near(method, self.methods)}")  # fmt: skip
        return self.methods.index(method)

    def _settings(self) -> dict[str, Any]:
        names = ("methods", "unsigned", "labels", "unit", "hook_name", "token_scope", "error_term", "steps", "k",
                 "n_bootstrap", "confidence")  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, **same_origin(self.provenance)}
