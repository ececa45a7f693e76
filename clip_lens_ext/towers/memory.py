"""What `run_from` has to know of the pass that made an activation: its prompts, and whether it needed a gradient.

A text tower pools at the end-of-text token, so the tail from a hook needs the token ids as well as the activation.
`run_from(..., tokens=ids)` says so outright. Without it the ids are taken from the `run_to` that made the activation,
or, for an edited copy, from the only prompts that `run_to` has seen at this batch size; where that is not one answer
it is an error, never a guess.

`run_to` gives an activation without gradients. Where a weight before the hook needs one, the native forward would have
kept off the fused attention kernels from there on; the tail does the same for that very activation, so that both give
the same bits.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


class PrefixMemory:
    """Facts about the activations that `run_to` made; it keeps none of them alive."""

    def __init__(self) -> None:
        self._made: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self._needing: list[weakref.ref[Tensor]] = []
        self._by_batch: dict[int, tuple[Tensor, Tensor] | None] = {}  # None: several prompts of this batch size

    def remember(self, activation: Tensor, tokens: Tensor, pooled_at: Tensor) -> None:
        """Note that `activation` came from `tokens`, which are pooled at the positions `pooled_at` `[batch]`."""
        self._made = [(ref, ids) for ref, ids in self._made if ref() is not None]
        self._made.append((weakref.ref(activation), tokens))
        known = self._by_batch.get(len(tokens), (tokens, pooled_at))
        same = known is not None and torch.equal(known[1], pooled_at)
        self._by_batch[len(tokens)] = (tokens, pooled_at) if same else None

    def remember_gradient(self, activation: Tensor) -> None:
        """Note that `activation` depends on weights that need a gradient."""
        self._needing = [ref for ref in self._needing if ref() is not None] + [weakref.ref(activation)]

    def needed_gradient(self, activation: Tensor) -> bool:
        """Whether `run_to` made this activation from weights that need a gradient."""
        return any(ref() is activation for ref in self._needing)

    def recall(self, activation: Tensor) -> Tensor:
        """The token ids of an activation.

        Raises:
            InputError: `run_to` did not make it, and has seen no prompts of this batch size, or several.
        """
        for ref, tokens in self._made:
            if ref() is activation:
                return tokens
        batch = len(activation)
        known = self._by_batch.get(batch)
        if known is not None:
            return known[0]
        found = "several prompts that end at different tokens" if batch in self._by_batch else "no prompts"
        raise InputError(
            f"a text tower pools at the end-of-text token, and run_to has seen {found} at batch size "
            f"{batch}: pass run_from(..., tokens=ids)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixMemory:
        return PrefixMemory()

    def __reduce__(self) -> tuple[type[PrefixMemory], tuple[()]]:
        return (PrefixMemory, ())  # weak references do not pickle, and another process has not run these prompts
