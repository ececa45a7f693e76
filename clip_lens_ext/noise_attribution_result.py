"""The result of `noise_share`: attributions in two parts that add up."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.shards import check_mergeable
from clip_lens_ext.result_files import load_result, save_result

_SAME = ("noise_hook", "rank", "d", "rule", "cut")


@dataclass(frozen=True, eq=False)
class NoiseShare:
    """Attributions, and what of each passes through a noise subspace.

    **Sign** and unit are those of the attribution: a part is positive where it raises the prediction. The two parts may
    have opposite signs, and either may be greater than the whole.

    Attributes:
        total: the attributions, by attribution patching.
        noise: what of each passes through the noise, `[pair target]`, pairs as in `total`.
        noise_hook: where the noise lies.
        rank, d: dimension of the noise, and of the space.
        rule, cut: by which the split was made.
    """

    total: Attribution
    noise: Tensor
    noise_hook: str
    rank: int
    d: int
    rule: str
    cut: str

    @property
    def signal(self) -> Tensor:
        """What of each attribution passes through the complement, `[pair target]`: `total.value - noise`."""
        return self.total.value - self.noise

    @property
    def share(self) -> Tensor:
        """`noise / attribution`, `[pair target]`; NaN where the attribution is zero.

        Below 0 or above 1 where noise and signal have opposite signs. The mean over random (Haar) subspaces of the same
        dimension is `by_chance`, for every pair.
        """
        return torch.where(self.total.value == 0, torch.nan, self.noise / self.total.value)

    @property
    def by_chance(self) -> float:
        """The mean of `share` over random subspaces of the same dimension: `rank / d`."""
        return self.rank / self.d

    def __repr__(self) -> str:
        return (
            f"NoiseShare({self.rank} of {self.d} dimensions at {self.noise_hook}, {len(self.total)} active pairs, "
            f"{len(self.total.labels)} targets, {self.total.hook_name} of the {self.total.tower} tower)"
        )

    def part(self, name: str) -> Attribution:
        """The `"noise"` or the `"signal"` as an attribution of its own, to rank, to sum up or to plot.

        Raises:
            KeyError: another name.
        """
        value = {"noise": self.noise, "signal": self.signal}[name]
        settings = {**(self.total.settings or {}), "part": name, **{field: getattr(self, field) for field in _SAME}}
        return replace(self.total, value=value, method=f"{self.total.method}, {name}", settings=settings)

    def to_frame(self) -> pd.DataFrame:
        """One row for each pair and target: those of the attribution, with `noise`, `signal` and `share`."""
        frame = self.total.to_frame()
        for name in ("noise", "signal", "share"):
            frame[name] = getattr(self, name).flatten().float().cpu().numpy()
        return frame

    def of_latents(self) -> pd.DataFrame:
        """One row for each target and latent that is active in any sample, greatest absolute noise first.

        Columns: `target`, `latent`, `n` (pairs), the sums `attribution`, `noise` and `signal` over the samples, and
        `share`, the mean of the shares weighted by the size of the attribution: `sum sign(a) noise / sum |a|`. So
        attributions of both signs do not cancel in its denominator; its mean by chance is `by_chance` too.
        """
        latents, place = self.total.latent.cpu().unique(return_inverse=True)
        count = torch.bincount(place, minlength=len(latents))
        whole, noise = self.total.value.double().cpu(), self.noise.double().cpu()

        def summed(value: Tensor) -> Tensor:
            return torch.zeros(len(latents), whole.shape[1], dtype=torch.float64).index_add_(0, place, value)

        sums = {"attribution": summed(whole), "noise": summed(noise), "signal": summed(whole - noise),
                "share": summed(whole.sign() * noise) / summed(whole.abs())}  # fmt: skip
        n_target = len(self.total.labels)
        frame = pd.DataFrame({
            "target": list(self.total.labels) * len(latents),
            "latent": latents.repeat_interleave(n_target).numpy(), "n": count.repeat_interleave(n_target).numpy(),
            **{name: value.flatten().numpy() for name, value in sums.items()},
        })  # fmt: skip
        return frame.sort_values("noise", key=lambda column: -column.abs(), kind="stable", ignore_index=True)

    def merge(self, other: NoiseShare) -> NoiseShare:
        """The attributions of both, the samples of `other` after one's own.

        Raises:
            InputError: they are of other noise, or differ in more than their samples; it names in what.
        """
        check_mergeable("shares of noise", *({name: getattr(one, name) for name in _SAME} for one in (self, other)))
        noise = torch.cat([self.noise, other.noise.to(self.noise.device)])
        return replace(self, total=self.total.merge(other.total), noise=noise)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NoiseShare:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        return self.total._fits() and self.noise.shape == self.total.value.shape
