"""What predictions are of: texts that the model embeds, or directions of its embedding space from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.clip import HookedCLIP


@runtime_checkable
class Target(Protocol):
    """The prompts and their embeddings, as `text_target` and `direction_target` give them."""

    @property
    def vectors(self) -> Tensor:
        """`[target d_embed]`."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The prompts."""
        ...


class EmbeddedPrompts(NamedTuple):
    """Prompts and where they point."""

    vectors: Tensor
    """Of unit length, `[prompt d_embed]`."""
    labels: tuple[str, ...]
    """One per row."""


@torch.no_grad()
def embedded_prompts(clip: HookedCLIP, prompts: str | Sequence[str] | Target) -> EmbeddedPrompts:
    """Unit embeddings of texts, by the model's text tower, or of a target, which needs none.

    Raises:
        InputError: no prompt, a target whose prediction is no cosine, or vectors that are not of this model.
    """
    if not isinstance(prompts, Target):
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if not texts:
            raise InputError("there is no prompt: at least one is needed")
        return EmbeddedPrompts(clip.embed_texts(list(texts), normalize=True), texts)
    if not getattr(prompts, "cosine", True):
        raise InputError(
            "predictions are cosines here, and this target's is an inner product: pass direction_target(vectors)"
        )
    width = clip.vision.cfg.d_embed
    if prompts.vectors.dim() != 2 or prompts.vectors.shape[1] != width or len(prompts.labels) == 0:
        raise InputError(
            f"a target of this model has vectors [target {width}], got {list(prompts.vectors.shape)}: are they of the "
            "same model?"
        )
    vectors = prompts.vectors.detach().to(clip.vision.cfg.device)
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    return EmbeddedPrompts(F.normalize(vectors, dim=-1), tuple(prompts.labels))
