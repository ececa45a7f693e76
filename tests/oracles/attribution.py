"""What attribution methods and faithfulness compute, from the formulas, by re-running the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oracles import tower as oracle
from oracles.saes import SAEFormula, scope_tokens


class Explained:
    """Predictions of one sample as a function of the latents at the SAE's tokens; nothing is linearised or reused.

    Args:
        model: a native open_clip model.
        x: one input, with its batch axis.
        sae, hook, scope: the SAE and where it sits.
        vectors: targets `[target d_embed]`.
        cosine: cosine or inner product.
        kept: whether the error term stays.
        held: hooks whose values stay what they are on the unedited input, whatever the latents are.
        spec: of a model that is not open_clip's.
    """

    def __init__(
        self,
        model: Any,
        x: Tensor,
        sae: Any,
        hook: str,
        scope: str,
        vectors: Tensor,
        *,
        cosine: bool = True,
        kept: bool = True,
        held: Sequence[str] = (),
        spec: oracle.Spec | None = None,
    ) -> None:
        self.spec, self.x, self.hook, self.kept = spec or oracle.spec_of(model), x, hook, kept
        self.formula, self.vectors, self.cosine = SAEFormula(sae), vectors.double(), cosine
        self.activation = oracle.run(self.spec, x)[1][hook][0]
        if scope == "pooled":
            self.tokens = [-1]
        else:
            eot = None
            if self.spec.tower == "text":
                ids = [int(i) for i in x[0]]
                eot = ids.index(self.spec.eos_id if self.spec.pool == "eos" else max(ids))
            self.tokens = scope_tokens(scope, len(self.activation), eot)
        self.rows = [self.activation if token < 0 else self.activation[token] for token in self.tokens]
        self._known: dict[frozenset[int], Tensor] = {}
        self.latents = torch.stack([self.formula.encode(row) for row in self.rows])
        self.values: dict[str, Tensor] = {}
        self.embedding = self._run(self.latents, {})
        self.unedited = self.values
        self.held = {name: self.unedited[name] for name in held}

    def predict(self, latents: Tensor) -> Tensor:
        """Predictions `[target]` for latents `[token d_sae]`."""
        return self.read(self._run(latents, self.held))

    def _run(self, latents: Tensor, held: dict[str, Tensor]) -> Tensor:
        """The embedding `[d_embed]`; `self.values` are those of this run."""

        def replace(value: Tensor) -> Tensor:
            out = value.clone()
            for nth, token in enumerate(self.tokens):
                row = self.rows[nth]
                new = self.formula.decode(latents[nth], row)
                if self.kept:
                    new = new + row - self.formula.decode(self.latents[nth], row)
                out[(0,) if token < 0 else (0, token)] = new
            return out

        constant = {name: (lambda value, kept=kept: kept) for name, kept in held.items()}
        embedding, self.values = oracle.run(self.spec, self.x, {self.hook: replace, **constant})
        return embedding[0]

    def read(self, embedding: Tensor) -> Tensor:
        """Predictions `[target]` of an embedding."""
        predictions = []
        for vector in self.vectors:
            product = float((embedding * vector).sum())
            lengths = math.sqrt(float((embedding**2).sum())) * math.sqrt(float((vector**2).sum()))
            predictions.append(product / lengths if self.cosine else product)
        return torch.tensor(predictions, dtype=torch.float64)

    def active(self) -> list[int]:
        """Latents that are active at some token."""
        return [i for i in range(self.latents.shape[1]) if bool((self.latents[:, i] != 0).any())]

    def patching(self, latent: int, token: int | None = None, step: float = 1e-4) -> Tensor:
        """`z dy/dz` of one latent `[target]`, summed over tokens or at one: a central difference along `z`.

        Moving all of a latent's activations by the same relative amount has `sum_t z_t dy/dz_t` as its derivative. The
        five-point rule leaves an error of step^4, some 1e-14, and the rounding of `y` over the step, some 1e-12.
        """
        direction = torch.zeros_like(self.latents)
        where = slice(None) if token is None else slice(token, token + 1)
        direction[where, latent] = self.latents[where, latent]
        return self.along(self.latents, direction, step)

    def along(self, at: Tensor, direction: Tensor, step: float = 1e-4) -> Tensor:
        """Derivative of the predictions along a direction of the latents, by the five-point rule, `[target]`."""
        ends = {k: self.predict(at + k * step * direction) for k in (-2, -1, 1, 2)}
        return (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * step)

    def integrated(self, latent: int, baseline: Tensor, n_interval: int = 6) -> Tensor:
        """Integral over the path from `baseline` `[token d_sae]` of `(z - z0) dy/dz` of one latent, `[target]`.

        Bode's rule on each of `n_interval` parts of the path: not the nodes of the code under test.
        """
        whole = self.latents - baseline
        own = torch.zeros_like(whole)
        own[:, latent] = whole[:, latent]
        total = torch.zeros(len(self.vectors), dtype=torch.float64)
        for part in range(n_interval):
            for node, weight in enumerate((7, 32, 12, 32, 7)):
                at = (part + node / 4) / n_interval
                total = total + weight / 90 / n_interval * self.along(baseline + at * whole, own)
        return total

    def direct(self, latent: int, token: int, step: float = 1.0) -> Tensor:
        """What one unit of a latent at one token adds to the predictions through the stream alone, `[target]`.

        Its row is added to the stream after the last block, where the final LayerNorm's scale is held; the embedding
        moves by a straight line, of which each target is read with the length of the embedding held.
        """
        nothing = torch.zeros_like(self.latents[0])
        one = nothing.clone()
        one[latent] = 1
        row = self.rows[token]
        write = self.formula.decode(one, row) - self.formula.decode(nothing, row)
        scale = self.unedited["ln_final.hook_scale"]
        last = f"blocks.{self.spec.n_layers - 1}.hook_resid_post"
        assert self.kept or self.hook != last, "values are those before an edit"
        stream = self.unedited[last].clone()
        stream[0, self.tokens[token]] += step * write
        edits = {last: lambda value: stream, "ln_final.hook_scale": lambda value: scale}
        moved = oracle.run(self.spec, self.x, edits)[0][0] - self.embedding
        length = math.sqrt(float((self.embedding**2).sum()))
        found = []
        for vector in self.vectors:
            own = math.sqrt(float((vector**2).sum())) * length if self.cosine else 1.0
            found.append(float((moved * vector).sum()) / own / step)
        return torch.tensor(found, dtype=torch.float64)

    def ablation(self, latent: int) -> Tensor:
        """`y(as is) - y(latent set to zero at every token)`, `[target]`."""
        return self.predict(self.latents) - self.without([latent])

    def without(self, latents: Sequence[int]) -> Tensor:
        """Predictions `[target]` with several latents set to zero at every token; which is asked for again is kept."""
        key = frozenset(latents)
        if key not in self._known:
            self._known[key] = self._without(latents)
        return self._known[key]

    def _without(self, latents: Sequence[int]) -> Tensor:
        edited = self.latents.clone()
        for latent in latents:
            edited[:, latent] = 0
        return self.predict(edited)


def deletion_curve(explained: Explained, order: Sequence[int], n_steps: int, target: int) -> list[float]:
    """The prediction after 0, 1, ..., n_steps latents of an order were deleted; it stays where no latent is left."""
    return [float(explained.without(order[: min(step, len(order))])[target]) for step in range(n_steps + 1)]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties averaged."""
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; NaN where it is 0/0."""
    x, y = ranks(a), ranks(b)
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    upper = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    lower = math.sqrt(sum((p - mean_x) ** 2 for p in x) * sum((q - mean_y) ** 2 for q in y))
    return upper / lower if lower > 0 else math.nan


def each(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> list[Explained]:
    """One `Explained` for each sample of a batch."""
    return [Explained(model, x[i : i + 1], *args, **kwargs) for i in range(len(x))]
