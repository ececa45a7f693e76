"""Activations of images at several hooks in bounded memory: one pass, kept in memory or on disk, or run again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.data import ImageBatch, ImageBatches
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.activation_cache import ActivationCache
from clip_lens_ext.towers.positions import TokenScope, select_tokens
from clip_lens_ext.towers.tower import HookedTower


class ActivationRows:
    """The activations of every readable sample at some hooks: `n_tokens` rows a sample, of width `d[hook]`.

    Making one passes over the data once, for all hooks together. Rows that fit into the memory limit are kept there;
    with `cache_dir` they are written to disk, whatever their size, and read from there the next time; otherwise the
    pass only reads the samples, and `take` runs the tower again for those that are asked for.

    Args:
        tower: the tower; it is only run, without gradients.
        images: the samples.
        hook_names: hooks that give `[batch token d]` or `[batch d]`, all with as many tokens.
        token_scope: which tokens; "all" at a hook without a token axis means "pooled".
        memory_limit: bytes that the kept rows may take, of all hooks together; 0 keeps none.
        cache_dir: folder of activations on disk; a pass that was killed goes on after what is there.
        identity: JSON values that tell the activations of one model from those of another.
        progress: draw a bar.

    Attributes:
        indexes: the position in the data of each readable sample.
        fingerprint: of the data, as `ImageBatches.fingerprint`.
        n_skipped: samples that could not be read.
        stored: `[sample token d]` of each hook, on the CPU, or None where they did not fit.
        token_scope: with "pooled" for "all" where the hooks have no token axis.

    Raises:
        InputError: no sample can be read, an activation is NaN or infinite (it names the image), hook and scope do not
            go together, two hooks have different numbers of tokens, or the cache is of other activations.
    """

    def __init__(
        self,
        tower: HookedTower,
        images: ImageBatches,
        *,
        hook_names: Sequence[str],
        token_scope: TokenScope,
        memory_limit: int,
        cache_dir: str | os.PathLike[str] | None = None,
        identity: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.tower, self.images, self.token_scope = tower, images, token_scope
        self.hook_names = tuple(dict.fromkeys(hook_names))
        self.indexes: list[int] = []
        self.stored: dict[str, Tensor] | None = None
        self.n_tokens = 0
        self.d: dict[str, int] = {}
        same = {**(identity or {}), "token_scope": token_scope, "dtype": str(tower.cfg.dtype)}
        self._caches: dict[str, ActivationCache] = {}
        if cache_dir is not None:
            self._caches = {
                name: ActivationCache(Path(cache_dir, name), {**same, "hook_name": name}) for name in self.hook_names
            }
        self._pass(memory_limit, progress)
        self.fingerprint = str(images.fingerprint)
        self.n_skipped = len(images.skipped)
        if images.skipped:
            named = "; ".join(f"{skip.name}: {skip.reason}" for skip in images.skipped[:5])
            warnings.warn(f"{self.n_skipped} samples could not be read and are left out ({named})", stacklevel=4)

    @property
    def n_samples(self) -> int:
        """Number of readable samples."""
        return len(self.indexes)

    def _pass(self, memory_limit: int, progress: bool) -> None:
        """Read every sample once; run the tower where its rows are to be kept and are not on disk yet."""
        n_expected, keep = self.images.n_samples, False
        shown = self.hook_names[0] if len(self.hook_names) == 1 else f"{len(self.hook_names)} hooks"
        with tqdm(total=n_expected, desc=f"activations at {shown}", unit="image", disable=not progress) as bar:
            for batch in self.images:
                missing = self._not_cached(batch)
                if not self.indexes:
                    rows = self.rows(batch, self.hook_names)
                    size = sum(one[0].numel() * one.element_size() for one in rows.values())
                    keep = not self._caches and (n_expected or len(batch.names)) * size <= memory_limit
                    if keep:
                        room = n_expected or 1024
                        self.stored = {k: torch.empty((room, *v.shape[1:]), dtype=v.dtype) for k, v in rows.items()}
                elif keep or missing:
                    rows = self.rows(batch, self.hook_names if keep else missing)
                if keep:
                    keep = self._store(rows, memory_limit)
                for name in missing:
                    known = self._caches[name].n_stored - len(self.indexes)
                    self._caches[name].append(rows[name][known:], batch.pixels[known:])
                self.indexes += batch.indexes
                bar.update(len(batch.names))
                if self.images.skipped:
                    bar.set_postfix(skipped=len(self.images.skipped))
        for cache in self._caches.values():
            cache.finish(len(self.indexes))
        if self._caches and len(self.indexes) * size <= memory_limit:
            everything = range(len(self.indexes))
            self.stored = {name: cache.take(everything) for name, cache in self._caches.items()}
        elif self.stored is not None:
            self.stored = {name: kept[: len(self.indexes)] for name, kept in self.stored.items()}

    def _not_cached(self, batch: ImageBatch) -> list[str]:
        """The hooks whose cache lacks samples of this batch; those that it has are checked."""
        missing, first = [], len(self.indexes)
        for name, cache in self._caches.items():
            for number in range(first, min(first + len(batch.names), cache.n_stored)):
                cache.check(number, batch.pixels[number - first], batch.names[number - first])
            if cache.n_stored < first + len(batch.names):
                missing.append(name)
        return missing

    @torch.no_grad()
    def rows(self, batch: ImageBatch, hook_names: Sequence[str]) -> dict[str, Tensor]:
        """The activations of a batch, `[sample token d]` on the CPU for each hook, in one run of the tower."""
        cfg = self.tower.cfg
        x = batch.pixels.to(cfg.device)
        x = x.to(cfg.dtype) if x.is_floating_point() else x
        return {name: self._rows(value, name, batch, x) for name, value in self._run(x, hook_names).items()}

    def _run(self, x: Tensor, hook_names: Sequence[str]) -> dict[str, Tensor]:
        """The activation that enters each hook; the tower runs as far as the last of them."""
        order = {name: place for place, name in enumerate(self.tower.hook_names())}
        *before, last = sorted(hook_names, key=order.__getitem__)
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            found[hook.name] = value

        # Where gradients are on, run_to keeps to the kernels that a gradient needs.
        with torch.no_grad(), ExitStack() as live:
            if before:
                live.enter_context(self.tower.hooks(fwd_hooks=[(name, keep) for name in before]))
            found[last] = self.tower.run_to(x, last)
        return {name: found[name] for name in hook_names}

    def _rows(self, activation: Tensor, hook_name: str, batch: ImageBatch, x: Tensor) -> Tensor:
        if activation.ndim not in (2, 3):
            raise InputError(
                f"{hook_name} gives {list(activation.shape)}: an SAE is trained where the tower gives "
                "[batch token d] or [batch d]"
            )
        if activation.ndim == 2 and self.token_scope == "all":
            self.token_scope = "pooled"
        eot = self.tower.eot_positions(x) if self.token_scope == "eot" else None
        rows = select_tokens(activation, self.token_scope, eot, n_prefix=self.tower.n_prefix)
        rows = rows.reshape(len(x), -1, activation.shape[-1])
        finite = torch.isfinite(rows).flatten(1).all(1)
        if not finite.all():
            name = batch.names[int(finite.int().argmin())]
            raise InputError(f"the activation of image {name!r} at {hook_name} is NaN or infinite")
        if self.n_tokens and rows.shape[1] != self.n_tokens:
            raise InputError(
                f"{hook_name} has {rows.shape[1]} tokens and {next(iter(self.d))} has {self.n_tokens}: hooks that are "
                "trained together need as many; train them in two calls"
            )
        self.n_tokens, self.d[hook_name] = rows.shape[1], rows.shape[2]
        rows = rows.cpu()
        # One token as a view would keep the activations of all of them alive.
        return rows.clone() if rows.nbytes < rows.untyped_storage().nbytes() else rows

    def _store(self, rows: Mapping[str, Tensor], memory_limit: int) -> bool:
        """Keep the rows of a batch; False, and nothing is kept any more, where they do not fit."""
        assert self.stored is not None
        for name, new in rows.items():
            kept, start, end = self.stored[name], len(self.indexes), len(self.indexes) + len(new)
            if end > len(kept):
                grown = torch.empty((2 * end, *new.shape[1:]), dtype=new.dtype)
                grown[:start] = kept[:start]
                self.stored[name] = kept = grown
            kept[start:end] = new
        size = sum(new[0].numel() * new.element_size() for new in rows.values())
        if end * size > memory_limit:
            self.stored = None
        return self.stored is not None

    def take(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """The activations `[sample token d]` of some readable samples, in this order, for each hook.

        Raises:
            InputError: a sample that was readable at first is not any more, or the data have one order only.
        """
        if self.stored is not None:
            return {name: kept[torch.as_tensor(samples, dtype=torch.long)] for name, kept in self.stored.items()}
        if self._caches:
            return {name: cache.take(samples) for name, cache in self._caches.items()}
        chosen = self.images.select([self.indexes[sample] for sample in samples])
        parts = [self.rows(batch, self.hook_names) for batch in chosen]
        rows = {name: torch.cat([part[name] for part in parts]) for name in self.hook_names}
        if len(rows[self.hook_names[0]]) != len(samples):
            raise InputError(f"the data changed: {chosen.skipped[0].name!r} could be read before, and now it cannot")
        return rows
