"""The samples that activate each latent most, found in one streaming pass.

A sample's activation of a latent is its greatest over the SAE's tokens, and the top `k` samples of every latent are
kept, greatest first; ties go to the sample that came first. Only positive activations count. Codes are sparse and what
is kept is `[d_sae k]`, so memory does not grow with the data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.data import ImageBatch, Preprocess, Skipped, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import versions
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.saes.codes import encode
from clip_lens_ext.saes.identity import sae_sha256
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.semantics.activity import LatentActivity
from clip_lens_ext.semantics.peaks import TopSamples, peaks
from clip_lens_ext.semantics.reference_pass import ReferenceAccumulator, ReferenceBatch
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


class LatentReferences(NamedTuple):
    """The references of one latent, greatest activation first; tensors `[reference]`, none of them padded."""

    sample: Tensor
    activation: Tensor
    position: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class References:
    """The top `k` samples of every latent, and how often and how strongly it is active.

    Attributes:
        sample: which sample, `[d_sae k]`, counting the readable ones in order; -1 where a latent has fewer than `k`.
        activation: its activation, in the SAE's units, `[d_sae k]`; 0 where there is no sample.
        position: token of the tower's sequence at which it is reached, the first if several, `[d_sae k]`; -1 where
            there is no sample or no token axis.
        n_samples: readable samples of the pass.
        names: one per readable sample.
        indexes: position of each readable sample in the data, counting those that were skipped, `[n_samples]`.
        hook_name, token_scope: where the SAE reads.
        skipped: what could not be read.
        latents: those that were collected, sorted; None means all.
        provenance: model, SAE hash, data fingerprint, versions.
        activity: statistics of every latent over all samples; zeros where a latent was not collected.
    """

    sample: Tensor
    activation: Tensor
    position: Tensor
    n_samples: int
    names: tuple[str, ...]
    indexes: Tensor
    hook_name: str
    token_scope: str
    skipped: tuple[Skipped, ...]
    latents: Tensor | None
    provenance: dict[str, Any]
    activity: LatentActivity

    @property
    def k(self) -> int:
        """How many samples are kept for each latent."""
        return self.sample.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents of the SAE."""
        return self.sample.shape[0]

    def __repr__(self) -> str:
        found = int((self.sample[:, 0] >= 0).sum())
        return (
            f"References(top {self.k} of {self.n_samples} samples, {found} of {self.d_sae} latents active, "
            f"{self.hook_name}, {self.token_scope} tokens)"
        )

    def of(self, latent: int) -> LatentReferences:
        """The references of one latent, without padding; empty where no sample activates it.

        Raises:
            InputError: there is no such latent, or it was not collected.
        """
        if not 0 <= latent < self.d_sae:
            raise InputError(f"latents are 0 to {self.d_sae - 1}, got {latent}")
        if self.latents is not None and latent not in self.latents:
            raise InputError(
                f"latent {latent} was not collected: collect_references was asked for {len(self.latents)} "
                f"of {self.d_sae} latents"
            )
        filled = self.sample[latent] >= 0
        sample = self.sample[latent][filled]
        names = tuple(self.names[i] for i in sample.tolist())
        return LatentReferences(sample, self.activation[latent][filled], self.position[latent][filled], names)

    def merge(self, other: References) -> References:
        """The references of both passes, as one pass over this data followed by the other's would give them.

        Args:
            other: of the same model, SAE, tokens, `k` and latents. Its sample `i` becomes `i + self.n_samples`.

        Raises:
            InputError: the two were not collected in the same way.
        """
        mine, others = self._settings(), other._settings()
        if mine != others:
            differ = ", ".join(f"{key} {mine[key]!r} and {others[key]!r}" for key in mine if mine[key] != others[key])
            raise InputError(f"these references cannot be merged, they differ in {differ}")
        n_read = self.n_samples + len(self.skipped)
        top = self._top()
        top.merge(other._top(), first=self.n_samples)
        both = "+".join(str(one.provenance["data_fingerprint"]) for one in (self, other))
        return References(
            top.sample,
            top.activation,
            top.position,
            self.n_samples + other.n_samples,
            self.names + other.names,
            torch.cat([self.indexes, other.indexes + n_read]),
            self.hook_name,
            self.token_scope,
            self.skipped + other.skipped,
            self.latents,
            {**self.provenance, "data_fingerprint": both},
            self.activity.merge(other.activity),
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; what is no tensor is JSON in it."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> References:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=cls._fits)

    def _fits(self) -> bool:
        shapes = {value.shape for value in (self.sample, self.activation, self.position)}
        counts = {len(self.names), len(self.indexes), self.n_samples}
        sizes = {len(value) for value in (self.sample, self.activity.n_active, self.activity.total)}
        return len(shapes) == len(counts) == len(sizes) == 1 and int(self.sample.max()) < self.n_samples

    def _top(self) -> TopSamples:
        top = TopSamples(self.d_sae, self.k)
        top.load_state_dict({"sample": self.sample, "activation": self.activation, "position": self.position})
        return top

    def _settings(self) -> dict[str, Any]:
        return {
            "hook_name": self.hook_name,
            "token_scope": self.token_scope,
            "d_sae": self.d_sae,
            "k": self.k,
            "model": self.provenance["model"],
            "sae_sha256": self.provenance["sae_sha256"],
            "latents": None if self.latents is None else self.latents.tolist(),
        }


def collect_references(
    tower: HookedTower,
    data: Any,
    sae: SAE,
    *,
    k: int = 20,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    latents: Sequence[int] | Tensor | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> References:
    """The `k` samples that activate each latent most, in one pass over the data.

    Args:
        tower: the tower that the SAE belongs to.
        data: samples, as `clip_lens_ext.data.image_batches` takes them: a folder, a tensor, a data set, ...
        sae: the SAE.
        k: how many samples to keep for each latent.
        hook_name, token_scope: instead of the SAE's own.
        latents: only these; None: all.
        preprocess: PIL picture to tensor, for data of files or PIL pictures (`clip.preprocess`).
        batch_size: samples in a batch; the result does not depend on it, save for rounding in the tower.
        checkpoint: a file; a pass that was interrupted goes on from it, and gives what an uninterrupted one gives.
        checkpoint_every: batches between two writes.
        progress: draw a bar.

    Returns:
        `References`, with every tensor on the CPU. What could not be read is in `skipped`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: `k` or a latent is out of range, the SAE or the checkpoint does not fit, or no sample can be read.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(6, seed=0, split="test").images)
        >>> references = collect_references(clip.vision, pixels, sae, k=3, progress=False)
        >>> references.sample.shape, references.n_samples
        (torch.Size([1024, 3]), 6)
        >>> best = references.of(int(references.activation[:, 0].argmax()))
        >>> bool((best.activation.diff() <= 0).all())
        True
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k must be a positive integer, got {k!r}")
    d_sae = sae.cfg.d_sae
    wanted = None if latents is None else _wanted(latents, d_sae)
    batches = image_batches(data, preprocess=preprocess, batch_size=batch_size)
    batches.keeping_order("references are samples by their position")
    keep = None if wanted is None else torch.zeros(d_sae, dtype=torch.bool).index_fill(0, wanted, True)

    def step(batch: ImageBatch) -> ReferenceBatch:
        x = batch.pixels.to(tower.cfg.device)
        x = x.to(tower.cfg.dtype) if x.is_floating_point() else x
        codes = encode(tower, x, sae, hook_name=hook_name, token_scope=token_scope)
        return ReferenceBatch(peaks(codes, keep), batch.names, batch.indexes, str(codes.hook_name), codes.token_scope)

    metadata = sae.cfg.metadata
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        settings = {
            "k": k, "latents": None if wanted is None else wanted.tolist(), "batch_size": batch_size,
            "hook_name": sae_hook_name(tower, sae, hook_name), "token_scope": token_scope or metadata.token_scope,
            "model": tower.cfg.model_name, "model_sha256": tower_sha256(tower), "sae_sha256": sae_sha256(sae),
        }  # fmt: skip
    found = ReferenceAccumulator(d_sae, k)
    report = run_pass(
        batches, step, found, checkpoint=checkpoint, checkpoint_every=checkpoint_every, settings=settings,
        description="reference images", progress=progress,
    )  # fmt: skip
    provenance = {
        "model": tower.cfg.model_name,
        "sae_sha256": metadata.sha256,
        "sae_format": metadata.format,
        "data_fingerprint": report.fingerprint,
        "versions": versions(),
    }
    return References(
        found.top.sample,
        found.top.activation,
        found.top.position,
        len(found.names),
        tuple(found.names),
        torch.tensor(found.indexes),
        found.hook_name,
        found.token_scope,
        report.skipped,
        wanted,
        provenance,
        found.count.result(),
    )


def _wanted(latents: Sequence[int] | Tensor, d_sae: int) -> Tensor:
    wanted = torch.as_tensor(latents).cpu()
    if wanted.dim() != 1 or wanted.numel() == 0 or wanted.is_floating_point() or wanted.dtype is torch.bool:
        raise InputError("latents must be a list of at least one integer")
    wanted = wanted.long().unique()
    if int(wanted[0]) < 0 or int(wanted[-1]) >= d_sae:
        raise InputError(f"latents are 0 to {d_sae - 1}, got {int(wanted[0])} to {int(wanted[-1])}")
    return wanted
