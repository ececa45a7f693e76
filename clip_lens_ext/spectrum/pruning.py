"""A CLIP without its noise, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope
from clip_lens_ext.towers.tower import HookedTower

TowerName = Literal["vision", "text"]
EMBEDDING = "hook_embedding"


@contextmanager
def prune(
    clip: HookedCLIP,
    split: NoiseSplit,
    *,
    hook_names: str | Sequence[str] | None = None,
    towers: Sequence[TowerName] | None = None,
    token_scope: TokenScope | None = None,
) -> Iterator[HookedCLIP]:
    """The model with the noise projected out, while the context lasts.

    At the embedding `e' = (I - U U') e`, the same in both towers. At a hook of the residual stream
    `x' = x - U U'(x - m)`, with `m` the mean of the rows that the split was made of, which later layers expect.
    Pruning twice is pruning once.

    Args:
        clip: the model; its weights are not touched, and its hooks are those of before when the context ends, also by
            an exception.
        split: what is noise.
        hook_names: where; None: the hook of the split, or the embedding where it has none.
        towers: `"vision"`, `"text"` or both; None: both at the embedding, and at another hook the tower of the split.
        token_scope: which tokens of a residual stream; None: those of the split.

    Yields:
        `clip`.

    Raises:
        HookNameError: a tower has no such hook.
        InputError: the split is of another width, all of it is noise, there is no such tower, or it is not known which
            tower is meant.

    Example:
        >>> import torch
        >>> import clip_lens_ext as cle
        >>> clip, pictures = cle.planted_clip(), torch.randn(300, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> with torch.no_grad():
        ...     embeddings = clip.embed_images(pictures)
        ...     split = cle.split_noise(embeddings, cut=8)
        ...     with cle.prune(clip, split) as pruned:
        ...         found = pruned.embed_images(pictures)
        >>> bool((found @ split.basis.float()).abs().max() < 1e-5), torch.equal(found, embeddings)
        (True, False)
    """
    check_split(split)
    hooks: dict[str, list[tuple[str | Callable[..., Any], Callable[..., Any]]]] = {}
    for name in _names(split, hook_names):
        for which in _towers(clip, split, name, towers):
            tower = tower_of(clip, which)
            tower.check_hook_name(name)
            _check_width(tower, name, split)
            hooks.setdefault(which, []).append((name, _projection(tower, name, split, which, token_scope)))
    with ExitStack() as live:
        for which, given in hooks.items():
            live.enter_context(tower_of(clip, which).hooks(fwd_hooks=given))
        yield clip


def tower_of(clip: HookedCLIP, which: str) -> HookedTower:
    """The tower of that name.

    Raises:
        InputError: there is none.
    """
    tower = {"vision": clip.vision, "text": clip.text}.get(which)
    if tower is None:
        raise InputError(f"{clip.model_name} has no tower {which!r}")
    return tower


def check_split(split: NoiseSplit) -> None:
    """Raise `InputError` where pruning would leave nothing."""
    if not isinstance(split, NoiseSplit):
        raise InputError(f"a NoiseSplit is needed, from split_noise; got {type(split).__name__}")
    if split.rank == split.d:
        raise InputError(f"all {split.d} dimensions are noise by this split: pruning would leave nothing")


def _names(split: NoiseSplit, given: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (split.hook_name or EMBEDDING,) if given is None else (given,) if isinstance(given, str) else tuple(given)
    if not names:
        raise InputError("no hook named; None means the hook of the split")
    return tuple(dict.fromkeys(names))


def _towers(clip: HookedCLIP, split: NoiseSplit, name: str, given: Sequence[TowerName] | None) -> tuple[str, ...]:
    if given is not None:
        if isinstance(given, str) or not given:
            raise InputError(f"towers is a list of 'vision' and 'text', got {given!r}")
        return tuple(dict.fromkeys(given))
    if name not in clip.vision.hook_dict and (clip.text is None or name not in clip.text.hook_dict):
        clip.vision.check_hook_name(name)  # a wrong name, and no question of the tower
    if name == EMBEDDING:
        return ("vision",) if clip.text is None else ("vision", "text")
    if split.tower is None:
        raise InputError(
            f"the residual streams of two towers are two spaces, and it is not known of which this split is: pass "
            f"towers=['vision'] or ['text'] to prune at {name}"
        )
    return (split.tower,)


def _check_width(tower: HookedTower, name: str, split: NoiseSplit) -> None:
    width = tower.hook_width(name)
    if width != split.d:
        raise InputError(f"the split is of {split.d} dimensions, and {name} of the {tower.cfg.tower} tower has {width}")


def _projection(tower: HookedTower, name: str, split: NoiseSplit, which: str, scope: TokenScope | None) -> Any:
    """The hook that projects."""
    wanted = scope or cast("TokenScope | None", split.token_scope)
    mean = None if name == EMBEDDING else _mean(split, which)

    def project(activation: Tensor, hook: Any) -> Tensor:
        natural = default_scope(activation)
        # A scope of tokens says nothing about a vector without a token axis, nor the other way round.
        chosen = natural if natural == "pooled" or wanted in (None, "pooled") else wanted
        # As an SAE on the end-of-text token does: the prompts are those of the pass that is under way.
        eot = tower.eot_positions(tower._tokens) if chosen == "eot" else None
        positions = TokenPositions(cast(TokenScope, chosen), eot, tower.n_prefix)
        positions.check(activation, name)
        return positions.put(activation, split.remove(positions.take(activation), mean=mean))

    return project


def _mean(split: NoiseSplit, which: str) -> Tensor:
    """The mean row of the tower's own modality."""
    own = {"vision": "image", "text": "text"}[which]
    return split.means[split.modalities.index(own) if own in split.modalities else 0]
