"""The derivative of every target along every active latent: what the gradient methods share.

Three ways, equal up to rounding; which one runs is a matter of cost alone.

- **A pooled token after the last block**: the tail is LayerNorm, projection and target of one vector. Where there are
  more gradients to take (samples times targets) than active latents, each decoder row is pushed forward through it: two
  matrix products for any number of targets.
- **Up to `d_embed` targets**: one vector-Jacobian product of the tail for each.
- **More targets**: one for each number of the embedding, and one matrix product for all targets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def entry_gradients(site: Site, target: Target, path: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """`dy/dz` of every active entry.

    Args:
        site: where.
        target: what is explained.
        path: points to average over; the actual input alone if None.

    Returns:
        `[active target]`, and at the actual input alone the prediction `[sample target]`.
    """
    n_sample, device = site.codes.n_sample, site.base.device
    out = torch.zeros(len(site.codes), len(target), dtype=_result_dtype(site), device=device)
    if path is not None:
        for start in range(0, n_sample * len(path.at), path.batch_size):
            number = torch.arange(start, min(start + path.batch_size, n_sample * len(path.at)), device=device)
            sample, point = number // len(path.at), number % len(path.at)
            back = 1 - torch.tensor(path.at, dtype=torch.float64, device=device)[point]
            rows = site.base[sample] - back.to(site.base.dtype)[:, None, None] * path.step[sample]
            weight = torch.tensor(path.weight, dtype=torch.float64, device=device)[point]
            _add_products(site, target, rows, sample, weight, out)
        return out, None
    samples = torch.arange(n_sample, device=device)
    if site.is_pooled_token and len(site.codes) <= _PUSHES_PER_PULL * n_sample * len(target):
        return _pushed_forward(site, target, out), site.predict(target)
    return out, _add_products(site, target, site.base, samples, None, out)


def _pushed_forward(site: Site, target: Target, out: Tensor) -> Tensor:
    """Each decoder row through the tail by forward-mode differentiation, at the point where its sample is."""
    per_entry = 6 * max(len(target), site.base.shape[-1]) * site.base.element_size()
    with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
        # torch's own decompositions, imported at the first dual number, warn of torch.jit.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
        for part, rows in site.entry_chunks(at_once=max(1, _BYTES_AT_ONCE // per_entry)):
            sample = site.codes.sample[part]
            dual = forward_ad.make_dual(site.base[sample], rows[:, None].to(site.base.dtype))
            moved = forward_ad.unpack_dual(target(site.tail(dual, sample))).tangent
            if moved is not None:  # None: the prediction does not depend on the embedding
                out[part] = moved
    return out


def _add_products(
    site: Site, target: Target, rows: Tensor, samples: Tensor, weight: Tensor | None, out: Tensor
) -> Tensor:
    """Add to `out` what the gradients at `rows` `[item token d_in]` are along the entries of the items' samples.

    Args:
        site, target: where and what.
        rows: points at which the gradient is taken.
        samples: the sample of each item, ascending, `[item]`.
        weight: of each item, or None for one.
        out: `[active target]`.

    Returns:
        The predictions at the items, `[item target]`.
    """
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        embedding = site.tail(leaf, samples)
    prediction, pull = _target_gradients(target, embedding)
    n_target, d_embed = len(target), embedding.shape[-1]
    first, last = int(samples[0]), int(samples[-1])
    at_once = max(1, _BYTES_AT_ONCE // (leaf.numel() * leaf.element_size()))
    by_embedding = n_target > d_embed and weight is None
    n = d_embed if by_embedding else n_target
    own = _entries_of(site, first, last - first + 1)
    products = out.new_zeros(len(out), d_embed) if by_embedding else out
    for start in range(0, n, at_once):
        found = []
        for index in range(start, min(start + at_once, n)):
            cotangent = _unit(embedding, index) if by_embedding else pull(index)
            keep = index + 1 < n
            gradient = torch.autograd.grad(embedding, leaf, cotangent, retain_graph=keep)[0]
            found.append(_by_sample(gradient, samples, weight, last - first + 1))
        gradients = torch.stack(found)  # [target sample token d_in]
        products[own, start : start + len(found)] += _along_entries(site, gradients, first, own)
    if by_embedding:
        all_targets = torch.stack([pull(index) for index in range(n_target)], dim=1)  # [sample target d_embed]
        for sample in range(first, last + 1):
            own = _entries_of(site, sample, 1)
            out[own] += products[own] @ all_targets[sample - first].T.to(out.dtype)
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
    weighted = gradient * weight.to(gradient.dtype)[:, None, None]
    out = gradient.new_zeros(n_sample, *gradient.shape[1:])
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


def _result_dtype(site: Site) -> torch.dtype:
    return torch.promote_types(site.base.dtype, site.codes.value.dtype)
