"""Reads pictures for `find_picture_senses`: cosines of all, then the latents of those that a prompt retrieves."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.data import ImageBatch, ImageBatches
from clip_lens_ext.errors import InputError
from clip_lens_ext.pass_rows import RowAccumulator
from clip_lens_ext.passes import PassReport, run_pass
from clip_lens_ext.provenance import tensors_sha256
from clip_lens_ext.saes.codes import codes_of
from clip_lens_ext.semantics.through_latents import cosines
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope


class Pictures(NamedTuple):
    """What is known of some pictures."""

    cosine: Tensor
    """With each prompt, float64 `[sample prompt]`."""
    indexes: Tensor
    """Their positions in the data, `[sample]`."""


class PictureReader:
    """Looks at pictures through one tower and one SAE.

    Args:
        clip: the model.
        sae: an SAE of its vision tower.
        hook_name: where features and latents are taken.
        scope: of tokens; None: all that the activation has.
        vectors: prompts `[prompt d_embed]`.
        progress: draw bars.
    """

    def __init__(
        self, clip: HookedCLIP, sae: SAE, hook_name: str, scope: TokenScope | None, vectors: Tensor, progress: bool
    ) -> None:
        self.clip, self.sae, self.hook_name, self.scope = clip, sae, hook_name, scope
        self.vectors, self.progress = vectors, progress

    def all_pictures(
        self, batches: ImageBatches, checkpoint: str | os.PathLike[str] | None, checkpoint_every: int
    ) -> tuple[Pictures, PassReport]:
        """Cosines and positions of all pictures that can be read."""
        tower, found = self.clip.vision, RowAccumulator(Pictures)
        settings: dict[str, Any] = {}
        if checkpoint is not None:
            settings = {"what": "find_picture_senses", "model_sha256": tower_sha256(tower),
                        "prompts": tensors_sha256({"vectors": self.vectors})}  # fmt: skip

        def step(batch: ImageBatch) -> Pictures:
            cosine = cosines(tower(batch.pixels.to(tower.cfg.device, tower.cfg.dtype)), self.vectors)
            return Pictures(cosine.double().cpu(), torch.tensor(batch.indexes))

        report = run_pass(
            batches, step, found, checkpoint=checkpoint, checkpoint_every=checkpoint_every, settings=settings,
            description="pictures", progress=self.progress,
        )  # fmt: skip
        return found.result(), report

    def latents(self, batches: ImageBatches, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Greatest activations float64 `[row d_sae]` of the pictures in `sample`, and the row of each sample.

        Args:
            batches: those pictures alone, each once, in their order.
            sample: their numbers among the pictures of the pass, in any shape.

        Raises:
            InputError: one of them cannot be read any more.
        """
        wanted = sample.unique()
        found = []
        with tqdm(total=len(wanted), desc="latents of the prompts' pictures", unit="image",
                  disable=not self.progress) as bar:  # fmt: skip
            for batch in batches:
                tower = self.clip.vision
                activation = tower.run_to(batch.pixels.to(tower.cfg.device, tower.cfg.dtype), self.hook_name)
                positions = TokenPositions(self.scope or default_scope(activation), None, tower.n_prefix)
                codes = codes_of(self.sae, activation, positions, hook_name=self.hook_name)
                found.append(codes.dense().amax(dim=1).clamp(min=0).double().cpu())
                bar.update(len(batch.names))
        if batches.skipped:  # rows would be those of other pictures
            shown = "; ".join(f"{skip.name}: {skip.reason}" for skip in batches.skipped[:3])
            raise InputError(
                f"{len(batches.skipped)} of the {len(wanted)} pictures of the prompts could be read in the first pass "
                f"and cannot be read any more ({shown}): the data changed; mend them or take them out, and start again"
            )
        row_of = torch.full((int(wanted.max()) + 1,), -1)
        row_of[wanted] = torch.arange(len(wanted))
        return torch.cat(found), row_of
