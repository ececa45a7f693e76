"""Every attribution method on one input, and the table that compares them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sae_lens import SAE
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table

NAMES = {
    "attribution_patching": "attribution patching",
    "activation_x_logit_lens": "activation x Logit Lens",
    "logit_lens": "Logit Lens",
    "activation_energy": "energy",
    "random": "random",
    "exact_ablation": "exact ablation",
}


def faithfulness_of_all(
    tower: cle.HookedTower, x: Tensor, sae: SAE, target: cle.Target, *, n_steps: int
) -> cle.Faithfulness:
    """Deletion curves and rank correlations of every method; the prefix runs once for all of them."""
    site = cle.open_site(tower, x, sae)
    results = [
        cle.attribution_patching(tower, site, sae, target),
        cle.logit_lens(tower, site, sae, target, times_activation=True),
        cle.logit_lens(tower, site, sae, target),
        cle.activation_energy(tower, site, sae, target),
        cle.random_attribution(tower, site, sae, target, seed=0),
        cle.exact_ablation(tower, site, sae, target),
    ]
    return cle.faithfulness(tower, site, sae, target, results, n_steps=n_steps, progress=False)


def method_table(found: Sequence[cle.Faithfulness], shown_steps: Sequence[int]) -> str:
    """One row per method: rank correlation, deletion area and curve, means over inputs with one target each."""
    curves = torch.stack([one.deletion[:, 0, 0] for one in found], dim=1)
    correlations = torch.stack([one.rank_correlation[:, 0, 0] for one in found], dim=1)
    rows = []
    for index, method in enumerate(found[0].methods):
        defined = correlations[index][~correlations[index].isnan()]
        error = defined.std() / len(defined) ** 0.5
        curve = 100 * curves[index].mean(dim=0)
        rows.append([
            NAMES[method], f"{defined.mean():.3f} ± {error:.3f}", f"{curve.mean():.2f}",
            *(f"{curve[step]:.2f}" for step in shown_steps),
        ])  # fmt: skip
    return table(["order", "rank correlation", "deletion area", *(f"n = {step}" for step in shown_steps)], rows)
