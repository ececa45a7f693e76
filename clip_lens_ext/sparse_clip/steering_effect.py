"""What steering does to zero-shot classification and to retrieval, over strengths, beside random features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from clip_lens_ext.provenance import fingerprint, versions
from clip_lens_ext.sparse_clip.checks import checked_count, checked_seed, checked_strengths
from clip_lens_ext.sparse_clip.steering import steer
from clip_lens_ext.sparse_clip.steering_data import SteeringData, plan_steering
from clip_lens_ext.sparse_clip.steering_result import SteeringEffect, check_interval

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
_AT_ONCE = 256  # pictures
_TIE = 1e-12  # cosines nearer than this are equal: the same sum in another order


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
    become zero. Captions are compared both ways; in each, what is equally near counts as nearer, but for pictures with
    the same caption (equal codes), which are no rivals. Of the steered picture: whether its nearest caption is still
    its own, and whether it has become one of a picture of the new class. Of the *other* pictures, with this one steered
    and all others as they are: the share of their captions whose own picture is nearest, and the share that found it
    before and no longer does, because the steered picture has got in between. One picture is one of many rivals, so
    those two hardly move.

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
    checked_seed(seed)
    plan = plan_steering(data, n_controls=n_controls, seed=seed)
    others = None if data.caption_codes is None else _Others(data, data.caption_codes)
    before = _measure(data, data.codes, plan.new_labels, others)
    n_arm = 1 + n_controls
    found = []
    with tqdm(total=len(values) * n_arm, desc="steering", disable=not progress) as bar:
        for strength in values:
            for arm in range(n_arm):
                codes = steer(data.codes, plan.suppress[arm], plan.boost[arm], strength)
                found.append(_measure(data, codes, plan.new_labels, others))
                bar.update()
    after = _Measured(*(torch.stack(part).unflatten(0, (len(values), n_arm))
                        for part in zip(*found, strict=True)))  # fmt: skip
    removed = data.codes.cpu().expand(n_arm, -1, -1).gather(2, plan.suppress).double().sum(dim=-1)
    return SteeringEffect(
        classes=data.classes, strengths=values, labels=data.labels, new_labels=plan.new_labels,
        predicted_before=before.predicted, cosine_before=before.cosine, retrieval_before=before.retrieval,
        own_caption_before=before.own_caption, new_caption_before=before.new_caption,
        predicted=after.predicted, cosine=after.cosine, retrieval=after.retrieval, harmed=after.harmed,
        own_caption=after.own_caption, new_caption=after.new_caption, removed=removed,
        k=data.concepts.features.shape[1], n_bootstrap=n_bootstrap, confidence=confidence, seed=seed,
        provenance={**data.concepts.provenance, "codes": fingerprint(data.codes), "versions": versions()},
    )  # fmt: skip


class _Measured(NamedTuple):
    """What one way to steer gives, for each picture."""

    predicted: Tensor
    cosine: Tensor
    retrieval: Tensor
    harmed: Tensor
    own_caption: Tensor
    new_caption: Tensor


class _Others:
    """Captions and the pictures as they are: how many pictures are as near to a caption as its own or nearer."""

    def __init__(self, data: SteeringData, captions: Tensor) -> None:
        device = data.codes.device
        captions = captions.to(device)
        self.captions, self.labels = _unit(captions), data.labels.to(device)
        self.group = captions.unique(dim=0, return_inverse=True)[1]  # pictures with one caption are no rivals
        similarity = self.captions @ _unit(data.codes).T
        self.own = similarity.diagonal()[:, None]
        self.nearer = (similarity - self.own > -_TIE) & (self.group[:, None] != self.group)
        self.n_nearer = self.nearer.sum(dim=1, keepdim=True)

    def with_steered(self, unit: Tensor, columns: slice, new_labels: Tensor) -> tuple[Tensor, ...]:
        """The last four of `_Measured`, with each of some pictures steered alone, `[picture]` each."""
        similarity = self.captions @ unit.T  # [caption picture]
        rival = self.group[:, None] != self.group[columns]
        now = (similarity - self.own > -_TIE) & rival
        places = torch.arange(columns.start, columns.start + len(unit), device=unit.device)
        each = torch.arange(len(unit), device=unit.device)
        other = torch.ones_like(now)
        other[places, each] = False
        before = (self.n_nearer == 0) & other
        after = (self.n_nearer - self.nearer[:, columns].long() + now.long() == 0) & other
        own = ~((similarity - similarity[places, each] > -_TIE) & rival).any(dim=0)
        of_new = self.labels[:, None] == new_labels.to(unit.device)
        best, rest = (similarity.masked_fill(gone, -torch.inf).amax(dim=0) for gone in (~of_new, of_new))
        return _share(after, other), _share(before & ~after, other), own.double(), (best - rest > _TIE).double()


def _measure(data: SteeringData, codes: Tensor, new_labels: Tensor, others: _Others | None) -> _Measured:
    classes = _unit(data.class_codes).to(codes.device)
    parts = []
    for start in range(0, len(codes), _AT_ONCE):
        columns = slice(start, start + _AT_ONCE)
        unit = _unit(codes[columns])
        cosine = (unit @ classes.T).cpu()
        pair = torch.stack([data.labels[columns], new_labels[columns]], dim=1)
        absent = cosine.new_full((len(cosine),), torch.nan)
        captions = (absent,) * 4 if others is None else others.with_steered(unit, columns, new_labels[columns])
        parts.append(_Measured(_winner(cosine), cosine.gather(1, pair), *(part.cpu() for part in captions)))
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
