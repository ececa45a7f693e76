"""Pictures to steer: their codes, what is on them, and which features stand for that; and what each is steered to.

Each picture is steered from its own class to another one, drawn at random from those that share none of its features;
and, as a control, random features of like activation are steered instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip.checks import checked_codes, checked_count, checked_labels
from clip_lens_ext.sparse_clip.steering import ConceptFeatures, features_of, text_codes, wide
from clip_lens_ext.towers.clip import HookedCLIP

N_NEAREST = 4


@dataclass(frozen=True, eq=False)
class SteeringData:
    """What `steering_effect` and `caption_steering` need; from a model by `SteeringData.from_clip`, or by hand.

    Attributes:
        codes: of the pictures, un-normalised, `[picture d_code]`.
        labels: the class that is on each, `[picture]`.
        concepts: the features of each class; its words are the classes.
        class_codes: of the classes' prompts, for zero-shot, `[class d_code]`.
        caption_codes: of each picture's caption, for retrieval, `[picture d_code]`; or None.

    Raises:
        InputError: codes that are none, sizes or labels that do not fit, or a class that shares a feature with every
            other one.
    """

    codes: Tensor
    labels: Tensor
    concepts: ConceptFeatures
    class_codes: Tensor
    caption_codes: Tensor | None = None

    def __post_init__(self) -> None:
        d_code, n_class = self.concepts.d_code, len(self.classes)
        checked_codes(self.codes, d_code, what="codes of pictures")
        checked_codes(self.class_codes, d_code, what="codes of classes")
        object.__setattr__(self, "labels", checked_labels(self.labels, len(self.codes), n_class))
        if len(self.class_codes) != n_class:
            raise InputError(f"there are {n_class} classes, and codes of {len(self.class_codes)}")
        if self.caption_codes is not None and len(checked_codes(self.caption_codes, d_code, what="codes of captions"))\
                != len(self.codes):  # fmt: skip
            raise InputError(f"{len(self.codes)} pictures have {len(self.caption_codes)} captions: one each is needed")
        alone = (~self.choices.any(dim=1)).nonzero().flatten().tolist()
        if alone:
            raise InputError(
                f"the class {self.classes[alone[0]]!r} has no other class that shares none of its features, so it can "
                "be steered to none: ask features_of for fewer (k), leave shared ones out (max_share), or add classes"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in label order."""
        return self.concepts.words

    @property
    def choices(self) -> Tensor:
        """Whether a class can be steered to another one, bool `[class class]`: they share no feature."""
        features = self.concepts.features
        return ~(features[:, None, :, None] == features[None, :, None, :]).any(dim=-1).any(dim=-1)

    @property
    def typical_activation(self) -> float:
        """Median activation of the features of a picture's own class where they are active: a natural strength.

        NaN where none is active in any picture.
        """
        own = self.codes.gather(1, self.concepts.features[self.labels].to(self.codes.device))
        return float(own[own > 0].median()) if bool((own > 0).any()) else float("nan")

    def __repr__(self) -> str:
        captions = "no" if self.caption_codes is None else "with"
        return f"SteeringData({len(self.codes)} pictures, {len(self.classes)} classes, {captions} captions)"

    @classmethod
    @torch.no_grad()
    def from_clip(
        cls,
        clip: HookedCLIP,
        images: Any,
        labels: Sequence[int] | Tensor,
        classes: Sequence[str],
        *,
        captions: Sequence[str] | None = None,
        k: int = 2,
        template: str = "{}",
        prompt: str = "a photo of a {}",
        max_share: float | None = None,
        preprocess: Preprocess | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> SteeringData:
        """Run a Sparse CLIP over pictures and texts.

        Args:
            clip: the model.
            images: as `clip_lens_ext.data.image_batches` takes them; each must be readable, for each has a label.
            labels: the class of each picture, as a number.
            classes: names of the classes, each once.
            captions: one for each picture.
            k, template, max_share: of the features of a class, as in `features_of`.
            prompt: of zero-shot, with one `{}` for the class.
            preprocess: instead of the model's own.
            batch_size: pictures in a batch.
            progress: draw a bar.

        Raises:
            InputError: as `features_of` and `SteeringData` raise, or an unreadable picture.

        Example:
            >>> import clip_lens_ext as cle
            >>> from clip_lens_ext.sparse_clip import add_sparse_heads
            >>> sparse, pictures = add_sparse_heads(cle.planted_clip(), 256), torch.zeros(2, 3, 48, 48)
            >>> SteeringData.from_clip(sparse, pictures, [0, 1], ["heart", "kite"], k=1, progress=False)
            SteeringData(2 pictures, 2 classes, no captions)
        """
        concepts = features_of(clip, classes, k, template=template, max_share=max_share)
        if prompt.count("{}") != 1:
            raise InputError(f"a prompt has one {{}} for the class, and not so {prompt!r}")
        batches = image_batches(images, preprocess=preprocess or clip.preprocess, batch_size=batch_size, strict=True)
        batches.keeping_order("labels and captions go with pictures by their position")
        if batches.n_samples is not None:  # before the pictures are read
            labels = checked_labels(labels, batches.n_samples, len(concepts.words))
        cfg, parts = clip.vision.cfg, []
        with tqdm(total=batches.n_samples, desc="codes of pictures", unit="image", disable=not progress) as bar:
            for batch in batches:
                parts.append(wide(clip.embed_images(batch.pixels.to(cfg.device, cfg.dtype))))
                bar.update(len(batch.names))
        return cls(
            torch.cat(parts), labels, concepts,  # type: ignore[arg-type]
            text_codes(clip, [prompt.replace("{}", name) for name in concepts.words]),
            None if captions is None else text_codes(clip, list(captions)),
        )  # fmt: skip


class SteeringPlan(NamedTuple):
    """Which features of each picture are steered; the first arm is the concepts, the others are controls."""

    new_labels: Tensor
    """The class that each picture is steered to, `[picture]`."""
    suppress: Tensor
    """`[arm picture k]`."""
    boost: Tensor
    """`[arm picture k]`."""


def plan_steering(data: SteeringData, *, n_controls: int, seed: int) -> SteeringPlan:
    """Draw the new class of each picture, and the features of the controls.

    A control takes, for each feature of the concept, a random one of the `N_NEAREST` others whose activation in the
    picture is nearest to that feature's, what is equally near in random order. Those that are boosted are active in
    the text of some class, for a feature of no text could do nothing.

    Args:
        data: the pictures.
        n_controls: draws.
        seed: a picture's draws depend on it and on the picture's own place alone.

    Raises:
        InputError: there are too few features to draw from.
    """
    checked_count(n_controls, "n_controls", 0)
    codes, of_class = data.codes.double().cpu().numpy(), data.concepts.features.numpy()
    choices = [row.nonzero().flatten().tolist() for row in data.choices]
    live = (data.class_codes > 0).any(dim=0).cpu().numpy()
    new = np.empty(len(codes), dtype=np.int64)
    off = np.empty((1 + n_controls, len(codes), of_class.shape[1]), dtype=np.int64)
    on = np.empty_like(off)
    for picture, (code, label) in enumerate(zip(codes, data.labels.tolist(), strict=True)):
        rng = np.random.default_rng([seed, picture])
        new[picture] = choices[label][rng.integers(len(choices[label]))]
        off[0, picture], on[0, picture] = of_class[label], of_class[new[picture]]
        for arm in range(1, 1 + n_controls):
            free = np.ones(len(code), dtype=bool)
            free[off[0, picture]] = free[on[0, picture]] = False
            on[arm, picture] = _alike(code, on[0, picture], free, live, rng)
            off[arm, picture] = _alike(code, off[0, picture], free, np.ones_like(free), rng)
    return SteeringPlan(*(torch.from_numpy(part) for part in (new, off, on)))


def _alike(
    code: np.ndarray, wanted: np.ndarray, free: np.ndarray, allowed: np.ndarray, rng: np.random.Generator
) -> list[int]:
    """A random feature of like activation for each that is wanted; it is no longer free afterwards."""
    found = []
    for feature in wanted:
        candidates = np.flatnonzero(free & allowed)
        if not len(candidates):
            raise InputError("there are too few other features for a control: take fewer of each concept (k), or "
                             "n_controls=0")  # fmt: skip
        distance = np.abs(code[candidates] - code[feature])
        nearest = np.lexsort((rng.random(len(candidates)), distance))[:N_NEAREST]
        taken = int(candidates[nearest[rng.integers(len(nearest))]])
        free[taken] = False
        found.append(taken)
    return found
