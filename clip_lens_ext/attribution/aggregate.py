"""Which latents a target rests on over a whole data set: attributions image by image, added up in one pass.

Mean attribution, share, and in how many images a latent is active or among the greatest: see `AttributionSummary`.
The memory is that of `[target d_sae]` sums, whatever the number of images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.data_pass import AttributionPass
from clip_lens_ext.attribution.methods import Method
from clip_lens_ext.attribution.site import ErrorTerm
from clip_lens_ext.attribution.summary import AttributionSummary
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.data import Preprocess
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def aggregate_attributions(
    tower: HookedTower,
    images: Any,
    sae: SAE,
    target: Target,
    *,
    method: str | Method = "attribution_patching",
    k: int = 10,
    target_of: Sequence[int] | Tensor | None = None,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> AttributionSummary:
    """Sum up a method's attributions over all images of a data set.

    Args:
        tower: the tower whose predictions are explained.
        images: samples, as `clip_lens_ext.data.image_batches` takes them: a folder, a tensor, a data set, ...
        sae: the SAE.
        target: what is explained, one target or several.
        method: a name of `METHODS`, or a function that is called as `method(tower, site, sae, target)`.
        k: a latent is counted where it is among an image's `k` greatest attributions.
        target_of: for each image, by its position in the data, the number of its own target. Then each target is summed
            up over its own images alone, say over the pictures of its class. None: every target over all images.
        hook_name, token_scope, error_term: as in `attribution_patching`.
        preprocess: PIL picture to tensor, for data of files or PIL pictures (`clip.preprocess`).
        batch_size: images in a batch; the result depends on it by rounding alone.
        checkpoint: a file; a pass that was interrupted goes on from it, and gives what an uninterrupted one gives.
        checkpoint_every: batches between two writes.
        progress: draw a bar.

    Returns:
        `AttributionSummary`, with every tensor on the CPU. What could not be read is in `skipped`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: the input, the SAE, the target, the method or the checkpoint do not fit, or no latent is
            ever active.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(6, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[:2])
        >>> found = aggregate_attributions(clip.vision, pixels, sae, target, progress=False)
        >>> found.n_images.tolist(), found.top(3).latents.shape
        ([6, 6], torch.Size([2, 3]))
        >>> [round(total, 6) for total in found.share.clamp(min=0).sum(dim=1).tolist()]
        [1.0, 1.0]
    """
    explained = AttributionPass(tower, sae, (target,), method, k, target_of, hook_name, token_scope, error_term)
    return explained.run(
        images, preprocess=preprocess, batch_size=batch_size, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
        progress=progress,
    )[0]  # fmt: skip
