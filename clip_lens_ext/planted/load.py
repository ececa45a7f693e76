"""The dual encoder and the SAEs that ship for seed 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from sae_lens import SAE

from clip_lens_ext.errors import HookNameError, InputError, LoadError, near
from clip_lens_ext.planted.drawing import SIZE
from clip_lens_ext.planted.store import MANIFEST, check_sha256, read_clip
from clip_lens_ext.planted.world import PlantedWorld, normalise
from clip_lens_ext.saes.load import load_sae
from clip_lens_ext.towers import from_sparse
from clip_lens_ext.towers.clip import HookedCLIP

__all__ = [
    "MODEL_NAME", "SHIPPED_SEED", "SPARSE", "WEIGHTS", "planted_clip", "planted_sae", "planted_sparse_clip",
    "preprocess",
]  # fmt: skip

SHIPPED_SEED: Final = 0
"""The world whose weights ship with the package."""
MODEL_NAME: Final = "planted-0"
WEIGHTS: Final = Path(__file__).parent / "weights"
SPARSE: Final = "sparse"
"""The folder of the Sparse CLIP among the weights."""


def preprocess(picture: Image.Image) -> Float[torch.Tensor, "3 48 48"]:
    """A PIL picture as the planted dual encoder takes it: the middle square, scaled to 48 x 48, and `normalise`.

    Args:
        picture: Of any mode and size.

    Returns:
        float32 in [-2, 2], `[3 48 48]`. A picture of 48 x 48 keeps its pixels.

    Example:
        >>> from PIL import Image
        >>> from clip_lens_ext.planted.load import preprocess
        >>> preprocess(Image.new("RGB", (96, 60), "white"))[:, 0, 0]
        tensor([2., 2., 2.])
    """
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    # Cropped first: a resize of the whole picture would let what lies beside the square into its edge.
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    small = square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return normalise(torch.from_numpy(np.array(small)).permute(2, 0, 1))


def planted_clip(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> HookedCLIP:
    """The dual encoder that was trained on `PlantedWorld(0)`.

    Args:
        device: Where it goes; None: the CPU.
        dtype: None: float32. The shipped weights are in half precision.

    Raises:
        LoadError: If the shipped file is missing, or is not the one that was shipped.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld, normalise, planted_clip
        >>> clip, batch = planted_clip(), PlantedWorld(0).sample(2, seed=0, split="test")
        >>> clip.similarity(normalise(batch.images), ["a photo of a crane", "a heart", ""]).shape
        torch.Size([2, 3])
    """
    path = check_sha256(WEIGHTS, "clip.safetensors")
    native, tokenizer, _ = read_clip(path, vocabulary=PlantedWorld(SHIPPED_SEED).vocabulary)
    native = native.to(device=device, dtype=dtype)
    return HookedCLIP(native, preprocess=preprocess, tokenizer=tokenizer, model_name=MODEL_NAME).eval()


def planted_sae(
    hook_name: str = "blocks.2.hook_resid_post",
    *,
    tower: Literal["vision", "text"] = "vision",
    device: str | torch.device | None = None,
) -> SAE[Any]:
    """An SAE that was trained on activations of `planted_clip`.

    Args:
        hook_name: The hook that it was trained at.
        tower: The tower that has the hook.
        device: Where it goes; None: the CPU.

    Raises:
        HookNameError: If no SAE ships for this hook; the message names those that do.
        LoadError: If a shipped file is missing, or is not the one that was shipped.

    Example:
        >>> from clip_lens_ext.planted import planted_sae
        >>> sae = planted_sae()
        >>> sae.cfg.d_in, sae.cfg.metadata.hook_name
        (128, 'blocks.2.hook_resid_post')
    """
    if tower not in ("vision", "text"):
        raise InputError(f"tower is {tower!r}; there are 'vision' and 'text'")
    shipped = _shipped_saes()
    folder = f"saes/{tower}/{hook_name}"
    if folder not in shipped:
        of_tower = [name.split("/")[-1] for name in shipped if name.split("/")[1] == tower]
        listed = ", ".join(name.removeprefix("saes/").replace("/", " ") for name in shipped)
        raise HookNameError(
            f"no planted SAE at {hook_name!r} of the {tower} tower{near(hook_name, of_tower)}; there are: {listed}"
        )
    for name in shipped[folder]:
        check_sha256(WEIGHTS, name)
    return load_sae(WEIGHTS / folder, device=device)


def planted_sparse_clip(device: str | torch.device | None = None) -> HookedCLIP:
    """A Sparse CLIP on the towers of `planted_clip`: sparse heads of 1024 features, trained on pictures of its world.

    The towers were not trained with the heads, as `train_sparse_clip(..., trained="heads")` has it.

    Args:
        device: Where it goes; None: the CPU.

    Raises:
        LoadError: If a shipped file is missing, or is not the one that was shipped.

    Example:
        >>> from clip_lens_ext.planted import PlantedWorld, normalise, planted_sparse_clip
        >>> clip, batch = planted_sparse_clip(), PlantedWorld(0).sample(2, seed=0, split="test")
        >>> codes = clip.embed_images(normalise(batch.images))
        >>> codes.shape, bool((codes >= 0).all()), float((codes > 0).float().mean()) < 0.2
        (torch.Size([2, 1024]), True, True)
    """
    for name in (from_sparse.CONFIG, from_sparse.WEIGHTS):
        check_sha256(WEIGHTS, f"{SPARSE}/{name}")
    return from_sparse.load(from_sparse.read(WEIGHTS / SPARSE), planted_clip()).to(device=device)


def _shipped_saes() -> dict[str, list[str]]:
    """Folders of the shipped SAEs, and the files that the manifest lists in each."""
    path = WEIGHTS / MANIFEST
    try:
        names = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise LoadError(f"cannot read {path}: {error!r}; install the package again") from error
    folders: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("saes/"):
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    return folders
