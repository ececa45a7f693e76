"""Several methods on one input, held against exact ablation, in one call; the prefix runs once for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.ablation import exact_ablation
from clip_lens_ext.attribution.baselines import random_attribution
from clip_lens_ext.attribution.comparison import Comparison
from clip_lens_ext.attribution.faithfulness import EXACT, RANDOM, faithfulness
from clip_lens_ext.attribution.methods import METHODS, Method, find_method
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def compare(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    *,
    methods: Sequence[str | Method] | Mapping[str, Method] | None = None,
    exact: Attribution | None = None,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    n_steps: int = 64,
    steps: Sequence[int] | None = None,
    k: int = 10,
    batch_size: int | None = None,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Run methods side by side and say which of them predicts exact ablation best.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        methods: names of `METHODS`, functions that are called as `method(tower, site, sae, target)`, or a mapping from
            names of your own to functions. None: all of `METHODS`; those that cannot be had at this hook, or say
            nothing of their own there, are left out, and `Comparison.notes` says which and why. Exact ablation and a
            random order are always there.
        exact: an exact ablation that is there already, possibly of a part of the latents; None: of all active ones.
        n_steps, steps, k, batch_size, n_bootstrap, confidence: as in `faithfulness`.
        seed: of the random order and of the bootstrap.
        progress: show a bar.

    Returns:
        `Comparison`; printing it says what the numbers mean.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: there is no such method, a method that was asked for cannot be had here, or as in `faithfulness`.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(4, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> found = compare(clip.vision, pixels, sae, target, methods=["attribution_patching", "logit_lens"],
        ...                 progress=False)
        >>> found.faithfulness.methods
        ('attribution_patching', 'logit_lens', 'exact_ablation', 'random')
    """
    asked = _asked(methods)
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    if exact is not None:
        asked[EXACT] = lambda *args: exact
    asked.setdefault(EXACT, partial(exact_ablation, batch_size=batch_size, progress=progress))
    asked.setdefault(RANDOM, partial(random_attribution, seed=seed))
    found: dict[str, Attribution | Tensor] = {}
    notes: list[str] = []
    for name, method in asked.items():
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                result = method(tower, site, sae, target)
        except InputError as error:
            if methods is not None or name in (EXACT, RANDOM):
                raise InputError(f"{name}: {error}") from error
            notes.append(f"{name} ({error})")
            continue
        vacuous = (getattr(result, "settings", None) or {}).get("vacuous")
        if vacuous and methods is None:
            notes.append(f"{name} ({vacuous})")
            continue
        for warning in said:
            warnings.warn(str(warning.message), warning.category, stacklevel=3)
        found[name] = result
    checked = faithfulness(
        tower, site, sae, target, found, n_steps=n_steps, steps=steps, k=k, batch_size=batch_size,
        n_bootstrap=n_bootstrap, confidence=confidence, seed=seed, progress=progress,
    )  # fmt: skip
    attributions = {name: result for name, result in found.items() if isinstance(result, Attribution)}
    scores = {name: result for name, result in found.items() if isinstance(result, Tensor)}
    return Comparison(attributions, scores, checked, tuple(notes))


def _asked(methods: Sequence[str | Method] | Mapping[str, Method] | None) -> dict[str, Method]:
    """The methods by name; exact ablation and the random order are not among the defaults, they are added anyway."""
    if methods is None:
        return {name: method for name, method in METHODS.items() if name not in (EXACT, RANDOM)}
    if isinstance(methods, Mapping):
        return dict(methods)
    if isinstance(methods, str):
        methods = [methods]
    asked: dict[str, Method] = {}
    for method in methods:
        name = method if isinstance(method, str) else getattr(method, "__name__", "")
        if not name:
            raise InputError(f"{method!r} has no name: pass a mapping from names of your own to methods")
        if name in asked:
            raise InputError(f"{name} is asked for twice: pass a mapping from names of your own to methods")
        asked[name] = find_method(method) if isinstance(method, str) else method
    return asked
