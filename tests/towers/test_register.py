"""A family of one's own: read, held against its own forward when it registers, and refused where it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles.models import randomise_
from torch import Tensor, nn

from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.towers import HookedTower, TowerConfig, families, register_family, unregister_family
from clip_lens_ext.towers.families.attentions import MLPReading, MultiheadAttentionReading
from clip_lens_ext.towers.families.defaults import BlockDefaults, ReadingDefaults
from clip_lens_ext.towers.families.inputs import check_pictures


class ToyMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.bend, self.down = nn.Linear(width, 3 * width), nn.SiLU(), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.bend(self.up(x)))


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look = nn.MultiheadAttention(width, 2, batch_first=True)
        self.think = ToyMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = x + 0.5 * self.look(y, y, y, need_weights=False)[0]
        return x + self.think(self.b(x))


class Toy(nn.Module):
    """Rows of a picture are its tokens; the mean of them is its embedding."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.rows = nn.Linear(3 * 8, width)
        self.places = nn.Parameter(torch.zeros(8, width))
        self.layers = nn.ModuleList(ToyBlock(width) for _ in range(2))
        self.end = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rows(x.transpose(1, 2).flatten(2)) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.end(x).mean(dim=1)


class ToyBlockReading(BlockDefaults):
    factor = 0.5

    def __init__(self, native: Any) -> None:
        attention = MultiheadAttentionReading(native.look)
        super().__init__(native, attention, MLPReading(native.think, "up", "bend", "down"))

    @property
    def ln1(self) -> nn.LayerNorm:
        return self.native.a

    @property
    def ln2(self) -> nn.LayerNorm:
        return self.native.b

    def run(self, x: Tensor, mask: Any) -> Tensor:
        return self.native(x)

    def scale_attn_out(self, x: Tensor) -> Tensor:
        return self.factor * x


class ToyReading(ReadingDefaults):
    block: type[ToyBlockReading] = ToyBlockReading

    def __init__(self, native: Any) -> None:
        self.native = native
        self.blocks = [self.block(layer) for layer in native.layers]

    @property
    def ln_final(self) -> nn.LayerNorm:
        return self.native.end

    @property
    def device(self) -> torch.device:
        return self.native.places.device

    @property
    def dtype(self) -> torch.dtype:
        return self.native.places.dtype

    def config(self, model_name: str) -> TowerConfig:
        return TowerConfig(
            tower="vision", model_name=model_name, family="toy", n_layers=2, n_heads=2, d_model=12, d_head=6, d_mlp=36,
            d_embed=12, n_ctx=8, pooling="mean", act_fn="silu", eps=1e-5, device=self.device, dtype=self.dtype,
        )  # fmt: skip

    def check_input(self, x: Tensor) -> None:
        check_pictures(x, size=(8, 8), dtype=self.dtype, device=self.device)

    def embed(self, x: Tensor) -> Tensor:
        return self.native.rows(x.transpose(1, 2).flatten(2))

    def positional_embedding(self, embedded: Tensor) -> Tensor:
        return self.native.places

    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return x.mean(dim=1)

    def pooled_token(self) -> None:
        return None


def matches(native: nn.Module) -> bool:
    return isinstance(native, Toy)


@pytest.fixture
def toy() -> Iterator[nn.Module]:
    before = families()
    yield randomise_(Toy()).eval()
    for name in families():
        if name not in before:
            unregister_family(name)


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_family_of_one_s_own(toy: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="how to add one"):
        HookedTower(toy)
    register_family("toy", matches, ToyReading, example=toy, inputs=pictures())
    assert families()[0] == "toy"
    other = randomise_(Toy(), seed=5).eval()
    tower = HookedTower(other)
    assert torch.equal(tower(pictures(3)), other(pictures(3)))
    _, cache = tower.run_with_cache(pictures(3))
    heads = cache["blocks.1.attn.hook_result"].sum(dim=2) + tower.blocks[1].attn.b_O  # type: ignore[union-attr]
    torch.testing.assert_close(0.5 * heads, cache["blocks.1.hook_attn_out"])
    with pytest.raises(InputError, match="called 'toy' already"):
        register_family("toy", matches, ToyReading, example=toy, inputs=pictures())


class WrongScale(ToyBlockReading):
    factor = 1.0


class WrongBlock(ToyReading):
    block = WrongScale


class StraightMLP(ToyBlockReading):
    def __init__(self, native: Any) -> None:
        super().__init__(native)
        self.mlp = MLPReading(native.think, "up", "up", "down")
        self.mlp.act = lambda x: x  # type: ignore[method-assign]


class WrongMLP(ToyReading):
    block = StraightMLP


class WrongEmbedding(ToyReading):
    def embed(self, x: Tensor) -> Tensor:
        return super().embed(x) * 1.0001


class WrongPooling(ToyReading):
    def pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return x[:, 0]


class Raises(ToyReading):
    def embed(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("by zero")


class Incomplete:
    def __init__(self, native: Any) -> None:
        self.native = native


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (WrongBlock, r"native forward from blocks\.0\.hook_resid_mid on"),
        (WrongMLP, "other numbers once its blocks are taken apart"),
        (WrongEmbedding, "bit for bit"),
        (WrongPooling, "bit for bit"),
        (Raises, "does not run on its example: by zero"),
        (Incomplete, r"lacks .*blocks, .*ln_final"),
    ],
)
def test_a_wrong_reading_does_not_register(toy: nn.Module, read: Any, message: str) -> None:
    before = families()
    with pytest.raises(InputError, match=message):
        register_family("toy", matches, read, example=toy, inputs=pictures())
    assert families() == before
    with pytest.raises(UnsupportedModelError):
        HookedTower(toy)


def test_an_example_that_does_not_match(toy: nn.Module) -> None:
    with pytest.raises(InputError, match="does not know its own example"):
        register_family("toy", lambda native: False, ToyReading, example=toy, inputs=pictures())
    with pytest.raises(InputError, match="no registered tower family is called 'open_clip'"):
        unregister_family("open_clip")
