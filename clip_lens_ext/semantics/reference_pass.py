"""References added up batch by batch: the top samples and the activity of every latent, and which samples were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from clip_lens_ext.semantics.activity import ActivityCount
from clip_lens_ext.semantics.peaks import Peaks, TopSamples


class ReferenceBatch(NamedTuple):
    """What a batch adds: its peaks, and its samples' names and positions in the data."""

    found: Peaks
    names: Sequence[str]
    indexes: Sequence[int]
    hook_name: str
    token_scope: str


class ReferenceAccumulator:
    """The top `k` samples and the activity of every latent so far, `[d_sae k]` and `[d_sae]`.

    Attributes:
        top, count: what is kept of the activations.
        names, indexes: of every sample that was read.
        hook_name, token_scope: where the SAE reads; empty before the first batch.
    """

    def __init__(self, d_sae: int, k: int) -> None:
        self.top, self.count = TopSamples(d_sae, k), ActivityCount(d_sae)
        self.names: list[str] = []
        self.indexes: list[int] = []
        self.hook_name = self.token_scope = ""

    def update(self, batch: ReferenceBatch, /) -> None:
        """Take in a batch."""
        self.top.update(batch.found, first=len(self.names))
        self.count.update(batch.found.latent, batch.found.activation, n_samples=len(batch.names))
        self.hook_name, self.token_scope = batch.hook_name, batch.token_scope
        self.names += batch.names
        self.indexes += batch.indexes

    def merge(self, other: ReferenceAccumulator, /) -> ReferenceAccumulator:
        """Take in one that went over later samples of the same data, and return itself."""
        self.top.merge(other.top, first=len(self.names))
        self.count.merge(other.count)
        self.hook_name, self.token_scope = other.hook_name or self.hook_name, other.token_scope or self.token_scope
        self.names += other.names
        self.indexes += other.indexes
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return {
            **{f"top.{name}": value for name, value in self.top.state_dict().items()},
            **{f"count.{name}": value for name, value in self.count.state_dict().items()},
            "names": self.names, "indexes": torch.tensor(self.indexes, dtype=torch.int64),
            "hook_name": self.hook_name, "token_scope": self.token_scope,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what another one of the same sizes was."""
        for part, own in (("top.", self.top), ("count.", self.count)):
            own.load_state_dict({name[len(part) :]: value for name, value in state.items() if name.startswith(part)})
        self.names, self.indexes = list(state["names"]), state["indexes"].tolist()
        self.hook_name, self.token_scope = state["hook_name"], state["token_scope"]

    def result(self) -> ReferenceAccumulator:
        """Itself: `collect_references` makes `References` of it, with what the pass says of the data."""
        return self
