"""The result of `find_picture_senses`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from clip_lens_ext.image_files import Skipped
from clip_lens_ext.result_files import load_result, save_result


@dataclass(frozen=True, eq=False)
class PictureSenses:
    """The pictures that each prompt retrieves, in two groups, and the controls of the split.

    Attributes:
        names: what was asked for.
        texts: the names, and then the single words of those that have several.
        prompts: one for each text.
        sample: positions in the data of each prompt's pictures, nearest first, `[text n]`.
        cosine: of each with the prompt, `[text n]`.
        group: 0 for a picture of the larger group, 1 for the smaller one, `[text n]`.
        separation: share of the spread that the two groups explain, `[text]`.
        bimodality: that share along the line between the groups, of pictures that had no part in the line, `[text]`.
            2/pi for one normal cloud, 1 for two points, NaN where the pictures are too few to tell.
        latent_t: Welch's t of each latent between the groups, positive where it is more active on the smaller one,
            `[text d_sae]`.
        chance_t: greatest absolute t of any latent between random groups of the same sizes, `[text]`; infinite where
            a group has one picture, which says nothing.
        group_auroc: how well each latent tells the pictures of a group from all others that some prompt retrieves, as
            area under the ROC curve; 0.5 is chance, `[text 2 d_sae]`. NaN for an empty group.
        text_auroc: the same for all pictures of a text, `[text d_sae]`.
        mixed_separation, mixed_bimodality, mixed_purity: of random pairs of prompts, half and half, `[control]`. Purity
            is the share of pictures that the split gives back to their prompt; 0.5 is chance.
        part_of: the name that each part is a word of, `[part]`.
        part_words: the words.
        part_separation, part_purity: of the pictures of the name and those of the word alone, half and half, `[part]`.
        part_latent_t: Welch's t, positive where a latent is more active on the word's pictures, `[part d_sae]`.
        part_chance_t: greatest absolute t of any latent between random halves of both pictures together, `[part]`.
        vectors: of the prompts, of unit length, `[text d_embed]`.
        hook_name, token_scope: where the latents are from.
        seed: of controls and starts.
        provenance: model, SAE hash, data fingerprint, versions.
        skipped: what could not be read.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    sample: Tensor
    cosine: Tensor
    group: Tensor
    separation: Tensor
    bimodality: Tensor
    latent_t: Tensor
    chance_t: Tensor
    group_auroc: Tensor
    text_auroc: Tensor
    mixed_separation: Tensor
    mixed_bimodality: Tensor
    mixed_purity: Tensor
    part_of: Tensor
    part_words: tuple[str, ...]
    part_separation: Tensor
    part_purity: Tensor
    part_latent_t: Tensor
    part_chance_t: Tensor
    vectors: Tensor
    hook_name: str
    token_scope: str
    seed: int
    provenance: dict[str, Any]
    skipped: tuple[Skipped, ...] = ()

    @property
    def threshold(self) -> float:
        """Of a word's pictures from its name's: the harmonic mean of the separations of one prompt and of two mixed."""
        one, two = self.separation[: len(self.names)].median(), self.mixed_separation.median()
        return float(2 * one * two / (one + two).clamp(min=1e-300))

    def bimodality_threshold(self, quantile: float = 0.05) -> float:
        """From where a prompt's pictures are two groups: a low quantile of the bimodality of two prompts mixed.

        At 0.05, nineteen of twenty pairs of prompts pass it, as a word of two meanings should. Infinite where no pair
        had pictures enough.
        """
        known = self.mixed_bimodality[~self.mixed_bimodality.isnan()]
        return float(known.quantile(quantile)) if len(known) else float("inf")

    @property
    def cosine_threshold(self) -> float:
        """From where a text retrieves something: the least of the names' median cosines with their pictures."""
        return float(self.cosine[: len(self.names)].median(dim=1).values.min())

    @property
    def purity_threshold(self) -> float:
        """From the controls: half-way between chance and the median purity of two prompts mixed."""
        return (0.5 + float(self.mixed_purity.median())) / 2

    def __repr__(self) -> str:
        n_two = int(self.to_frame().two_groups.sum())
        skipped = f"; {len(self.skipped)} pictures skipped" * bool(self.skipped)
        return (
            f"PictureSenses({self.sample.shape[1]} pictures of each of {len(self.texts)} prompts; {n_two} names with "
            f"two groups, bimodality of at least {self.bimodality_threshold():.3f}{skipped})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each name: separation, bimodality, share of the smaller group, and whether there are two."""
        own = slice(len(self.names))
        return pd.DataFrame({
            "name": self.names, "separation": self.separation[own].numpy(),
            "bimodality": self.bimodality[own].numpy(),
            "smaller_group": self.group[own].double().mean(dim=1).numpy(),
            "two_groups": (self.bimodality[own] >= self.bimodality_threshold()).numpy(),
        })  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> PictureSenses:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path)
