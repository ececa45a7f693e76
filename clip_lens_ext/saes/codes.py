"""The latents of an SAE as (index, value): what is stored is what is active."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.codes_io import from_rows, load_codes, row_starts, save_codes, to_frame
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope
from clip_lens_ext.towers.tower import HookedTower


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Active latents of every token of a batch, in the order sample, token, latent.

    Attributes:
        sample: index of the sample, `[active]`.
        token: index along the SAE's own token axis (0 for a CLS or pooled SAE), `[active]`.
        latent: index of the latent, `[active]`.
        value: activation of the latent, in the SAE's units, `[active]`; negative values occur in SAEs whose TopK has
            no ReLU.
        n_sample, n_token, d_sae: sizes of the dense `[sample token d_sae]`.
        position: place in the tower's sequence of each of the SAE's tokens, `[sample token]`; -1 for pooled vectors.
        hook_name, token_scope: where the SAE reads.
    """

    sample: Tensor
    token: Tensor
    latent: Tensor
    value: Tensor
    n_sample: int
    n_token: int
    d_sae: int
    position: Tensor
    hook_name: str = ""
    token_scope: str = "all"

    def __len__(self) -> int:
        return len(self.value)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return len(self) / (self.n_sample * self.n_token)

    def dense(self) -> Tensor:
        """`[sample token d_sae]`, zero where a latent is not active."""
        out = self.value.new_zeros(self.n_sample, self.n_token, self.d_sae)
        out[self.sample, self.token, self.latent] = self.value
        return out

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The (sample, latent) pairs that are active at some token, and for every active entry which pair it is in.

        Returns:
            `sample [pair]` and `latent [pair]`, sorted by sample, then latent, and `pair [active]`.
        """
        keys, pair = torch.unique(self.sample * self.d_sae + self.latent, return_inverse=True)
        return keys // self.d_sae, keys % self.d_sae, pair

    def csr(self) -> Tensor:
        """`[sample*token d_sae]` as a sparse CSR tensor of torch; `scipy.sparse.csr_matrix` takes its three parts."""
        size = (self.n_sample * self.n_token, self.d_sae)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(row_starts(self), self.latent, self.value, size, check_invariants=False)

    @classmethod
    def from_csr(cls, csr: Tensor, *, n_token: int = 1, **fields: Any) -> SparseCodes:
        """Codes of a sparse CSR tensor `[sample*token d_sae]`.

        Raises:
            InputError: the rows are no whole number of samples.
        """
        n_row, d_sae = csr.shape
        if n_row % n_token:
            raise InputError(f"{n_row} rows are no whole number of samples with {n_token} tokens")
        sizes = n_row // n_token, n_token, d_sae
        return from_rows(csr.crow_indices(), csr.col_indices(), csr.values(), sizes, fields)

    def to_frame(self) -> pd.DataFrame:
        """One row for each active latent of each token: sample, token, latent, value."""
        return to_frame(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the codes: `.safetensors` (eight bytes an entry in float32) or `.parquet` (a table)."""
        save_codes(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseCodes:
        """Read what `save` wrote.

        Raises:
            LoadError: no such file, or one that holds something else.
        """
        return load_codes(path)

    @classmethod
    def from_dense(cls, dense: Tensor, **fields: Any) -> SparseCodes:
        """Codes of a dense `[sample token d_sae]`."""
        sample, token, latent = dense.nonzero(as_tuple=True)
        n_sample, n_token, d_sae = dense.shape
        fields.setdefault("position", torch.arange(n_token).expand(n_sample, -1))
        return cls(sample, token, latent, dense[sample, token, latent], n_sample, n_token, d_sae, **fields)


@torch.no_grad()
def encode_rows(sae: SAE, rows: Tensor, *, chunk: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value of everything active in `rows` `[row d_in]`; never more than one dense chunk at a time.

    Raises:
        InputError: the SAE gives NaN, or the chunk is empty.
    """
    if chunk < 1:
        raise InputError(f"chunk must be at least 1 token, got {chunk}")
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(rows), chunk):
        dense = sae.encode(rows[start : start + chunk])
        row, latent = dense.nonzero(as_tuple=True)
        value = dense[row, latent]
        if not torch.isfinite(value).all():
            raise InputError(
                "the SAE gives NaN or infinite latents: is the hook's activation finite, and the SAE whole?"
            )
        found.append((row + start, latent, value))
    row, latent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, latent, value


def codes_of(
    sae: SAE, activation: Tensor, positions: TokenPositions, *, hook_name: str, chunk: int = 512
) -> SparseCodes:
    """The codes of an activation `[batch token d]` or `[batch d]` at the SAE's tokens."""
    positions.check(activation, hook_name)
    taken = positions.take(activation)
    # At hook_z a row is [head d_head]: SAELens' classes flatten it themselves.
    rows = taken.flatten(0, 1) if taken.dim() > 2 else taken
    n_sample = len(activation)
    n_token = len(rows) // n_sample
    n_ctx = activation.shape[1] if activation.dim() > 2 else 1
    row, latent, value = encode_rows(sae, rows, chunk=chunk)
    return SparseCodes(
        row // n_token,
        row % n_token,
        latent,
        value,
        n_sample,
        n_token,
        sae.cfg.d_sae,
        position=positions.indices(n_ctx, n_sample),
        hook_name=hook_name,
        token_scope=positions.scope,
    )


def encode(
    tower: HookedTower,
    x: Tensor,
    sae: SAE,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    chunk: int = 512,
) -> SparseCodes:
    """The active latents of an SAE on a batch.

    The tower is run up to the SAE's hook and no further, without gradients; the SAE reads the tokens that it was
    trained on.

    Args:
        tower: the tower that the SAE belongs to.
        x: the tower's input.
        sae: the SAE.
        hook_name: instead of the SAE's own.
        token_scope: instead of the SAE's own.
        chunk: tokens that are encoded at a time; the dense latents of one chunk are all that is ever held.

    Returns:
        `SparseCodes` `[sample token]`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: the SAE does not fit the hook, or the input the tower.

    Example:
        >>> import clip_lens_ext as cle
        >>> codes = encode(cle.planted_clip().vision, torch.zeros(2, 3, 48, 48), cle.planted_sae())
        >>> codes.n_sample, codes.n_token
        (2, 65)
    """
    name = sae_hook_name(tower, sae, hook_name)
    with torch.no_grad():
        activation = tower.run_to(x, name)
    scope = token_scope or sae.cfg.metadata.token_scope or default_scope(activation)
    eot = tower.eot_positions(x) if tower.cfg.tower == "text" else None
    return codes_of(sae, activation, TokenPositions(scope, eot, tower.n_prefix), hook_name=name, chunk=chunk)
