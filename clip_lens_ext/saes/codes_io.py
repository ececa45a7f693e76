"""Sparse codes on disk and as matrices: what is kept is proportional to what is active."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens_ext.errors import InputError, LoadError

if TYPE_CHECKING:
    from clip_lens_ext.saes.codes import SparseCodes

KIND = "clip_lens_ext.SparseCodes"


def row_starts(codes: SparseCodes) -> Tensor:
    """Where the entries of each token begin, `[sample*token + 1]`: the row pointers of a CSR matrix."""
    row = codes.sample * codes.n_token + codes.token
    count = torch.bincount(row, minlength=codes.n_sample * codes.n_token)
    return torch.cat([count.new_zeros(1), count.cumsum(0)])


def from_rows(
    starts: Tensor, latent: Tensor, value: Tensor, sizes: tuple[int, int, int], fields: dict[str, Any]
) -> SparseCodes:
    """Codes of row pointers, columns and values."""
    from clip_lens_ext.saes.codes import SparseCodes

    n_sample, n_token, d_sae = sizes
    row = torch.repeat_interleave(torch.arange(n_sample * n_token, device=starts.device), starts.diff())
    fields.setdefault("position", torch.arange(n_token).expand(n_sample, -1))
    return SparseCodes(row // n_token, row % n_token, latent.long(), value, n_sample, n_token, d_sae, **fields)


def save_codes(codes: SparseCodes, path: str | os.PathLike[str]) -> None:
    """Write codes as `.safetensors` (whole) or `.parquet` (a table: sample, token, latent, value)."""
    path = Path(path)
    facts: dict[Any, Any] = {
        "n_sample": codes.n_sample, "n_token": codes.n_token, "d_sae": codes.d_sae, "hook_name": codes.hook_name,
        "token_scope": codes.token_scope,
    }  # fmt: skip
    if path.suffix == ".safetensors":
        # Four bytes an index; the tokens are told by how many entries each has.
        tensors = {
            "count": row_starts(codes).diff().int().cpu(), "latent": codes.latent.int().cpu(),
            "value": codes.value.detach().cpu().contiguous(), "position": codes.position.int().cpu().contiguous(),
        }  # fmt: skip
        save_file(tensors, path, metadata={"kind": KIND, "facts": json.dumps(facts)})
    elif path.suffix == ".parquet":
        frame = to_frame(codes)
        frame.attrs = {**facts, "position": codes.position.tolist()}
        frame.to_parquet(path, index=False)
    else:
        raise InputError(f"sparse codes are written as .safetensors or .parquet, not {path.suffix!r}")


def load_codes(path: str | os.PathLike[str]) -> SparseCodes:
    """Read what `save_codes` wrote.

    Raises:
        LoadError: no such file, or one that holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"no sparse codes at {str(path)!r}")
    if path.suffix == ".parquet":
        return _load_parquet(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise LoadError(f"{str(path)!r} holds no sparse codes")
            names = ("count", "latent", "value", "position")
            count, latent, value, position = (file.get_tensor(name) for name in names)
    except SafetensorError as error:
        raise LoadError(f"{str(path)!r} is truncated or holds no sparse codes: {error}") from error
    facts = json.loads(metadata["facts"])
    sizes = facts.pop("n_sample"), facts.pop("n_token"), facts.pop("d_sae")
    starts = torch.cat([count.new_zeros(1).long(), count.long().cumsum(0)])
    return from_rows(starts, latent, value, sizes, {**facts, "position": position.long()})


def _load_parquet(path: Path) -> SparseCodes:
    from clip_lens_ext.saes.codes import SparseCodes

    try:
        frame = pd.read_parquet(path)
        facts: dict[str, Any] = {str(name): value for name, value in frame.attrs.items()}
        columns = [torch.as_tensor(frame[name].to_numpy().copy()) for name in ("sample", "token", "latent", "value")]
        position = torch.tensor(facts.pop("position"))
        sizes = facts.pop("n_sample"), facts.pop("n_token"), facts.pop("d_sae")
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{str(path)!r} is truncated or holds no sparse codes: {error}") from error
    sample, token, latent, value = columns
    return SparseCodes(sample.long(), token.long(), latent.long(), value, *sizes, position=position, **facts)


def to_frame(codes: SparseCodes) -> pd.DataFrame:
    """One row for each active latent of each token: sample, token, latent, value."""
    value = codes.value.detach().cpu()
    value = value.float() if value.dtype == torch.bfloat16 else value
    return pd.DataFrame({
        "sample": codes.sample.int().cpu().numpy(), "token": codes.token.int().cpu().numpy(),
        "latent": codes.latent.int().cpu().numpy(), "value": value.numpy(),
    })  # fmt: skip
