"""In which order a method would take the latents of each sample, and its values at the active ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import Site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError


@dataclass(frozen=True, eq=False)
class Order:
    """What one method says of the latents of a site.

    Attributes:
        values: of the site's active (sample, latent) pairs, `[pair target]`; NaN where the method left one out.
        pairs: the number of the pair that is taken at each step, greatest first, `[sample target step]`; -1 for a
            latent that is not active, and after the last one.
        signed: False where the values say how much a latent matters and not which way.
    """

    values: Tensor
    pairs: Tensor
    signed: bool = True


def read_order(name: str, given: Attribution | Tensor, site: Site, target: Target, n_steps: int) -> Order:
    """The order of an attribution over its own latents, or of scores `[target d_sae]` over all latents of the SAE.

    Raises:
        InputError: it was computed elsewhere, it is per token, NaN or infinite, or of the wrong shape.
    """
    if isinstance(given, Tensor):
        return _of_scores(name, given, site, target, n_steps)
    _check_same(name, given, site, target)
    keys, own = _site_keys(site), given.sample * site.codes.d_sae + given.latent
    if (own.diff() <= 0).any():
        raise InputError(f"{name}: its pairs must be sorted by sample, then latent, each there once")
    value, place = given.value.to(keys.device), _places(keys, own.to(keys.device))
    _check_finite(name, value)
    values = value.new_full((len(keys), len(target)), torch.nan)
    values[place[place >= 0]] = value[place >= 0]
    bounds = torch.searchsorted(given.sample.contiguous(), torch.arange(site.codes.n_sample + 1, device=own.device))
    pairs = torch.full((site.codes.n_sample, len(target), n_steps), -1, device=keys.device)
    for sample in range(site.codes.n_sample):
        part = slice(int(bounds[sample]), int(bounds[sample + 1]))
        order = value[part].argsort(dim=0, descending=True, stable=True)[:n_steps]
        pairs[sample, :, : len(order)] = place[part][order].T
    return Order(values, pairs, bool((given.settings or {}).get("signed", True)))


def _of_scores(name: str, scores: Tensor, site: Site, target: Target, n_steps: int) -> Order:
    shape = (len(target), site.codes.d_sae)
    if scores.shape != shape:
        raise InputError(f"{name}: scores of latents are [target d_sae], here {list(shape)}; got {list(scores.shape)}")
    sample, latent, _ = site.codes.pairs()
    scores = scores.to(sample.device)
    _check_finite(name, scores)
    top = scores.argsort(dim=1, descending=True, stable=True)[:, :n_steps]
    pairs = torch.full((site.codes.n_sample, len(target), n_steps), -1, device=sample.device)
    each = torch.arange(site.codes.n_sample, device=sample.device)[:, None, None] * site.codes.d_sae
    pairs[..., : top.shape[1]] = _places(_site_keys(site), each + top)
    return Order(scores.T[latent], pairs)


def _site_keys(site: Site) -> Tensor:
    sample, latent, _ = site.codes.pairs()
    return sample * site.codes.d_sae + latent


def _places(keys: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted key stands among the sorted ones; -1 where it does not."""
    place = torch.searchsorted(keys, wanted.contiguous()).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == wanted, place, -1)


def _check_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values, which have no place in an order")


def check_coverage(name: str, order: Order, n_given: int, *, is_reference: bool) -> None:
    """Raise `InputError` where a method lacks active latents, or the reference has others.

    Exact ablation may cover a part of the active latents, and nothing else; any other method has a value for each of
    them, and may have values for more. An SAE without a file has no hash, so this also is what finds another SAE.
    """
    n_active, n_found = len(order.values), int((~order.values.isnan()).all(dim=1).sum())
    if is_reference and n_found < n_given:
        raise InputError(
            f"{name} has values for {n_given - n_found} latents that are not active here: it was computed with another "
            "SAE than that given here"
        )
    if not is_reference and n_found < n_active:
        raise InputError(
            f"{name} has no value for {n_active - n_found} of the {n_active} active latents: it was computed with "
            "another SAE than that given here, or over a part of the latents, which exact ablation alone may be"
        )


def _check_same(name: str, result: Attribution, site: Site, target: Target) -> None:
    if result.token is not None:
        raise InputError(f"{name} is per token; faithfulness ranks latents: compute it with per_token=False")
    origin, here = result.provenance or {}, site.provenance(target)
    same_origin = all(origin.get(key) == here[key] for key in ("data_fingerprint", "sae_sha256", "model"))
    mine = (result.hook_name, result.token_scope, result.d_sae, result.n_sample)
    theirs = (site.hook_name, site.positions.scope, site.codes.d_sae, site.codes.n_sample)
    if not (same_origin and mine == theirs):
        raise InputError(f"{name} was computed on another input or another SAE than those given here")
    if result.labels != target.labels:
        raise InputError(f"{name} explains {', '.join(result.labels)}; the target here is {', '.join(target.labels)}")
    if origin.get("target_fingerprint") != here["target_fingerprint"]:
        raise InputError(f"{name} explains another target of the same name: its vectors are not those given here")
    if result.error_term != site.error_term:
        raise InputError(
            f"{name} was computed with the error term {result.error_term}, this comparison has it "
            f"{site.error_term}: use one setting for all"
        )
