"""Means and covariances at several hooks of a tower, in one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from clip_lens_ext.data import ImageBatch, Preprocess, Skipped, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import versions
from clip_lens_ext.spectrum.covariance import StreamingCovariance
from clip_lens_ext.spectrum.covariance_result import Covariance
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.positions import TokenScope, default_scope, select_tokens
from clip_lens_ext.towers.tower import HookedTower

_Place = tuple[str, TokenScope]


@dataclass(frozen=True, eq=False)
class Covariances:
    """The covariances of one pass, one for each hook and token scope.

    Attributes:
        parts: in the order in which they were asked for.
        n_samples: images or prompts that were read; a sample gives one row for each of its tokens.
        skipped: what could not be read.

    Example:
        >>> import clip_lens_ext as cle
        >>> tower = cle.planted_clip().vision
        >>> found = cle.collect_covariance(tower, torch.randn(4, 3, 48, 48), "hook_embedding", progress=False)
        >>> [part.hook_name for part in found]
        ['hook_embedding']
        >>> found["hook_embedding"].count
        4
    """

    parts: tuple[Covariance, ...]
    n_samples: int
    skipped: tuple[Skipped, ...]

    def __getitem__(self, where: str | tuple[str, str]) -> Covariance:
        """The covariance at a hook, or `[hook_name, token_scope]` where the hook has several.

        Raises:
            InputError: there is none, or there are several.
        """
        hook_name, scope = (where, None) if isinstance(where, str) else where
        found = [part for part in self.parts if part.hook_name == hook_name and scope in (None, part.token_scope)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"[{part.hook_name!r}, {part.token_scope!r}]" for part in self.parts)
        raise InputError(f"{'several' if found else 'no'} covariances at {where!r}; there are {known}")

    def __iter__(self) -> Iterator[Covariance]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __repr__(self) -> str:
        places = ", ".join(f"{part.hook_name} ({part.token_scope}, {part.count} rows)" for part in self.parts)
        return f"Covariances({self.n_samples} samples: {places})"


def collect_covariance(
    tower: HookedTower,
    data: Any,
    hook_names: str | Sequence[str],
    *,
    token_scope: TokenScope | Sequence[TokenScope] | None = None,
    unit_length: bool = False,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> Covariances:
    """Mean and covariance of the activations at some hooks, in one pass and one forward for all of them.

    Args:
        tower: a vision or a text tower; it is only run, without gradients, as far as the last of the hooks.
        data: samples, as `clip_lens_ext.data.image_batches` takes them: a folder, a tensor, token ids, a data set, ...
        hook_names: hooks that give `[batch token d]` or `[batch d]`: the residual stream, `hook_pooled`, the embedding.
        token_scope: whose tokens are rows: `"cls"`, `"patches"`, `"eot"` or `"all"`; of several, each has its own
            covariance. None: all tokens. A hook without a token axis gives its vectors, whatever the scope.
        unit_length: divide each row by its L2 length first, as the embedding is for a cosine.
        preprocess: PIL picture to tensor, for data of files or PIL pictures (`clip.preprocess`).
        batch_size: samples in a batch; the result does not depend on it, save for rounding.
        checkpoint: file to resume the pass from, and to write to, as in `run_pass`.
        checkpoint_every: batches between two writes.
        progress: draw a bar.

    Returns:
        `Covariances`. Tokens of one sample are not independent: `count` is rows, not evidence.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: a hook gives another shape, hook and scope do not go together, an activation is NaN, infinite or
            (with `unit_length`) zero, or no sample can be read.

    Example:
        >>> import clip_lens_ext as cle
        >>> tower, hooks = cle.planted_clip().vision, ["blocks.2.hook_resid_post", "hook_embedding"]
        >>> found = cle.collect_covariance(tower, torch.randn(6, 3, 48, 48), hooks, token_scope=["cls", "patches"],
        ...                                progress=False)
        >>> found["blocks.2.hook_resid_post", "patches"]
        Covariance(384 rows of length 128, vision blocks.2.hook_resid_post, patches tokens)
        >>> found["hook_embedding"].token_scope
        'pooled'
    """
    names = (hook_names,) if isinstance(hook_names, str) else tuple(dict.fromkeys(hook_names))
    if not names:
        raise InputError("no hook named: pass at least one of tower.hook_names()")
    for name in names:
        tower.check_hook_name(name)
    batches = image_batches(data, preprocess=preprocess, batch_size=batch_size)
    reader = _Reader(tower, names, _scopes(token_scope), unit_length)
    found = _Several(tower.cfg.device)
    same = {} if checkpoint is None else {
        "hook_names": list(names), "token_scopes": list(reader.scopes), "unit_length": unit_length,
        "model": tower.cfg.model_name, "model_sha256": tower_sha256(tower), "dtype": str(tower.cfg.dtype),
        "batch_size": batches.batch_size,
    }  # fmt: skip
    report = run_pass(
        batches, reader, found, checkpoint=checkpoint, checkpoint_every=checkpoint_every, settings=same,
        description="covariances", progress=progress,
    )  # fmt: skip
    origin = {"model": tower.cfg.model_name, "data_fingerprint": report.fingerprint, "n_samples": report.n_samples,
              "versions": versions()}  # fmt: skip
    parts = tuple(
        replace(part, hook_name=name, token_scope=scope, tower=tower.cfg.tower, unit_length=unit_length,
                provenance=dict(origin))
        for (name, scope), part in found.result().items()
    )  # fmt: skip
    return Covariances(parts, report.n_samples, report.skipped)


def _scopes(given: TokenScope | Sequence[TokenScope] | None) -> tuple[TokenScope, ...]:
    scopes: tuple[Any, ...] = ("all",) if given is None else (given,) if isinstance(given, str) else tuple(given)
    for scope in scopes:
        if scope not in get_args(TokenScope):
            raise InputError(f"unknown token scope {scope!r}; the scopes are {', '.join(get_args(TokenScope))}")
    if not scopes:
        raise InputError("no token scope named; None means all tokens")
    return tuple(dict.fromkeys(scopes))


class _Reader:
    """The rows of a batch at each hook and scope."""

    def __init__(
        self, tower: HookedTower, hook_names: tuple[str, ...], scopes: tuple[TokenScope, ...], unit_length: bool
    ) -> None:
        order = {name: place for place, name in enumerate(tower.hook_names())}
        *self.before, self.last = sorted(hook_names, key=order.__getitem__)
        self.tower, self.hook_names, self.scopes, self.unit_length = tower, hook_names, scopes, unit_length

    @torch.no_grad()
    def __call__(self, batch: ImageBatch) -> dict[_Place, Tensor]:
        cfg = self.tower.cfg
        x = batch.pixels.to(cfg.device)
        x = x.to(cfg.dtype) if x.is_floating_point() else x
        activations = self._run(x)
        found: dict[_Place, Tensor] = {}
        for name, scope in product(self.hook_names, self.scopes):
            activation = activations[name]
            if activation.dim() not in (2, 3):
                raise InputError(
                    f"{name} gives {list(activation.shape)}; covariances are of [batch token d] or [batch d]"
                )
            scope = "pooled" if default_scope(activation) == "pooled" else scope
            if (name, scope) not in found:
                found[name, scope] = self._rows(activation, name, scope, batch, x)
        return found

    def _run(self, x: Tensor) -> dict[str, Tensor]:
        """The activation that enters each hook; the tower runs as far as the last of them."""
        found: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            found[hook.name] = activation

        with ExitStack() as live:
            if self.before:
                live.enter_context(self.tower.hooks(fwd_hooks=[(name, keep) for name in self.before]))
            found[self.last] = self.tower.run_to(x, self.last)
        return found

    def _rows(self, activation: Tensor, name: str, scope: TokenScope, batch: ImageBatch, x: Tensor) -> Tensor:
        eot = self.tower.eot_positions(x) if scope == "eot" and self.tower.cfg.tower == "text" else None
        rows = select_tokens(activation, scope, eot, n_prefix=self.tower.n_prefix)
        length = rows.norm(dim=-1, keepdim=True)
        bad = ~torch.isfinite(rows).all(dim=-1)
        if self.unit_length:
            bad |= length.squeeze(-1) == 0
            rows = rows / length
        if bad.any():
            sample = batch.names[int(bad.reshape(len(x), -1).any(dim=1).int().argmax())]
            kind = "NaN, infinite or zero" if self.unit_length else "NaN or infinite"
            raise InputError(f"the activation of sample {sample!r} at {name} is {kind}")
        return rows


class _Several:
    """One accumulator for each hook and scope; they are made with the first batch, which says how wide each is."""

    def __init__(self, device: torch.device) -> None:
        # A device without float64, as Apple's, cannot keep the state.
        self.device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        self.parts: dict[_Place, StreamingCovariance] = {}

    def update(self, value: Mapping[_Place, Tensor], /) -> None:
        """Take in the rows of a batch."""
        for place, rows in value.items():
            self._at(place, rows.shape[1]).update(rows)

    def merge(self, other: _Several, /) -> _Several:
        """Take in another one, place by place, and return itself."""
        for place, part in other.parts.items():
            self._at(place, part.d).merge(part)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The states of all, each name with its number before it."""
        states = {f"{number}.{name}": value for number, part in enumerate(self.parts.values())
                  for name, value in part.state_dict().items()}  # fmt: skip
        return {**states, "places": [list(place) for place in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said."""
        self.parts = {}
        for number, (hook_name, scope) in enumerate(state["places"]):
            own = {name: state[f"{number}.{name}"] for name in ("d", "count", "mean", "scatter", "waiting")}
            self._at((hook_name, scope), own["d"]).load_state_dict(own)

    def result(self) -> dict[_Place, Covariance]:
        """The covariance at each hook and scope."""
        return {place: part.result() for place, part in self.parts.items()}

    def _at(self, place: _Place, d: int) -> StreamingCovariance:
        if place not in self.parts:
            self.parts[place] = StreamingCovariance(d, device=self.device)
        return self.parts[place]
