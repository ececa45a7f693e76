"""How concepts change over training: what is born, dies, switches or merges, and since when the last ones are there.

The paper looks at five checkpoints by eye; here each event has a definition, and each overlap a control.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip.concept_names import ConceptNames
from clip_lens_ext.sparse_clip.drift_result import KINDS, ConceptDrift, DriftEvent
from clip_lens_ext.sparse_clip.overlap import Sets

Checkpoints = Mapping[Any, ConceptNames] | Sequence[tuple[Any, ConceptNames]]


def concept_drift(
    checkpoints: Checkpoints, *, max_overlap: float = 0.1, min_overlap: float = 0.5, n_min: int = 2
) -> ConceptDrift:
    """What became of every feature's concept from one checkpoint of training to the next.

    With `P_t(i)` the top pictures of feature `i` at checkpoint `t`, `W_t(i)` its top words, and
    `J(A, B) = |A and B| / |A or B|`, a feature is *alive* where both sets have something in them. Then

    - **birth**: alive for the first time, and not at the first checkpoint; **death**: alive before, and not now;
      **revival**: alive again after a death;
    - **switch**: alive at both, another first word, and `J(P_{t-1}(i), P_t(i)) < max_overlap`. A word that gives way
      to a synonym is none: the pictures stay;
    - **merge**: `J(P_t(i), P_t(j)) >= min_overlap`, and no third feature overlaps more with either of the two; and that
      was not so at the checkpoint before;
    - **stability**: `J(W_t(i), W_T(i))` and `J(P_t(i), P_T(i))` with the last checkpoint `T`, beside the mean over all
      other features `j` of `J(W_t(i), W_T(j))` and `J(P_t(i), P_T(j))`.

    Args:
        checkpoints: in the order of training, label (a step, a share of training, ...) and `ConceptNames`; of one
            vocabulary and the same pictures, with as many words and pictures for each feature.
        max_overlap: above 0: of a switch's pictures with those before, less than this.
        min_overlap: above 0: of a merge's pictures, at least this.
        n_min: pictures that both features of a merge have at least; with one picture each, any two that share it
            would be one.

    Returns:
        `ConceptDrift`. Where the top pictures of other features overlap by `max_overlap` or more in the mean, no switch
        can be told, which is warned of.

    Raises:
        InputError: fewer than two checkpoints, a label twice, other numbers of features, another vocabulary or other
            pictures, or a threshold out of range.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import name_concepts, add_sparse_heads
        >>> words = cle.Vocabulary.from_terms(["crown", "gear", "heart"])
        >>> pixels = cle.planted.normalise(cle.PlantedWorld(0).sample(40, seed=0, split="test").images)
        >>> names = {
        ...     step: name_concepts(
        ...         add_sparse_heads(cle.planted_clip(), 64, seed=step), words, pixels, k_images=3, progress=False
        ...     )
        ...     for step in (0, 1)
        ... }
        >>> found = concept_drift(names)
        >>> found.labels, found.image_stability[1].nanmean(), list(found.counts().columns)
        (('0', '1'), tensor(1., dtype=torch.float64), ['birth', 'revival', 'death', 'switch', 'merge'])

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075, section on emergence, for the question; definitions are ours.
    """
    labels, names = _checked(checkpoints)
    for name, value in (("max_overlap", max_overlap), ("min_overlap", min_overlap)):
        if not 0 < value <= 1:
            raise InputError(f"{name} is an overlap in (0, 1], got {value}")
    if isinstance(n_min, bool) or not isinstance(n_min, int) or n_min < 1:
        raise InputError(f"n_min must be a positive integer, got {n_min!r}")
    words = [Sets(one.word, len(one.terms)) for one in names]
    pictures = [Sets(one.images.sample, one.images.n_samples) for one in names]
    alive = torch.stack([(w.size > 0) & (p.size > 0) for w, p in zip(words, pictures, strict=True)])
    nothing = torch.full((len(names[0]),), torch.nan, dtype=torch.float64)
    steps = torch.stack([nothing, *(now.own(before) for before, now in pairwise(pictures))])
    steps[1:] = torch.where(alive[1:] & alive[:-1], steps[1:], torch.nan)
    both = alive & alive[-1]
    stability = {
        f"{kind}_{what}": torch.where(both, torch.stack([measure(one, sets[-1]) for one in sets]), torch.nan)
        for kind, sets in (("word", words), ("image", pictures))
        for what, measure in (("stability", Sets.own), ("control", Sets.with_others))
    }
    by_chance = float(stability["image_control"][-1].nanmean())
    if by_chance >= max_overlap:
        warnings.warn(
            f"the top pictures of other features overlap by {by_chance:.2g} in the mean, and a switch needs less than "
            f"{max_overlap:g}: name with more pictures or a smaller k_images, or raise max_overlap", stacklevel=2,
        )  # fmt: skip
    merged = [sets.nearest_pairs(min_overlap, n_min) for sets in pictures]
    events: list[DriftEvent] = []
    for step in range(1, len(names)):
        found = [
            *_lives(names, alive, step),
            *_switches(names, steps, step, max_overlap),
            *_merges(names, merged, step),
        ]
        events += sorted(found, key=lambda event: (KINDS.index(event.kind), event.feature, event.other))
    settings = {"max_overlap": max_overlap, "min_overlap": min_overlap, "n_min": n_min,
                "k_words": names[0].k_words, "k_images": names[0].k_images}  # fmt: skip
    return ConceptDrift(
        labels, torch.stack([one.word[:, 0] for one in names]), alive,
        torch.stack([one.modality for one in names]), torch.stack([one.density for one in names]),
        stability["word_stability"], stability["image_stability"], stability["word_control"],
        stability["image_control"], steps, tuple(events), names[0].terms, settings,
    )  # fmt: skip


def _checked(checkpoints: Checkpoints) -> tuple[tuple[str, ...], list[ConceptNames]]:
    """Labels as texts, and names that can be compared."""
    pairs = list(checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], ConceptNames):
            raise InputError("checkpoints are pairs of a label and ConceptNames, or a mapping of them")
    if len(pairs) < 2:
        raise InputError(f"drift is between checkpoints: two or more are needed, got {len(pairs)}")
    labels, names = tuple(str(label) for label, _ in pairs), [one for _, one in pairs]
    if len(set(labels)) < len(labels):
        again = next(label for label in labels if labels.count(label) > 1)
        raise InputError(f"two checkpoints have the label {again!r}")
    about: dict[str, Any] = {
        "features": len, "words of a feature, at most": lambda one: one.k_words,
        "pictures of a feature, at most": lambda one: one.k_images, "vocabulary": lambda one: one.vocabulary,
        "pictures": lambda one: (one.images.names, one.images.provenance["data_fingerprint"]),
    }  # fmt: skip
    for what, value in about.items():
        for label, one in zip(labels, names, strict=True):
            if value(one) != value(names[0]):
                raise InputError(f"checkpoints {labels[0]!r} and {label!r} have other {what}: they do not compare")
    return labels, names


def _lives(names: list[ConceptNames], alive: torch.Tensor, step: int) -> Iterator[DriftEvent]:
    """Births, revivals and deaths."""
    for feature in (alive[step] != alive[step - 1]).nonzero().flatten().tolist():
        kind = "death"
        if alive[step, feature]:
            kind = "revival" if alive[:step, feature].any() else "birth"
        before, after = names[step - 1].names[feature], names[step].names[feature]
        yield DriftEvent(kind, step, feature, -1, before, after, float("nan"))


def _switches(names: list[ConceptNames], overlap: torch.Tensor, step: int, most: float) -> Iterator[DriftEvent]:
    before, now = names[step - 1], names[step]
    switched = (overlap[step] < most) & (before.word[:, 0] != now.word[:, 0])
    for feature in switched.nonzero().flatten().tolist():
        yield DriftEvent("switch", step, feature, -1, before.names[feature], now.names[feature],
                         float(overlap[step, feature]))  # fmt: skip


def _merges(names: list[ConceptNames], pairs: list[dict[tuple[int, int], float]], step: int) -> Iterator[DriftEvent]:
    for (one, two), overlap in pairs[step].items():
        if (one, two) not in pairs[step - 1]:
            yield DriftEvent("merge", step, one, two, names[step].names[one], names[step].names[two], overlap)
