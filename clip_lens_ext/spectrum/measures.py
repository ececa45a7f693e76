"""What embeddings are good for: zero-shot, retrieval, neighbours and a linear probe, sample by sample.

Every measure gives a hit, 0 or 1, for each sample, so that two prunings can be compared on the same samples.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.embedded import Embedded

_TOP = 5


def hits(embedded: Embedded, *, n_neighbors: int, probe_c: float) -> dict[str, Tensor]:
    """Of each measure that the data allow, whether each sample is right, float64 `[sample]`.

    - `zero-shot top-1`, `top-5`: the test picture's own class is nearest, or among the five nearest.
    - `image to text R@1`, `R@5`: a caption of the test picture is among the nearest of the test's captions.
    - `text to image R@1`, `R@5`: a picture of the caption is among the nearest of all test pictures.
    - `kNN`: the majority of the `n_neighbors` nearest training pictures has the test picture's class (scikit-learn).
      A picture with an embedding of zeros has no neighbours, and is wrong. Where a class of the test has no training
      picture there is no kNN and no probe.
    - `linear probe`: logistic regression on unit-length embeddings of the training pictures (scikit-learn).

    "Nearest" is by cosine. What is equally near counts as nearer, so embeddings that are all alike are never right.
    A top-5 is left out where there are five candidates or fewer.

    Args:
        embedded: the embeddings.
        n_neighbors: of kNN.
        probe_c: inverse strength of the probe's L2 penalty.

    Raises:
        InputError: fewer training pictures than neighbours.
    """
    found: dict[str, Tensor] = {}
    test = embedded.test
    if embedded.labels is not None and embedded.classes is not None:
        classes = embedded.class_embeddings()
        own = torch.nn.functional.one_hot(embedded.labels[test], len(classes)).bool()
        rank = best_rank(embedded.images[test] @ classes.T, own)
        found |= _within(rank, len(classes), "zero-shot top-{}")
    if embedded.texts is not None:
        similarity, own = _pairs(embedded, embedded.texts)
        found |= _within(best_rank(similarity, own), similarity.shape[1], "image to text R@{}")
        found |= _within(best_rank(similarity.T, own.T), len(similarity), "text to image R@{}")
    if embedded.labels is not None and not unseen_classes(embedded):
        found |= _classifiers(embedded, embedded.labels, n_neighbors, probe_c)
    return found


def unseen_classes(embedded: Embedded) -> list[int]:
    """Classes of test pictures that no training picture has: kNN and the linear probe cannot know them."""
    if embedded.labels is None:
        return []
    seen = set(embedded.labels[~embedded.test].tolist())
    return sorted(set(embedded.labels[embedded.test].tolist()) - seen)


def best_rank(similarity: Tensor, own: Tensor) -> Tensor:
    """Rank from 1 of the best of each row's own columns, counting what is equally similar as better, `[row]`.

    Example:
        >>> best_rank(torch.tensor([[0.1, 0.9, 0.9]]), torch.tensor([[False, True, False]]))
        tensor([2])
    """
    best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~own).sum(dim=1) + 1


def _within(rank: Tensor, n_candidate: int, name: str) -> dict[str, Tensor]:
    return {name.format(k): (rank <= k).double() for k in (1, _TOP) if k == 1 or n_candidate > k}


def _pairs(embedded: Embedded, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of test pictures and their captions `[image text]`, and which belong together."""
    own = torch.zeros(len(embedded.images), len(texts), dtype=torch.bool)
    own[embedded.pairs[:, 0], embedded.pairs[:, 1]] = True
    own = own[embedded.test]
    used = own.any(dim=0)  # the captions of training pictures are no candidates
    return embedded.images[embedded.test] @ texts[used].T, own[:, used]


def _classifiers(embedded: Embedded, labels: Tensor, n_neighbors: int, probe_c: float) -> dict[str, Tensor]:
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn takes a second to load
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    test = embedded.test
    x, y = embedded.images[~test].numpy(), labels[~test].numpy()
    if len(y) < n_neighbors:
        raise InputError(f"{len(y)} training pictures are fewer than n_neighbors={n_neighbors}")
    neighbours = KNeighborsClassifier(n_neighbors, metric="cosine", algorithm="brute").fit(x, y)
    guesses = {"kNN": neighbours.predict(embedded.images[test].numpy())}
    if len(set(y.tolist())) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)  # a half-fitted probe is no measure
            try:
                probe = LogisticRegression(C=probe_c, max_iter=2000).fit(x, y)
            except ConvergenceWarning as error:
                raise InputError(
                    f"the linear probe did not converge with probe_c={probe_c}: pass a smaller one"
                ) from error
        guesses["linear probe"] = probe.predict(embedded.images[test].numpy())
    found = {name: torch.from_numpy(guess == labels[test].numpy()).double() for name, guess in guesses.items()}
    found["kNN"] *= embedded.images[test].any(dim=1)  # one of zeros is equally far from all
    return found
