"""What is explained beyond one cosine: a contrast of prompts, a linear classifier, a probability over a set of prompts.

All are read off affine scores of the embedding, `s = V e + b`, with `e` L2-normalised where the docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.attribution.targets import Target, checked_vectors, chosen_targets, text_vectors, wide
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint
from clip_lens_ext.towers.clip import HookedCLIP

Readout = Literal["score", "margin", "probability"]


@dataclass(frozen=True, eq=False)
class ScoreTarget(Target):
    """Predictions that are read off scores `s = vectors e + bias`.

    Args:
        vectors: `[score d_embed]`.
        labels: one per target.
        cosine: must be False: the vectors count with their length.
        bias: `[score]`, or None.
        normalize: whether the embedding is L2-normalised first.
        readout: `"score"`: the score itself; `"margin"`: less the greatest other score; `"probability"`: softmax over
            the scores.
        of: which score each target is about.
        named_unit: what a prediction is measured in.
    """

    cosine: bool = False
    bias: Tensor | None = None
    normalize: bool = False
    readout: Readout = "score"
    of: tuple[int, ...] = ()
    named_unit: str = "score"

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.of):
            raise InputError(f"{len(self.of)} targets have {len(self.labels)} labels")
        if self.cosine:
            raise InputError("a target of scores has no cosine=True: use Target, or normalize=True")

    @property
    def fingerprint(self) -> str:
        """Hash of what is explained."""
        bias = "" if self.bias is None else fingerprint(self.bias)
        return "-".join([fingerprint(self.vectors), bias, self.readout, str(self.normalize), *map(str, self.of)])

    @property
    def unit(self) -> str:
        """What a prediction is measured in."""
        return self.named_unit

    def __call__(self, embedding: Tensor) -> Tensor:
        """Predictions `[sample target]` of un-normalised embeddings `[sample d_embed]`; differentiable."""
        embedding = wide(embedding)
        return self._read(F.normalize(embedding, dim=-1) if self.normalize else embedding)

    def at_length(self, embedding: Tensor, length: Tensor) -> Tensor:
        """The prediction `[sample target]` with the length `[sample 1]` of the embedding given, not computed."""
        embedding = wide(embedding)
        return self._read(embedding / length if self.normalize else embedding)

    def select(self, indices: Sequence[int] | Tensor) -> ScoreTarget:
        """Some of the targets, by number, in this order; the other scores still count in margins and probabilities."""
        chosen = chosen_targets(self, indices)
        return replace(self, labels=tuple(self.labels[i] for i in chosen), of=tuple(self.of[i] for i in chosen))

    def _read(self, embedding: Tensor) -> Tensor:
        scores = embedding @ self._vectors_like(embedding).T
        if self.bias is not None:
            scores = scores + self.bias.to(scores.device, scores.dtype)
        own = scores[:, self.of]
        if self.readout == "margin":
            # The greatest of the others is the greatest of all, or for that one the second.
            best, winner = scores.topk(2, dim=-1)
            is_best = winner[:, :1] == torch.tensor(self.of, device=scores.device)
            return own - torch.where(is_best, best[:, 1:], best[:, :1])
        return scores.softmax(dim=-1)[:, self.of] if self.readout == "probability" else own


def contrast_target(clip: HookedCLIP, positive: str | Sequence[str], negative: str | Sequence[str]) -> ScoreTarget:
    """What speaks for one prompt and not for others: `cos(e, positive) - mean over negatives of cos(e, negative)`.

    Args:
        clip: embeds the texts with its text tower.
        positive: one prompt, or several: one target each.
        negative: one prompt or several; the mean of their cosines is subtracted from every target.

    Returns:
        `ScoreTarget`, in cosine points that can reach from -2 to 2.

    Raises:
        InputError: an empty prompt, or a contrast that is zero everywhere because the negative is the positive.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip = cle.planted_clip()
        >>> a, b, c = cle.PlantedWorld(0).prompts()[:3]
        >>> contrast_target(clip, [a, b], c).labels == (f"{a} - {c}", f"{b} - {c}")
        True
    """
    vectors, labels = text_vectors(clip, positive)
    others, names = text_vectors(clip, negative)
    against = names[0] if len(names) == 1 else f"mean of {len(names)} others"
    for label in labels:
        if set(names) == {label}:
            raise InputError(f"{label!r} against itself is zero for every picture: name another negative")
    return ScoreTarget(
        vectors - others.mean(dim=0),
        tuple(f"{label} - {against}" for label in labels),
        normalize=True,
        of=tuple(range(len(labels))),
        named_unit="cosine difference",
    )


def probe_target(
    weight: Any,
    bias: Any = None,
    *,
    labels: Sequence[str] | None = None,
    kind: Literal["logit", "margin"] = "logit",
    normalize: bool = False,
) -> ScoreTarget:
    """The output of a linear classifier on the embedding: a logit `w_c . e + b_c`, or its margin over the others.

    Args:
        weight: `[class d_embed]`, or `[d_embed]` of a binary classifier: `linear.weight`, or scikit-learn's `coef_`.
        bias: `[class]`, or one number; `linear.bias`, `intercept_`.
        labels: one per class; numbers by default.
        kind: `"logit"`, or `"margin"`: the logit less the greatest other logit. A margin above zero is the classifier's
            decision; which class is the runner-up depends on the sample.
        normalize: whether the classifier was trained on L2-normalised embeddings.

    Returns:
        `ScoreTarget`, one target per class.

    Raises:
        InputError: shapes that do not fit, NaN, or a margin of fewer than two classes.

    Example:
        >>> probe = probe_target(torch.eye(3), torch.tensor([0.0, 0.5, 0.0]), kind="margin")
        >>> probe(torch.tensor([[1.0, 2.0, 4.0]]))
        tensor([[-3.0000, -1.5000,  1.5000]])
    """
    vectors = checked_vectors(weight, "a probe's weights")
    n_class = len(vectors)
    if kind not in ("logit", "margin"):
        raise InputError(f"kind is 'logit' or 'margin', got {kind!r}")
    if kind == "margin" and n_class < 2:
        raise InputError("a margin needs at least two classes; a binary classifier's one logit is its margin")
    if bias is not None:
        bias = torch.as_tensor(bias, dtype=vectors.dtype, device=vectors.device).detach().reshape(-1)
        if len(bias) != n_class or not torch.isfinite(bias).all():
            raise InputError(f"expected {n_class} finite biases, one for each class, got {bias.tolist()}")
    names = tuple(labels) if labels is not None else tuple(str(i) for i in range(n_class))
    if len(names) != n_class:
        raise InputError(f"{n_class} classes have {len(names)} labels")
    return ScoreTarget(
        vectors,
        names,
        bias=bias,
        normalize=normalize,
        readout="margin" if kind == "margin" else "score",
        of=tuple(range(n_class)),
        named_unit="logit" if kind == "logit" else "logit margin",
    )


def softmax_target(clip: HookedCLIP, texts: Sequence[str], *, logit_scale: float | None = None) -> ScoreTarget:
    """Zero-shot probabilities: softmax over a set of prompts of the cosines times the logit scale.

    Args:
        clip: embeds the texts; gives the logit scale that it was trained with.
        texts: the set of prompts, at least two; every one is a target, and all share the probability.
        logit_scale: the factor on the cosines, instead of `exp(clip.logit_scale)`.

    Returns:
        `ScoreTarget`, in probability. Where the model is sure the probability is flat, and so are gradients of it:
        exact ablation still measures; `contrast_target` does not saturate.

    Raises:
        InputError: fewer than two prompts, an empty one, or a factor that is not positive.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip = cle.planted_clip()
        >>> target = softmax_target(clip, cle.PlantedWorld(0).prompts()[:3])
        >>> bool((target(torch.randn(2, clip.vision.cfg.d_embed)).sum(dim=-1) - 1).abs().max() < 1e-5)
        True
    """
    vectors, labels = text_vectors(clip, texts)
    if len(labels) < 2:
        raise InputError("softmax over one prompt is 1 for every picture: name at least two")
    scale = float(clip.logit_scale.detach().exp()) if logit_scale is None else float(logit_scale)
    if not 0 < scale < float("inf"):
        raise InputError(f"the logit scale is a positive factor on the cosines, got {scale}")
    return ScoreTarget(
        vectors * scale, labels, normalize=True, readout="probability", of=tuple(range(len(labels))),
        named_unit="probability",
    )  # fmt: skip
