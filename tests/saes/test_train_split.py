"""What a training run holds out: a partition that the seed alone decides, and that leaves no trace in the weights."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from tiny_training import HOOK, SMALL, make_tower, pictures, same_weights

from clip_lens_ext.data import image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.activations import ActivationRows
from clip_lens_ext.saes.shuffled_rows import split_samples
from clip_lens_ext.saes.train import train_sae
from clip_lens_ext.towers.tower import HookedTower

pytestmark = pytest.mark.filterwarnings("ignore:the SAE at .* explains")  # nothing here is trained for long


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


def test_the_split_is_a_partition_that_the_seed_alone_decides() -> None:
    for n, share, at_least, n_held in [
        (10, 0.1, 1, 1),
        (10, 0.01, 1, 1),
        (10, 0.01, 2, 2),
        (2, 0.5, 1, 1),
        (99, 0.3, 1, 30),
    ]:
        train, held = split_samples(n, share, seed=1, at_least=at_least)
        assert sorted(train + held) == list(range(n))
        assert len(held) == n_held
        assert (train, held) == split_samples(n, share, seed=1, at_least=at_least)
    assert split_samples(99, 0.3, seed=1) != split_samples(99, 0.3, seed=2)
    for n, at_least in [(1, 1), (2, 2), (0, 1)]:
        with pytest.raises(InputError, match="too few"):
            split_samples(n, 0.5, seed=0, at_least=at_least)


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_held_out_images_leave_no_trace_in_the_weights(tower: HookedTower, memory_limit: int) -> None:
    train, held = split_samples(20, 0.1, seed=0)
    images = pictures()
    original = train_sae(tower, images, memory_limit=memory_limit, **SMALL)
    others = images.clone()
    others[held] = 50 * pictures(seed=9)[held]
    assert same_weights(original, train_sae(tower, others, memory_limit=memory_limit, **SMALL))
    others[train[0]] *= 1.1
    assert not same_weights(original, train_sae(tower, others, memory_limit=memory_limit, **SMALL))


@pytest.mark.parametrize(("scope", "n_held"), [("cls", 2), ("patches", 1), ("all", 1)])
def test_a_scope_of_one_token_holds_out_two_images(tower: HookedTower, scope: Any, n_held: int) -> None:
    metadata = train_sae(tower, pictures(8), token_scope=scope, **{**SMALL, "n_training_tokens": 32}).cfg.metadata
    assert (metadata.token_scope, metadata.n_held_out_images) == (scope, n_held)
    assert metadata.explained_variance is not None


def test_the_pooled_and_the_embedding_hook(tower: HookedTower) -> None:
    for hook, width in (("hook_pooled", 16), ("hook_embedding", 12)):
        sae = train_sae(tower, pictures(), **{**SMALL, "hook_name": hook})
        assert (sae.cfg.d_in, sae.cfg.metadata.token_scope) == (width, "pooled")


def test_a_text_tower_trains_on_its_end_of_text_tokens() -> None:
    torch.manual_seed(0)
    native = open_clip.model.CLIP(
        embed_dim=12,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 64, "layers": 1},
        text_cfg={"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    ).eval()
    tower = HookedTower(native, model_name="tiny")
    ids = torch.randint(1, 49, (20, 6))
    ids[torch.arange(20), torch.randint(1, 6, (20,))] = 49
    sae = train_sae(tower, ids, token_scope="eot", **SMALL)
    assert (sae.cfg.metadata.tower, sae.cfg.metadata.token_scope) == ("text", "eot")
    rows = ActivationRows(
        tower, image_batches(ids), hook_names=[HOOK], token_scope="eot", memory_limit=1 << 20, progress=False
    )
    expected = tower.run_to(ids, HOOK)[torch.arange(20), ids.argmax(1)]
    torch.testing.assert_close(rows.take(range(20))[HOOK][:, 0], expected)
