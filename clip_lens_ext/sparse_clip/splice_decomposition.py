"""SpLiCE: embeddings of any CLIP as sparse non-negative sums of words, without training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint, versions
from clip_lens_ext.saes.codes import SparseCodes
from clip_lens_ext.semantics.term_embeddings import TermEmbeddings
from clip_lens_ext.sparse_clip.checks import checked_count
from clip_lens_ext.sparse_clip.decomposition_result import Decomposition
from clip_lens_ext.sparse_clip.nonnegative_lasso import Solved, duality_gap, solve

Solver = Literal["working_set", "sklearn"]
_SEARCH_STEPS = 20
_CLOSE = 0.02  # relative distance at which a mean number of words counts as the one asked for


@torch.no_grad()
def decompose(
    embeddings: Tensor,
    terms: TermEmbeddings,
    *,
    l1: float | None = None,
    l0: float | None = None,
    image_mean: Tensor | None = None,
    term_mean: Tensor | None = None,
    solver: Solver = "working_set",
    tol: float = 1e-6,
    max_iter: int = 20_000,
    batch_size: int = 256,
    progress: bool = True,
) -> Decomposition:
    """Write each embedding as a sparse sum of words with weights of zero or more.

    `u = (e - m) / |e - m|` of the embeddings, with `e` of unit length and `m` their mean, and likewise the rows of `D`
    of the words, with *their* mean. Then, for each embedding,

        w = argmin_{w >= 0}  1/2 |D' w - u|^2 + l1 * sum(w)

    which is half of the paper's `|D' w - u|^2 + 2 lambda |w|_1` with `l1 = lambda`. In scikit-learn's `Lasso` it is
    `alpha = l1 / d_embed`; the `l1_penalty` of the authors' code for its scikit-learn solver is twice `l1`.

    Args:
        embeddings: of pictures, of any length but zero, `[sample d_embed]`.
        terms: of the words, by the same model, as `Vocabulary.embed` gives them.
        l1: weight of the penalty; from the greatest entry of `D u` on, all weights are zero.
        l0: instead of `l1`: the mean number of words above zero per embedding; `l1`, one for all, is searched for. Not
            every mean can be had, of few embeddings above all.
        image_mean: of unit embeddings, `[d_embed]`; None: of `embeddings`, which should be many and varied then.
        term_mean: likewise of the words; None: of `terms`.
        solver: `"working_set"`, all at once; `"sklearn"`: coordinate descent, one embedding after the other.
        tol: a sample has converged where its duality gap is at most this share of `1/2 |u|^2 = 1/2`.
        max_iter: steps of either solver for each sample.
        batch_size: samples at once.
        progress: draw a bar.

    Returns:
        `Decomposition` with the gap of each sample.

    Warns:
        Where samples have not converged; how many, and which, is in the result. Where the mean number of words is not
        within 2 % of `l0`.

    Raises:
        InputError: both of `l1` and `l0` or neither, one out of range or out of reach, another width, NaN, an embedding
            or a word that is its own mean and so has no direction.

    Numerics:
        In float64, on the CPU. The objective of a sample is at most its gap above the minimum, and
        `1/2 |D'(w - w*)|^2` is at most its gap too.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.1, 1.0], [1.0, 0.0, 0.2]])
        >>> terms = TermEmbeddings.from_vectors(torch.eye(3), ["duck", "bow", "crane"], model="elsewhere")
        >>> found = decompose(embeddings, terms, l1=0.05, progress=False)
        >>> found.top(1)
        [[('bow', ...)], [('crane', ...)], [('duck', ...)]]

    Reference:
        Bhalla et al. (2024), Interpreting CLIP with sparse linear concept embeddings, arXiv 2402.10376.
    """
    if (l1 is None) == (l0 is None):
        raise InputError(f"either l1 or l0 is needed, and not both; got l1={l1!r} and l0={l0!r}")
    if solver not in get_args(Solver):
        raise InputError(f"solver is one of {', '.join(get_args(Solver))}, got {solver!r}")
    for name, value in (("l1", l1), ("l0", l0), ("tol", tol)):
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < math.inf):
            raise InputError(f"{name} is above zero and finite, got {value!r}")
    checked_count(max_iter, "max_iter")
    checked_count(batch_size, "batch_size")
    unit = _unit(embeddings, "embeddings")
    words = _unit(terms.vectors, "terms", terms.terms)
    if unit.shape[1] != words.shape[1]:
        raise InputError(f"embeddings of {unit.shape[1]} numbers and terms of {words.shape[1]}: are they of one model?")
    m_image, m_term = _mean(unit, image_mean, "image_mean"), _mean(words, term_mean, "term_mean")
    u = _unit(unit - m_image, "centred embeddings")
    dictionary = _unit(words - m_term, "centred terms", terms.terms)
    if l1 is None:
        assert l0 is not None
        l1 = _search(dictionary, u, l0, tol, max_iter, batch_size, progress)
    parts = []
    with tqdm(total=len(u), desc="decomposing", unit="embedding", disable=not progress) as bar:
        for rows in u.split(batch_size):
            one = solve(dictionary, rows, l1, tol=tol, max_iter=max_iter) if solver == "working_set" \
                else _by_sklearn(dictionary, rows, l1, tol, max_iter)  # fmt: skip
            parts.append((SparseCodes.from_dense(one.weights[:, None]), one))
            bar.update(len(rows))
    gap = torch.cat([one.gap for _, one in parts])
    converged = gap <= tol / 2
    if not bool(converged.all()):
        warnings.warn(
            f"{int((~converged).sum())} of {len(u)} samples have not converged after {max_iter} steps: the greatest "
            f"gap is {float(gap.max()):.2g}, and {tol / 2:.2g} was asked for; see .converged",
            stacklevel=3,
        )
    codes = _joined([one for one, _ in parts])
    n_words = len(codes.value) / len(u)
    if l0 is not None and abs(n_words - l0) > _CLOSE * l0:
        warnings.warn(f"the nearest mean number of words is {n_words:.3g}, not {l0:g}, with l1={l1:.3g}", stacklevel=3)
    found = Decomposition(
        codes=codes, terms=terms.terms, l1=l1, gap=gap, converged=converged,
        cosine=gap, cosine_centred=gap, dictionary=dictionary.float(), image_mean=m_image.float(),
        term_mean=m_term.float(), solver=solver, tol=tol, n_iterations=max(one.n_iterations for _, one in parts),
        provenance={"model": terms.model, "model_hash": terms.model_hash, "vocabulary": terms.vocabulary,
                    "embeddings": fingerprint(embeddings), "versions": versions()},
    )  # fmt: skip
    return found.with_cosines(unit, u)


def _unit(vectors: Tensor, what: str, names: Sequence[str] | None = None) -> Tensor:
    """Of unit length in float64, and each with a direction."""
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.numel() == 0 or not vectors.is_floating_point():
        shown = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(f"{what} are floats [sample d_embed], at least one; got {shown}")
    vectors = vectors.detach().double().cpu()
    length = vectors.norm(dim=1)
    # A vector that is its own mean leaves rounding, which would become a direction.
    wrong = (~torch.isfinite(length) | (length < 1e-7)).nonzero().flatten().tolist()
    if wrong:
        why = " (it is equal to the mean: pass a mean over more of them)" if what.startswith("centred") else ""
        which = f"number {wrong[0]}" if names is None else repr(names[wrong[0]])
        raise InputError(f"{what}: {which} is zero or not finite, and has no direction{why}")
    return F.normalize(vectors, dim=1)


def _mean(unit: Tensor, given: Tensor | None, what: str) -> Tensor:
    if given is None:
        return unit.mean(dim=0)
    if not isinstance(given, Tensor) or given.shape != unit.shape[1:] or not bool(torch.isfinite(given).all()):
        raise InputError(f"{what} is a finite vector [{unit.shape[1]}], got {given!r}"[:300])
    return given.detach().double().cpu()


def _search(
    dictionary: Tensor, u: Tensor, l0: float, tol: float, max_iter: int, batch_size: int, progress: bool
) -> float:
    """The `l1` whose mean number of weights above zero is nearest to `l0`, by bisection of its logarithm."""
    high = float((u @ dictionary.T).max())
    if high <= 0:
        raise InputError("no word correlates with any embedding, so there is no weight above zero to ask for")
    low, l1, best = 0.0, high / 2, (math.inf, high)
    with tqdm(desc=f"l1 for an L0 of {l0:g}", disable=not progress) as bar:
        for _ in range(_SEARCH_STEPS):
            active = sum(int((solve(dictionary, rows, l1, tol=max(tol, 1e-5), max_iter=max_iter).weights > 0).sum())
                         for rows in u.split(batch_size)) / len(u)  # fmt: skip
            best = min(best, (abs(active - l0), l1))
            bar.update()
            if abs(active - l0) <= _CLOSE * l0:
                break
            low, high = (l1, high) if active > l0 else (low, l1)
            # Downwards by halves first: a small penalty is the dearest to solve.
            l1 = math.sqrt(low * high) if low else high / 2
    if not low and best[0] > _CLOSE * l0:
        raise InputError(f"an L0 of {l0:g} is out of reach: with l1={best[1]:.2g} the words give {l0 - best[0]:.1f}")
    return best[1]


def _by_sklearn(dictionary: Tensor, rows: Tensor, l1: float, tol: float, max_iter: int) -> Solved:
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn takes a second to load
    from sklearn.linear_model import Lasso

    # Its objective is divided by the number of rows of X, which here are the numbers of an embedding; its tolerance is
    # a share of |z|^2, and not of half of it.
    model = Lasso(alpha=l1 / dictionary.shape[1], fit_intercept=False, positive=True, max_iter=max_iter, tol=tol / 2)
    x = dictionary.numpy().T
    found, steps = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the gap says it, of each sample
        for row in rows.numpy():
            found.append(torch.from_numpy(model.fit(x, row).coef_.copy()))
            steps = max(steps, int(model.n_iter_))
    weights = torch.stack(found)
    residual = rows - weights @ dictionary
    gap = duality_gap(
        weights.sum(dim=1), residual.square().sum(dim=1), (residual * rows).sum(dim=1), rows.square().sum(dim=1),
        (residual @ dictionary.T).amax(dim=1), l1,
    )  # fmt: skip
    return Solved(weights, gap, steps)


def _joined(parts: list[SparseCodes]) -> SparseCodes:
    n_sample = sum(part.n_sample for part in parts)
    starts = [sum(part.n_sample for part in parts[:i]) for i in range(len(parts))]
    return SparseCodes(
        sample=torch.cat([part.sample + start for part, start in zip(parts, starts, strict=True)]),
        token=torch.cat([part.token for part in parts]),
        latent=torch.cat([part.latent for part in parts]),
        value=torch.cat([part.value for part in parts]),
        n_sample=n_sample,
        n_token=1,
        d_sae=parts[0].d_sae,
        position=torch.full((n_sample, 1), -1),
        hook_name="hook_embedding",
        token_scope="pooled",
    )
