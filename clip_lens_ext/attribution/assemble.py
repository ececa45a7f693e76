"""From numbers per active entry to an `Attribution`: the sum over tokens, and the labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import Site
from clip_lens_ext.attribution.targets import Target


def from_entries(
    site: Site,
    target: Target,
    entries: Tensor,
    prediction: Tensor,
    method: str,
    *,
    per_token: bool = False,
    **extra: Any,
) -> Attribution:
    """An attribution of values `[active target]`, one for each active entry of the codes.

    `extra` are further fields of the result: `seed`, `settings`, `completeness_gap`.
    """
    if per_token:
        codes = site.codes
        return _result(
            site, target, codes.sample, codes.latent, entries, codes.value, prediction, method,
            token=codes.token, **extra,
        )  # fmt: skip
    sample, latent, pair = site.codes.pairs()
    value = entries.new_zeros(len(sample), entries.shape[1]).index_add_(0, pair, entries)
    return _result(site, target, sample, latent, value, summed_activation(site), prediction, method, **extra)


def from_pairs(
    site: Site,
    target: Target,
    value: Tensor,
    prediction: Tensor,
    method: str,
    *,
    kept: Tensor | None = None,
    **extra: Any,
) -> Attribution:
    """An attribution of values `[pair target]`, one for each (sample, latent) pair of the codes.

    `kept` are the numbers of the pairs that the values are of, where they are not all.
    """
    sample, latent, _ = site.codes.pairs()
    activation = summed_activation(site)
    if kept is not None:
        sample, latent, activation = sample[kept], latent[kept], activation[kept]
    return _result(site, target, sample, latent, value, activation, prediction, method, **extra)


def summed_activation(site: Site) -> Tensor:
    """Activation of each (sample, latent) pair, summed over the SAE's tokens, `[pair]`."""
    sample, _, pair = site.codes.pairs()
    return site.codes.value.new_zeros(len(sample)).index_add_(0, pair, site.codes.value)


def _result(
    site: Site,
    target: Target,
    sample: Tensor,
    latent: Tensor,
    value: Tensor,
    activation: Tensor,
    prediction: Tensor,
    method: str,
    **extra: Any,
) -> Attribution:
    return Attribution(
        method=method,
        sample=sample,
        latent=latent,
        value=value.detach(),
        activation=activation,
        prediction=prediction.detach(),
        labels=target.labels,
        n_sample=site.codes.n_sample,
        d_sae=site.codes.d_sae,
        hook_name=site.hook_name,
        tower=site.tower.cfg.tower,
        token_scope=site.positions.scope,
        error_term=site.error_term,
        unit=target.unit,
        n_token=site.codes.n_token,
        provenance=site.provenance(target),
        **extra,
    )
