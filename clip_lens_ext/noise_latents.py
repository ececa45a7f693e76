"""Latents that live in the noise: how much of each decoder row lies in the subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from scipy.stats import beta
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.decoder import check_reconstructs, decoder_rows
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pruning import EMBEDDING
from clip_lens_ext.towers.tower import HookedTower

_POOLED = "hook_pooled"
_AT_ONCE = 8192  # rows that are pushed through the projection


@dataclass(frozen=True, eq=False)
class NoiseAlignment:
    """How much of each latent's direction lies in a noise subspace.

    Attributes:
        value: `||U'w||^2 / ||w||^2` of each latent's decoder row, in [0, 1], float64 `[d_sae]`; NaN for a zero row.
        p_value: chance that a random direction has at least as much, `[d_sae]`; NaN for a zero row.
        hook_name: what the SAE reads.
        noise_hook: where the noise lies: the same hook, or `"hook_embedding"` behind a linear map.
        rank, d: dimension of the noise, and of the space.
        rule, cut: by which the split was made.
        provenance: of the split, and the SAE's hash.
    """

    value: Tensor
    p_value: Tensor
    hook_name: str
    noise_hook: str
    rank: int
    d: int
    rule: str
    cut: str
    provenance: dict[str, Any]

    @property
    def by_chance(self) -> float:
        """The mean of `value` over random directions: `rank / d`."""
        return self.rank / self.d

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return (f"NoiseAlignment({len(self)} latents of {self.hook_name}, {self.rank} of {self.d} dimensions of noise, "
                f"by chance {self.by_chance:.3f})")  # fmt: skip

    def top(self, k: int = 10) -> Tensor:
        """The `k` latents that lie in the noise the most, greatest first; zero rows are none of them.

        Raises:
            InputError: `k` is less than 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        order = self.value.nan_to_num(-1.0).argsort(descending=True, stable=True)
        return order[: min(k, int((~self.value.isnan()).sum()))]

    def within(self, *, alpha: float = 0.01) -> Tensor:
        """Latents that lie in the noise more than chance, greatest first: `p_value <= alpha / d_sae` (Bonferroni).

        Of as many random directions one or more would be here with a probability of at most `alpha`.

        Raises:
            InputError: `alpha` is no probability.
        """
        if not 0 < alpha < 1:
            raise InputError(f"alpha is a probability in (0, 1), got {alpha}")
        order = self.top(len(self))
        return order[self.p_value[order] <= alpha / len(self)]

    def to_frame(self) -> pd.DataFrame:
        """One row for each latent, the most in the noise first: `latent`, `alignment`, `p_value`, `by_chance`."""
        order = self.value.nan_to_num(-1.0).argsort(descending=True, stable=True)
        return pd.DataFrame({
            "latent": order.numpy(), "alignment": self.value[order].numpy(), "p_value": self.p_value[order].numpy(),
            "by_chance": self.by_chance,
        })  # fmt: skip


@torch.no_grad()
def noise_alignment(
    sae: SAE,
    split: NoiseSplit,
    *,
    tower: HookedTower | None = None,
    noise_hook: str | None = None,
    hook_name: str | None = None,
) -> NoiseAlignment:
    """Of each latent's decoder row `w`, the share of its squared length in the noise: `||U'w||^2 / ||w||^2`.

    A random direction has `rank / d` in the mean, and follows Beta(rank / 2, (d - rank) / 2), which gives the p-value.
    The rows of a trained SAE are no random directions: they are where activations vary, so by themselves they lie in
    directions of little variance less than chance.

    Args:
        sae: the SAE.
        split: what is noise, at the SAE's hook; or in the embedding, for an SAE there, or at `hook_pooled` of a tower
            that ends in a linear map, through which the rows are pushed first.
        tower: whose projection that is; else it is not needed, and the SAE is checked against it if it is there.
        noise_hook: where the split lies: the SAE's hook, or `"hook_embedding"`. None: the hook of the split, or the
            embedding where it has none (one made of rows).
        hook_name: instead of the SAE's own.

    Returns:
        `NoiseAlignment`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: the split is of another hook, tower or width, or of other tokens than the SAE reads; the SAE is a
            transcoder; or what lies between the latents and the embedding is not linear: there a latent has no one
            direction in it.

    Example:
        >>> import clip_lens_ext as cle
        >>> sae = cle.planted_sae("blocks.2.hook_resid_post")
        >>> rows = torch.randn(2000, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
        >>> found = noise_alignment(sae, cle.split_noise(rows, cut=32), noise_hook="blocks.2.hook_resid_post")
        >>> found.by_chance, len(found) == sae.cfg.d_sae
        (0.25, True)
    """
    check_reconstructs(sae)
    at = hook_name or sae.cfg.metadata.hook_name
    if tower is not None:
        at = sae_hook_name(tower, sae, hook_name)
    if not at:
        raise InputError("the SAE does not say which hook it reads: pass hook_name=")
    place = noise_place(split, at, noise_hook)
    own = sae.cfg.metadata.tower if tower is None else tower.cfg.tower
    if place != EMBEDDING and None not in (split.tower, own) and split.tower != own:
        raise InputError(f"the split is of the {split.tower} tower, the SAE of the {own} tower")
    if place == at:
        check_tokens(split, sae.cfg.metadata.token_scope)
    rows = decoder_rows(sae, torch.arange(sae.cfg.d_sae, device=sae.W_dec.device)).detach()
    if place != at:
        rows = _pushed(rows, at, tower)
    if rows.shape[1] != split.d:
        raise InputError(f"the split is of {split.d} dimensions, and a latent writes {rows.shape[1]} at {place}")
    rows, basis = rows.double().cpu(), split.basis.cpu()
    value = ((rows @ basis).square().sum(dim=1) / rows.square().sum(dim=1)).clamp(max=1)
    return NoiseAlignment(
        value=value, p_value=_chance(value, split), hook_name=at, noise_hook=place, rank=split.rank, d=split.d,
        rule=split.rule, cut=split.cut, provenance={"sae_sha256": sae.cfg.metadata.sha256, "split": split.provenance},
    )  # fmt: skip


def noise_place(split: NoiseSplit, at: str, given: str | None) -> str:
    """The hook at which a split lies, for an SAE at a hook: that one, or the embedding.

    Args:
        split: the split.
        at: what the SAE reads.
        given: where the caller says that it lies.

    Raises:
        InputError: it is no split, lies elsewhere, or not where the caller says.
    """
    if not isinstance(split, NoiseSplit):
        raise InputError(f"a NoiseSplit is needed, from split_noise; got {type(split).__name__}")
    place = given or split.hook_name or EMBEDDING
    if split.hook_name not in (None, place):
        raise InputError(f"noise_hook={given!r} contradicts the split, which is of {split.hook_name}")
    if place not in (at, EMBEDDING):
        raise InputError(
            f"the split is of {place}, and the SAE is at {at}: what it writes is compared with the noise there, or "
            f"with that of the embedding; collect_covariance(tower, data, {at!r}) gives what a split there needs"
        )
    return place


def check_tokens(split: NoiseSplit, scope: str | None) -> None:
    """Raise `InputError` where a split is of other tokens than an SAE reads; None is of nothing that is known."""
    if scope is not None and split.token_scope not in (None, "all", scope):
        raise InputError(
            f"the split is of {split.token_scope!r} tokens, and the SAE reads {scope!r}: what is noise in the ones "
            f"says nothing of the others; collect_covariance(..., token_scope={scope!r}) has those of the SAE"
        )


def _pushed(rows: Tensor, at: str, tower: HookedTower | None) -> Tensor:
    """What one unit of each latent adds to the embedding `[d_sae d_embed]`, where that is the same everywhere."""
    if at != _POOLED:
        raise InputError(
            f"the split is of the embedding, and between {at} and it lie LayerNorms or blocks, so a latent has no one "
            "direction there: use noise_share, which takes the derivative at each input, or a split at the SAE's hook"
        )
    if tower is None:
        raise InputError("the split is of the embedding and the SAE is at hook_pooled: pass tower=, whose projection "
                         "lies between them")  # fmt: skip
    zero = rows.new_zeros(1, rows.shape[1]).to(tower.cfg.dtype)

    def tail(given: Tensor) -> Tensor:
        return tower.run_from(_POOLED, given.to(tower.cfg.dtype))

    start = tail(zero)
    found = torch.cat([tail(part) - start for part in rows.split(_AT_ONCE)])
    probe = torch.randn(rows[:1].shape, generator=torch.Generator().manual_seed(0)).to(rows) * rows.norm(dim=1).mean()
    # Linear: the same addition from another point, and twice as much of twice the row.
    moved, twice = tail(probe + rows[:16]) - tail(probe), tail(2 * rows[:16]) - start
    slack = 1000 * torch.finfo(tower.cfg.dtype).eps * float(found.abs().max() + tail(probe).abs().max())
    if max(float((moved - found[:16]).abs().max()), float((twice - 2 * found[:16]).abs().max())) > slack:
        raise InputError(
            f"the {tower.cfg.tower} tower is not linear from hook_pooled to the embedding, so a latent has no one "
            "direction there: use noise_share, or a split at the SAE's hook"
        )
    return found


def _chance(value: Tensor, split: NoiseSplit) -> Tensor:
    """Of a random direction: the chance of as much or more."""
    if split.rank in (0, split.d):  # every direction has the same
        return torch.where(value.isnan(), torch.nan, 1.0)
    found = beta.sf(value.numpy(), split.rank / 2, (split.d - split.rank) / 2)
    return torch.as_tensor(found, dtype=torch.float64)
