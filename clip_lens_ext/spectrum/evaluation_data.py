"""What a pruned model is tried on: pictures with their classes and captions, or the embeddings of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.data import Preprocess
from clip_lens_ext.errors import InputError

_PLAIN = "a photo of a {}"


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """Pictures, and what is known of them; each part that is left out leaves out the measures that need it.

    Half of the pictures are the test: they are classified and retrieved. The others are the neighbours of kNN, and what
    the linear probe is fitted on; where a class of the test is not among them, both are left out. Make the split that
    you evaluate of other pictures, or of the training half.

    Args:
        images: pictures, as `clip_lens_ext.data.image_batches` takes them; or their embeddings, floats `[n d_embed]`.
        labels: the class of each picture, integers from 0, `[n]`; for zero-shot, kNN and the linear probe.
        classes: names of the classes, or their text embeddings `[class d_embed]` or `[class template d_embed]`; for
            zero-shot.
        captions: of each picture a text or several, or an embedding, `[n d_embed]`; for retrieval. Equal texts are one
            text, which belongs to all of its pictures.
        templates: one or several prompts with a `{}` for the name of a class; the unit-length embeddings of several
            are averaged after pruning.
        is_test: which pictures are the test, bool `[n]`; None: by `seed`, `test_share` of each class, and of a
            class with a single picture none.
        test_share: share of the test, in (0, 1).
        seed: of the choice.
        preprocess: PIL picture to tensor, for files and PIL pictures (`clip.preprocess`).
        batch_size: pictures, or texts, at a time.

    Raises:
        InputError: nothing to evaluate on, parts of unequal length, a label without a class, no test or
            no training picture, or a template without `{}`.

    Example:
        >>> rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        >>> data = EvaluationData(rows, labels=torch.tensor([0, 1] * 4))
        >>> data.n, int(data.test.sum())
        (8, 4)
    """

    images: Any
    labels: Tensor | None = None
    classes: Sequence[str] | Tensor | None = None
    captions: Sequence[str] | Sequence[Sequence[str]] | Tensor | None = None
    templates: str | Sequence[str] = _PLAIN
    is_test: Tensor | None = None
    test_share: float = 0.5
    seed: int = 0
    preprocess: Preprocess | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.labels is None and self.captions is None:
            raise InputError("nothing to evaluate on: pass labels (and classes, for zero-shot), captions, or both")
        if self.labels is not None:
            object.__setattr__(self, "labels", _integers(self.labels))
        if isinstance(self.captions, str):
            raise InputError("captions is a list with the text, or the texts, of each picture; got one string")
        lengths = {name: len(part) for name, part in self._parts().items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"parts of unequal length: {', '.join(f'{n} {name}' for name, n in lengths.items())}")
        if self.n < 4:
            raise InputError(f"{self.n} pictures: at least four are needed, for a training half and a test")
        self._check_classes()
        _check_templates(self.prompt_templates)
        if not 0 < self.test_share < 1:
            raise InputError(f"test_share is in (0, 1), got {self.test_share}")
        object.__setattr__(self, "is_test", self._choose() if self.is_test is None else self.is_test.bool().cpu())
        self._check_test()

    @property
    def n(self) -> int:
        """Pictures that something is known of."""
        return len(next(iter(self._parts().values())))

    @property
    def test(self) -> Tensor:
        """Which pictures are the test, bool `[n]`."""
        assert self.is_test is not None  # __post_init__ has chosen
        return self.is_test

    @property
    def has_embeddings(self) -> bool:
        """Whether the images are embeddings, and no pictures."""
        return isinstance(self.images, Tensor) and self.images.dim() == 2 and self.images.is_floating_point()

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        """The templates as a tuple."""
        return (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)

    def _parts(self) -> dict[str, Any]:
        parts = {"labels": self.labels, "captions": self.captions, "is_test": self.is_test}
        return {name: part for name, part in parts.items() if part is not None}

    def _check_classes(self) -> None:
        if self.classes is None:
            return
        if self.labels is None:
            raise InputError("classes without labels: which class each picture has is needed for zero-shot")
        if isinstance(self.classes, str) or len(self.classes) < 2:
            raise InputError("classes is a list of two or more names, or their embeddings [class d_embed]")
        if int(self.labels.max()) >= len(self.classes):
            raise InputError(f"label {int(self.labels.max())} has no class: there are {len(self.classes)}")

    def _choose(self) -> Tensor:
        """The test by lot, of each class by itself, so that none is without pictures in the training half."""
        generator = torch.Generator().manual_seed(self.seed)
        groups = torch.zeros(self.n, dtype=torch.long) if self.labels is None else self.labels
        if len(groups.unique()) == self.n:  # nothing to learn of any class, and all can be tried
            groups = torch.zeros_like(groups)
        chosen = torch.zeros(self.n, dtype=torch.bool)
        for group in groups.unique():
            own = (groups == group).nonzero().flatten()
            n_test = min(max(1, round(self.test_share * len(own))), len(own) - 1)  # a single picture is for training
            chosen[own[torch.randperm(len(own), generator=generator)[:n_test]]] = True
        return chosen

    def _check_test(self) -> None:
        if bool(self.test.all()) or not bool(self.test.any()):
            raise InputError("every picture is on one side: some must be the test and some not")


def _integers(labels: Any) -> Tensor:
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels are integers [n], the number of each picture's class: {error}") from error
    if found.dim() != 1 or found.is_floating_point() or found.dtype is torch.bool or len(found) == 0:
        raise InputError(f"labels are integers [n], got {found.dtype} {list(found.shape)}")
    if int(found.min()) < 0:
        raise InputError(f"labels count from 0, got {int(found.min())}")
    return found.long().cpu()


def _check_templates(templates: tuple[str, ...]) -> None:
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise InputError(f"each template has one {{}} for the name of the class; got {wrong[0] if wrong else 'none'!r}")
