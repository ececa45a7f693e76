"""Embeddings of pictures and their captions, made once: what heads alone are trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_lens_ext.data import ImageBatch, Preprocess, Skipped, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.pass_rows import RowAccumulator
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import tensors_sha256
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.sparse_clip.paired_captions import PairedCaptions
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.identity import tower_sha256


@dataclass(frozen=True, eq=False)
class EmbeddedPairs:
    """Embeddings of both towers, and which belong together; `embed_pairs` makes it.

    Attributes:
        images: un-normalised embeddings of the pictures that could be read, `[n d_embed]`.
        indexes: the position of each in the data, `[n]`.
        texts: un-normalised embeddings of the distinct captions, `[text d_embed]`.
        captions: those texts.
        entries: numbers of texts, those of the first picture first, `[caption]`.
        first: where the captions of each picture begin in `entries`, and their end, `[n + 1]`.
        skipped: pictures that could not be read.
        vision_sha256, text_sha256: of the towers that made them; empty for embeddings from elsewhere.
    """

    images: Tensor
    indexes: Tensor
    texts: Tensor
    captions: tuple[str, ...]
    entries: Tensor
    first: Tensor
    skipped: tuple[Skipped, ...] = ()
    vision_sha256: str = ""
    text_sha256: str = ""

    @classmethod
    def from_vectors(cls, images: Tensor, texts: Tensor) -> EmbeddedPairs:
        """Embeddings from elsewhere: picture i belongs to text i.

        Args:
            images, texts: finite floats `[n d_embed]`; the widths may differ.

        Raises:
            InputError: another shape or dtype, unequal numbers, or a NaN, infinite or zero embedding.

        Example:
            >>> EmbeddedPairs.from_vectors(torch.eye(4, 8), torch.eye(4, 6))
            EmbeddedPairs(4 pictures, 4 captions)
        """
        for name, rows in (("images", images), ("texts", texts)):
            if not isinstance(rows, Tensor):
                raise InputError(f"{name} are a tensor [n d_embed], got a {type(rows).__name__}")
            if rows.dim() != 2 or not rows.is_floating_point() or len(rows) == 0:
                raise InputError(f"{name} are floats [n d_embed], got {rows.dtype} {list(rows.shape)}")
            bad = ~torch.isfinite(rows).all(dim=1) | (rows == 0).all(dim=1)
            if bad.any():
                raise InputError(f"the embedding of number {int(bad.int().argmax())} of the {name} is NaN, infinite or "
                                 "zero")  # fmt: skip
        if len(images) != len(texts):
            raise InputError(f"{len(images)} pictures and {len(texts)} texts: picture i belongs to text i")
        each = torch.arange(len(images) + 1)
        names = tuple(str(number) for number in range(len(texts)))
        return cls(images.detach(), each[:-1], texts.detach(), names, each[:-1], each)

    @property
    def n(self) -> int:
        """Pictures."""
        return len(self.images)

    @property
    def pairing(self) -> PairedCaptions:
        """Which texts belong to which picture."""
        return PairedCaptions(self.captions, self.entries, self.first)

    def sha256(self) -> str:
        """Of the embeddings and what belongs together."""
        parts = {"images": self.images, "texts": self.texts, "entries": self.entries, "first": self.first}
        return tensors_sha256(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, `InputError` where that cannot be."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EmbeddedPairs:
        """Read what `save` wrote; `LoadError` if the file is something else."""
        return load_result(cls, path, fits=lambda one: len(one.first) == one.n + 1 == len(one.indexes) + 1)

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"EmbeddedPairs({self.n} pictures, {len(self.entries)} captions{skipped})"


@torch.no_grad()
def embed_pairs(
    clip: HookedCLIP,
    images: Any,
    captions: Sequence[str | Sequence[str]],
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 64,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> EmbeddedPairs:
    """Embed pictures and their captions with both towers, each picture and each distinct caption once.

    Args:
        clip: the dense model; of a Sparse CLIP, `dense_clip(clip)`.
        images: pictures, as `image_batches` takes them; those that cannot be read are skipped with their captions.
        captions: for each picture a text, or several.
        preprocess: PIL picture to tensor; None: that of `clip`.
        batch_size: pictures, or texts, at a time.
        checkpoint: a file to resume from if it exists and to write to, and another beside it for the texts.
        progress: draw a bar.

    Raises:
        InputError: another number of captions than of pictures, a picture without caption, a vision tower alone, no
            picture that can be read, or a checkpoint of other data or another model.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, batch = cle.planted_clip(), cle.PlantedWorld(0).sample(6, seed=0)
        >>> embed_pairs(clip, cle.planted.normalise(batch.images), batch.captions, progress=False)
        EmbeddedPairs(6 pictures, 6 captions)
    """
    if clip.text is None:
        raise InputError(f"{clip.model_name} is a vision tower alone, and captions need a text tower")
    paired = PairedCaptions.of(captions)
    batches = image_batches(images, preprocess=preprocess or clip.preprocess, batch_size=batch_size)
    batches.keeping_order("captions go with pictures by their position")
    if batches.n_samples is not None and batches.n_samples != paired.n:
        raise InputError(f"{batches.n_samples} pictures, and captions of {paired.n}")
    # Before the pictures, which take long: a caption that the tokenizer refuses is said at once.
    tokens = torch.cat([clip.tokenize(paired.texts[at : at + 4096]).cpu() for at in range(0, len(paired.texts), 4096)])
    vision, text = tower_sha256(clip.vision), tower_sha256(clip.text)
    cfg = clip.vision.cfg
    seen = RowAccumulator(_Rows)
    # Each write has all rows so far: twenty in all cost ten times the size of the rows, however many there are.
    every = [max(50, -(-(n or 0) // (20 * batch_size))) for n in (batches.n_samples, len(paired.texts))]
    report = run_pass(
        batches, lambda batch: _embedded(batch, clip.vision(batch.pixels.to(cfg.device, cfg.dtype))), seen,
        checkpoint=checkpoint, checkpoint_every=every[0], settings={"what": "embed_pairs", "model": vision},
        description="pictures", progress=progress,
    )  # fmt: skip
    indexes, images_of = seen.result()
    if (n := len(indexes) + len(report.skipped)) != paired.n:  # a stream, which does not say so before
        raise InputError(f"{n} pictures, and captions of {paired.n}")
    tower, said = clip.text, RowAccumulator(_Rows)
    run_pass(
        image_batches(tokens, batch_size=batch_size),
        lambda batch: _embedded(batch, tower(batch.pixels.to(tower.cfg.device))), said,
        checkpoint=None if checkpoint is None else Path(checkpoint).with_name(Path(checkpoint).name + ".texts"),
        checkpoint_every=every[1],
        settings={"what": "embed_pairs", "model": text}, description="captions", unit="caption",
        progress=progress,
    )  # fmt: skip
    own = paired.select(indexes)
    return EmbeddedPairs(images_of, indexes, said.result().rows, own.texts, own.entries, own.first, report.skipped,
                         vision, text)  # fmt: skip


def _embedded(batch: ImageBatch, embedding: Tensor) -> _Rows:
    bad = ~torch.isfinite(embedding).all(dim=1)
    if bad.any():
        raise InputError(f"the embedding of {batch.names[int(bad.int().argmax())]!r} is NaN or infinite")
    return _Rows(torch.tensor(batch.indexes), embedding.float().cpu())


class _Rows(NamedTuple):
    """Embeddings, and the positions of what they are of."""

    indexes: Tensor
    rows: Tensor
