"""A linear classifier beside text embeddings: do both heads rest on the same latents?

For each class and latent the share of the attribution (see `AttributionSummary.share`) under a linear head on the
image embedding, and under the cosine with the class's text embedding. Shares have no unit, so a logit and a cosine can
be compared. A latent with a large share under the probe and a small one under the text is one that the probe learnt
from its training data, and that the words do not ask for.

Reference: Dreyer et al. 2505.20229 reports such a comparison; its formulas are not public, so these are our own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.data_pass import AttributionPass
from clip_lens_ext.attribution.methods import Method
from clip_lens_ext.attribution.ranks import spearman, top_overlap
from clip_lens_ext.attribution.shards import check_mergeable
from clip_lens_ext.attribution.site import ErrorTerm
from clip_lens_ext.attribution.summary import AttributionSummary
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.data import Preprocess
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


@dataclass(frozen=True, eq=False)
class HeadComparison:
    """The attributions of two heads for the same classes, over the same images.

    Attributes:
        labels: the classes, as the probe names them.
        probe, texts: the summary under each head; their labels may differ, their order does not.
        rank_correlation: Spearman's between the two shares, over the latents that are active in at least one image of
            the class, float64 `[class]`; NaN where fewer than two are or all shares are equal.
        overlap: how many of the `k` greatest shares the two have in common, over `k`, float64 `[class]`;
            NaN where no more than `k` latents are active in its images.
        k: of the overlap.
    """

    labels: tuple[str, ...]
    probe: AttributionSummary
    texts: AttributionSummary
    rank_correlation: Tensor
    overlap: Tensor
    k: int

    @classmethod
    def of(cls, probe: AttributionSummary, texts: AttributionSummary, *, k: int = 10) -> HeadComparison:
        """Compare two summaries of the same images, one under each head, for the same classes in the same order.

        Args:
            probe, texts: the summaries.
            k: how many of the greatest shares the overlap compares.

        Raises:
            InputError: the two are not of the same images and SAE, or not of as many classes.
        """
        mine, theirs = (
            {"n_images": one.n_images.tolist(), "d_sae": one.d_sae, "hook_name": one.hook_name, "method": one.method,
             "data_fingerprint": one.provenance.get("data_fingerprint")}
            for one in (probe, texts)
        )  # fmt: skip
        check_mergeable("summaries", mine, theirs)
        correlation, overlap = [], []
        for number in range(len(probe.labels)):
            seen = probe.n_active[number] > 0
            first, second = (summary.share[number, seen] for summary in (probe, texts))
            defined = bool(torch.isfinite(first).all() and torch.isfinite(second).all())
            correlation.append(spearman(first, second) if defined else torch.nan)
            overlap.append(float(top_overlap(first[:, None], second[:, None], k)[0]) if defined else torch.nan)
        tables = [torch.tensor(values, dtype=torch.float64) for values in (correlation, overlap)]
        return cls(probe.labels, probe, texts, tables[0], tables[1], k)

    def merge(self, other: HeadComparison) -> HeadComparison:
        """Both on all their images.

        Raises:
            InputError: the two differ in more than their images; it names in what.
        """
        check_mergeable("comparisons", {"k": self.k}, {"k": other.k})
        return HeadComparison.of(self.probe.merge(other.probe), self.texts.merge(other.texts), k=self.k)

    def __repr__(self) -> str:
        return (f"HeadComparison({len(self.labels)} classes, mean rank correlation "
                f"{float(self.rank_correlation.nanmean()):.3f}, mean overlap of the top {self.k} "
                f"{float(self.overlap.nanmean()):.3f})")  # fmt: skip

    def to_frame(self) -> pd.DataFrame:
        """One row for each class and latent that is active in one of its images, with both shares.

        `difference` is the probe's share minus the text's; the greatest comes first in each class.
        """
        target, latent = (self.probe.n_active > 0).nonzero(as_tuple=True)
        shares = [summary.share[target, latent].numpy() for summary in (self.probe, self.texts)]
        frame = pd.DataFrame({
            "class": [self.labels[i] for i in target.tolist()], "latent": latent.numpy(), "share_probe": shares[0],
            "share_text": shares[1], "difference": shares[0] - shares[1],
            "n_active": self.probe.n_active[target, latent].numpy(), "n_images": self.probe.n_images[target].numpy(),
        })  # fmt: skip
        order = frame.assign(number=target.numpy()).sort_values(
            ["number", "difference"], ascending=[True, False], kind="stable"
        )
        return frame.loc[order.index].reset_index(drop=True)


def compare_heads(
    tower: HookedTower,
    images: Any,
    sae: SAE,
    probe: Target,
    texts: Target,
    *,
    method: str | Method = "attribution_patching",
    k: int = 10,
    target_of: Sequence[int] | Tensor | None = None,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> HeadComparison:
    """Each latent's share of the attribution under a linear classifier, and under text embeddings for the same classes.

    The prefix of each batch runs once for both heads.

    Args:
        tower: the image tower.
        images: samples, as `clip_lens_ext.data.image_batches` takes them.
        sae: an SAE of the tower.
        probe: the classes of the linear head, one target each.
        texts: the same classes in the same order, by text.
        method, target_of, hook_name, token_scope, error_term, preprocess, batch_size: as in `aggregate_attributions`.
        k: how many of the greatest shares the overlap compares.
        checkpoint, checkpoint_every: as in `aggregate_attributions`.
        progress: draw a bar.

    Returns:
        `HeadComparison`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: the two heads have other classes or another order of them, or as in `aggregate_attributions`.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(6, seed=0, split="test").images)
        >>> texts = cle.text_target(clip, world.prompts()[:2])
        >>> weight = clip.vision(pixels)[:2] - clip.vision(pixels)[2:4]  # a stand-in for a trained classifier
        >>> probe = cle.direction_target(weight, labels=texts.labels, cosine=False)
        >>> found = compare_heads(clip.vision, pixels, sae, probe, texts, progress=False)
        >>> found.rank_correlation.shape, found.to_frame().columns.tolist()[:4]
        (torch.Size([2]), ['class', 'latent', 'share_probe', 'share_text'])
    """
    _check_classes(probe, texts)
    explained = AttributionPass(tower, sae, (probe, texts), method, k, target_of, hook_name, token_scope, error_term)
    both = explained.run(
        images, preprocess=preprocess, batch_size=batch_size, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
        progress=progress,
    )  # fmt: skip
    return HeadComparison.of(*both, k=k)


def _check_classes(probe: Target, texts: Target) -> None:
    if len(probe) != len(texts):
        raise InputError(
            f"the probe has {len(probe)} classes and the texts {len(texts)}: give one of each for each class"
        )
    if probe.labels != texts.labels and sorted(probe.labels) == sorted(texts.labels):
        raise InputError("probe and texts have the same labels in another order: put them in one order")
