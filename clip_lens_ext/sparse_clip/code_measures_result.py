"""The result of `code_measures`: what the features of a code do, and what chance gives beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.sparse_clip.chance import dealt_share


@dataclass(frozen=True, eq=False)
class CodeMeasures:
    """What a code's features do over pictures and texts; `code_measures` makes it.

    Attributes:
        clarity: mean cosine, by the judge, of all pairs of pictures that activate a feature, float64 `[d_code]`, in
            [-1, 1]; NaN where fewer than `n_min` do.
        clarity_error: its standard deviation were the feature's pictures drawn at random, as many, `[d_code]`.
        clarity_baseline: its mean then: the mean cosine of all pairs of pictures.
        image_energy, text_energy: mean activation over pictures and over texts, `[d_code]`.
        image_count, text_count: pictures and texts whose activation is above the threshold, `[d_code]`.
        modality_error: standard deviation of the modality score were pictures and texts shuffled together; its mean is
            then 1/2, `[d_code]`.
        n_images, n_texts: samples. Without texts whatever needs them is NaN.
        threshold: the paper's tau: a sample activates a feature if its activation is greater.
        n_min: samples that an active feature has at least.
        band: modality scores that count as bimodal, both ends included.
        provenance: versions that computed it.
    """

    clarity: Tensor
    clarity_error: Tensor
    clarity_baseline: float
    image_energy: Tensor
    text_energy: Tensor
    image_count: Tensor
    text_count: Tensor
    modality_error: Tensor
    n_images: int
    n_texts: int
    threshold: float
    n_min: int
    band: tuple[float, float]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.clarity)

    def __repr__(self) -> str:
        return (
            f"CodeMeasures({len(self)} features, {self.n_images} pictures, {self.n_texts} texts: Clarity "
            f"{self.mean_clarity:.3f} (random pairs {self.clarity_baseline:.3f}), active {self.active_share:.1%}, "
            f"L0 {self.l0_image:.1f} and {self.l0_text:.1f}, bimodal {self.bimodal_share:.1%} (dealt anew "
            f"{self.bimodal_share_by_chance:.1%}))"
        )

    @property
    def l0_image(self) -> float:
        """Mean number of features that a picture activates."""
        return float(self.image_count.sum()) / self.n_images

    @property
    def l0_text(self) -> float:
        """Mean number of features that a text activates; NaN without texts."""
        return float(self.text_count.sum()) / self.n_texts if self.n_texts else float("nan")

    @property
    def active_share(self) -> float:
        """Share of the features that `n_min` pictures or more activate, in [0, 1]."""
        return float((self.image_count >= self.n_min).double().mean())

    @property
    def mean_clarity(self) -> float:
        """Mean over the active features: the published number. NaN where none is active."""
        return float(self.clarity.nanmean())

    @property
    def modality(self) -> Tensor:
        """`E_img / (E_img + E_txt)`, float64 `[d_code]` in [0, 1]; NaN for a feature that is never active."""
        return self.image_energy / (self.image_energy + self.text_energy)

    @property
    def density(self) -> Tensor:
        """Mean activation with pictures and texts weighing the same, `(E_img + E_txt) / 2`, float64 `[d_code]`."""
        return (self.image_energy + self.text_energy) / 2

    @property
    def bimodal_share(self) -> float:
        """Share of the features with a modality score whose score lies in the band."""
        score = self.modality[self.modality.isfinite()]
        low, high = self.band
        return float(((score >= low) & (score <= high)).double().mean()) if len(score) else float("nan")

    @property
    def bimodal_share_by_chance(self) -> float:
        """That share were the energies over texts dealt to the features anew: were the towers to share no feature."""
        return dealt_share(self.image_energy, self.text_energy, self.band) if self.n_texts else float("nan")

    def to_frame(self) -> pd.DataFrame:
        """A row for each feature."""
        columns = {
            "feature": torch.arange(len(self)), "clarity": self.clarity, "clarity_error": self.clarity_error,
            "modality": self.modality, "modality_error": self.modality_error, "density": self.density,
            "image_energy": self.image_energy, "text_energy": self.text_energy, "image_count": self.image_count,
            "text_count": self.text_count,
        }  # fmt: skip
        return pd.DataFrame({name: value.numpy() for name, value in columns.items()})

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> CodeMeasures:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=lambda found: found.clarity.shape == found.text_count.shape)
