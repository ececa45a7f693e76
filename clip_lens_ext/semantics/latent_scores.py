"""The result of a score: one number per latent, and why some latents have none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings

TOO_FEW = "fewer than 2 samples"
NO_DIRECTION = "a sample's embedding is zero or not finite"


@dataclass(frozen=True, eq=False)
class LatentScores:
    """A score of every latent. Scores of different names are different quantities: never compare across.

    Attributes:
        name: name of the score.
        value: float64 `[latent]`; NaN where the score is not defined.
        n_samples: samples that each latent's score rests on, `[latent]`.
        bounds: what a value can be, least and greatest.
        undefined: how many latents have no score, by reason.
        settings: how it was computed, as plain JSON values.
        seed: of a random score, else None.
        provenance: where the embeddings come from, or None for a plain tensor.
        partner: of `redundancy`: the latent with the most similar mean, `[latent]`; -1 where there is none. Else None.
    """

    name: str
    value: Tensor
    n_samples: Tensor
    bounds: tuple[float, float]
    undefined: dict[str, int]
    settings: dict[str, Any]
    seed: int | None = None
    provenance: dict[str, Any] | None = None
    partner: Tensor | None = None

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        low, high = self.bounds
        return (
            f"LatentScores({self.name!r} in [{low:g}, {high:g}], {len(self)} latents, mean {self.mean:.3f}, "
            f"{self.n_undefined} without a score)"
        )

    @property
    def n_undefined(self) -> int:
        """Latents without a score."""
        return sum(self.undefined.values())

    @property
    def mean(self) -> float:
        """Mean over the latents that have a score; NaN where none has."""
        return float(self.value.nanmean())

    def top(self, k: int = 10, *, largest: bool = True) -> list[int]:
        """The latents of the `k` greatest (or least) scores, in order; fewer where fewer have a score.

        Raises:
            InputError: `k` is less than 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        defined = self.value.isfinite().nonzero().flatten()
        order = self.value[defined].argsort(descending=largest, stable=True)[:k]
        return defined[order].tolist()

    def to_frame(self) -> pd.DataFrame:
        """One row for each latent: latent, the score by its name, n_samples."""
        columns = {self.name: self.value.numpy(), "n_samples": self.n_samples.numpy()}
        if self.partner is not None:
            columns["partner"] = self.partner.numpy()
        return pd.DataFrame(columns).rename_axis("latent").reset_index()

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> LatentScores:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=lambda found: found.value.shape == found.n_samples.shape)


class Block(NamedTuple):
    """Some latents' samples in float64."""

    part: slice
    """Which latents."""
    vectors: Tensor
    """Un-normalised, `[latent sample d_embed]`; zeros where there is no sample."""
    mask: Tensor
    """`[latent sample]`, true where there is a sample."""
    defined: Tensor
    """`[latent]`: every sample has a direction."""

    @property
    def n(self) -> Tensor:
        """Samples of each latent, `[latent]`."""
        return self.mask.sum(dim=1)


class Samples:
    """Samples of every latent, a block of latents at a time.

    Args:
        embeddings: `ReferenceEmbeddings`, or a tensor `[latent sample d_embed]`.
        mask: for a tensor, `[latent sample]`, true where there is a sample; None: everywhere.

    Raises:
        InputError: a wrong shape or dtype, or a mask beside `ReferenceEmbeddings`, which have their own.
    """

    def __init__(self, embeddings: Tensor | ReferenceEmbeddings, mask: Tensor | None) -> None:
        self._embeddings, self._mask = embeddings, mask
        if isinstance(embeddings, ReferenceEmbeddings):
            if mask is not None:
                raise InputError("ReferenceEmbeddings know which references are missing: leave out mask=")
            self.n_latents, self.n_samples = embeddings.row.shape
            self.provenance: dict[str, Any] | None = embeddings.provenance
            d_embed = embeddings.vectors.shape[1]
        else:
            if not isinstance(embeddings, Tensor) or embeddings.dim() != 3 or not embeddings.is_floating_point():
                found = list(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
                raise InputError(f"expected floats [latent sample d_embed] or ReferenceEmbeddings, got {found}")
            if 0 in embeddings.shape:
                raise InputError(f"there is nothing to score in {list(embeddings.shape)}")
            if mask is not None and (mask.shape != embeddings.shape[:2] or mask.dtype is not torch.bool):
                raise InputError(
                    f"mask is booleans {list(embeddings.shape[:2])}, true where there is a sample; got {mask.dtype} "
                    f"{list(mask.shape)}"
                )
            self.n_latents, self.n_samples, d_embed = embeddings.shape
            self.provenance = None
        # A block of float64 of some 16 MB, and at least one latent.
        self._size = max(1, 2_000_000 // (self.n_samples * d_embed))

    def __iter__(self) -> Iterator[Block]:
        for start in range(0, self.n_latents, self._size):
            part = slice(start, min(start + self._size, self.n_latents))
            if isinstance(self._embeddings, ReferenceEmbeddings):
                vectors, mask = self._embeddings.gather(part)
            else:
                vectors = self._embeddings[part].detach().cpu()
                mask = torch.ones(vectors.shape[:2], dtype=torch.bool) if self._mask is None else self._mask[part].cpu()
                # Not a product: a NaN in the padding would stay one.
                vectors = vectors.masked_fill(~mask[..., None], 0)
            vectors = vectors.double()
            length = vectors.norm(dim=-1)
            defined = ((length.isfinite() & (length > 0)) | ~mask).all(dim=1)
            yield Block(part, vectors, mask, defined)


def undefined(reasons: dict[str, Tensor]) -> dict[str, int]:
    """How many latents each reason holds for, where the first that holds is the one that counts.

    Args:
        reasons: by name, booleans `[latent]`.
    """
    found: dict[str, int] = {}
    seen: Tensor | None = None
    for reason, holds in reasons.items():
        new = holds if seen is None else holds & ~seen
        seen = holds if seen is None else seen | holds
        if bool(new.any()):
            found[reason] = int(new.sum())
    return found
