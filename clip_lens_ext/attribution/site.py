"""The model split at an SAE's hook: the prefix has run, the tail can be run on any edit of the latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.reach import check_path, check_start, stream_hooks
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint, versions
from clip_lens_ext.saes.codes import SparseCodes, codes_of
from clip_lens_ext.saes.decoder import check_decoder, decoder_rows, output_scale
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.towers.live import any_live, fire
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
        inputs: the tower's input, `[batch ...]`.
        fingerprint: hash of the input.
        stream: at `hook_attn_out` and `hook_mlp_out`: the residual stream that the block adds the activation to.
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
    inputs: Tensor
    fingerprint: str
    stream: Tensor | None = None

    def tail(self, rows: Tensor, samples: Tensor) -> Tensor:
        """Embeddings `[n d_embed]` with the SAE's tokens replaced.

        Args:
            rows: `[n token d_in]`.
            samples: which sample of the batch each of the `n` is a copy of, `[n]`.
        """
        if self.is_pooled_token:
            alone = rows[:, 0]
            return self.tower.project(alone if self.stream is None else self._own_stream[samples] + alone)
        rows = rows[:, 0] if self.activation.dim() == 2 else rows
        edited = self.positions.select(samples).put(self.activation[samples], rows)
        tokens = None if self.tokens is None else self.tokens[samples]
        start = self.hook_name
        if self.stream is not None:
            # As the block does it: what the hook gives is added to the stream, and the pass goes on behind the sum.
            with self.tower._running(tokens):  # an SAE attached at the hook may ask for the prompts
                edited = self.stream[samples] + fire(self.tower.hook_dict[self.hook_name], edited)
            start = cast(tuple[str, str], stream_hooks(self.hook_name))[1]
        if can_run_pooled(self.tower, start):
            return run_pooled(self.tower, start, edited, tokens=tokens)
        return self.tower.run_from(start, edited, tokens=tokens)

    @property
    def is_pooled_token(self) -> bool:
        """Whether the tail is LayerNorm and projection of the SAE's one token: pooled, after the last block."""
        last = f"blocks.{self.tower.cfg.n_layers - 1}"
        listens = any_live(self.tower.hook_points())
        at_end = self.hook_name in (f"{last}.hook_resid_post", f"{last}.hook_mlp_out")
        return at_end and self.positions.scope == self.tower.reading.pooled_token() and not listens

    @property
    def _own_stream(self) -> Tensor:
        """The stream at the SAE's one token, `[batch d_model]`."""
        assert self.stream is not None
        return self.positions.take(self.stream)[:, 0]

    @torch.no_grad()
    def predict(self, target: Target) -> Tensor:
        """Prediction `[sample target]` before any edit."""
        return target(self.tail(self.base, torch.arange(len(self.base), device=self.base.device)))

    def entry_chunks(
        self, within: slice | None = None, *, at_once: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the active entries with their scaled decoder rows `[entry d_in]`, a bounded number at a time.

        Args:
            within: these entries; all by default.
            at_once: how many at a time.
        """
        first, last, _ = (within or slice(None)).indices(len(self.codes))
        step = min(at_once or _ENTRIES_AT_ONCE, _ENTRIES_AT_ONCE)
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
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
        InputError: the SAE does not fit, the hook is none of the residual stream or of what a block adds to it, no
            latent is active, or the SAE's tokens have no path to the output.
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
    check_start(tower, name)
    activation, stream = _prefix(tower, x, name)
    return site_at(tower, x, sae, name, activation, stream, token_scope=token_scope, error_term=error_term)


@torch.no_grad()
def site_at(
    tower: HookedTower,
    x: Tensor,
    sae: SAE,
    hook_name: str,
    activation: Tensor,
    stream: Tensor | None,
    *,
    token_scope: TokenScope | None,
    error_term: ErrorTerm,
) -> Site:
    """The site of an activation that a pass has given, with `stream` what the block adds it to, if it does.

    Raises:
        InputError: the SAE does not fit, no latent is active, or the SAE's tokens have no path to the output.
    """
    scope = token_scope or sae.cfg.metadata.token_scope or default_scope(activation)
    eot = tower.eot_positions(x) if tower.cfg.tower == "text" else None
    positions = TokenPositions(scope, eot, tower.n_prefix)
    positions.check(activation, hook_name)
    check_path(tower, hook_name, scope)
    codes = codes_of(sae, activation, positions, hook_name=hook_name)
    taken = positions.take(activation)
    rows = taken if taken.dim() == 3 else taken[:, None]
    if len(codes) == 0:
        raise InputError("the SAE has no active latent on this input: is it an SAE of this model and hook?")
    check_decoder(sae, rows[0, :1], codes.latent)
    scale = output_scale(sae, rows.flatten(0, 1)).reshape(*rows.shape[:2], 1).to(rows.dtype)
    base = rows if error_term == "kept" else sae.decode(sae.encode(rows)).to(rows.dtype)
    tokens = x if tower.cfg.tower == "text" else None
    return Site(
        tower, sae, hook_name, activation, codes, base.detach(), scale, error_term, positions, tokens, x,
        fingerprint(x), stream,
    )  # fmt: skip


@torch.no_grad()
def _prefix(tower: HookedTower, x: Tensor, hook_name: str) -> tuple[Tensor, Tensor | None]:
    """What enters a hook, and the stream that it is added to; both from one pass."""
    around = stream_hooks(hook_name)
    if around is None:
        return tower.run_to(x, hook_name), None
    seen: list[Tensor] = []
    # Registered last, so that it sees the stream as the hooks of others left it.
    handle = tower.hook_dict[around[0]].register_forward_hook(lambda point, args, out: seen.append(out.detach()))
    try:
        activation = tower.run_to(x, hook_name)
    finally:
        handle.remove()
    return activation, seen[0]
