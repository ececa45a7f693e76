"""The result of `decompose`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.saes.codes import SparseCodes
from clip_lens_ext.sparse_clip.checks import checked_count


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Embeddings as sparse non-negative sums of words.

    Attributes:
        codes: the weights above zero, float64; a "latent" is a word.
        terms: the words.
        l1: weight of the penalty, as given or found.
        gap: duality gap of each sample, `[sample]`: how far its objective is above the minimum at most.
        converged: whether the gap is small enough, `[sample]`.
        cosine: of each embedding and what `to_embedding` gives, `[sample]`.
        cosine_centred: of each centred embedding and the sum of words, without the mean, which is a large part of
            `cosine`, `[sample]`; 0 where no word has a weight.
        dictionary: centred unit embeddings of the words, `[term d_embed]`.
        image_mean, term_mean: what was subtracted, `[d_embed]`.
        solver, tol: as asked for.
        n_iterations: steps of the slowest sample.
        provenance: model, vocabulary, fingerprint of the embeddings, versions.
    """

    codes: SparseCodes
    terms: tuple[str, ...]
    l1: float
    gap: Tensor
    converged: Tensor
    cosine: Tensor
    cosine_centred: Tensor
    dictionary: Tensor
    image_mean: Tensor
    term_mean: Tensor
    solver: str
    tol: float
    n_iterations: int
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return self.codes.n_sample

    @property
    def l0(self) -> Tensor:
        """Number of words with a weight above zero, `[sample]`."""
        return torch.bincount(self.codes.sample, minlength=len(self))

    def dense(self) -> Tensor:
        """The weights, float64 `[sample term]`."""
        return self.codes.dense()[:, 0]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The words of greatest weight of each sample with their weights, `k` or as many as there are.

        Raises:
            InputError: `k` is below 1.
        """
        checked_count(k, "k")
        found: list[list[tuple[str, float]]] = []
        for sample in range(len(self)):
            own = (self.codes.sample == sample).nonzero().flatten()
            order = own[self.codes.value[own].argsort(descending=True, stable=True)][:k]
            found.append([(self.terms[int(self.codes.latent[i])], float(self.codes.value[i])) for i in order])
        return found

    def to_embedding(self) -> Tensor:
        """What the words say, as embeddings of unit length, `[sample d_embed]`.

        `unit(unit(D' w) + image_mean)`, as the authors' code has it: the penalty shortens `D' w`, and the first
        division undoes that. A sample without words gives the mean.
        """
        return F.normalize(F.normalize(self._sums(), dim=1) + self.image_mean, dim=1)

    def with_cosines(self, unit: Tensor, centred: Tensor) -> Decomposition:
        """With `cosine` and `cosine_centred` of these embeddings of unit length, `[sample d_embed]` both."""
        return replace(
            self,
            cosine=(self.to_embedding().double() * unit).sum(dim=1),
            cosine_centred=(F.normalize(self._sums(), dim=1).double() * centred).sum(dim=1),
        )

    def _sums(self) -> Tensor:
        codes = self.codes
        found = torch.zeros(len(self), self.dictionary.shape[1], dtype=self.dictionary.dtype)
        for start in range(0, len(codes), 65_536):
            part = slice(start, start + 65_536)
            rows = self.dictionary[codes.latent[part]] * codes.value[part, None].to(found.dtype)
            found.index_add_(0, codes.sample[part], rows)
        return found

    def __repr__(self) -> str:
        missed = int((~self.converged).sum())
        return (
            f"Decomposition({len(self)} samples, {len(self.terms)} terms, L0 {float(self.l0.double().mean()):.1f}, "
            f"cosine {float(self.cosine.mean()):.3f} ({float(self.cosine_centred.mean()):.3f} without the mean), "
            f"l1={self.l1:.4g}{f', {missed} NOT CONVERGED' if missed else ''})"
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        n, n_term = len(self), len(self.terms)
        columns = (self.gap, self.converged, self.cosine, self.cosine_centred)
        return all(column.shape == (n,) for column in columns) and len(self.dictionary) == self.codes.d_sae == n_term
