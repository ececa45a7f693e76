"""The part of each reference picture at which a latent is most active."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics.reference_embeddings import check_name
from clip_lens_ext.semantics.references import References
from clip_lens_ext.towers.tower import HookedTower


class ReferenceCrops(NamedTuple):
    """Crops of the references of one latent, greatest activation first."""

    pictures: tuple[Tensor, ...]
    """`[3 height width]` each, in the values of the images that were passed in."""
    box: Tensor
    """Left, top, right, bottom in pixels, the last two exclusive, `[reference 4]`."""
    sample: Tensor
    """Which sample, `[reference]`."""


def crop_references(
    references: References,
    latent: int,
    images: Any,
    tower: HookedTower,
    *,
    context: int = 1,
    preprocess: Preprocess | None = None,
) -> ReferenceCrops:
    """Cut out where each reference of a latent activates it most.

    The crop is the patch of greatest activation with `context` patches on each side, moved inwards at an edge of the
    picture, so that all have one size. Where the greatest activation is at no patch (a CLS token, a pooled vector) it
    is the whole picture.

    Args:
        references: from `collect_references`.
        latent: which latent.
        images: the data that the references were collected from, as the tower takes them, or files.
        tower: the vision tower that they were collected on; it knows the grid of patches.
        context: patches on each side.
        preprocess: PIL picture to tensor, for data of files or PIL pictures.

    Returns:
        `ReferenceCrops`, empty where the latent has no reference.

    Raises:
        InputError: no such latent, images that are not those of the references or of another size than the tower's,
            or a tower without a grid of patches.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(20, seed=0, split="test").images)
        >>> references = cle.collect_references(clip.vision, pixels, sae, k=4, progress=False)
        >>> latent = int(references.activation[:, 3].argmax())
        >>> crops = crop_references(references, latent, pixels, clip.vision)
        >>> len(crops.pictures), crops.box.shape
        (4, torch.Size([4, 4]))
    """
    if isinstance(context, bool) or not isinstance(context, int) or context < 0:
        raise InputError(f"context must be a number of patches, 0 or more, got {context!r}")
    cfg = tower.cfg
    if cfg.image_size is None or cfg.patch_size is None:
        raise InputError(f"the {cfg.tower} tower of {cfg.model_name} has no grid of patches to crop from")
    height, width = cfg.image_size
    patch_height, patch_width = cfg.patch_size
    n_row, n_column = height // patch_height, width // patch_width
    if cfg.n_ctx < n_row * n_column:
        raise InputError(f"{cfg.model_name} has {cfg.n_ctx} tokens for {n_row} x {n_column} patches: they are no grid")
    found = references.of(latent)
    if len(found.sample) == 0:
        return ReferenceCrops((), torch.zeros(0, 4, dtype=torch.int64), found.sample)
    # Patches are the last tokens of the sequence, row by row; CLS and registers come before them.
    place = found.position - (cfg.n_ctx - n_row * n_column)
    if int(found.position.max()) >= cfg.n_ctx:
        raise InputError(
            f"the greatest activation is at token {int(found.position.max())}, and {cfg.model_name} has {cfg.n_ctx}: "
            "were the references collected on this tower?"
        )
    pixels = _pictures(references, found.sample, images, preprocess)
    boxes, pictures = [], []
    for picture, at in zip(pixels, place.tolist(), strict=True):
        if tuple(picture.shape[1:]) != (height, width):
            raise InputError(f"{cfg.model_name} reads {height} x {width} pixels, got {list(picture.shape[1:])}")
        left, top, right, bottom = 0, 0, width, height
        if at >= 0:
            row, column = divmod(at, n_column)
            top, bottom = _span(row, n_row, patch_height, context)
            left, right = _span(column, n_column, patch_width, context)
        boxes.append([left, top, right, bottom])
        pictures.append(picture[:, top:bottom, left:right])
    return ReferenceCrops(tuple(pictures), torch.tensor(boxes), found.sample)


def _span(at: int, n: int, size: int, context: int) -> tuple[int, int]:
    """First and last pixel of the patches around one, along one axis."""
    taken = min(2 * context + 1, n)
    first = min(max(at - context, 0), n - taken)
    return first * size, (first + taken) * size


def _pictures(references: References, sample: Tensor, images: Any, preprocess: Preprocess | None) -> list[Tensor]:
    indexes = references.indexes[sample].tolist()
    name_of = dict(zip(indexes, (references.names[i] for i in sample.tolist()), strict=True))
    by_index: dict[int, Tensor] = {}
    for batch in image_batches(images, preprocess=preprocess).select(indexes):
        for index, name in zip(batch.indexes, batch.names, strict=True):
            check_name(name_of[index], name)
        by_index |= dict(zip(batch.indexes, batch.pixels, strict=True))
    missing = [index for index in indexes if index not in by_index]
    if missing:
        raise InputError(f"the reference {name_of[missing[0]]!r} cannot be read any more")
    return [by_index[index] for index in indexes]
