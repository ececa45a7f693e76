"""A Sparse CLIP into a folder, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from clip_lens_ext.errors import LoadError
from clip_lens_ext.sparse_clip.head import headed
from clip_lens_ext.towers import from_sparse
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.load import load_clip


def save_sparse_clip(
    clip: HookedCLIP, folder: str | os.PathLike[str], *, towers: bool, training: Mapping[str, Any] | None = None
) -> None:
    """Write a Sparse CLIP: `sparse_clip.json` and `sparse_clip.safetensors`.

    Args:
        clip: the model.
        folder: made where it is missing.
        towers: write the weights of the towers too. Without them the file is small, and holds the hash of the dense
            model that it must be opened with; they belong in it where they were trained with the heads.
        training: JSON values to be kept with it.

    Raises:
        InputError: the model has no sparse heads, or the path is a file.
    """
    from_sparse.write(clip, headed(clip), folder, towers=towers, training=training or {})


def load_sparse_clip(
    folder: str | os.PathLike[str],
    dense: HookedCLIP | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedCLIP:
    """Open what `save_sparse_clip` or `train_sparse_clip` wrote.

    Args:
        folder: of the model, or of one of the checkpoints of its training.
        dense: the model under the heads, of which nothing is copied and nothing changed but device and dtype, if given;
            where the folder holds the towers too, any model of the same architecture. None: opened by `load_clip` under
            the name that it had, which works where that name was a tag or a repository of the hub; of a folder or a
            file of weights the last part of its name alone is known, so pass those.
        device, dtype: as in `load_clip`; None leaves both.

    Returns:
        `HookedCLIP` in evaluation mode; `clip.vision` and `clip.text` give codes.

    Raises:
        LoadError: no such folder, a broken one, a dense model that cannot be opened, or another one than that which
            the heads were trained on.

    Example:
        >>> import tempfile
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> clip = add_sparse_heads(cle.planted_clip(), 256)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse_clip(clip, folder, towers=False)
        ...     again = load_sparse_clip(folder, dense=cle.planted_clip())
        >>> torch.equal(again.embed_texts("a crane"), clip.embed_texts("a crane"))
        True
    """
    found = from_sparse.read(folder)
    if dense is None:
        try:
            dense = load_clip(found.dense)
        except LoadError as error:
            raise LoadError(f"the dense model {found.dense!r} under the heads in {found.path} cannot be opened by its "
                            f"name: pass dense=. {error}") from error  # fmt: skip
    return from_sparse.load(found, dense).to(device=device, dtype=dtype)
