"""`min_w 1/2 |D' w - z|^2 + l1 sum(w)` with `w >= 0`, for many `z` at once, each with its duality gap.

Few weights are above zero, so each round solves the problem on a working set, the weights above zero and the terms that
correlate most with what is left, and then looks at all terms again. Within the working set, accelerated proximal steps
get near the weights above zero, and an active-set method gives them to the last digit.

The dual is `max_t 1/2 |z|^2 - 1/2 |t - z|^2` with `D t <= l1`. The residual `r = z - D' w`, scaled so that it is
feasible, gives a lower bound of the minimum; the gap between it and the objective bounds how far `w` is from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NEW = 32  # terms that a working set takes in at least
_POLISH_EVERY = 40  # steps between two descents
_MOST_DESCENTS = 100
_RIDGE = 1e-9  # of rows of unit length
_NO_SLOPE, _ENTERS = 1e-12, 1e-14  # what counts as none, and as what a weight enters
_NUMBERS_AT_ONCE = 1 << 24  # of gathered dictionary rows: 128 MB


class Solved(NamedTuple):
    """Weights and how good they are, float64."""

    weights: Tensor
    """`[sample term]`, none below zero."""
    gap: Tensor
    """Objective minus the dual's, `[sample]`: the objective is at most this far above its minimum."""
    n_iterations: int
    """Proximal steps in all, those of the slowest sample."""


def solve(dictionary: Tensor, rows: Tensor, l1: float, *, tol: float, max_iter: int) -> Solved:
    """The weights of each row.

    Args:
        dictionary: `D`, float64 `[term d]`.
        rows: `z`, float64 `[sample d]`.
        l1: weight of the penalty, above zero.
        tol: stop where the gap is at most this share of `1/2 |z|^2`, the objective at `w = 0`.
        max_iter: proximal steps for each sample.

    Example:
        >>> found = solve(torch.eye(2).double(), torch.tensor([[1.0, -1.0]]).double(), 0.25, tol=1e-9, max_iter=100)
        >>> found.weights, bool(found.gap[0] < 1e-9)
        (tensor([[0.7500, 0.0000]], dtype=torch.float64), True)
    """
    enough = tol * rows.square().sum(dim=1) / 2
    weights = rows.new_zeros(len(rows), len(dictionary))
    gap = torch.full_like(enough, torch.inf)
    pending = torch.arange(len(rows), device=rows.device)
    used, per_round = 0, max(1, min(max_iter, 2000))
    while True:
        own = weights[pending]
        residual = rows[pending] - own @ dictionary
        correlation = residual @ dictionary.T
        gap[pending] = duality_gap(
            own.sum(dim=1), residual.square().sum(dim=1), (residual * rows[pending]).sum(dim=1),
            rows[pending].square().sum(dim=1), correlation.amax(dim=1), l1,
        )  # fmt: skip
        left = gap[pending] > enough[pending]
        pending = pending[left]
        if len(pending) == 0 or used >= max_iter:
            return Solved(weights, gap, used)
        own, correlation = own[left], correlation[left]
        size = min(len(dictionary), int((own > 0).sum(dim=1).max()) + _NEW)
        members = correlation.masked_fill(own > 0, torch.inf).topk(size, dim=1).indices
        at_once = max(1, _NUMBERS_AT_ONCE // (size * dictionary.shape[1]))
        steps = 0
        for part in torch.arange(len(pending), device=rows.device).split(at_once):
            z, chosen = rows[pending[part]], members[part]
            atoms = dictionary[chosen]
            found, n_steps = _on_working_set(
                atoms @ atoms.mT, (atoms @ z[:, :, None])[..., 0], z.square().sum(dim=1), own[part].gather(1, chosen),
                l1, 0.3 * enough[pending[part]], min(per_round, max_iter - used),
            )  # fmt: skip
            weights[pending[part]] = torch.zeros_like(own[part]).scatter(1, chosen, found)
            steps = max(steps, n_steps)
        used += steps


def duality_gap(total: Tensor, squared: Tensor, inner: Tensor, length: Tensor, greatest: Tensor, l1: float) -> Tensor:
    """Objective minus the dual's at the best feasible multiple of the residual, `[sample]`.

    Args:
        total: sum of the weights.
        squared: `|r|^2`.
        inner: `<r, z>`.
        length: `|z|^2`.
        greatest: the greatest entry of `D r`.
        l1: weight of the penalty.
    """
    objective = squared / 2 + l1 * total
    largest = torch.where(greatest > 0, l1 / greatest.clamp(min=1e-300), torch.inf)  # multiples up to it are feasible
    factor = torch.minimum((inner / squared.clamp(min=1e-300)).clamp(min=0), largest)
    dual = factor * inner - factor.square() * squared / 2
    return (objective - dual).clamp(min=0)


def _on_working_set(
    gram: Tensor, inner: Tensor, length: Tensor, start: Tensor, l1: float, enough: Tensor, n_steps: int
) -> tuple[Tensor, int]:
    """Weights `[sample member]` of the problem whose Gram matrices and inner products with `z` are given."""
    step = 1 / torch.linalg.matrix_norm(gram, ord=float("inf")).clamp(min=1e-300)[:, None]

    def apply(weights: Tensor) -> Tensor:
        return (gram @ weights[:, :, None])[..., 0]

    def gap_of(weights: Tensor) -> Tensor:
        image = apply(weights)
        with_z, with_itself = (weights * inner).sum(dim=1), (weights * image).sum(dim=1)
        squared = (length - 2 * with_z + with_itself).clamp(min=0)
        greatest = (inner - image).amax(dim=1)
        return duality_gap(weights.sum(dim=1), squared, length - with_z, length, greatest, l1)

    best = start
    gap = gap_of(start)
    now, ahead, momentum = start, start, torch.ones_like(length)
    for done in range(1, n_steps + 1):
        new = (ahead - step * (apply(ahead) - inner + l1)).clamp(min=0)
        # Restart where momentum points uphill: without it, coherent dictionaries make the iterates circle.
        uphill = ((ahead - new) * (new - now)).sum(dim=1) > 0
        momentum = torch.where(uphill, torch.ones_like(momentum), momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = new + torch.where(uphill, torch.zeros_like(momentum), (momentum - 1) / following)[:, None] * (new - now)
        now, momentum = new, following
        if done % _POLISH_EVERY == 0 or done == n_steps:
            for candidate in (now, _descend(gram, inner, now, l1)):
                found = gap_of(candidate)
                better = found < gap
                best, gap = torch.where(better[:, None], candidate, best), torch.where(better, found, gap)
            if bool((gap <= enough).all()):
                return best, done
            now, ahead, momentum = best, best, torch.ones_like(length)
    return best, n_steps


def _descend(gram: Tensor, inner: Tensor, start: Tensor, l1: float) -> Tensor:
    """An active-set method: Newton steps on the weights above zero, and one weight more wherever they have converged.

    A step goes as far as the first weight that reaches zero, which then leaves. On a fixed support the objective is
    quadratic, so a whole step gives its minimum, and the term of the steepest slope enters. Where the rows of the
    support depend on each other, the minimum is not unique or far off; the small ridge turns the step into a long one
    along such a direction, at whose end one weight less is above zero.
    """
    weights = start
    settled = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for _ in range(_MOST_DESCENTS):
        slope = inner - l1 - (gram @ weights[:, :, None])[..., 0]
        steepest = slope.masked_fill(weights > 0, -torch.inf).max(dim=1)
        enters = settled & (steepest.values > _NO_SLOPE)
        if bool((settled & ~enters).all()):
            break
        rows = enters.nonzero().flatten()
        weights = weights.clone()
        weights[rows, steepest.indices[rows]] = _ENTERS
        mask = (weights > 0).to(gram.dtype)
        square = gram * mask[:, :, None] * mask[:, None, :] + torch.diag_embed(1 - mask + _RIDGE * mask)
        factor, info = torch.linalg.cholesky_ex(square)
        step = torch.cholesky_solve((slope * mask)[:, :, None], factor)[..., 0]
        step = torch.where(((info == 0) & torch.isfinite(step).all(dim=1))[:, None], step * mask, 0.0)
        reach = torch.where(weights + step < 0, weights / (-step).clamp(min=1e-300), torch.inf)
        fraction = reach.amin(dim=1, keepdim=True).clamp(max=1)
        weights = torch.where(reach <= fraction, 0.0, (weights + fraction * step).clamp(min=0))
        settled = fraction[:, 0] == 1
    return weights
