"""What passes through a subspace, by moving what is written, or the embedding, along its projection and no further.

The derivatives are five-point differences of the whole model, no gradient and no chain rule; no import of the package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from oracles import tower as oracle
from oracles.attribution import Explained
from oracles.spectrum import projector

STEP = 1e-4


def slope(function: Callable[[float], Tensor], step: float = STEP) -> Tensor:
    """Derivative at 0 by the five-point rule: an error of step^4, and the rounding over the step, some 1e-12."""
    ends = {k: function(k * step) for k in (-2, -1, 1, 2)}
    return (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * step)


def through_the_hook(explained: Explained, latent: int, basis: Tensor, token: int | None = None) -> Tensor:
    """`z <dy/dx, P w>` `[target]`: the activation moved by what the projection leaves of the latent's write."""
    keep = torch.from_numpy(projector(np.asarray(basis)))
    writes = []
    for nth, row in enumerate(explained.rows):
        own = torch.zeros_like(explained.latents[nth])
        if token in (None, nth):
            own[latent] = explained.latents[nth][latent]
        write = explained.formula.decode(own, row) - explained.formula.decode(torch.zeros_like(own), row)
        writes.append(keep @ write)

    def predicted(amount: float) -> Tensor:
        def replace(value: Tensor) -> Tensor:
            out = value.clone()
            for nth, at in enumerate(explained.tokens):
                row = explained.rows[nth]
                base = row if explained.kept else explained.formula.decode(explained.latents[nth], row)
                out[(0,) if at < 0 else (0, at)] = base + amount * writes[nth]
            return out

        return explained.read(oracle.run(explained.spec, explained.x, {explained.hook: replace})[0][0])

    return slope(predicted)


def through_the_embedding(explained: Explained, latent: int, basis: Tensor) -> Tensor:
    """`z <dy/de, P de/dz>` `[target]`: the embedding moved by what the projection leaves of the latent's effect."""
    keep = torch.from_numpy(projector(np.asarray(basis)))
    direction = torch.zeros_like(explained.latents)
    direction[:, latent] = explained.latents[:, latent]
    moved = slope(lambda amount: explained._run(explained.latents + amount * direction, {}))
    embedding = explained._run(explained.latents, {})
    return slope(lambda amount: explained.read(embedding + amount * (keep @ moved)))
