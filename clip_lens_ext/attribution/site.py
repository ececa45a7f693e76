"""The model split at an SAE's hook: the prefix has run, the tail can be run on any edit of the latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint, versions
from clip_lens_ext.saes.codes import SparseCodes, codes_of
from clip_lens_ext.saes.decoder import check_decoder, decoder_rows, output_scale
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.towers.live import any_live
from clip_lens_ext.towers.pooled_tail import can_run_pooled, run_pooled
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope
from clip_lens_ext.towers.tower import HookedTower

ErrorTerm = Literal["kept", "dropped"]
_ENTRIES_AT_ONCE = 16_384  # decoder rows that are gathered at a time: 50 MB at d_model 768


@dataclass(frozen=True, eq=False)
class Site:
    """One batch at one SAE: activation, codes, and the rows that the tail starts from.

    `open_site` makes it; every method takes it in place of `x`, so that several methods share one prefix.

    Attributes:
        tower, sae, hook_name: what is explained, and where.
        activation: what enters the hook, `[batch token d_model]`, or `[batch d]` at a pooled hook.
        codes: the active latents.
        base: the SAE's tokens as the tail gets them before any edit, `[batch token d_in]`: the activation itself where
            the error term is kept, the reconstruction where it is dropped.
        scale: factor between a decoder row and the reconstruction, `[batch token 1]`.
        error_term: `"kept"` or `"dropped"`.
        positions: the SAE's tokens.
        tokens: the prompts' ids, for a text tower.
        fingerprint: hash of the input.
    """

    tower: HookedTower
    sae: SAE
    hook_name: str
    activation: Tensor
    codes: SparseCodes
    base: Tensor
    scale: Tensor
    error_term: ErrorTerm
    positions: TokenPositions
    tokens: Tensor | None
    fingerprint: str

    def tail(self, rows: Tensor, samples: Tensor) -> Tensor:
        """Embeddings `[n d_embed]` with the SAE's tokens replaced.

        Args:
            rows: `[n token d_in]`.
            samples: which sample of the batch each of the `n` is a copy of, `[n]`.
        """
        if self._tail_is_pooled_token:
            return self.tower.project(rows[:, 0])
        rows = rows[:, 0] if self.activation.dim() == 2 else rows
        edited = self.positions.select(samples).put(self.activation[samples], rows)
        tokens = None if self.tokens is None else self.tokens[samples]
        if can_run_pooled(self.tower, self.hook_name):
            return run_pooled(self.tower, self.hook_name, edited, tokens=tokens)
        return self.tower.run_from(self.hook_name, edited, tokens=tokens)

    @property
    def _tail_is_pooled_token(self) -> bool:
        """After the last block a pooled CLS or end-of-text token goes through LayerNorm and projection alone."""
        last = f"blocks.{self.tower.cfg.n_layers - 1}.hook_resid_post"
        listens = any_live(self.tower.hook_points())
        return self.hook_name == last and self.positions.scope == self.tower.reading.pooled_token() and not listens

    @torch.no_grad()
    def predict(self, target: Target) -> Tensor:
        """Prediction `[sample target]` before any edit."""
        return target(self.tail(self.base, torch.arange(len(self.base), device=self.base.device)))

    def entry_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the active entries with their scaled decoder rows `[entry d_in]`, a bounded number at a time."""
        for start in range(0, len(self.codes), _ENTRIES_AT_ONCE):
            part = slice(start, start + _ENTRIES_AT_ONCE)
            scale = self.scale[self.codes.sample[part], self.codes.token[part]]
            yield part, decoder_rows(self.sae, self.codes.latent[part]).detach() * scale

    def contributions(self, entries: Tensor) -> Tensor:
        """What some active entries `[n]` add to the reconstruction at their token, `[n d_in]`."""
        scale = self.scale[self.codes.sample[entries], self.codes.token[entries]]
        rows = decoder_rows(self.sae, self.codes.latent[entries]).detach() * scale
        return rows * self.codes.value[entries][:, None]

    def provenance(self, target: Target | None = None) -> dict[str, Any]:
        """Where a result at this site, about this target, comes from, as plain JSON values."""
        metadata = self.sae.cfg.metadata
        return {
            "model": self.tower.cfg.model_name,
            "sae_sha256": metadata.sha256,
            "sae_format": metadata.format,
            "data_fingerprint": self.fingerprint,
            "target_fingerprint": None if target is None else target.fingerprint,
            "versions": versions(),
        }


def open_site(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
) -> Site:
    """Run the prefix and encode: everything that the methods share.

    Args:
        tower: the tower.
        x: its input, or a `Site`, which is given back as it is.
        sae: the SAE.
        hook_name, token_scope: instead of the SAE's own.
        error_term: `"kept"`: what the SAE does not reconstruct stays in the activation, held constant;
            `"dropped"`: the tail starts from the reconstruction alone. None means kept, or what a `Site` has.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: the SAE does not fit, the hook is no split of the residual stream, no latent is active, or the SAE's
            tokens have no path to the output.
    """
    if isinstance(x, Site):
        if x.tower is not tower or x.sae is not sae:
            raise InputError("this Site was opened with another tower or another SAE")
        mine = {"hook_name": x.hook_name, "token_scope": x.positions.scope, "error_term": x.error_term}
        asked = {"hook_name": hook_name, "token_scope": token_scope, "error_term": error_term}
        for name, value in asked.items():
            if value is not None and value != mine[name]:
                raise InputError(f"{name}={value!r} contradicts the Site, which was opened with {mine[name]!r}")
        return x
    error_term = error_term or "kept"
    if error_term not in get_args(ErrorTerm):
        raise InputError(f"error_term is 'kept' or 'dropped', got {error_term!r}")
    name = sae_hook_name(tower, sae, hook_name)
    if name not in tower.split_names():
        raise InputError(
            f"attribution needs a hook at which the tail can start, and {name} carries only a part of the "
            "state; see tower.split_names()"
        )
    with torch.no_grad():
        activation = tower.run_to(x, name)
        scope = token_scope or sae.cfg.metadata.token_scope or default_scope(activation)
        eot = tower.eot_positions(x) if tower.cfg.tower == "text" else None
        positions = TokenPositions(scope, eot, tower.n_prefix)
        positions.check(activation, name)
        _check_path(tower, name, scope)
        codes = codes_of(sae, activation, positions, hook_name=name)
        taken = positions.take(activation)
        rows = taken if taken.dim() == 3 else taken[:, None]
        if len(codes) == 0:
            raise InputError("the SAE has no active latent on this input: is it an SAE of this model and hook?")
        check_decoder(sae, rows[0, :1], codes.latent)
        scale = output_scale(sae, rows.flatten(0, 1)).reshape(*rows.shape[:2], 1).to(rows.dtype)
        base = rows if error_term == "kept" else sae.decode(sae.encode(rows)).to(rows.dtype)
    return Site(
        tower,
        sae,
        name,
        activation,
        codes,
        base.detach(),
        scale,
        error_term,
        positions,
        x if tower.cfg.tower == "text" else None,
        fingerprint(x),
    )


# Which scopes hold a token that the pooled vector is made of; other ways of pooling read every token.
_REACHING: dict[str, tuple[str, ...]] = {
    "cls": ("cls", "all"),
    "eot": ("eot", "patches", "all"),
    "first": ("cls", "all"),
    "last": ("patches", "all"),
    "mean of patches": ("patches", "all"),
}


def _check_path(tower: HookedTower, hook_name: str, scope: str) -> None:
    """Refuse tokens that the pooled vector does not depend on: their gradient is zero, which says nothing."""
    pooled = tower.reading.pooled_token() or tower.cfg.pooling
    last = f"blocks.{tower.cfg.n_layers - 1}.hook_resid_"
    # After the last attention layer no token reads another one.
    if hook_name in (f"{last}mid", f"{last}post") and scope not in _REACHING.get(pooled, (scope,)):
        what = "the mean of the patches" if pooled == "mean of patches" else f"the {pooled} token alone"
        raise InputError(
            f"at {hook_name} the embedding depends on {what}: an SAE on {scope!r} has no path to the output there, so "
            "every attribution would be zero. Take an earlier block"
        )
