"""A Sparse CLIP of the planted world, its heads trained for a few seconds, for tests of what is done with one."""

from __future__ import annotations

import pytest
import torch

import clip_lens_ext as cle
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.sparse_clip import add_sparse_heads
from clip_lens_ext.sparse_clip.contrastive import contrastive_step
from clip_lens_ext.towers.clip import HookedCLIP

N_PAIRS, N_STEPS, BATCH, D_CODE, LARGEST_SCALE = 1500, 150, 250, 512, 30.0


@pytest.fixture(scope="session")
def planted_sparse() -> HookedCLIP:
    """The planted CLIP with ReLU heads of 512 features; not to be changed by a test."""
    torch.manual_seed(0)
    dense = cle.planted_clip()
    batch = PlantedWorld(0).sample(N_PAIRS, seed=0)
    with torch.no_grad():
        images = torch.cat([dense.embed_images(part) for part in normalise(batch.images).split(250)])
        texts = dense.embed_texts(batch.captions)
    sparse = add_sparse_heads(dense, D_CODE, logit_scale=10.0)
    native = sparse.native
    heads = [native.image_head, native.text_head]
    trained = [*(weight for head in heads for weight in head.parameters()), native.logit_scale]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        rows = torch.randperm(N_PAIRS, generator=generator)[:BATCH]
        optimizer.zero_grad()
        contrastive_step(lambda part: (heads[0](images[part]), heads[1](texts[part])), [rows], native.logit_scale)
        optimizer.step()
        with torch.no_grad():
            native.logit_scale.clamp_(max=torch.tensor(LARGEST_SCALE).log())
    return sparse.eval()
