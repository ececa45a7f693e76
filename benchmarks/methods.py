"""Every attribution method on some inputs, and the table that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table
from clip_lens_ext.bootstrap import bootstrap_intervals

NAMES = {
    "attribution_patching": "attribution patching",
    "integrated_gradients": "integrated gradients",
    "gradient_dropping": "GradDrop (unsigned)",
    "frozen_layer_norm": "patching, frozen LayerNorm",
    "activation_x_logit_lens": "activation x Logit Lens",
    "activation_x_logit_lens_frozen_norm": "direct effect (frozen norm)",
    "activation_x_logit_lens_embedding": "activation x lens, no LayerNorm",
    "logit_lens": "Logit Lens",
    "logit_lens_frozen_norm": "Logit Lens, frozen norm",
    "logit_lens_embedding": "Logit Lens, no LayerNorm",
    "logit_lens_of_all_latents": "Logit Lens, inactive latents too",
    "activation_energy": "energy",
    "exact_ablation": "exact ablation",
    "random": "random",
}


def faithfulness_of_all(
    tower: cle.HookedTower, x: Tensor | cle.Site, sae: Any, target: cle.Target, **settings: Any
) -> cle.Faithfulness:
    """Curves and rank correlations of every method that says something here; one prefix for all of them."""
    return cle.compare(tower, x, sae, target, n_bootstrap=1, progress=False, **settings).faithfulness


def by_input(found: Sequence[cle.Faithfulness], method: str, measure: str) -> Tensor:
    """A measure of one method on every input, `[input]`; NaN where the method says nothing or it is not defined."""
    rows = [
        getattr(one, measure)[one.methods.index(method), 0, 0].double() if method in one.methods else torch.tensor(torch.nan)
        for one in found
    ]
    return torch.stack([row.double() for row in rows])


def mean_with_interval(values: Tensor, digits: int) -> str:
    """Mean over the inputs and its bootstrap interval of 95%, in words."""
    if values.isnan().all():
        return ""
    low, high = bootstrap_intervals(values[None], n_bootstrap=2000, seed=0, confidence=0.95)[0].tolist()
    return f"{float(values.nanmean()):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def method_table(found: Sequence[cle.Faithfulness]) -> str:
    """One row per method, means over inputs with one target each; curves in points, 100 x cosine."""
    rows = []
    for method in cle.METHODS:
        if not any(method in one.methods for one in found):
            continue
        areas = [100 * by_input(found, method, name) for name in ("deletion_area", "insertion_area")]
        rows.append([
            NAMES[method], mean_with_interval(by_input(found, method, "rank_correlation"), 3),
            mean_with_interval(by_input(found, method, "overlap"), 2), *(mean_with_interval(area, 2) for area in areas),
        ])  # fmt: skip
    header = ["order", "rank correlation", f"overlap, top {found[0].k}", "deletion area", "insertion area"]
    return table(header, rows)
