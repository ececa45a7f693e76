"""The result of naming: the words, the pictures and the agreement of both, for every feature of a code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
from torch import Tensor

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.semantics.references import References

Order = Literal["density", "agreement", "lift"]


class Activated(NamedTuple):
    """A word or a picture of a feature, and how strongly it activates it."""

    name: str
    activation: float


class Concept(NamedTuple):
    """One feature: its words and its pictures, strongest first."""

    feature: int
    name: str | None
    words: tuple[Activated, ...]
    images: tuple[Activated, ...]
    agreement: float
    control: float
    rank: float
    modality: float
    density: float


@dataclass(frozen=True, eq=False)
class ConceptNames:
    """The top words and the top pictures of every feature; `name_concepts` makes it.

    Attributes:
        word: numbers of the words that activate a feature most, strongest first, `[d_code k_words]`; -1 where fewer do.
        word_activation: their activations, un-normalised, `[d_code k_words]`; 0 where there is no word.
        n_words: words of the vocabulary that activate each feature, `[d_code]`.
        images: the pictures that activate it most, as `References` of the feature as a latent.
        agreement: mean cosine, by the judge, of a feature's words with its pictures, each centred by its modality's
            mean, in [-1, 1], float64 `[d_code]`; NaN without words or without pictures.
        control: the same with the words of every other feature, in the mean, `[d_code]`.
        rank: place of the feature's own words among those of all features, for its pictures: 1 is best, ties
            halve, `[d_code]`.
        first: its share of the first place there: 1 over the number of features with words that fit equally well, where
            none fit better, else 0, float64 `[d_code]`.
        text_energy: mean activation over texts, float64 `[d_code]`.
        n_texts: texts of that mean.
        text_source: `"vocabulary"` where the words stand in for texts, else `"texts"`.
        terms: the vocabulary.
        templates: what the words were put into.
        vocabulary: its fingerprint.
        judge: name of the model that compared words with pictures.
        provenance_of_names: hashes of text tower and judge, and versions; the pictures' are in `images.provenance`.
    """

    word: Tensor
    word_activation: Tensor
    n_words: Tensor
    images: References
    agreement: Tensor
    control: Tensor
    rank: Tensor
    first: Tensor
    text_energy: Tensor
    n_texts: int
    text_source: str
    terms: tuple[str, ...]
    templates: tuple[str, ...]
    vocabulary: str
    judge: str
    provenance_of_names: dict[str, Any]

    def __len__(self) -> int:
        return len(self.word)

    def __repr__(self) -> str:
        return (
            f"ConceptNames({len(self)} features, {len(self) - self.n_unnamed} named with {len(self.terms)} words, "
            f"{len(self) - self.n_without_images} with pictures of {self.images.n_samples}; agreement "
            f"{self.mean_agreement:.3f} by {self.judge!r}, of other features' words {self.mean_control:.3f})"
        )

    @property
    def k_words(self) -> int:
        """Words of a feature, at most."""
        return self.word.shape[1]

    @property
    def k_images(self) -> int:
        """Pictures of a feature, at most."""
        return self.images.k

    @cached_property
    def names(self) -> tuple[str | None, ...]:
        """The strongest word of each feature; None where no word activates it."""
        return tuple(None if best < 0 else self.terms[best] for best in self.word[:, 0].tolist())

    @property
    def n_unnamed(self) -> int:
        """Features that no word activates."""
        return int((self.n_words == 0).sum())

    @property
    def n_without_images(self) -> int:
        """Features that no picture activates."""
        return int((self.images.activity.n_active == 0).sum())

    @property
    def image_energy(self) -> Tensor:
        """Mean activation over pictures, float64 `[d_code]`."""
        return self.images.activity.total / self.images.n_samples

    @property
    def modality(self) -> Tensor:
        """`E_img / (E_img + E_txt)`, float64 `[d_code]` in [0, 1]; NaN for a feature that nothing activates."""
        return self.image_energy / (self.image_energy + self.text_energy)

    @property
    def density(self) -> Tensor:
        """`(E_img + E_txt) / 2`, float64 `[d_code]`."""
        return (self.image_energy + self.text_energy) / 2

    @property
    def lift(self) -> Tensor:
        """Agreement less its control, `[d_code]`: above 0 where a feature's own words fit better than others'."""
        return self.agreement - self.control

    @property
    def n_scored(self) -> int:
        """Features with an agreement: with words and pictures."""
        return int(self.agreement.isfinite().sum())

    @property
    def mean_agreement(self) -> float:
        """Mean over the features that have one."""
        return float(self.agreement.nanmean())

    @property
    def mean_control(self) -> float:
        """Mean over the features that have one."""
        return float(self.control.nanmean())

    @property
    def retrieval_accuracy(self) -> float:
        """Share of the features whose own words fit their pictures best of all features'; NaN if none has an agreement.

        Features with words that fit equally well, as the same words do, share the first place.
        """
        return float(self.first.nanmean())

    @property
    def retrieval_chance(self) -> float:
        """That share were the words dealt at random, in the mean over all deals; exact, with ties too."""
        return 1 / self.n_scored if self.n_scored else float("nan")

    def of(self, feature: int) -> Concept:
        """One feature in words.

        Raises:
            InputError: there is no such feature.
        """
        if isinstance(feature, bool) or not 0 <= feature < len(self):
            raise InputError(f"features are 0 to {len(self) - 1}, got {feature}")
        words = zip(self.word[feature].tolist(), self.word_activation[feature].tolist(), strict=True)
        found = self.images.of(feature)
        numbers = (self.agreement, self.control, self.rank, self.modality, self.density)
        return Concept(
            feature, self.names[feature],
            tuple(Activated(self.terms[word], activation) for word, activation in words if word >= 0),
            tuple(Activated(*one) for one in zip(found.names, found.activation.tolist(), strict=True)),
            *(float(values[feature]) for values in numbers),
        )  # fmt: skip

    def find(self, word: str) -> list[int]:
        """The features that have this word among theirs, where it is strongest first.

        Raises:
            InputError: the vocabulary has no such word.
        """
        if word not in self.terms:
            hint = near(word, self.terms) if len(self.terms) < 20_000 else ""
            raise InputError(f"{word!r} is not one of the {len(self.terms)} words of this vocabulary{hint}")
        feature, place = (self.word == self.terms.index(word)).nonzero(as_tuple=True)
        return feature[self.word_activation[feature, place].argsort(descending=True, stable=True)].tolist()

    def top(self, k: int = 10, *, by: Order = "density") -> list[int]:
        """The features with words and pictures for which a number is greatest, in order.

        Args:
            k: how many; fewer where fewer have words and pictures.
            by: `"density"`, `"agreement"` or `"lift"`.

        Raises:
            InputError: `k` is less than 1, or an unknown number.
        """
        if k < 1 or by not in get_args(Order):
            raise InputError(f"k is at least 1 and by one of {', '.join(get_args(Order))}; got {k} and {by!r}")
        values: Tensor = getattr(self, by)
        known = (self.agreement.isfinite() & values.isfinite()).nonzero().flatten()
        return known[values[known].argsort(descending=True, stable=True)[:k]].tolist()

    def to_frame(self) -> pd.DataFrame:
        """A row for each feature; `words` is one text, `frequency` the share of the pictures that activate it."""
        words = [", ".join(self.terms[word] for word in row if word >= 0) for row in self.word.tolist()]
        columns = {
            "agreement": self.agreement, "control": self.control, "rank": self.rank, "first": self.first,
            "modality": self.modality, "density": self.density, "frequency": self.images.activity.frequency,
            "n_words": self.n_words, "n_images": self.images.activity.n_active,
        }  # fmt: skip
        return pd.DataFrame({
            "feature": range(len(self)), "name": pd.Series(self.names, dtype=object), "words": words,
            **{name: values.numpy() for name, values in columns.items()},
        })  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> ConceptNames:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        sizes = {len(one) for one in (self.word, self.n_words, self.agreement, self.text_energy, self.images.sample)}
        same = self.word.shape == self.word_activation.shape and len(sizes) == 1
        return same and int(self.word.max()) < len(self.terms) and len(self.images.names) == self.images.n_samples
