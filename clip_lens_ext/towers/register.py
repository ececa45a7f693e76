"""A tower family of one's own, checked when it is registered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clip_lens_ext.errors import ClipLensError, InputError
from clip_lens_ext.towers.families.reading import Reading, TowerReading
from clip_lens_ext.towers.families.registry import add_family, remove_family
from clip_lens_ext.towers.tower import HookedTower


def register_family(
    name: str,
    matches: Callable[[nn.Module], bool],
    read: Callable[[nn.Module], TowerReading],
    *,
    example: nn.Module,
    inputs: Tensor,
) -> None:
    """Make a tower family of your own known, after it was held against the model's own forward.

    Families that were registered later are asked first.

    Args:
        name: what to call it.
        matches: whether the family reads a module.
        read: a module by its parts: an object with the attributes and methods of `families.Reading`.
        example: a small model of the family in evaluation mode, with random weights that are not all zero or one.
        inputs: two samples or more that it takes.

    Raises:
        InputError: the name is taken; `matches` does not know the example; a part of the reading is missing; the
            tower is not bit-equal to `reading.native_forward`; the tail of a prefix is not the tower; the parts of a
            block that are called one by one do not give the block.
    """
    if not matches(example):
        raise InputError(f"matches() of the tower family {name!r} does not know its own example")
    reading = read(example)
    if not isinstance(reading, Reading):
        wanted = {part for part in dir(Reading) if not part.startswith("_")}
        missing = sorted(part for part in wanted if not hasattr(reading, part))
        raise InputError(f"the reading of the tower family {name!r} lacks {', '.join(missing)}")
    add_family(name, matches, read)
    try:
        _try(name, HookedTower(example), inputs)
    except Exception as error:
        remove_family(name)
        if isinstance(error, ClipLensError):
            raise
        raise InputError(f"the tower family {name!r} does not run on its example: {error}") from error


def unregister_family(name: str) -> None:
    """Forget a family of your own. Towers that were made with it go on working.

    Raises:
        InputError: no family of yours has this name.
    """
    remove_family(name)


@torch.no_grad()
def _try(name: str, tower: HookedTower, inputs: Tensor) -> None:
    expected = tower.reading.native_forward(inputs)
    found = tower(inputs)
    if not torch.equal(found, expected):
        raise InputError(f"the tower family {name!r} does not give the native forward, bit for bit, without hooks")
    for split in tower.split_names():
        if not torch.equal(tower.run_from(split, tower.run_to(inputs, split)), expected):
            raise InputError(f"the tower family {name!r} does not give the native forward from {split} on")
    with tower.hooks([(lambda hook: True, lambda activation, hook: activation)]):
        listened = tower(inputs)
    # Other kernels in another order: a few units in the last place of the greatest entry.
    tolerance = 1e4 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if not torch.allclose(listened, expected, rtol=0, atol=tolerance):
        raise InputError(f"the tower family {name!r} gives other numbers once its blocks are taken apart")
