"""How well the words of features go with their pictures, by a judge, beside the words of other features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_NO_DIRECTION = 1e-6  # a centred unit vector shorter than this is rounding
_TIE = 1e-9
_BLOCK = 1024


class Agreement(NamedTuple):
    """Float64 `[feature]` each; NaN for a feature without words or without pictures."""

    score: Tensor
    """Mean cosine of the feature's words with its pictures, each centred by the mean of its modality."""
    control: Tensor
    """The same with the words of every other feature, in the mean."""
    rank: Tensor
    """Place of the feature's own words among the words of all features, for its pictures: 1 is best; ties halve."""
    first: Tensor
    """Its share of the first place: 1 over the number of features whose words fit equally well, its own among them,
    where no other feature's fit better; else 0. Were the words dealt at random, the mean is 1 over the number of
    features, exactly."""


def agreement(word: Tensor, word_vectors: Tensor, row: Tensor, image_vectors: Tensor) -> Agreement:
    """Whether a feature's words are what its pictures show, by a judge.

    With unit vectors `t` of words and `x` of pictures, centred by their own means and made unit again (the mean
    direction of each modality, the modality gap, would else be most of every cosine),
    `score_i = mean_{w in words(i), p in pictures(i)} cos(t_w, x_p)`. The control takes the words of all other features
    in turn: the exact mean over all ways to deal the words anew that leave no feature its own. All four are functions
    of one mean vector per feature and modality.

    Args:
        word: rows of `word_vectors` of each feature's words, `[feature k]`; -1 where there are fewer.
        word_vectors: the judge's, of any length but zero, `[term d_embed]`.
        row: rows of `image_vectors` of each feature's pictures, `[feature k]`; -1 where there are fewer.
        image_vectors: the judge's, `[picture d_embed]`.

    Returns:
        `Agreement`. A single feature has no control; a single word, or words that are all the same to the judge, have
        no direction when centred, and no score.

    Example:
        >>> own = torch.arange(3)[:, None]
        >>> found = agreement(own, torch.eye(3), own, torch.eye(3) + 0.2)
        >>> found.score.round(decimals=3), found.control.round(decimals=3), found.rank
        (tensor([1., 1., 1.], dtype=torch.float64), tensor([-0.5000, -0.5000, -0.5000], dtype=torch.float64),
         tensor([1., 1., 1.], dtype=torch.float64))
    """
    words, pictures = _mean(word, _centred(word_vectors)), _mean(row, _centred(image_vectors))
    known = (words.isfinite() & pictures.isfinite()).all(dim=1)
    words, pictures = words[known], pictures[known]
    n = len(words)
    own = (words * pictures).sum(dim=1)
    others = words.sum(dim=0) - words
    control = (others * pictures).sum(dim=1) / (n - 1) if n > 1 else torch.full_like(own, torch.nan)
    found = Agreement(*(torch.full((len(word),), torch.nan, dtype=torch.float64) for _ in Agreement._fields))
    for filled, values in zip(found, (own, control, *_places(words, pictures, own)), strict=True):
        filled[known] = values
    return found


def _centred(vectors: Tensor) -> Tensor:
    """Unit vectors less their mean, unit again; NaN where nothing is left."""
    unit = F.normalize(vectors.detach().cpu().double(), dim=1)
    unit = unit - unit.mean(dim=0)
    length = unit.norm(dim=1, keepdim=True)
    return torch.where(length > _NO_DIRECTION, unit / length, torch.nan)


def _mean(rows: Tensor, vectors: Tensor) -> Tensor:
    """The mean of some rows for each feature, `[feature d_embed]`; NaN where there are none."""
    count = (rows >= 0).sum(dim=1)
    total = F.embedding_bag(rows[rows >= 0], vectors, count.cumsum(0) - count, mode="sum")
    return total / count[:, None]


def _places(words: Tensor, pictures: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Rank and share of the first place of each feature's words, from one block of `[feature feature]` at a time."""
    ranks, first = [own[:0]], [own[:0]]
    for start in range(0, len(own), _BLOCK):
        part = slice(start, start + _BLOCK)
        beyond = pictures[part] @ words.T - own[part, None]
        greater, equal = (beyond > _TIE).sum(dim=1), (beyond.abs() <= _TIE).sum(dim=1)
        ranks.append(greater + (equal + 1).double() / 2)  # it is one of the equal ones itself
        first.append((greater == 0).double() / equal)
    return torch.cat(ranks), torch.cat(first)
