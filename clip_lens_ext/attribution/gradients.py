"""The derivative of every target along every active latent: what the gradient methods share.

Three ways, equal up to rounding; which one runs is a matter of cost alone.

- **A pooled token after the last block**: the tail is LayerNorm, projection and target of one vector. Where the
  active latents are few beside the gradients to take (samples times targets), each decoder row is pushed forward
  through it: two matrix products for any number of targets.
- **Up to `d_embed` targets**: one vector-Jacobian product of the tail for each.
- **More targets**: one for each number of the embedding, and one matrix product for all targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lens_ext.attribution.bound import bar
from clip_lens_ext.attribution.forward_mode import pushed_forward
from clip_lens_ext.attribution.site import Site
from clip_lens_ext.attribution.targets import Target

_BYTES_AT_ONCE = 64 << 20  # of gradients that are held for several targets before they are contracted
_PUSHES_PER_PULL = 3  # rows that are pushed forward in the time of one vector-Jacobian product
_FEW = 4  # targets: below, whole chunks of entries at once are faster than a product for each token


@dataclass(frozen=True, eq=False)
class Path:
    """A straight path in the space of the latents, and the points on it at which gradients are taken.

    Attributes:
        step: what the SAE's tokens lose from the end of the path to its beginning, `[batch token d_in]`.
        at: places of the points, from 0 at the beginning to 1 at the end, which is the actual input.
        weight: of each point.
        batch_size: points that run through the tail at a time.
    """

    step: Tensor
    at: Sequence[float]
    weight: Sequence[float]
    batch_size: int


def entry_gradients(site: Site, target: Target) -> tuple[Tensor, Tensor]:
    """`dy/dz` of every active entry at the actual input.

    Returns:
        `[active target]`, and the prediction `[sample target]`.
    """
    out, n_sample = no_products(site, target), site.codes.n_sample
    if site.is_pooled_token and len(site.codes) <= _PUSHES_PER_PULL * n_sample * len(target):
        return _pushed_forward(site, target, out), site.predict(target)
    samples = torch.arange(n_sample, device=site.base.device)
    return out, _add_products(site, target, site.base, samples, None, out)


def path_gradients(site: Site, target: Target, path: Path, *, progress: bool = False) -> Tensor:
    """Weighted mean of `dy/dz` of every active entry over the points of a path, `[active target]`."""
    out, device = no_products(site, target), site.base.device
    n_point = len(path.at)
    n_item = site.codes.n_sample * n_point
    # Not in the tower's own precision: eight bits are too few for weights that add up to one.
    left = torch.tensor([1 - at for at in path.at], dtype=out.dtype, device=device)
    weight = torch.tensor(path.weight, dtype=out.dtype, device=device)
    for start in bar(range(0, n_item, path.batch_size), "points on the path", progress):
        number = torch.arange(start, min(start + path.batch_size, n_item), device=device)
        sample, point = number // n_point, number % n_point
        rows = site.base[sample] - left[point][:, None, None] * path.step[sample]
        _add_products(site, target, rows.to(site.base.dtype), sample, weight[point], out)
    return out


def _pushed_forward(site: Site, target: Target, out: Tensor) -> Tensor:
    """Each decoder row through the tail by forward-mode differentiation, at the point where its sample is."""
    per_entry = 6 * max(len(target), site.base.shape[-1]) * site.base.element_size()
    for part, rows in site.entry_chunks(at_once=max(1, _BYTES_AT_ONCE // per_entry)):
        sample = site.codes.sample[part]

        def predicted(moved: Tensor, sample: Tensor = sample) -> Tensor:
            return target(site.tail(moved, sample))

        out[part] = pushed_forward(predicted, site.base[sample], rows[:, None].to(site.base.dtype)).to(out.dtype)
    return out


def _add_products(
    site: Site, target: Target, rows: Tensor, samples: Tensor, weight: Tensor | None, out: Tensor
) -> Tensor:
    """Add to `out` the gradients at `rows` `[item token d_in]` along the entries; the predictions `[item target]`.

    Args:
        site, target: where and what.
        rows: points at which the gradient is taken.
        samples: the sample of each item, ascending, `[item]`.
        weight: of each item, or None for one.
        out: `[active target]`.
    """
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        embedding = site.tail(leaf, samples)
    return add_products([Place(site, leaf, out)], target, embedding, samples, weight)


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor in the graph of an embedding, and the site whose entries its gradient is read along.

    Attributes:
        site: says which entries.
        leaf: the SAE's tokens `[item token d_in]`, or with `whole` all of the activation.
        out: what is added to, `[active target]`.
        whole: whether the SAE's tokens have to be taken out of the gradient.
    """

    site: Site
    leaf: Tensor
    out: Tensor
    whole: bool = False

    def rows(self, gradient: Tensor) -> Tensor:
        """Of the gradient, the SAE's tokens `[item token d_in]`."""
        taken = self.site.positions.take(gradient) if self.whole else gradient
        return taken if taken.dim() == 3 else taken[:, None]


def add_products(
    places: Sequence[Place], target: Target, embedding: Tensor, samples: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Add to each place's `out` the gradient of every target along its entries; the predictions `[item target]`.

    Args:
        places: where; all from one backward pass for each target.
        target: what is explained.
        embedding: with its graph, `[item d_embed]`.
        samples: the sample of each item, ascending, `[item]`.
        weight: of each item, or None for one, where there is one item for each sample.
    """
    prediction, pull = _target_gradients(target, embedding)
    n_target, d_embed = len(target), embedding.shape[-1]
    first, last = int(samples[0]), int(samples[-1])
    owns = [_entries_of(place.site, first, last - first + 1) for place in places]
    n_bytes = sum(place.leaf.numel() * place.leaf.element_size() for place in places)
    at_once = max(1, _BYTES_AT_ONCE // n_bytes)
    by_embedding = n_target > d_embed and weight is None
    n = d_embed if by_embedding else n_target
    products = [place.out.new_zeros(len(place.out), d_embed) if by_embedding else place.out for place in places]
    for start in range(0, n, at_once):
        found: list[list[Tensor]] = [[] for _ in places]
        for index in range(start, min(start + at_once, n)):
            cotangent = _unit(embedding, index) if by_embedding else pull(index)
            leaves = [place.leaf for place in places]
            gradients = torch.autograd.grad(embedding, leaves, cotangent, retain_graph=index + 1 < n)
            for place, rows, gradient in zip(places, found, gradients, strict=True):
                rows.append(_by_sample(place.rows(gradient), samples, weight, last - first + 1))
        for place, product, own, rows in zip(places, products, owns, found, strict=True):
            product[own, start : start + len(rows)] += _along_entries(place.site, torch.stack(rows), first, own)
    if by_embedding:
        all_targets = torch.stack([pull(index) for index in range(n_target)], dim=1)  # [sample target d_embed]
        for place, product in zip(places, products, strict=True):
            for sample in range(first, last + 1):
                own = _entries_of(place.site, sample, 1)
                place.out[own] += product[own] @ all_targets[sample - first].T.to(product.dtype)
    return prediction


def _unit(like: Tensor, index: int) -> Tensor:
    out = torch.zeros_like(like)
    out[:, index] = 1
    return out


def _target_gradients(target: Target, embedding: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Predictions, and a function from a target's number to the gradient of its prediction `[item d_embed]`."""
    with torch.enable_grad():
        end = embedding.detach().requires_grad_()
        prediction = target(end)

    def pull(index: int) -> Tensor:
        return torch.autograd.grad(prediction, end, _unit(prediction, index), retain_graph=True)[0]

    return prediction.detach(), pull


def _by_sample(gradient: Tensor, samples: Tensor, weight: Tensor | None, n_sample: int) -> Tensor:
    """Weighted sum over the items of each sample, `[sample token d_in]`."""
    if weight is None:
        return gradient
    weighted = gradient * weight[:, None, None]
    out = weighted.new_zeros(n_sample, *gradient.shape[1:])
    return out.index_add_(0, samples - samples[0], weighted)


def _entries_of(site: Site, sample: int, n_sample: int) -> slice:
    """The entries of some samples that follow each other; entries are sorted by sample."""
    ends = torch.tensor([sample, sample + n_sample], device=site.codes.sample.device)
    first, last = torch.searchsorted(site.codes.sample, ends).tolist()
    return slice(first, last)


def _along_entries(site: Site, gradients: Tensor, first: int, own: slice) -> Tensor:
    """Inner products of gradients `[target sample token d_in]` with the entries' decoder rows, `[entry target]`.

    The samples are those from `first` on, and `own` their entries.
    """
    codes, n_target = site.codes, len(gradients)
    out = torch.zeros(own.stop - own.start, n_target, dtype=_result_dtype(site), device=gradients.device)
    for part, rows in site.entry_chunks(own):
        sample, token = codes.sample[part] - first, codes.token[part]
        place = out[part.start - own.start : part.stop - own.start]
        if n_target < _FEW:
            for index, gradient in enumerate(gradients):
                place[:, index] = (rows * gradient[sample, token]).sum(dim=-1)
            continue
        # Entries of one token lie side by side: one matrix product for each token and all targets.
        _, lengths = torch.unique_consecutive(sample * codes.n_token + token, return_counts=True)
        start = 0
        for length in lengths.tolist():
            of_token = gradients[:, sample[start], token[start]].to(rows.dtype)
            place[start : start + length] = rows[start : start + length] @ of_token.T
            start += length
    return out


def no_products(site: Site, target: Target) -> Tensor:
    """Zeros `[active target]`, to add to."""
    return torch.zeros(len(site.codes), len(target), dtype=_result_dtype(site), device=site.base.device)


def _result_dtype(site: Site) -> torch.dtype:
    return torch.promote_types(site.base.dtype, site.codes.value.dtype)
