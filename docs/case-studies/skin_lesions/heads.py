"""The heads that are compared on the same pictures, and on which embeddings each of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from measures import Accuracy, Array, LinearClassifier, accuracy, fit_classifier
from numpy.typing import NDArray

CLASSIFIER, PROMPTS = "classifier", "prompts"
ABLATED, RANDOM = "suspects at zero", "random latents at zero"
KEYED, REFITTED = "the key's latents at zero", "refitted, suspects at zero"
HEADS = (CLASSIFIER, PROMPTS, ABLATED, RANDOM, KEYED, REFITTED)


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
    embeddings: Array,
    labels: NDArray[np.int64],
    classifier: LinearClassifier,
    prompts: LinearClassifier,
    *,
    suspects: int | None = None,
    controls: Sequence[int] = (),
    keyed: int | None = None,
) -> Heads:
    """The classifier as it is on every set of embeddings, and fitted anew on those without the suspects.

    Args:
        embeddings: of the training pictures with each set of latents at zero, `[set picture d_embed]`.
        labels: 0 or 1, `[picture]`.
        classifier: fitted on the model as it is, which is the set 0.
        prompts: the class prompts as a linear head.
        suspects: the number of the suspects' set, if there are any.
        controls: the numbers of the sets of random latents.
        keyed: the number of the set that the answer key gives, if it gives one.
    """
    members = {CLASSIFIER: [(0, classifier)], PROMPTS: [(0, prompts)]}
    if suspects is not None:
        members[ABLATED] = [(suspects, classifier)]
        members[REFITTED] = [(suspects, fit_classifier(embeddings[suspects], labels))]
    if controls:
        members[RANDOM] = [(number, classifier) for number in controls]
    if keyed is not None:
        members[KEYED] = [(keyed, classifier)]
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
