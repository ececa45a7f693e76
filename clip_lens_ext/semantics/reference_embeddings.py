"""The references of every latent as a judge embeds them: each sample once, however many latents share it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.data import ImageBatch, Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import fingerprint
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.semantics.embedding_pass import EmbeddedBatch, EmbeddingAccumulator, WantedBatches
from clip_lens_ext.semantics.references import References
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.tower import HookedTower


class Gathered(NamedTuple):
    """Embeddings of the references of some latents, and which of them are there."""

    vectors: Tensor
    """`[latent reference d_embed]`, un-normalised; zeros where a latent has fewer references."""
    mask: Tensor
    """`[latent reference]`, true where there is a reference."""


@dataclass(frozen=True, eq=False)
class ReferenceEmbeddings:
    """`[latent reference d_embed]`, stored sparsely; `embed_references` makes it.

    Attributes:
        vectors: un-normalised embeddings of the samples that are a reference of any latent, `[embedded d_embed]`.
        sample: which sample each is, counted as in `References`, ascending `[embedded]`.
        row: row of `vectors` of each latent's references, strongest first, `[d_sae k]`; -1 where there are fewer.
        activation: the latent's activation on each, `[d_sae k]`; 0 where there are fewer.
        lowest: each latent's least activation over all samples of the pass, `[d_sae]`: 0 unless it is active on all.
        judge: name of the model that embedded them.
        hook_name, token_scope: of the references.
        provenance: of the references, with the judge and its embedding's tower.
    """

    vectors: Tensor
    sample: Tensor
    row: Tensor
    activation: Tensor
    lowest: Tensor
    judge: str
    hook_name: str
    token_scope: str
    provenance: dict[str, Any]

    @property
    def d_sae(self) -> int:
        """Number of latents of the SAE."""
        return len(self.row)

    @property
    def k(self) -> int:
        """References of a latent, at most."""
        return self.row.shape[1]

    @property
    def n_references(self) -> Tensor:
        """How many references each latent has, `[d_sae]`."""
        return (self.row >= 0).sum(dim=1)

    def __repr__(self) -> str:
        found = int((self.n_references > 0).sum())
        return (
            f"ReferenceEmbeddings({len(self.vectors)} samples by {self.judge!r}, top {self.k} of {found} of "
            f"{self.d_sae} latents, {self.hook_name}, {self.token_scope} tokens)"
        )

    def gather(self, latents: Tensor | slice) -> Gathered:
        """The embeddings of some latents' references.

        Args:
            latents: numbers `[latent]`, or a slice.

        Returns:
            `Gathered`: `[latent k d_embed]` with its mask.
        """
        row = self.row[latents]
        mask = row >= 0
        return Gathered(self.vectors[row.clamp(min=0)].masked_fill(~mask[..., None], 0), mask)

    def blocks(self, size: int = 256) -> Iterator[tuple[slice, Gathered]]:
        """All latents in order, so many at a time."""
        for start in range(0, self.d_sae, size):
            part = slice(start, min(start + size, self.d_sae))
            yield part, self.gather(part)

    def mean(self, *, normalize: bool = False) -> Tensor:
        """The mean embedding of each latent's references, `[d_sae d_embed]`; NaN where there are none.

        Args:
            normalize: L2-normalise each embedding before the mean; else it is the mean of un-normalised ones, as
                Dreyer et al. 2505.20229 take it.
        """
        count = self.n_references
        vectors = F.normalize(self.vectors, dim=-1) if normalize else self.vectors
        # Sums without the `[d_sae k d_embed]` that a gather would make.
        total = F.embedding_bag(self.row[self.row >= 0], vectors, count.cumsum(0) - count, mode="sum")
        return total / count[:, None]

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceEmbeddings:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        same = self.row.shape == self.activation.shape and len(self.sample) == len(self.vectors)
        return same and (self.row.numel() == 0 or int(self.row.max()) < len(self.vectors))


@torch.no_grad()
def embed_references(
    references: References,
    images: Any,
    judge: HookedCLIP,
    *,
    k: int | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 64,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> ReferenceEmbeddings:
    """Embed the references of every latent with a judge; each sample once.

    Args:
        references: from `collect_references`.
        images: the data that the references were collected from, in any form that `image_batches` takes. Files and PIL
            pictures are preprocessed for the judge; a tensor is taken as it is, so it has to be what the judge reads.
            Where the data cannot be read by position, they are read once from the start.
        judge: embeds them: the model itself, or another CLIP.
        k: only the first `k` references of each latent; None: all that were kept.
        preprocess: instead of the judge's own.
        batch_size: samples in a batch.
        checkpoint: a file; a pass that was interrupted goes on from it, and gives what an uninterrupted one gives.
        checkpoint_every: batches between two writes.
        progress: draw a bar.

    Returns:
        `ReferenceEmbeddings` on the CPU; half precision becomes float32.

    Raises:
        InputError: `k` is out of range, the images are not those of the references, the judge cannot read them, or the
            checkpoint is of another pass.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(20, seed=0, split="test").images)
        >>> references = cle.collect_references(clip.vision, pixels, sae, k=4, progress=False)
        >>> embeddings = embed_references(references, pixels, clip, progress=False)
        >>> embeddings.gather(torch.tensor([0, 7])).vectors.shape
        torch.Size([2, 4, 128])
    """
    k = references.k if k is None else k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= references.k:
        raise InputError(f"k must be in 1..{references.k}, as many references as were collected, got {k!r}")
    wanted = references.sample[:, :k]
    sample = wanted[wanted >= 0].unique()
    if len(sample) == 0:
        raise InputError("no latent has a reference: nothing in the data activates this SAE")
    number_of = dict(zip(references.indexes[sample].tolist(), range(len(sample)), strict=True))
    every = image_batches(images, preprocess=preprocess or judge.preprocess, batch_size=batch_size)
    batches = WantedBatches(every.keeping_order("references are samples by their position"), sorted(number_of))

    def step(batch: ImageBatch) -> EmbeddedBatch:
        chosen = [place for place, index in enumerate(batch.indexes) if index in number_of]
        rows = [number_of[batch.indexes[place]] for place in chosen]
        for place, row in zip(chosen, rows, strict=True):
            check_name(references.names[int(sample[row])], batch.names[place])
        tower = "vision" if batch.pixels.is_floating_point() else "text"
        vectors = _embed(judge, batch.pixels[chosen], references) if chosen else torch.zeros(0, 0)
        return EmbeddedBatch(torch.tensor(rows, dtype=torch.int64), vectors, tower)

    found = EmbeddingAccumulator(len(sample))
    settings = {} if checkpoint is None else _settings(references, judge, sample, batch_size)
    run_pass(batches, step, found, checkpoint=checkpoint, checkpoint_every=checkpoint_every, settings=settings,
             description="embedding references", progress=progress)  # fmt: skip
    vectors = found.vectors
    if vectors is None or not bool(found.done.all()):
        missing = (~found.done).nonzero().flatten()
        first = references.names[int(sample[missing[references.indexes[sample[missing]].argmin()]])]
        why = {skip.name: skip.reason for skip in batches.skipped}
        reasons = f" ({'; '.join(f'{name}: {reason}' for name, reason in list(why.items())[:3])})" if why else ""
        raise InputError(
            f"{len(missing)} of {len(sample)} reference samples are not in these images, the first {first!r}{reasons}: "
            "pass the data that collect_references read, in the same order"
        )
    row = torch.where(wanted >= 0, torch.searchsorted(sample, wanted.contiguous()), -1)
    provenance = {**references.provenance, "judge": judge.model_name, "judge_tower": found.tower}
    activity = references.activity
    lowest = torch.where(activity.n_active < activity.n_samples, 0.0, activity.least)
    return ReferenceEmbeddings(
        vectors, sample, row, references.activation[:, :k].clone(), lowest, judge.model_name, references.hook_name,
        references.token_scope, provenance,
    )  # fmt: skip


def _settings(references: References, judge: HookedCLIP, sample: Tensor, batch_size: int) -> dict[str, Any]:
    """By which two passes are the same pass."""
    towers = {"vision": judge.vision, "text": judge.text}
    return {
        "judge": judge.model_name, "batch_size": batch_size, "samples": fingerprint(sample),
        "references": {name: references.provenance.get(name) for name in ("model", "sae_sha256", "data_fingerprint")},
        **{f"{name}_sha256": None if tower is None else tower_sha256(tower) for name, tower in towers.items()},
    }  # fmt: skip


def _embed(judge: HookedCLIP, pixels: Tensor, references: References) -> Tensor:
    tower: HookedTower | None = judge.vision
    if not pixels.is_floating_point():
        if judge.model_name != references.provenance["model"]:
            raise InputError(
                f"these references are token ids of {references.provenance['model']!r}: another judge "
                f"({judge.model_name!r}) has other tokens"
            )
        tower = judge.text
    if tower is None:
        raise InputError(f"{judge.model_name} is a vision tower alone: it cannot embed prompts")
    cfg = tower.cfg
    pixels = pixels.to(cfg.device)
    found = tower(pixels.to(cfg.dtype) if pixels.is_floating_point() else pixels).cpu()
    return found if found.dtype == torch.float64 else found.float()


def check_name(collected: str, given: str) -> None:
    """Names that are positions say nothing, and folders may be named from another place; file names must agree.

    Args:
        collected: the name of a sample in `References`.
        given: of the one at its position in the images that were passed in.

    Raises:
        InputError: they are files of other names.
    """
    if collected.isdigit() or given.isdigit():
        return
    if PurePath(collected).name != PurePath(given).name:
        raise InputError(
            f"these are not the images of the references: where {collected!r} was collected, there is {given!r} now"
        )
