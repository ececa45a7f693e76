"""A Sparse CLIP on disk: its heads, and its towers where they were trained with them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.provenance import versions
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.families.headed import HeadedCLIP
from clip_lens_ext.towers.families.registry import split_model
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.sparse_head import SparseHead
from clip_lens_ext.towers.weights import fill, read_weights

CONFIG, WEIGHTS = "sparse_clip.json", "sparse_clip.safetensors"
_FORMAT = 1
_DENSE = "dense."


@dataclass(frozen=True)
class SparseFolder:
    """What the folder of a Sparse CLIP says.

    Attributes:
        path: the folder.
        dense: name of the dense model.
        dense_sha256: of its vision and its text tower; empty where the folder holds the towers themselves.
        d_in: widths of the embeddings of both towers.
        d_code, activation, k: of the heads, as in `SparseHead`.
        has_towers: whether the towers are in the folder, because they were trained too.
        training: how it was trained, and what was measured, as JSON values.
    """

    path: Path
    dense: str
    dense_sha256: list[str]
    d_in: list[int]
    d_code: int
    activation: Any
    k: int | None
    has_towers: bool
    training: dict[str, Any] = field(default_factory=dict)


def put_together(dense: HookedCLIP, image_head: SparseHead, text_head: SparseHead, logit_scale: float) -> HookedCLIP:
    """A Sparse CLIP of a dense one, on its weights and not on copies, and two heads.

    Args:
        dense: with both towers.
        image_head, text_head: on the device of the towers.
        logit_scale: natural logarithm of the factor on the cosines.
    """
    visual, text = split_model(dense.native)
    assert text is not None  # the callers have refused a vision tower alone
    native = HeadedCLIP(
        dense.native, visual, text, image_head, text_head,
        # Of a model below float32 too: the factor is trained in small steps.
        logit_scale=nn.Parameter(torch.tensor(logit_scale, device=dense.vision.cfg.device,
                                              dtype=torch.promote_types(dense.vision.cfg.dtype, torch.float32))),
        dense_name=dense.model_name,
    )  # fmt: skip
    return HookedCLIP(
        native, preprocess=dense.preprocess, tokenizer=dense.tokenizer,
        model_name=f"{dense.model_name}, {image_head.out_features} {image_head.activation} code",
    )  # fmt: skip


def write(
    clip: HookedCLIP, native: HeadedCLIP, folder: str | os.PathLike[str], *, towers: bool, training: Mapping[str, Any]
) -> None:
    """Write a Sparse CLIP; the file that says what it is comes last, so that half a folder is none.

    Args:
        clip, native: the model, and what is in it.
        folder: made where it is missing; one that holds a Sparse CLIP is replaced.
        towers: write the weights of the towers too; without them the dense model is needed to load it.
        training: JSON values, to be read again.
    """
    path = Path(folder)
    if path.is_file():
        raise InputError(f"{os.fspath(folder)!r} is a file: a Sparse CLIP is a folder")
    path.mkdir(parents=True, exist_ok=True)
    head, text_head = native.image_head, native.text_head
    assert isinstance(head, SparseHead)
    assert isinstance(text_head, SparseHead)
    assert clip.text is not None
    about = SparseFolder(
        path, native.dense_name, [] if towers else _sha256(native, native.dense_name),
        [head.in_features, text_head.in_features], head.out_features, head.activation, head.k, towers, dict(training),
    )  # fmt: skip
    weights = {name: value for name, value in native.state_dict().items() if towers or not name.startswith(_DENSE)}
    # Copies: tied weights are two names of one tensor, which a safetensors file cannot hold.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in weights.items()},
              path / f"{WEIGHTS}.part")  # fmt: skip
    (path / CONFIG).unlink(missing_ok=True)
    (path / f"{WEIGHTS}.part").replace(path / WEIGHTS)
    said = {"format": _FORMAT, **{key: value for key, value in asdict(about).items() if key != "path"},
            "versions": versions()}  # fmt: skip
    (path / f"{CONFIG}.part").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    (path / f"{CONFIG}.part").replace(path / CONFIG)


def read(folder: str | os.PathLike[str]) -> SparseFolder:
    """What a folder says of the Sparse CLIP in it.

    Raises:
        LoadError: it holds none, or one of a later version.
    """
    path = Path(folder)
    try:
        said = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if said.pop("format") != _FORMAT:
            raise LoadError(f"{path / CONFIG} is of a format that this version does not know: upgrade")
        said.pop("versions", None)
        return SparseFolder(path, **said)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{os.fspath(folder)} holds no Sparse CLIP: {type(error).__name__}: {error}") from error


def load(found: SparseFolder, dense: HookedCLIP) -> HookedCLIP:
    """A Sparse CLIP from what its folder says and the dense model, whose weights stay as they are.

    Where the folder holds the towers, the dense model gives the architecture alone, and is copied.

    Raises:
        LoadError: the dense model is another one than that under the heads, or the weights do not fit.
    """
    if dense.text is None:
        raise LoadError(f"{dense.model_name} is a vision tower alone: the Sparse CLIP in {found.path} has two")
    widths = [dense.vision.cfg.d_embed, dense.text.cfg.d_embed]
    if widths != found.d_in:
        raise LoadError(f"the Sparse CLIP in {found.path} reads embeddings of {found.d_in} numbers, and those of "
                        f"{dense.model_name} have {widths}")  # fmt: skip
    if found.has_towers:
        dense = HookedCLIP(copy.deepcopy(dense.native), preprocess=dense.preprocess, tokenizer=dense.tokenizer,
                           model_name=dense.model_name)  # fmt: skip
    device, dtype = dense.vision.cfg.device, dense.vision.cfg.dtype
    heads = [
        SparseHead(width, found.d_code, activation=found.activation, k=found.k).to(device, dtype) for width in widths
    ]
    clip = put_together(dense, heads[0], heads[1], 0.0)
    assert isinstance(clip.native, HeadedCLIP)
    # The hash has the name in it: that of the training is taken, for the same weights may be opened by another one.
    if not found.has_towers and _sha256(clip.native, found.dense) != found.dense_sha256:
        raise LoadError(
            f"the heads in {found.path} were trained on {found.dense}, and this {dense.model_name} has other weights, "
            "or the same in another dtype: pass dense= that model"
        )
    weights = read_weights(found.path / WEIGHTS)
    if not found.has_towers:
        weights |= {
            name: value for name, value in clip.native.state_dict().items() if name.startswith(_DENSE)
        }
    fill(clip.native, weights, found.path / WEIGHTS, f"a Sparse CLIP of {dense.model_name}")
    return clip.eval()


def _sha256(native: HeadedCLIP, name: str) -> list[str]:
    plain = HookedCLIP(native.dense, model_name=name)
    assert plain.text is not None
    return [tower_sha256(plain.vision), tower_sha256(plain.text)]
