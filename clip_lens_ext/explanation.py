"""The result of `explain_images`: a decision for each picture and prompt, whole enough for tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.data import Skipped
from clip_lens_ext.semantics.references import References

Ranking = Literal["attribution", "logit_lens", "exact"]


@dataclass(frozen=True, eq=False)
class Decision:
    """One picture and one prompt: every active latent, and how much it matters.

    Attributes:
        image: the picture's name.
        prompt: what it is compared with.
        picture: the picture as the model sees it, uint8 `[3 height width]`.
        prediction: cosine of the two (or the inner product, see `Explanation.unit`).
        latent: the active latents, `[active]`.
        activation: summed over the SAE's tokens, `[active]`.
        attribution: by attribution patching, `[active]`, in the unit of the prediction; positive raises it.
        exact: by exact ablation, prediction as it is minus prediction with the latent set to zero, `[active]`.
        logit_lens: the prediction that the latent's decoder row makes alone, `[active]`; NaN where there is none.
        agreement: Spearman's rank correlation with `exact` over the active latents, of `"attribution"` and
            `"logit_lens"`.
        heat: latent -> its activation at every patch, `[grid_height grid_width]`, for the top latents; empty where the
            SAE does not read patches.
        off_grid: latent -> its activation at the tokens that are no patches (CLS), for the same latents.
    """

    image: str
    prompt: str
    picture: Tensor
    prediction: float
    latent: Tensor
    activation: Tensor
    attribution: Tensor
    exact: Tensor
    logit_lens: Tensor
    agreement: dict[str, float]
    heat: dict[int, Tensor]
    off_grid: dict[int, float]

    def top(self, k: int, by: Ranking = "attribution") -> Tensor:
        """Places in `latent` of the `k` greatest values, most positive first; none where the method has no values."""
        values: Tensor = getattr(self, by)
        return values.new_empty(0).long() if values.isnan().any() else values.argsort(descending=True, stable=True)[:k]

    def to_frame(self, *, scale: float = 1.0) -> pd.DataFrame:
        """One row per active latent, greatest attribution first; attribution and exact ablation times `scale`."""
        rankings: tuple[Ranking, ...] = ("attribution", "logit_lens")
        ranks = {by: torch.empty(len(self.latent), dtype=torch.int64) for by in rankings}
        for by, rank in ranks.items():
            order = self.top(len(self.latent), by)
            rank[order] = torch.arange(1, len(order) + 1)
        frame = pd.DataFrame({
            "image": self.image, "prompt": self.prompt, "prediction": self.prediction,
            "rank": ranks["attribution"].numpy(), "latent": self.latent.numpy(),
            "activation": self.activation.double().numpy(), "attribution": self.attribution.double().numpy() * scale,
            "exact_ablation": self.exact.double().numpy() * scale, "logit_lens": self.logit_lens.double().numpy(),
            "logit_lens_rank": ranks["logit_lens"].numpy(),
        })
        if bool(self.logit_lens.isnan().any()):
            frame["logit_lens_rank"] = 0
        return frame.sort_values("rank", kind="stable", ignore_index=True)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain_images` found, and where it comes from.

    **Sign**: attribution and exact ablation are positive where the latent raises the prediction.

    Attributes:
        decisions: one per picture and prompt.
        k: how many latents of each ranking have heat maps and references.
        n_references: how many references are shown for each latent.
        unit: of predictions: `"cosine"`, or `"inner product"`.
        model, hook_name, token_scope, n_tokens, d_sae, error_term: the site; `n_tokens` is what the SAE reads of one
            picture.
        grid: patches of a picture, `(height, width)`.
        first_patch: place of the first patch in the tower's sequence: 1 where there is a CLS token.
        references: the reference samples of the shown latents, or None.
        reference_pictures: sample -> uint8 `[3 height width]`, for the shown latents.
        notes: sentences about what could not be shown, and why.
        skipped: pictures that could not be read.
        provenance: model, SAE hash, versions.
    """

    decisions: tuple[Decision, ...]
    k: int
    n_references: int
    unit: str
    model: str
    hook_name: str
    token_scope: str
    n_tokens: int
    d_sae: int
    error_term: str
    grid: tuple[int, int]
    first_patch: int
    references: References | None
    reference_pictures: dict[int, Tensor]
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    provenance: dict[str, Any]

    @property
    def scale(self) -> float:
        """Factor from the unit of predictions to that of shown attributions: 100 for cosines, which gives points."""
        return 100.0 if self.unit == "cosine" else 1.0

    @property
    def points(self) -> str:
        """Name of the unit of shown attributions."""
        return "cosine points" if self.unit == "cosine" else self.unit

    def to_frame(self) -> pd.DataFrame:
        """All rows of all decisions; `attribution` and `exact_ablation` in points (`scale` times the unit)."""
        return pd.concat([decision.to_frame(scale=self.scale) for decision in self.decisions], ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pixels as plain JSON values; None where a number does not exist."""
        fields = ("model", "hook_name", "token_scope", "n_tokens", "d_sae", "error_term", "unit", "notes", "provenance")
        decisions = [
            {"image": decision.image, "prompt": decision.prompt, "prediction": decision.prediction,
             "rank_correlation": {by: rank if rank == rank else None for by, rank in decision.agreement.items()},
             "latents": _records(decision.to_frame(scale=self.scale).drop(columns=["image", "prompt", "prediction"]))}
            for decision in self.decisions
        ]
        return {
            **{field: getattr(self, field) for field in fields},
            "attribution_unit": self.points, "sign": f"positive where the latent raises the {self.unit}",
            "skipped": [{"name": skip.name, "reason": skip.reason} for skip in self.skipped], "decisions": decisions,
        }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): None if value != value else value for key, value in row.items()}
            for row in frame.to_dict("records")]
