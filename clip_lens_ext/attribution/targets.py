"""What is explained: one number per sample and target, as a differentiable function of the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.data import image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint
from clip_lens_ext.towers.clip import HookedCLIP


@dataclass(frozen=True, eq=False)
class Target:
    """Directions in the embedding space, and how a prediction is read off them.

    Args:
        vectors: `[target d_embed]`.
        labels: one per target.
        cosine: whether the prediction is the cosine of embedding and vector (both L2-normalised), or their inner
            product.
    """

    vectors: Tensor
    labels: tuple[str, ...]
    cosine: bool = True

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.vectors):
            raise InputError(f"{len(self.vectors)} target vectors have {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Hash of what is explained."""
        return f"{fingerprint(self.vectors)}-{'cosine' if self.cosine else 'inner'}"

    @property
    def unit(self) -> str:
        """What a prediction is measured in."""
        return "cosine" if self.cosine else "inner product"

    def __call__(self, embedding: Tensor) -> Tensor:
        """Predictions `[sample target]` of un-normalised embeddings `[sample d_embed]`; differentiable.

        Embeddings of half precision are read in float32: exact ablation is a difference of two predictions, of which
        bfloat16's three digits would leave nothing.
        """
        embedding = wide(embedding)
        vectors = self._vectors_like(embedding)
        if self.cosine:
            return F.normalize(embedding, dim=-1) @ F.normalize(vectors, dim=-1).T
        return embedding @ vectors.T

    def at_length(self, embedding: Tensor, length: Tensor) -> Tensor:
        """The prediction with the length of the embedding given, not computed: how a direct effect is read.

        Args:
            embedding: `[sample d_embed]`.
            length: what takes the place of each embedding's length, `[sample 1]`, where the prediction divides by it.

        Returns:
            `[sample target]`; `target.at_length(e, e.norm(dim=-1, keepdim=True))` is `target(e)`.
        """
        embedding = wide(embedding)
        vectors = self._vectors_like(embedding)
        if self.cosine:
            return (embedding / length) @ F.normalize(vectors, dim=-1).T
        return embedding @ vectors.T

    def select(self, indices: Sequence[int] | Tensor) -> Target:
        """Some of the targets, by number, in this order.

        Raises:
            InputError: no target has such a number.

        Example:
            >>> direction_target(torch.eye(3), labels=["a", "b", "c"]).select([2, 0]).labels
            ('c', 'a')
        """
        chosen = chosen_targets(self, indices)
        return replace(self, vectors=self.vectors[chosen], labels=tuple(self.labels[i] for i in chosen))

    def _vectors_like(self, embedding: Tensor) -> Tensor:
        """The vectors on the device and in the dtype of the embedding, which must be of their width."""
        if embedding.shape[-1] != self.vectors.shape[1]:
            raise InputError(
                f"the target's vectors have {self.vectors.shape[1]} numbers, the embeddings "
                f"{embedding.shape[-1]}: are they of the same model?"
            )
        return self.vectors.to(embedding.device, embedding.dtype)


def wide(embedding: Tensor) -> Tensor:
    """In float32 what is of half precision, the rest as it is."""
    return embedding.float() if embedding.dtype in (torch.float16, torch.bfloat16) else embedding


def chosen_targets(target: Target, indices: Sequence[int] | Tensor) -> list[int]:
    """Numbers of targets as a list, each of them one that exists."""
    chosen = [int(index) for index in indices]
    if not chosen or not all(0 <= index < len(target) for index in chosen):
        raise InputError(f"the targets have the numbers 0..{len(target) - 1}, got {chosen}")
    return chosen


def checked_vectors(vectors: Any, what: str = "directions") -> Tensor:
    """Vectors `[target d_embed]`, from those or from one `[d_embed]`; detached and finite.

    Raises:
        InputError: wrong shape, no floating-point numbers, NaN or infinity.
    """
    vectors = torch.as_tensor(vectors).detach()
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or vectors.numel() == 0:
        raise InputError(f"expected {what} [target d_embed], got {list(vectors.shape)}")
    if not vectors.is_floating_point() or not torch.isfinite(vectors).all():
        raise InputError(f"{what} must be finite floating-point numbers")
    return vectors


def text_vectors(clip: HookedCLIP, texts: str | Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """L2-normalised embeddings of prompts `[text d_embed]`, and the prompts.

    Raises:
        InputError: no text, or a text of nothing but spaces.
    """
    strings = [texts] if isinstance(texts, str) else list(texts)
    if any(isinstance(text, str) and not text.strip() for text in strings):
        raise InputError("a prompt is empty: say what the prediction is about, for instance 'a photo of a crane'")
    with torch.no_grad():
        return clip.embed_texts(strings, normalize=True), tuple(strings)


def text_target(clip: HookedCLIP, texts: str | Sequence[str]) -> Target:
    """The cosine of the image embedding with the embeddings of texts, without the logit scale.

    Args:
        clip: embeds the texts with its text tower.
        texts: one prompt or several; several are explained in one call.

    Returns:
        `Target` with the texts as labels.

    Raises:
        InputError: no text, or a text of nothing but spaces.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip = cle.planted_clip()
        >>> text_target(clip, cle.PlantedWorld(0).prompts()[:2]).vectors.shape[0]
        2
    """
    return Target(*text_vectors(clip, texts))


def image_target(clip: HookedCLIP, images: Any, *, labels: Sequence[str] | None = None) -> Target:
    """The cosine with the embeddings of pictures: what the text tower, or the vision tower, is explained towards.

    Args:
        clip: embeds the pictures with its vision tower.
        images: one picture or several, as `clip_lens_ext.data.image_batches` takes them: a tensor
            `[image 3 height width]`, a PIL picture or a list of them, files, a folder. One that cannot be read is an
            error, for a target cannot be skipped.
        labels: one per picture; file names or numbers by default.

    Returns:
        `Target`, one per picture.

    Raises:
        InputError: no picture, or one that cannot be read.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, world = cle.planted_clip(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = image_target(clip, pixels, labels=["first", "second"])
        >>> target(clip.embed_texts(world.prompts()[:3]).detach()).shape
        torch.Size([3, 2])
    """
    alone = hasattr(images, "convert") or (isinstance(images, Tensor) and images.dim() == 3)
    batches = image_batches([images] if alone else images, preprocess=clip.preprocess, strict=True)
    cfg = clip.vision.cfg
    found, names = [], []
    with torch.no_grad():
        for batch in batches:
            found.append(clip.embed_images(batch.pixels.to(cfg.device, cfg.dtype), normalize=True))
            names += batch.names
    return Target(torch.cat(found), tuple(labels) if labels is not None else tuple(names))


def direction_target(vectors: Tensor, *, labels: Sequence[str] | None = None, cosine: bool = True) -> Target:
    """The cosine with given directions of the embedding space: text embeddings from elsewhere, a class mean, a probe.

    Args:
        vectors: `[target d_embed]`, or one `[d_embed]`; any length.
        labels: one per vector; numbers by default.
        cosine: with False the prediction is the plain inner product of the un-normalised embedding and the vector.

    Returns:
        `Target`.

    Raises:
        InputError: wrong shape, NaN, or a zero vector, which has no direction.

    Example:
        >>> target = direction_target(torch.eye(3)[:2], labels=["first", "second"])
        >>> target(torch.tensor([[3.0, 4.0, 0.0]]))
        tensor([[0.6000, 0.8000]])
    """
    vectors = checked_vectors(vectors)
    if cosine and (vectors.norm(dim=-1) == 0).any():
        raise InputError("a zero vector has no direction, so no cosine with it exists")
    return Target(vectors, tuple(labels) if labels is not None else tuple(str(i) for i in range(len(vectors))), cosine)
