"""Sparse codes on disk and as matrices: what is kept is proportional to what is active."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.result_files import not_written, read_parts, staged, write_parts

if TYPE_CHECKING:
    from clip_lens_ext.saes.codes import SparseCodes

_KIND = "SparseCodes"


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
            "count": row_starts(codes).diff().int(), "latent": codes.latent.int(), "value": codes.value,
            "position": codes.position.int(),
        }  # fmt: skip
        write_parts(path, _KIND, tensors, facts, {})
    elif path.suffix == ".parquet":
        frame = to_frame(codes)
        frame.attrs = {**facts, "position": codes.position.tolist()}
        with staged(path) as part:
            frame.to_parquet(part, index=False)
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
    parts = read_parts(path, _KIND)
    try:
        count, latent, value, position = (parts.tensors[name] for name in ("count", "latent", "value", "position"))
        sizes = tuple(parts.fields.pop(name) for name in ("n_sample", "n_token", "d_sae"))
    except KeyError as error:
        raise not_written(path, _KIND, f"it lacks {error.args[0]}") from error
    n_sample, n_token, d_sae = sizes
    rows_fit = len(count) == n_sample * n_token and position.shape == (n_sample, n_token)
    entries_fit = len(latent) == len(value) == int(count.sum()) and bool((latent < d_sae).all())
    if not (rows_fit and entries_fit):
        raise not_written(path, _KIND, "its parts do not fit together")
    starts = torch.cat([count.new_zeros(1).long(), count.long().cumsum(0)])
    return from_rows(starts, latent, value, (n_sample, n_token, d_sae), {**parts.fields, "position": position.long()})


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
