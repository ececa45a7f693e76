"""What attributions over a whole data set come to: mean, share and counts for each target and latent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.attribution.results import Top
from clip_lens_ext.attribution.shards import check_mergeable, joined_origin, same_origin
from clip_lens_ext.errors import InputError
from clip_lens_ext.image_files import Skipped
from clip_lens_ext.result_files import load_result, save_result


@dataclass(frozen=True, eq=False)
class AttributionSummary:
    """Attributions of one method, added up over the images of a data set.

    **Sign** and unit are those of the method: positive where the latent raises the prediction.

    Attributes:
        method: name of the method.
        total: sum of the attributions over the images of each target, float64 `[target d_sae]`.
        n_top: images in which the latent is among the `k` greatest attributions of the target, `[target d_sae]`.
        n_active: images in which the latent is active, `[target d_sae]`.
        n_images: images of each target, `[target]`.
        labels: one per target.
        k: of `n_top`.
        own_images: whether each target has images of its own, or all targets have all images.
        unit: of `total` and `mean`.
        hook_name, tower, token_scope, error_term: the site.
        skipped: what could not be read.
        provenance: model, SAE hash, data and target fingerprints, versions.
    """

    method: str
    total: Tensor
    n_top: Tensor
    n_active: Tensor
    n_images: Tensor
    labels: tuple[str, ...]
    k: int
    own_images: bool
    unit: str
    hook_name: str
    tower: str
    token_scope: str
    error_term: str
    skipped: tuple[Skipped, ...]
    provenance: dict[str, Any]

    @property
    def d_sae(self) -> int:
        """Number of latents of the SAE."""
        return self.total.shape[1]

    @property
    def mean(self) -> Tensor:
        """Mean attribution over the images of each target, `[target d_sae]`; NaN for a target without images.

        An image in which a latent is not active counts with zero.
        """
        return self.total / self.n_images[:, None]

    @property
    def share(self) -> Tensor:
        """Each latent's share of all that speaks for a target, `[target d_sae]`.

        `share[c, j] = A[c, j] / sum_i max(A[c, i], 0)`, with `A` the mean over the images: a ratio of means and no mean
        of ratios, so that images with small attributions do not speak louder. The positive shares of a target add up
        to 1, a latent that speaks against it has a negative one, and NaN is where nothing speaks for it. Attributions
        do not add up to the prediction, so this is no share of the prediction.

        Reference: the share is a reading of Dreyer et al. 2505.20229, which reports percentages and no formula.
        """
        for_it = self.total.clamp(min=0).sum(dim=1, keepdim=True)
        return torch.where(for_it > 0, self.total / for_it, torch.nan)

    def __repr__(self) -> str:
        images = f"{int(self.n_images.min())} to {int(self.n_images.max())}" if self.own_images else self.n_images[0]
        return (
            f"AttributionSummary({self.method!r}, {images} images, {len(self.labels)} targets, {self.d_sae} latents, "
            f"{self.hook_name} of the {self.tower} tower, error term {self.error_term})"
        )

    def top(self, k: int = 10) -> Top:
        """The `k` latents of the greatest mean attribution, `[target k]`; NaN and -1 where fewer were ever active."""
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        mean = self.mean.masked_fill(self.n_active == 0, -torch.inf)
        order = mean.argsort(dim=1, descending=True, stable=True)[:, :k]
        shape = (len(self.labels), k)
        values, latents = torch.full(shape, torch.nan, dtype=mean.dtype), torch.full(shape, -1)
        found = mean.gather(1, order)
        seen = self.n_active.gather(1, order) > 0
        values[:, : order.shape[1]] = torch.where(seen, found, torch.nan)
        latents[:, : order.shape[1]] = torch.where(seen, order, -1)
        return Top(values, latents)

    def to_frame(self) -> pd.DataFrame:
        """One row for each target and latent that is active in one of its images, greatest mean attribution first."""
        target, latent = (self.n_active > 0).nonzero(as_tuple=True)
        frame = pd.DataFrame({
            "target": [self.labels[i] for i in target.tolist()], "latent": latent.numpy(),
            "mean_attribution": self.mean[target, latent].numpy(), "share": self.share[target, latent].numpy(),
            "n_top": self.n_top[target, latent].numpy(), "n_active": self.n_active[target, latent].numpy(),
            "n_images": self.n_images[target].numpy(),
        })  # fmt: skip
        order = frame.assign(number=target.numpy()).sort_values(
            ["number", "mean_attribution"], ascending=[True, False], kind="stable"
        )
        return frame.loc[order.index].reset_index(drop=True)

    def merge(self, other: AttributionSummary) -> AttributionSummary:
        """Both together, as one pass over the images of both would give it, up to rounding.

        Raises:
            InputError: the two differ in more than their images; it names in what.
        """
        names = ("method", "labels", "d_sae", "k", "own_images", "unit", "hook_name", "tower", "token_scope",
                 "error_term")  # fmt: skip
        mine, theirs = ({**{name: getattr(one, name) for name in names}, **same_origin(one.provenance)}
                        for one in (self, other))  # fmt: skip
        check_mergeable("summaries", mine, theirs)
        added = {name: getattr(self, name) + getattr(other, name)
                 for name in ("total", "n_top", "n_active", "n_images", "skipped")}  # fmt: skip
        return replace(self, **added, provenance=joined_origin(self.provenance, other.provenance))

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> AttributionSummary:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        shapes = {self.total.shape, self.n_top.shape, self.n_active.shape, (len(self.labels), self.d_sae)}
        return len(shapes) == 1 and self.n_images.shape == (len(self.labels),)
