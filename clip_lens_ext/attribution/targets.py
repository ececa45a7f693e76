"""What is explained: one number per sample and target, as a differentiable function of the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
        return len(self.vectors)

    @property
    def fingerprint(self) -> str:
        """Hash of what is explained."""
        return f"{fingerprint(self.vectors)}-{'cosine' if self.cosine else 'inner'}"

    @property
    def unit(self) -> str:
        """What a prediction is measured in."""
        return "cosine" if self.cosine else "inner product"

    def __call__(self, embedding: Tensor) -> Tensor:
        """Predictions `[sample target]` of un-normalised embeddings `[sample d_embed]`; differentiable."""
        if embedding.shape[-1] != self.vectors.shape[1]:
            raise InputError(
                f"the target's vectors have {self.vectors.shape[1]} numbers, the embeddings "
                f"{embedding.shape[-1]}: are they of the same model?"
            )
        vectors = self.vectors.to(embedding.device, embedding.dtype)
        if self.cosine:
            return F.normalize(embedding, dim=-1) @ F.normalize(vectors, dim=-1).T
        return embedding @ vectors.T


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
    strings = [texts] if isinstance(texts, str) else list(texts)
    if any(isinstance(text, str) and not text.strip() for text in strings):
        raise InputError("a prompt is empty: say what the prediction is about, for instance 'a photo of a crane'")
    with torch.no_grad():
        vectors = clip.embed_texts(strings, normalize=True)
    return Target(vectors, tuple(strings))


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
    vectors = torch.as_tensor(vectors).detach()
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or vectors.numel() == 0:
        raise InputError(f"expected directions [target d_embed], got {list(vectors.shape)}")
    if not vectors.is_floating_point() or not torch.isfinite(vectors).all():
        raise InputError("directions must be finite floating-point numbers")
    if cosine and (vectors.norm(dim=-1) == 0).any():
        raise InputError("a zero vector has no direction, so no cosine with it exists")
    return Target(vectors, tuple(labels) if labels is not None else tuple(str(i) for i in range(len(vectors))), cosine)
