"""What the tables of Sparse CLIP measure of a code: zero-shot, retrieval, sparsity, Clarity, modality, names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sparse_setup import Codes, Setup
from clip_lens_ext.sparse_clip import code_measures
from clip_lens_ext.spectrum.measures import best_rank

N_TOP = 20
JUDGES = (
    "*Clarity* is judged by the dense model, whose embeddings all rows read; *same class*, by the truth of the world: "
    "the share of the pairs of pictures of a feature that show the same main object. A feature of a background, a "
    "colour or a second object is clear, and has a low share."
)
THERE = (
    "*Name is there*: share of a feature's top pictures on which the object or the background is that its top word "
    "names, by the world's own truth. A word that is drawn on a picture is letters and does not count as the thing; "
    "one word of a compound that alone names another object stands for that one."
)


def hits(images: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
    """Whether zero-shot is right, by cosine, bool `[picture]`; what is equally near counts as nearer."""
    cosine = F.normalize(images.double(), dim=-1) @ F.normalize(prompts.double(), dim=-1).T
    return best_rank(cosine, F.one_hot(labels, len(prompts)).bool()) == 1


def retrieval(images: Tensor, captions: Tensor, own: Tensor) -> tuple[float, float]:
    """Image to text and text to image R@1."""
    cosine = F.normalize(images.double(), dim=-1) @ F.normalize(captions.double(), dim=-1).T
    to_text, to_image = (best_rank(c, o) == 1 for c, o in ((cosine, own), (cosine.T, own.T)))
    return float(to_text.double().mean()), float(to_image.double().mean())


def same_class(images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Share of the pairs of a feature's active pictures that show the same main object; and that of all pairs.

    `sum_c n_c (n_c - 1) / (n (n - 1))` with `n_c` the active pictures of class `c`: Clarity, with a judge for whom two
    pictures are alike where they show the same. NaN for features that fewer than two pictures activate.

    Args:
        images: codes, none below zero, `[picture feature]`.
        labels: the main object of each, `[picture]`.
    """
    found = code_measures(images, None, F.one_hot(labels).float())
    return found.clarity, found.clarity_baseline


def named_truth(codes: Codes, there: Tensor) -> tuple[float, float, int]:
    """How often what a feature is named by is on its top pictures; how often by chance; and features that count.

    The name is the word of the greatest code; features with fewer than five active pictures or no word do not count.

    Args:
        codes: of pictures and words.
        there: whether what a word names is on a picture, bool `[picture word]`.
    """
    found, chance = [], []
    best = codes.words.max(dim=0)
    for feature in range(codes.images.shape[1]):
        activation = codes.images[:, feature]
        n = min(N_TOP, int((activation > 0).sum()))
        if n < 5 or best.values[feature] <= 0:
            continue
        word = int(best.indices[feature])
        top = activation.topk(n).indices
        found.append(float(there[top, word].double().mean()))
        chance.append(float(there[:, word].double().mean()))
    n = len(found)
    return (sum(found) / n, sum(chance) / n, n) if n else (float("nan"), float("nan"), 0)


def row_of(codes: Codes, data: Setup, *, sparse: bool = True) -> dict[str, Any]:
    """All measures of one code: numbers, and as tensors what the findings draw their intervals from.

    `hits` and `L0s` are of each picture; `densities`, `clarities`, `same classes` and `bimodals` of each feature, NaN
    where a feature has none. Density is of the features in use, which two pictures or more activate.
    """
    to_text, to_image = retrieval(codes.images, codes.captions, data.own)
    right = hits(codes.images, codes.prompts, data.labels)
    found = {"zero-shot": float(right.double().mean()), "i2t": to_text, "t2i": to_image, "hits": right}
    if not sparse:
        return found
    images = codes.images.clamp(min=0)
    measures = code_measures(images, codes.captions[data.caption_of].clamp(min=0), data.images)
    same, same_chance = same_class(images, data.batch.labels)
    truth, chance, n = named_truth(codes, data.there)
    or_drawn, or_drawn_chance, _ = named_truth(codes, data.there | data.drawn)
    low, high = measures.band
    bimodal = ((measures.modality >= low) & (measures.modality <= high)).double()
    density = measures.density.where(measures.image_count >= measures.n_min, torch.nan)
    return found | {
        "L0 image": measures.l0_image, "L0 text": measures.l0_text, "active": measures.active_share,
        "density": float(density.nanmean()), "densities": density,
        "clarity": measures.mean_clarity, "clarity baseline": measures.clarity_baseline,
        "same class": float(same.nanmean()), "same class chance": same_chance,
        "bimodal": measures.bimodal_share, "bimodal chance": measures.bimodal_share_by_chance,
        "truth": truth, "truth chance": chance, "truth or drawn": or_drawn, "truth or drawn chance": or_drawn_chance,
        "named": n, "L0s": (images > measures.threshold).sum(dim=1), "clarities": measures.clarity,
        "same classes": same, "bimodals": bimodal.where(measures.modality.isfinite(), torch.nan),
    }  # fmt: skip


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row without its tensors."""
    return {name: value for name, value in row.items() if not isinstance(value, Tensor)}
