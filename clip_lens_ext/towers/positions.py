"""Which tokens of an activation an SAE reads: CLS, patches, all, the end-of-text token, or a pooled vector."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError

TokenScope = Literal["cls", "patches", "all", "eot", "pooled"]
TOKEN_SCOPES: tuple[str, ...] = get_args(TokenScope)


@dataclass(frozen=True)
class TokenPositions:
    """The tokens of one scope, to take out of an activation and to put back.

    - `"cls"`: token 0 of a vision tower; `"patches"`: the tokens after the prefix; `"all"`: every token;
    - `"eot"`: the end-of-text token of a text tower, another position for each prompt;
    - `"pooled"`: the activation has no token axis (`hook_pooled`, `hook_embedding`).

    Args:
        scope: one of `TOKEN_SCOPES`.
        eot: position of the end-of-text token of each sample, `[batch]`; needed for `"eot"` alone.
        n_prefix: tokens before the patches: 1 for a class token, 0 for SigLIP, more with registers.

    Example:
        >>> activation = torch.arange(12.0).reshape(1, 4, 3)
        >>> TokenPositions("patches").take(activation).shape
        torch.Size([1, 3, 3])
        >>> TokenPositions("cls").put(activation, torch.zeros(1, 1, 3))[0, :2]
        tensor([[0., 0., 0.],
                [3., 4., 5.]])
    """

    scope: TokenScope
    eot: Tensor | None = None
    n_prefix: int = 1

    def __post_init__(self) -> None:
        if self.scope not in TOKEN_SCOPES:
            raise InputError(f"unknown token scope {self.scope!r}; the scopes are {', '.join(TOKEN_SCOPES)}")

    def check(self, activation: Tensor, hook_name: str) -> None:
        """Raise `InputError` where this scope and the shape of an activation do not go together."""
        if self.scope == "pooled" and activation.dim() != 2:
            raise InputError(
                f"token scope 'pooled' needs an activation without a token axis; {hook_name} gives "
                f"{list(activation.shape)}: use 'cls', 'patches', 'eot' or 'all'"
            )
        if self.scope != "pooled" and activation.dim() < 3:
            raise InputError(
                f"token scope {self.scope!r} needs [batch token d_model]; {hook_name} gives "
                f"{list(activation.shape)}" + (": use 'pooled'" if activation.dim() == 2 else "")
            )
        if self.scope == "cls" and self.n_prefix == 0:
            raise InputError(f"token scope 'cls' needs a class token, and {hook_name} has none: use 'all' or 'pooled'")
        if self.scope == "eot" and (self.eot is None or len(self.eot) != len(activation)):
            found = "none" if self.eot is None else str(len(self.eot))
            raise InputError(
                f"token scope 'eot' needs one end-of-text position per sample: {len(activation)} samples, "
                f"{found} known. Only a text tower has them; pass tokens="
            )

    def take(self, activation: Tensor) -> Tensor:
        """The scope's tokens: `[batch token d]` for scopes with tokens (one for cls, eot), `[batch d]` pooled."""
        if self.scope == "cls":
            return activation[:, :1]
        if self.scope == "patches":
            return activation[:, self.n_prefix :]
        if self.scope == "eot":
            return activation[torch.arange(len(activation), device=activation.device), self._eot()][:, None]
        return activation

    def put(self, activation: Tensor, rows: Tensor) -> Tensor:
        """The activation with the scope's tokens replaced by `rows`, as `take` gave them; a new tensor."""
        if self.scope == "cls":
            return torch.cat([rows, activation[:, 1:]], dim=1)
        if self.scope == "patches":
            return torch.cat([activation[:, : self.n_prefix], rows], dim=1)
        if self.scope == "eot":
            index = (torch.arange(len(activation), device=activation.device), self._eot())
            return activation.index_put(index, rows[:, 0])
        return rows

    def indices(self, n_tokens: int, batch: int) -> Tensor:
        """Position in the sequence of each taken token, `[batch token]`; -1 for pooled vectors."""
        if self.scope == "eot":
            return self._eot().cpu()[:, None]
        patches = range(self.n_prefix, n_tokens)
        spans = {"cls": range(1), "patches": patches, "all": range(n_tokens), "pooled": range(-1, 0)}
        return torch.tensor(list(spans[self.scope])).expand(batch, -1)

    def select(self, samples: Tensor) -> TokenPositions:
        """The positions of some samples, by index `[n]`: for a batch of edited copies."""
        return self if self.eot is None else replace(self, eot=self.eot[samples.to(self.eot.device)])

    def _eot(self) -> Tensor:
        if self.eot is None:
            raise InputError("the end-of-text positions are not known: pass tokens=")
        return self.eot


def default_scope(activation: Tensor) -> TokenScope:
    """SAELens' convention where a file says nothing: every position, or the vector where there is no token axis."""
    return "pooled" if activation.dim() == 2 else "all"


def select_tokens(
    activation: Tensor, scope: TokenScope, tokens: Tensor | None = None, *, n_prefix: int = 1
) -> Tensor:
    """The scope's tokens of an activation as rows `[row d]`, sample by sample.

    Args:
        activation: `[batch token d]`, or `[batch d]` for `"pooled"`.
        scope: which tokens.
        tokens: end-of-text position of each sample `[batch]`, for `"eot"` alone.
        n_prefix: tokens before the patches.
    """
    positions = TokenPositions(scope, tokens, n_prefix)
    positions.check(activation, "this hook")
    return positions.take(activation).reshape(-1, activation.shape[-1])
