"""SAELens' own layout on disk: `cfg.json` beside `sae_weights.safetensors`, as `SAE.save_model` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting, read_sae_components_from_disk
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.verify import (
    file_sha256,
    reject_clip_checkpoint,
    verify_architecture,
    verify_config,
    verify_weights,
)


def matches(path: Path) -> bool:
    """Whether `path` is a folder with both files of SAELens' layout, or one of the two with the other beside it."""
    folder = _folder(path)
    return (folder / SAE_CFG_FILENAME).is_file() and (folder / SAE_WEIGHTS_FILENAME).is_file()


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check an SAE in SAELens' layout.

    Args:
        path: the folder, its `cfg.json` or its `sae_weights.safetensors`.
        device: where the weights go.
        cfg_overrides: fields that win over those of `cfg.json`.

    Returns:
        The configuration, with `metadata["format"]` and `metadata["sha256"]` of the weights file, and the weights.

    Raises:
        LoadError: a missing, truncated or corrupt file, invalid JSON, an unknown architecture, weights that do not
            fit the configuration, a NaN, or a CLIP model in the place of an SAE.
    """
    given = [name for name in ("subtract_b_dec", "input_stats", "settings") if name in (cfg_overrides or {})]
    if given:
        raise LoadError(f"SAELens' files say everything themselves: {', '.join(given)} is for other formats")
    folder = _folder(Path(path))
    weights = folder / SAE_WEIGHTS_FILENAME
    file_cfg, wanted = _config(folder / SAE_CFG_FILENAME), cfg_overrides or {}
    cfg_dict = {**file_cfg, "device": device, **wanted}
    _check_weights_file(weights)
    cfg_dict = _in_current_words(cfg_dict, folder)
    verify_config(cfg_dict, folder)
    cfg_dict = {"dtype": "float32", "metadata": {}, **cfg_dict}
    try:
        cfg_dict, state_dict = read_sae_components_from_disk(cfg_dict, weights, device)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise LoadError(f"cannot read {str(weights)!r}: {error}") from error
    verify_weights(cfg_dict, state_dict, weights)
    cfg_dict["metadata"].update(format="sae_lens", sha256=file_sha256(weights))
    won = {
        field: {"file": file_cfg[field], "keyword": wanted[field]}
        for field in wanted
        if _differ(file_cfg, wanted, field)
    }
    if won:
        cfg_dict["metadata"]["overrides"] = {**(cfg_dict["metadata"].get("overrides") or {}), **won}
    return cfg_dict, state_dict


def _differ(file_cfg: dict[str, Any], wanted: dict[str, Any], field: str) -> bool:
    return field not in ("device", "dtype") and file_cfg.get(field) not in (None, wanted[field])


def _folder(path: Path) -> Path:
    return path.parent if path.name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME) else path


def _config(path: Path) -> dict[str, Any]:
    try:
        cfg_dict = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {str(path)!r}: {error}") from error
    except json.JSONDecodeError as error:
        raise LoadError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(cfg_dict, dict):
        raise LoadError(f"{str(path)!r} holds a {type(cfg_dict).__name__}, not the fields of an SAE")
    if not isinstance(cfg_dict.get("metadata", {}), dict):
        raise LoadError(f"metadata in {str(path)!r} must be an object of JSON")
    return cfg_dict


def _check_weights_file(path: Path) -> None:
    if not path.is_file():
        raise LoadError(f"no weights file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            reject_clip_checkpoint(file.keys(), path)
    except SafetensorError as error:
        raise LoadError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error


def _in_current_words(cfg_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration as SAELens 6 writes it, whatever version wrote it."""
    metadata = cfg_dict.get("metadata")
    if metadata is not None and not cfg_dict.get("sae_lens_version"):
        # Without a version SAELens takes a config to be of version 5 or older, and drops its metadata.
        metadata.setdefault("sae_lens_version", sae_lens_version)
    # Up to version 5 the standard architecture went without saying.
    verify_architecture(cfg_dict.get("architecture", "standard" if metadata is None else None), folder)
    try:
        current = handle_config_defaulting(cfg_dict)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"cannot make sense of the configuration in {str(folder)!r}: {error!r}") from error
    if current is not cfg_dict:
        current["metadata"]["sae_lens_version"] = sae_lens_version  # or it would be rewritten once more
    return current
