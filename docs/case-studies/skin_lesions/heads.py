"""The heads that are compared on the same pictures, and on which embeddings each of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from measures import Accuracy, Array, LinearClassifier, accuracy, fit_classifier
from numpy.typing import NDArray

CLASSIFIER, PROMPTS = "classifier", "prompts"
ABLATED, RANDOM = "classifier, suspects at zero", "classifier, random latents at zero"
REFITTED, RANDOM_REFITTED = "refitted, suspects at zero", "refitted, random latents at zero"
HEADS = (CLASSIFIER, PROMPTS, ABLATED, RANDOM, REFITTED, RANDOM_REFITTED)


@dataclass(frozen=True, eq=False)
class Heads:
    """Linear heads, each on the embeddings of one set of latents at zero.

    Attributes:
        members: head -> its pairs (number of the set, linear classifier); the random ones have a pair for each draw.
    """

    members: dict[str, list[tuple[int, LinearClassifier]]]

    def accuracy(self, embeddings: Array, labels: NDArray[np.int64], *, seed: int = 0) -> dict[str, Accuracy]:
        """Of every head; of the random ones the mean over their draws.

        Args:
            embeddings: of the pictures with each set at zero, `[set picture d_embed]`.
            labels: 0 or 1, `[picture]`.
            seed: of the bootstrap.
        """
        return {
            name: Accuracy.mean([accuracy(head(embeddings[number]), labels, seed=seed) for number, head in pairs])
            for name, pairs in self.members.items()
        }


def fit_heads(
    embeddings: Array, labels: NDArray[np.int64], classifier: LinearClassifier, prompts: LinearClassifier
) -> Heads:
    """The classifier as it is on every set of embeddings, and fitted anew on them.

    Args:
        embeddings: of the training pictures, `[set picture d_embed]`: the model as it is, then, if there are suspects,
            the suspects at zero, then each random control.
        labels: 0 or 1, `[picture]`.
        classifier: fitted on the model as it is.
        prompts: the class prompts as a linear head.
    """
    members = {CLASSIFIER: [(0, classifier)], PROMPTS: [(0, prompts)]}
    numbers = range(1, len(embeddings))
    anew = [(number, fit_classifier(embeddings[number], labels)) for number in numbers]
    if len(embeddings) > 1:
        members[ABLATED], members[REFITTED] = [(1, classifier)], anew[:1]
    if len(embeddings) > 2:
        members[RANDOM], members[RANDOM_REFITTED] = [(number, classifier) for number in numbers[1:]], anew[1:]
    return Heads({name: members[name] for name in HEADS if name in members})


def chosen(embeddings: Array, shown: NDArray[np.int64]) -> Array:
    """Of every picture the version that is shown: `[set version picture d]` and `[picture]` to `[set picture d]`."""
    return embeddings[:, shown, np.arange(len(shown))]


def agreeing(labels: NDArray[np.int64], agreement: float, draws: Sequence[float] | Array) -> NDArray[np.int64]:
    """Which pictures show a shortcut that agrees with the label on a share `agreement` of them, `[picture]`.

    A picture on which it agrees at one share agrees at every greater one: what differs between two shares is those
    pictures that changed sides.

    Args:
        labels: 0 or 1, `[picture]`.
        agreement: from 0, reversed, over 0.5, unrelated, to 1.
        draws: uniform in 0..1, `[picture]`.

    Example:
        >>> agreeing(np.array([0, 0, 1, 1]), 0.5, [0.1, 0.9, 0.1, 0.9]).tolist()
        [0, 1, 1, 0]
    """
    return np.where(np.asarray(draws) < agreement, labels, 1 - labels)
