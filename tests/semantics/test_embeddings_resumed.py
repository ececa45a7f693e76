"""Embedding references: a pass that was interrupted ends as one that was not, and computes nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.resumed import Stopping
from tiny_clips import tiny_clip
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics import ReferenceEmbeddings, References, collect_references, embed_references
from clip_lens_ext.semantics.embedding_pass import EmbeddedBatch, EmbeddingAccumulator
from clip_lens_ext.towers import HookedCLIP


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, pixels: Tensor, at: int | None) -> None:
        self.pictures = Stopping(pixels, at)

    def __iter__(self) -> Any:
        for index in range(len(self.pictures)):
            yield self.pictures[index]


@pytest.fixture(scope="module")
def found(clip: HookedCLIP, pixels: Tensor, sae: Any) -> References:
    return collect_references(clip.vision, pixels[:9], sae, k=2, progress=False)


def embed(references: References, data: Any, judge: HookedCLIP, **settings: Any) -> ReferenceEmbeddings:
    return embed_references(references, data, judge, **{"batch_size": 2, "progress": False, **settings})


@pytest.mark.parametrize("kind", [Stopping, Stream])
def test_resumed_anywhere(clip: HookedCLIP, pixels: Tensor, found: References, tmp_path: Path, kind: Any) -> None:
    data = pixels[:9]
    whole = embed(found, data, clip)
    read: list[int] = []
    stopped = 0
    for at in found.indexes[whole.sample].tolist()[::2]:
        path = tmp_path / f"{at}"
        with pytest.raises(KeyboardInterrupt):
            embed(found, kind(data, at), clip, checkpoint=path, checkpoint_every=1)
        with clip.vision.hooks(fwd_hooks=[("hook_embed", lambda value, hook: read.append(len(value)))]):
            again = embed(found, kind(data, None), clip, checkpoint=path, checkpoint_every=1)
        for name in ("vectors", "sample", "row", "activation", "lowest"):
            assert torch.equal(getattr(again, name), getattr(whole, name)), name
        assert again.provenance == whole.provenance
        stopped += len(whole.sample) - sum(read)
        read.clear()
    assert stopped > 0  # what was there is not computed again
    with clip.vision.hooks(fwd_hooks=[("hook_embed", lambda value, hook: read.append(len(value)))]):
        assert torch.equal(embed(found, kind(data, None), clip, checkpoint=path).vectors, whole.vectors)
    assert read == []


def test_a_checkpoint_of_another_pass(clip: HookedCLIP, pixels: Tensor, found: References, tmp_path: Path) -> None:
    path = tmp_path / "c"
    embed(found, pixels[:9], clip, checkpoint=path)
    with pytest.raises(InputError, match="batch_size was 2 and is now 3"):
        embed(found, pixels[:9], clip, checkpoint=path, batch_size=3)
    with pytest.raises(InputError, match="samples was"):
        embed(found, pixels[:9], clip, checkpoint=path, k=1)
    with pytest.raises(InputError, match="vision_sha256 was"):
        embed(found, pixels[:9], tiny_clip(seed=4), checkpoint=path)
    with pytest.raises(InputError, match="over other data"):
        embed(found, pixels[:9] + 1, clip, checkpoint=path)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="no checkpoint"):
        embed(found, pixels[:9], clip, checkpoint=path)


def test_accumulators_merge_in_any_order() -> None:
    parts = [EmbeddingAccumulator(4) for _ in range(3)]
    vectors = torch.arange(8.0).reshape(4, 2)
    for part, rows in zip(parts, ([2], [0, 3], [1]), strict=True):
        part.update(EmbeddedBatch(torch.tensor(rows), vectors[rows], "vision"))
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        whole = EmbeddingAccumulator(4)
        for number in order:
            whole.merge(parts[number])
        assert torch.equal(whole.vectors, vectors)
        assert bool(whole.done.all())
        assert whole.tower == "vision"
    empty = EmbeddingAccumulator(4)
    empty.load_state_dict(EmbeddingAccumulator(4).state_dict())
    assert empty.vectors is None
