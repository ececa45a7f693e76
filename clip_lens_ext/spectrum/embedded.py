"""Everything of an `EvaluationData` as embeddings, plain and pruned."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.data import Skipped, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.evaluation_data import EvaluationData
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pruning import EMBEDDING, prune
from clip_lens_ext.towers.clip import HookedCLIP


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of unit length, float64, and what belongs together; pictures that could not be read are left out.

    Attributes:
        images: `[n d_embed]`.
        labels: class of each picture `[n]`, or None.
        test: which pictures are the test, bool `[n]`.
        classes: `[class template d_embed]`, or None.
        texts: distinct captions `[text d_embed]`, or None.
        pairs: picture and caption that belong together, `[pair 2]`.
        skipped: pictures that could not be read.
        fingerprint: of the pictures, or None for embeddings.
    """

    images: Tensor
    labels: Tensor | None
    test: Tensor
    classes: Tensor | None
    texts: Tensor | None
    pairs: Tensor
    skipped: tuple[Skipped, ...] = ()
    fingerprint: str | None = None

    def without(self, split: NoiseSplit) -> Embedded:
        """The same embeddings without the noise of a split of the embedding, of unit length again."""
        classes, texts = (None if part is None else _unit(split.remove(part)) for part in (self.classes, self.texts))
        return replace(self, images=_unit(split.remove(self.images)), classes=classes, texts=texts)

    def class_embeddings(self) -> Tensor:
        """The mean over the templates of each class, of unit length, `[class d_embed]`."""
        assert self.classes is not None  # asked only where there are classes
        return _unit(self.classes.mean(dim=1))

    def training_pairs(self) -> Tensor:
        """The pairs of training pictures and their captions, `[pair 2]`."""
        return self.pairs[~self.test[self.pairs[:, 0]]]


@torch.no_grad()
def embed(
    clip: HookedCLIP | None, data: EvaluationData, *, split: NoiseSplit | None = None, bar: str | None = None,
    zero: bool = False,
) -> Embedded:  # fmt: skip
    """Embed everything, with a split pruned at its hook where one is given.

    Args:
        clip: the model; None where all of `data` are embeddings.
        data: what to embed.
        split: what to prune, at the hook of the split; None: nothing.
        bar: name of a progress bar; None: no bar.
        zero: whether the model may give embeddings of zeros, as a ReLU may; they stay zero, and are like nothing.

    Raises:
        InputError: pictures or texts without a model to embed them, embeddings of unequal width, or one that is NaN,
            infinite or, where it may not be, zero.
    """
    if split is not None and clip is None:
        raise InputError("pruning inside of a tower needs the model: pass clip")
    context = nullcontext() if split is None or clip is None else prune(clip, split)
    with context:
        images, kept, skipped, fingerprint = _images(clip, data, bar, zero)
        classes = _classes(clip, data, zero)
        texts, pairs = _captions(clip, data, zero)
    widths = {part.shape[-1] for part in (images, classes, texts) if part is not None}
    if len(widths) > 1:
        raise InputError(
            f"embeddings of images, classes and captions have {sorted(widths)} numbers: one space is needed"
        )
    place = torch.full((data.n,), -1)
    place[kept] = torch.arange(len(kept))
    read = place[pairs[:, 0]] >= 0
    pairs = torch.stack([place[pairs[read, 0]], pairs[read, 1]], dim=1)
    labels = None if data.labels is None else data.labels[kept]
    return Embedded(images, labels, data.test[kept], classes, texts, pairs, skipped, fingerprint)


def is_of_embedding(split: NoiseSplit) -> bool:
    """Whether a split is of the embedding, so that embeddings can be pruned without the model."""
    return split.hook_name in (None, EMBEDDING)


def _images(
    clip: HookedCLIP | None, data: EvaluationData, bar: str | None, zero: bool
) -> tuple[Tensor, Tensor, tuple[Skipped, ...], str | None]:
    if data.has_embeddings:
        if len(data.images) != data.n:
            raise InputError(f"{len(data.images)} image embeddings, and {data.n} labels or captions")
        return _embeddings(data.images, "images"), torch.arange(data.n), (), None
    if clip is None:
        raise InputError("pictures need a model to embed them: pass clip, or embeddings [n d_embed]")
    batches = image_batches(data.images, preprocess=data.preprocess, batch_size=data.batch_size)
    if batches.n_samples is not None and batches.n_samples != data.n:
        raise InputError(f"{batches.n_samples} pictures, and {data.n} labels or captions")
    batches.keeping_order("labels and captions go with pictures by their position")
    cfg, rows, indexes = clip.vision.cfg, [], []
    with tqdm(total=data.n, desc=bar, unit="image", disable=bar is None, delay=3, leave=False) as shown:
        for batch in batches:
            rows.append(clip.embed_images(batch.pixels.to(cfg.device, cfg.dtype)).cpu())
            indexes += batch.indexes
            shown.update(len(batch.names))
    if (n := len(indexes) + len(batches.skipped)) != data.n:  # a stream, which does not say so before
        raise InputError(f"{n} pictures, and {data.n} labels or captions")
    found = _embeddings(torch.cat(rows), "images", zero=zero)
    return found, torch.tensor(indexes), tuple(batches.skipped), batches.fingerprint


def _classes(clip: HookedCLIP | None, data: EvaluationData, zero: bool) -> Tensor | None:
    if data.classes is None:
        return None
    if isinstance(data.classes, Tensor):
        given = data.classes[:, None] if data.classes.dim() == 2 else data.classes
        if given.dim() != 3:
            raise InputError(
                f"class embeddings are [class d_embed] or [class template d_embed], got {list(given.shape)}"
            )
        return _embeddings(given.flatten(0, 1), "classes").unflatten(0, given.shape[:2])
    templates = data.prompt_templates
    prompts = [template.replace("{}", name) for name in data.classes for template in templates]
    return _texts(clip, prompts, data.batch_size, zero).unflatten(0, (len(data.classes), len(templates)))


def _captions(clip: HookedCLIP | None, data: EvaluationData, zero: bool) -> tuple[Tensor | None, Tensor]:
    """Distinct captions, and which belong to which picture."""
    if data.captions is None:
        return None, torch.empty(0, 2, dtype=torch.long)
    if isinstance(data.captions, Tensor):
        if data.captions.dim() != 2:
            raise InputError(f"caption embeddings are [n d_embed], got {list(data.captions.shape)}")
        return _embeddings(data.captions, "captions"), torch.arange(data.n)[:, None].expand(-1, 2)
    number: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for image, given in enumerate(data.captions):
        own: Sequence[str] = (given,) if isinstance(given, str) else given
        if not own:
            raise InputError(f"picture {image} has no caption")
        pairs += [(image, number.setdefault(text, len(number))) for text in dict.fromkeys(own)]
    return _texts(clip, list(number), data.batch_size, zero), torch.tensor(pairs)


def _texts(clip: HookedCLIP | None, texts: list[str], batch_size: int, zero: bool) -> Tensor:
    if clip is None:
        raise InputError("texts need a model to embed them: pass clip, or embeddings [... d_embed]")
    parts = [clip.embed_texts(texts[start : start + batch_size]).cpu() for start in range(0, len(texts), batch_size)]
    return _embeddings(torch.cat(parts), "texts", zero=zero)


def _embeddings(rows: Tensor, what: str, *, zero: bool = False) -> Tensor:
    found = rows.detach().cpu().double()
    bad = ~torch.isfinite(found).all(dim=-1) | ((found == 0).all(dim=-1) & (not zero))
    if bad.any():
        kinds = "NaN or infinite" if zero else "NaN, infinite or zero"
        raise InputError(f"the embedding of number {int(bad.int().argmax())} of the {what} is {kinds}")
    return _unit(found)


def _unit(rows: Tensor) -> Tensor:
    """Unit length; a row of zeros, as pruning or a ReLU may leave it, stays zero, and is like nothing."""
    return F.normalize(rows, dim=-1)
