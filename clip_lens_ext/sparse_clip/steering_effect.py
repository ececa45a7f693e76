"""What steering does to zero-shot classification and to retrieval, over strengths, beside random features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from clip_lens_ext.provenance import fingerprint, versions
from clip_lens_ext.sparse_clip.checks import checked_count, checked_strengths
from clip_lens_ext.sparse_clip.steering import steer
from clip_lens_ext.sparse_clip.steering_data import SteeringData, plan_steering
from clip_lens_ext.sparse_clip.steering_result import SteeringEffect, check_interval

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
_AT_ONCE = 256  # pictures


@torch.no_grad()
def steering_effect(
    data: SteeringData,
    *,
    strengths: float | Sequence[float] = STRENGTHS,
    n_controls: int = 5,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> SteeringEffect:
    """Suppress the features of each picture's class, boost those of another class, and classify and retrieve again.

    Zero-shot is the class of the greatest cosine; it says no class where two are equally great, as where a code has
    become zero. Retrieval is of *other* pictures: with one picture steered and all others as they are, the share of
    the others' captions whose own picture is nearest (what is equally near counts as nearer), and the share that found
    it before and no longer does, because the steered picture has got in between.

    Args:
        data: pictures, classes and their features; with captions, retrieval is measured too.
        strengths: what boosted features are set to, one after the other.
        n_controls: draws of random features of like activation, as many as the concepts' (see `plan_steering`).
        n_bootstrap, confidence: of the intervals, over pictures.
        seed: of the new classes, the controls and the intervals.
        progress: draw a bar.

    Returns:
        `SteeringEffect`; its `.to_frame()` has a row for each strength, of the concepts and of the controls.

    Raises:
        InputError: a strength or count out of range, or too few features for a control.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> sparse, pictures = add_sparse_heads(cle.planted_clip(), 256), torch.zeros(2, 3, 48, 48)
        >>> data = SteeringData.from_clip(sparse, pictures, [0, 1], ["heart", "kite"], k=1, progress=False)
        >>> found = steering_effect(data, strengths=[1, 4], n_controls=2, progress=False)
        >>> found.predicted.shape, list(found.to_frame().arm)
        (torch.Size([2, 3, 2]), ['as is', 'concept', 'control', 'concept', 'control'])

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075, steers what a language model is shown; that zero-shot and
        retrieval are measured is ours.
    """
    values = checked_strengths(strengths)
    checked_count(n_bootstrap, "n_bootstrap")
    check_interval(confidence)
    plan = plan_steering(data, n_controls=n_controls, seed=seed)
    others = None if data.caption_codes is None else _Others(data.codes, data.caption_codes)
    before = _measure(data, data.codes, plan.new_labels, others)
    n_arm = 1 + n_controls
    found = []
    with tqdm(total=len(values) * n_arm, desc="steering", disable=not progress) as bar:
        for strength in values:
            for arm in range(n_arm):
                codes = steer(data.codes, plan.suppress[arm], plan.boost[arm], strength)
                found.append(_measure(data, codes, plan.new_labels, others))
                bar.update()
    predicted, cosine, retrieval, harmed = (torch.stack(part).unflatten(0, (len(values), n_arm))
                                            for part in zip(*found, strict=True))  # fmt: skip
    removed = data.codes.cpu().expand(n_arm, -1, -1).gather(2, plan.suppress).double().sum(dim=-1)
    return SteeringEffect(
        classes=data.classes, strengths=values, labels=data.labels, new_labels=plan.new_labels,
        predicted_before=before.predicted, cosine_before=before.cosine, retrieval_before=before.retrieval,
        predicted=predicted, cosine=cosine, retrieval=retrieval, harmed=harmed, removed=removed,
        k=data.concepts.features.shape[1], n_bootstrap=n_bootstrap, confidence=confidence, seed=seed,
        provenance={**data.concepts.provenance, "codes": fingerprint(data.codes), "versions": versions()},
    )  # fmt: skip


class _Measured(NamedTuple):
    """What one way to steer gives, for each picture."""

    predicted: Tensor
    cosine: Tensor
    retrieval: Tensor
    harmed: Tensor


class _Others:
    """Captions and the pictures as they are: how many pictures are as near to a caption as its own or nearer."""

    def __init__(self, codes: Tensor, captions: Tensor) -> None:
        self.captions = _unit(captions)
        similarity = self.captions @ _unit(codes).T
        self.own = similarity.diagonal()[:, None]
        self.nearer = (similarity >= self.own) & ~torch.eye(len(codes), dtype=torch.bool, device=codes.device)
        self.n_nearer = self.nearer.sum(dim=1, keepdim=True)

    def with_steered(self, unit: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """R@1 and harm of the other captions with each of some pictures steered alone, `[picture]` both."""
        now = self.captions @ unit.T >= self.own  # [caption picture]
        places = torch.arange(columns.start, columns.start + len(unit), device=unit.device)
        other = torch.ones_like(now)
        other[places, torch.arange(len(unit), device=unit.device)] = False
        before = (self.n_nearer == 0) & other
        after = (self.n_nearer - self.nearer[:, columns].long() + now.long() == 0) & other
        return _share(after, other), _share(before & ~after, other)


def _measure(data: SteeringData, codes: Tensor, new_labels: Tensor, others: _Others | None) -> _Measured:
    classes = _unit(data.class_codes).to(codes.device)
    parts = []
    for start in range(0, len(codes), _AT_ONCE):
        columns = slice(start, start + _AT_ONCE)
        unit = _unit(codes[columns])
        cosine = (unit @ classes.T).cpu()
        pair = torch.stack([data.labels[columns], new_labels[columns]], dim=1)
        absent = cosine.new_full((len(cosine),), torch.nan)
        retrieval, harmed = (absent, absent) if others is None else others.with_steered(unit, columns)
        parts.append(_Measured(_winner(cosine), cosine.gather(1, pair), retrieval.cpu(), harmed.cpu()))
    return _Measured(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _unit(codes: Tensor) -> Tensor:
    """In float64 and of length one; a code of zeros stays zero."""
    return F.normalize(codes.double(), dim=-1)


def _winner(cosine: Tensor) -> Tensor:
    """The class of the greatest cosine, -1 where two are equally great, `[picture]`."""
    greatest = cosine.max(dim=1, keepdim=True)
    alone = (cosine == greatest.values).sum(dim=1) == 1
    return greatest.indices[:, 0].where(alone, torch.tensor(-1))


def _share(hits: Tensor, among: Tensor) -> Tensor:
    """NaN where there is nothing to be a share of."""
    return hits.sum(dim=0).double() / among.sum(dim=0).double()
