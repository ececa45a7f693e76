"""Does an order of latents tell which of them the prediction rests on? Delete them in that order, and look.

**Deletion curve**: the prediction after the top 0, 1, ..., n_steps latents of a sample were set to zero, in the order
of a method, greatest first. The faster it falls the better the order; the area is the mean over the steps, lower is
better. **Rank correlation**: Spearman's, between a method's values and exact ablation, over a sample's active latents.
Exact ablation's own order and a random one are always there as the two ends.

The protocol is that of the released evaluation of Dreyer et al. 2505.20229, with the error term kept by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.attribution.ablation import exact_ablation
from clip_lens_ext.attribution.baselines import random_attribution
from clip_lens_ext.attribution.ranks import spearman
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.positions import TokenScope
from clip_lens_ext.towers.tower import HookedTower


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Deletion curves and rank correlations of several methods on one batch.

    Attributes:
        methods: names, in the order of the first axis everywhere.
        deletion: prediction after each step, `[method sample target step]`, step 0 being the unedited prediction. A
            sample with fewer active latents than steps stays at its last value.
        area: mean of the curve over its steps, `[method sample target]`; lower is better.
        rank_correlation: with exact ablation over the active latents, `[method sample target]`; NaN where a method's
            values are all equal.
        n_active: active latents of each sample, `[sample]`.
        labels: one per target.
        unit: of the predictions.
        hook_name, token_scope, error_term: the site; the same for every method.
    """

    methods: tuple[str, ...]
    deletion: Tensor
    area: Tensor
    rank_correlation: Tensor
    n_active: Tensor
    labels: tuple[str, ...]
    unit: str
    hook_name: str
    token_scope: str
    error_term: str

    def to_frame(self) -> pd.DataFrame:
        """One row per method: mean rank correlation, mean deletion area, and mean prediction after all steps.

        The means are over samples and targets; `n_undefined` counts rank correlations that do not exist.
        """
        return pd.DataFrame(
            {
                "method": self.methods,
                "rank_correlation": self.rank_correlation.flatten(1).nanmean(dim=1).tolist(),
                "deletion_area": self.area.flatten(1).mean(dim=1).tolist(),
                "prediction_before": self.deletion[..., 0].flatten(1).mean(dim=1).tolist(),
                "prediction_after": self.deletion[..., -1].flatten(1).mean(dim=1).tolist(),
                "n_undefined": self.rank_correlation.flatten(1).isnan().sum(dim=1).tolist(),
            }
        )


@torch.no_grad()
def faithfulness(
    tower: HookedTower,
    x: Tensor | Site,
    sae: SAE,
    target: Target,
    attributions: Attribution | Sequence[Attribution] | Mapping[str, Attribution],
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm | None = None,
    n_steps: int = 20,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """Hold methods against deletion and exact ablation, on the tail alone: the prefix runs once.

    Args:
        tower, x, sae, target, hook_name, token_scope, error_term: as in `attribution_patching`.
        attributions: results on the same input and SAE, one or several, or a mapping from a name to each.
        n_steps: latents that are deleted, one after the other.
        batch_size: edited activations that run through the tail at a time.
        seed: of the random order.
        progress: show a bar.

    Returns:
        `Faithfulness`, with the rows `exact_ablation` and `random` added where they are not among the methods.

    Raises:
        InputError: a result is of another input, SAE, target or error term, or per token.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post"), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(2, seed=0, split="test").images)
        >>> target = cle.text_target(clip, world.prompts()[0])
        >>> patching = cle.attribution_patching(clip.vision, pixels, sae, target)
        >>> faithfulness(clip.vision, pixels, sae, target, patching, n_steps=4, progress=False).methods
        ('attribution_patching', 'exact_ablation', 'random')
    """
    if n_steps < 1:
        raise InputError(f"n_steps must be at least 1, got {n_steps}")
    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
    named = _by_name(attributions)
    for name, result in named.items():
        _check_same(name, result, site, target)
    if "exact_ablation" not in named:
        named["exact_ablation"] = exact_ablation(tower, site, sae, target, batch_size=batch_size)
    if "random" not in named:
        named["random"] = random_attribution(tower, site, sae, target, seed=seed)
    exact = named["exact_ablation"]
    n_sample, n_target = site.codes.n_sample, len(target)
    curves = exact.prediction.new_empty(len(named), n_sample, n_target, n_steps + 1)
    correlation = torch.empty(len(named), n_sample, n_target, dtype=torch.float64)
    n_active = torch.bincount(exact.sample, minlength=n_sample)
    with tqdm(total=n_sample * len(named), desc="deletion curves", disable=not progress) as bar:
        for sample in range(n_sample):
            own = exact.sample == sample
            for row, result in enumerate(named.values()):
                value = result.value[own]
                for index in range(n_target):
                    order = value[:, index].argsort(descending=True, stable=True)[:n_steps]
                    removed = _removals(site, sample, order)
                    curves[row, sample, index] = _curve(site, sample, removed, target, index, n_steps, batch_size)
                    correlation[row, sample, index] = spearman(value[:, index], exact.value[own][:, index])
                bar.update()
    return Faithfulness(
        tuple(named),
        curves,
        curves.mean(dim=-1),
        correlation,
        n_active,
        target.labels,
        target.unit,
        site.hook_name,
        site.positions.scope,
        site.error_term,
    )


def _by_name(attributions: Attribution | Sequence[Attribution] | Mapping[str, Attribution]) -> dict[str, Attribution]:
    if isinstance(attributions, Mapping):
        return dict(attributions)
    several = [attributions] if isinstance(attributions, Attribution) else list(attributions)
    names = [result.method for result in several]
    if len(set(names)) < len(names):
        raise InputError(
            f"two results have the same method ({', '.join(names)}): pass a mapping from names of your own"
        )
    return dict(zip(names, several, strict=True))


def _check_same(name: str, result: Attribution, site: Site, target: Target) -> None:
    if result.token is not None:
        raise InputError(f"{name} is per token; faithfulness ranks latents: compute it with per_token=False")
    sample, latent, _ = site.codes.pairs()
    same_pairs = result.sample.equal(sample) and result.latent.equal(latent)
    origin, here = result.provenance or {}, site.provenance(target)
    same_origin = all(origin.get(key) == here[key] for key in ("data_fingerprint", "sae_sha256", "model"))
    same_site = (result.hook_name, result.token_scope, result.d_sae) == (
        site.hook_name,
        site.positions.scope,
        site.codes.d_sae,
    )
    if not (same_pairs and same_origin and same_site):
        raise InputError(
            f"{name} was computed on another input or another SAE: its active latents are not those found here"
        )
    if result.labels != target.labels:
        raise InputError(f"{name} explains {', '.join(result.labels)}; the target here is {', '.join(target.labels)}")
    if origin.get("target_fingerprint") != here["target_fingerprint"]:
        raise InputError(f"{name} explains another target of the same name: its vectors are not those given here")
    if result.error_term != site.error_term:
        raise InputError(
            f"{name} was computed with the error term {result.error_term}, this comparison has it "
            f"{site.error_term}: use one setting for all"
        )


def _removals(site: Site, sample: int, order: Tensor) -> Tensor:
    """What some latents of one sample add, `[latent token d_in]`.

    Args:
        sample: which sample.
        order: the latents, as indices into the sample's own pairs; the result is in this order.
    """
    pair_sample, _, pair = site.codes.pairs()
    first = int((pair_sample < sample).sum())
    place = torch.full((int((pair_sample == sample).sum()),), -1, device=pair.device)
    place[order] = torch.arange(len(order), device=pair.device)
    entries = (site.codes.sample == sample).nonzero().flatten()
    places = place[pair[entries] - first]
    entries, places = entries[places >= 0], places[places >= 0]
    n_token, d_in = site.base.shape[1:]
    out = site.base.new_zeros(len(order) * n_token, d_in)
    out.index_add_(0, places * n_token + site.codes.token[entries], site.contributions(entries).to(out.dtype))
    return out.reshape(len(order), n_token, d_in)


def _curve(
    site: Site, sample: int, removed: Tensor, target: Target, index: int, n_steps: int, batch_size: int
) -> Tensor:
    """Prediction `[step]` while the latents of `removed` `[latent token d_in]` are taken out one after the other."""
    steps = torch.cat([removed.new_zeros(1, *removed.shape[1:]), removed.cumsum(dim=0)])
    parts = []
    for part in steps.split(batch_size):
        own = torch.full((len(part),), sample, device=part.device)
        parts.append(target(site.tail(site.base[own] - part, own))[:, index])
    curve = torch.cat(parts)
    return torch.cat([curve, curve[-1:].expand(n_steps + 1 - len(curve))])
