"""Attribution patching of SAEs at several hooks from one forward and one backward pass.

With the error term kept an SAE leaves the activations as they are: `x_hat + stop_grad(x - x_hat)` is `x`, and passed
straight through, the gradient further upstream is the native one. So the gradient at each hook is that of the native
model, whichever other SAEs are there, and every result is what `attribution_patching` gives for that SAE alone. What
latents of one SAE do through latents of the next is not taken apart: each SAE explains the whole prediction once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from sae_lens import SAE
from torch import Tensor, nn

from clip_lens_ext.attribution.assemble import from_entries
from clip_lens_ext.attribution.gradients import Place, add_products, no_products
from clip_lens_ext.attribution.reach import check_start, stream_hooks
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, site_at
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


def attribution_patching_several(
    tower: HookedTower,
    x: Tensor,
    saes: Sequence[SAE] | Mapping[str, SAE],
    target: Target,
    *,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    per_token: bool = False,
) -> dict[str, Attribution]:
    """`attribution_patching` of several SAEs at once: the prefix to the first of them, then one forward and backward.

    Args:
        tower: the tower whose prediction is explained.
        x: its input.
        saes: SAEs at different hooks, whose metadata say which; or hook names with an SAE each.
        target: what is explained; several targets cost at most one backward pass each, for all SAEs together.
        token_scope: instead of the SAEs' own.
        error_term: `"kept"`, and nothing else: with an error dropped an SAE would change what the next one reads.
        per_token: one value per (token, latent) instead of the sum over the SAE's tokens.

    Returns:
        Hook name -> `Attribution`, in the order of the forward pass; each equal up to rounding to what
        `attribution_patching` gives for that SAE.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: as in `attribution_patching`; no SAE, two at one hook, a `Site`, or the error term dropped.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, world = cle.planted_clip(), cle.PlantedWorld(0)
        >>> saes = [cle.planted_sae(f"blocks.{layer}.hook_resid_post") for layer in (3, 2)]
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> found = attribution_patching_several(clip.vision, pixels, saes, cle.text_target(clip, world.prompts()[0]))
        >>> list(found)
        ['blocks.2.hook_resid_post', 'blocks.3.hook_resid_post']
    """
    if isinstance(x, Site):
        raise InputError("a Site is of one SAE; pass the tower's input, whose prefix runs once for all SAEs here")
    if error_term not in (None, "kept"):
        raise InputError(
            f"error_term={error_term!r}: several SAEs are explained at once with the error term kept alone, for "
            "dropping one SAE's error changes what the next reads; call attribution_patching for each"
        )
    by_hook = _by_hook(tower, saes)
    starts = {name: (stream_hooks(name) or (name,))[0] for name in by_hook}
    order = tower.split_names()
    first = min(starts.values(), key=order.index)
    begin = tower.run_to(x, first).requires_grad_()
    entering: dict[str, Tensor] = {}
    with torch.enable_grad(), _entering(tower, list(by_hook), entering):
        embedding = tower.run_from(first, begin, tokens=x if tower.cfg.tower == "text" else None)
    places = []
    for name in sorted(by_hook, key=tower.hook_names().index):
        # No tail starts at these sites, so what the block adds the activation to is not needed.
        activation = entering[name].detach()
        site = site_at(tower, x, by_hook[name], name, activation, None, token_scope=token_scope, error_term="kept")
        places.append(Place(site, entering[name], no_products(site, target), whole=True))
    prediction = add_products(places, target, embedding, torch.arange(len(x), device=embedding.device))
    return {
        place.site.hook_name: from_entries(
            place.site, target, place.site.codes.value[:, None] * place.out, prediction, "attribution_patching",
            per_token=per_token, settings={"together_with": [n for n in by_hook if n != place.site.hook_name]},
        )
        for place in places
    }  # fmt: skip


def _by_hook(tower: HookedTower, saes: Sequence[SAE] | Mapping[str, SAE]) -> dict[str, SAE]:
    if isinstance(saes, nn.Module):  # an SAE is iterable: it yields its config too
        raise InputError("saes is a list of SAEs, or a mapping from hook names; for one use attribution_patching")
    if isinstance(saes, Mapping):
        found = {sae_hook_name(tower, sae, name): sae for name, sae in saes.items()}
    else:
        found = {}
        for sae in saes:
            name = sae_hook_name(tower, sae)
            if name in found:
                raise InputError(f"two SAEs are at {name}: one result for each hook; call once for each")
            found[name] = sae
    if not found:
        raise InputError("no SAE given: pass at least one")
    for name in found:
        check_start(tower, name)
    return found


@contextmanager
def _entering(tower: HookedTower, names: list[str], into: dict[str, Tensor]) -> Iterator[None]:
    """Note what enters some hooks, with its graph."""
    with ExitStack() as stack:
        for name in names:

            def note(point: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                into[name] = args[0]

            # First of all, so that it sees what run_to gives.
            stack.callback(tower.hook_dict[name].register_forward_pre_hook(note, prepend=True).remove)
        yield
