"""Does an order of latents tell which of them the prediction rests on? Take them away in that order, and look.

**Deletion curve**: the prediction after the top 0, 1, ..., n_steps latents of a sample were set to zero, in the order
of a method, greatest first. The faster it falls the better the order; the area is the mean over the steps, lower is
better. **Insertion curve**: all active latents at zero, then the top ones put back; higher is better. **Rank
correlation** (Spearman's) and **overlap** of the top `k`: with exact ablation, over a sample's active latents. Exact
ablation's own order and a random one are always there as the two ends.

Reference: deletion follows the released evaluation of Dreyer et al. 2505.20229, with the error term kept by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.ablation import exact_ablation
from clip_lens_ext.attribution.baselines import random_attribution
from clip_lens_ext.attribution.bound import tail_batch
from clip_lens_ext.attribution.curves import run_curves
from clip_lens_ext.attribution.faithfulness_result import Faithfulness
from clip_lens_ext.attribution.orders import Order, check_coverage, read_order
from clip_lens_ext.attribution.ranks import spearman_columns, top_overlap
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower

EXACT, RANDOM = "exact_ablation", "random"


@torch.no_grad()
def faithfulness(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    attributions: Attribution | Sequence[Attribution] | Mapping[str, Attribution | Tensor],
    *,
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
) -> Faithfulness:
    """Hold methods against deletion, insertion and exact ablation, on the tail alone: the prefix runs once.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        attributions: results on the same input and SAE, one or several, or a mapping from a name to each. A mapping may
            also hold scores `[target d_sae]` of every latent of the SAE, active or not (`logit_lens_scores`): their
            order is over all latents, and a step that takes an inactive one changes nothing, as in the released
            evaluation. A result that has values for inactive latents is ranked with them, likewise. An exact ablation
            of a part of the active latents limits rank correlation and overlap to that part, for every method. A result
            that says `settings["signed"] = False` is ranked against the magnitude of exact ablation.
        n_steps: latents that are deleted or inserted, one after the other, with a look after each.
        steps: instead: after how many latents to look, ascending numbers from 1 on. Where the tail is long a few of
            them say as much in a fraction of the time; areas are means over the steps that were looked at.
        k: how many of the greatest latents the overlap compares.
        batch_size: edited activations that run through the tail at a time; None: what 512 MB hold, by estimate.
        n_bootstrap, confidence: draws over the samples for each interval, and its confidence.
        seed: of the random order and of the bootstrap.
        progress: show a bar.

    Returns:
        `Faithfulness`, with the rows `exact_ablation` and `random` added where they are not among the methods.

    Raises:
        InputError: a result is of another input, SAE, target or error term, per token, not finite, or lacks latents.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> patching = cle.attribution_patching(clip.vision, pixels, sae, target)
        >>> faithfulness(clip.vision, pixels, sae, target, patching, n_steps=4, progress=False).methods
        ('attribution_patching', 'exact_ablation', 'random')
    """
    _check_numbers(n_steps=n_steps, k=k, n_bootstrap=n_bootstrap, batch_size=1 if batch_size is None else batch_size)
    if not 0 < confidence < 1:
        raise InputError(f"confidence lies between 0 and 1, got {confidence}")
    looks = (0, *(range(1, n_steps + 1) if steps is None else _checked_steps(steps)))
    n_steps = looks[-1]
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    named = _by_name(attributions)
    orders = {name: read_order(name, given, site, target, n_steps) for name, given in named.items()}
    exact_name = _named_as(EXACT, named)
    for name, given in named.items():
        if isinstance(given, Attribution):
            check_coverage(name, orders[name], len(given), is_reference=name == exact_name)
    if exact_name is None:
        exact_name = EXACT
        exact = exact_ablation(tower, site, sae, target, batch_size=batch_size, progress=progress)
        orders[EXACT] = read_order(EXACT, exact, site, target, n_steps)
    if _named_as(RANDOM, named) is None:
        chance = random_attribution(tower, site, sae, target, seed=seed)
        orders[RANDOM] = read_order(RANDOM, chance, site, target, n_steps)
    at_once = tail_batch(site, len(target), gradient=False, batch_size=batch_size)
    pairs = torch.stack([order.pairs for order in orders.values()])
    deletion, insertion = run_curves(site, target, pairs, looks, batch_size=at_once, progress=progress)
    n_active = torch.bincount(site.codes.pairs()[0], minlength=site.codes.n_sample).cpu()
    correlation, overlap, n_compared = _agreement(orders, exact_name, n_active, k)
    return Faithfulness(
        methods=tuple(orders), unsigned=tuple(name for name, order in orders.items() if not order.signed),
        steps=looks, deletion=deletion, insertion=insertion, rank_correlation=correlation, overlap=overlap,
        n_active=n_active, n_compared=n_compared, labels=target.labels, unit=target.unit, hook_name=site.hook_name,
        token_scope=site.positions.scope, error_term=site.error_term, k=k, seed=seed, n_bootstrap=n_bootstrap,
        confidence=confidence, provenance=site.provenance(target),
    )  # fmt: skip


def _check_numbers(**given: int) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1, got {value!r}")


def _checked_steps(steps: Sequence[int]) -> list[int]:
    found = list(steps)
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in found)
    if not found or not whole or found[0] < 1 or found != sorted(set(found)):
        raise InputError(f"steps are ascending integers from 1 on, at least one, got {found}")
    return found


def _by_name(
    attributions: Attribution | Sequence[Attribution] | Mapping[str, Attribution | Tensor],
) -> dict[str, Attribution | Tensor]:
    if isinstance(attributions, Mapping):
        return dict(attributions)
    several = [attributions] if isinstance(attributions, Attribution) else list(attributions)
    if any(isinstance(given, Tensor) for given in several):
        raise InputError("scores of all latents have no name of their own: pass a mapping from names to results")
    names = [result.method for result in several]
    if len(set(names)) < len(names):
        raise InputError(
            f"two results have the same method ({', '.join(names)}): pass a mapping from names of your own"
        )
    return dict(zip(names, several, strict=True))


def _named_as(method: str, named: Mapping[str, Attribution | Tensor]) -> str | None:
    """The name under which a method's result was given: the method says what it is, and its own name is no other's."""
    found = [name for name, given in named.items() if isinstance(given, Attribution) and given.method == method]
    if method in named and method not in found:
        raise InputError(f"the name {method!r} is that of the method: give the result another one")
    if len(found) > 1:
        raise InputError(f"{' and '.join(found)} are both of the method {method!r}, of which there can be one")
    return found[0] if found else None


def _agreement(orders: Mapping[str, Order], exact_name: str, n_active: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank correlation and overlap `[method sample target]` with exact ablation, and the latents that it covers."""
    exact = orders[exact_name].values.cpu()
    compared = ~exact.isnan().any(dim=1)
    n_compared = torch.stack([part.sum() for part in compared.split(n_active.tolist())])
    size = n_compared.tolist()
    reference = exact[compared].split(size)
    correlation, overlap = [], []
    for order in orders.values():
        own = order.values.cpu()[compared].split(size)
        both = [(a, b if order.signed else b.abs()) for a, b in zip(own, reference, strict=True)]
        correlation.append(torch.stack([spearman_columns(a, b) for a, b in both]))
        overlap.append(torch.stack([top_overlap(a, b, k) for a, b in both]))
    return torch.stack(correlation), torch.stack(overlap), n_compared
