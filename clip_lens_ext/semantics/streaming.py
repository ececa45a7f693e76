"""Clarity and monosemanticity over every image that activates a latent, in one pass and mergeable.

Both are closed forms in sums over images, so a pass keeps `[d_sae d_embed]` and a few `[d_sae]`, in float64, however
many images there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.codes import SparseCodes
from clip_lens_ext.semantics.latent_scores import LatentScores, undefined
from clip_lens_ext.semantics.monosemanticity import LEAST_SHARE, ONE_SAMPLE
from clip_lens_ext.semantics.peaks import peaks

_CONSTANT = "its activation is the same on all images"
# Some steps of float32. Weights come by subtraction at the end: of a lesser share of spread, rounding would be left.
_LEAST_SPREAD = 1e-6


class _Active(NamedTuple):
    sample: Tensor
    latent: Tensor
    value: Tensor


class _VectorSums:
    """What both scores share: sums of unit embeddings by latent, `[d_sae d_embed]`."""

    def __init__(self, d_sae: int, d_embed: int) -> None:
        if min(d_sae, d_embed) < 1:
            raise InputError(f"d_sae and d_embed are positive, got {d_sae} and {d_embed}")
        self.total = torch.zeros(d_sae, d_embed, dtype=torch.float64)

    def unit(self, embeddings: Tensor) -> Tensor:
        """Unit embeddings of a batch in float64; each needs a direction."""
        if embeddings.dim() != 2 or embeddings.shape[1] != self.total.shape[1] or not embeddings.is_floating_point():
            raise InputError(f"embeddings are floats [sample {self.total.shape[1]}], got {list(embeddings.shape)}")
        vectors = embeddings.detach().cpu().double()
        length = vectors.norm(dim=1)
        wrong = (~length.isfinite() | (length == 0)).nonzero().flatten().tolist()
        if wrong:
            raise InputError(f"the embedding of sample {wrong[0]} of the batch is zero or not finite")
        return F.normalize(vectors, dim=1)

    def active(self, activations: SparseCodes | Tensor, n_sample: int) -> _Active:
        """The pairs of sample and latent with an activation other than zero."""
        d_sae = len(self.total)
        if isinstance(activations, SparseCodes):
            found, sizes = peaks(activations), (activations.n_sample, activations.d_sae)
            active = _Active(found.sample, found.latent, found.activation.double())
        else:
            if activations.dim() != 2 or not activations.is_floating_point():
                raise InputError(
                    f"activations are SparseCodes or floats [sample latent], got {list(activations.shape)}"
                )
            dense = activations.detach().cpu()
            if not dense.isfinite().all():
                raise InputError("activations hold NaN or infinite values")
            sizes = dense.shape[0], dense.shape[1]
            sample, latent = dense.nonzero(as_tuple=True)
            active = _Active(sample, latent, dense[sample, latent].double())
        if sizes != (n_sample, d_sae):
            raise InputError(
                f"activations of {sizes[0]} samples and {sizes[1]} latents, and embeddings of {n_sample} samples, "
                f"do not go together with {d_sae} latents"
            )
        return active

    def add(self, active: _Active, weight: Tensor, unit: Tensor) -> None:
        """Add the unit embedding of each pair's sample, times its weight, to its latent."""
        if len(weight) == 0:
            return
        rows, row = active.latent.unique(return_inverse=True)
        size = (len(rows), len(unit))
        matrix = torch.sparse_coo_tensor(torch.stack([row, active.sample]), weight, size, check_invariants=False)
        self.total.index_add_(0, rows, torch.sparse.mm(matrix, unit))

    def check(self, other: _VectorSums) -> None:
        if self.total.shape != other.total.shape:
            raise InputError(f"sums of {list(self.total.shape)} and {list(other.total.shape)} do not merge")


class StreamingClarity:
    """The mean cosine of all pairs of images that activate a latent, as Sparse CLIP measures it.

    `(||sum_i u_i||^2 - n) / (n (n - 1))` over the images whose activation is above `threshold`, unweighted; for a
    latent with `n_min` such images or more. An image's activation is its greatest over the SAE's tokens.
    `result().mean` is the published number; it is not comparable with `clarity` of the top references.

    Args:
        d_sae: number of latents.
        d_embed: length of an embedding.
        threshold: an image activates a latent if its activation is greater.
        n_min: images that a latent needs, at least 2.

    Example:
        >>> clarity = StreamingClarity(d_sae=2, d_embed=2)
        >>> clarity.update(torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.5, 3.0]]), torch.eye(2)[[0, 0, 1]])
        >>> clarity.result().value
        tensor([0.3333, 0.0000], dtype=torch.float64)

    References:
        Equation 2 of arXiv 2601.20075.
    """

    def __init__(self, d_sae: int, d_embed: int, *, threshold: float = 0.001, n_min: int = 2) -> None:
        if n_min < 2:
            raise InputError(f"a pair needs two images: n_min is at least 2, got {n_min}")
        self._sums = _VectorSums(d_sae, d_embed)
        self._count = torch.zeros(d_sae, dtype=torch.int64)
        self.threshold, self.n_min = float(threshold), n_min

    def update(self, activations: SparseCodes | Tensor, embeddings: Tensor) -> None:
        """Take in a batch.

        Args:
            activations: codes of the batch, or a dense `[sample d_sae]`.
            embeddings: of the same samples, by the judge, `[sample d_embed]`; any length but zero.

        Raises:
            InputError: shapes that do not go together, or an embedding without direction.
        """
        unit = self._sums.unit(embeddings)
        active = self._sums.active(activations, len(unit))
        chosen = active.value > self.threshold
        active = _Active(*(column[chosen] for column in active))
        self._sums.add(active, torch.ones_like(active.value), unit)
        self._count += torch.bincount(active.latent, minlength=len(self._count))

    def merge(self, other: StreamingClarity) -> StreamingClarity:
        """Take in the images of another pass; returns this one.

        Raises:
            InputError: the two have other sizes, thresholds or least numbers of images.
        """
        self._sums.check(other._sums)
        if (self.threshold, self.n_min) != (other.threshold, other.n_min):
            raise InputError("the two were counted with different threshold or n_min")
        self._sums.total += other._sums.total
        self._count += other._count
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, for a checkpoint."""
        return {
            "total": self._sums.total.clone(), "count": self._count.clone(), "threshold": self.threshold,
            "n_min": self.n_min,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said.

        Raises:
            InputError: the state is of other sizes, or of another threshold or least number of images.
        """
        mine = list(self._sums.total.shape), self.threshold, self.n_min
        if mine != (list(state["total"].shape), state["threshold"], state["n_min"]):
            raise InputError("the state is of other sizes, or was counted with another threshold or n_min")
        self._sums.total, self._count = state["total"].clone(), state["count"].clone()

    def result(self) -> LatentScores:
        """The clarity of every latent; NaN where fewer than `n_min` images activate it."""
        n = self._count
        few = n < self.n_min
        value = (self._sums.total.square().sum(dim=1) - n) / (n * (n - 1)).clamp(min=1)
        settings = {"images": "all that activate the latent", "threshold": self.threshold, "n_min": self.n_min}
        scored = n[~few]
        least = -1.0 / (int(scored.min()) - 1) if len(scored) else -1.0
        return LatentScores(
            "clarity of all active images", value.masked_fill(few, torch.nan), n.clone(), (least, 1.0),
            undefined({f"fewer than {self.n_min} images above the threshold": few}), settings,
        )  # fmt: skip


class StreamingMonosemanticity:
    """The monosemanticity score over all images, in one pass.

    `sum_{i<j} w_i w_j cos(e_i, e_j) / sum_{i<j} w_i w_j` with min-max normalised activations `w`. They are affine in
    the activations and their scale cancels, so the least activation can be subtracted at the end: the published two
    passes are one. Codes count with their greatest positive activation over tokens, and 0 where there is none; a dense
    `[sample d_sae]` counts as it is, negative values included.

    Args:
        d_sae: number of latents.
        d_embed: length of an embedding.

    Numerics:
        Sums in float64. Where activations spread over a share `s` of their greatest size, the error is of order
        `1e-16 / s^2`: a spread of a millionth or less counts as none.

    Example:
        >>> score = StreamingMonosemanticity(d_sae=1, d_embed=2)
        >>> score.update(torch.tensor([[4.0], [4.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> score.update(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        >>> score.result().value
        tensor([0.6667], dtype=torch.float64)

    References:
        Pach et al., arXiv 2504.02821.
    """

    _TENSORS = ("all", "weight", "square", "count", "least", "most")

    def __init__(self, d_sae: int, d_embed: int) -> None:
        self._sums = _VectorSums(d_sae, d_embed)
        self._all = torch.zeros(d_embed, dtype=torch.float64)
        self._weight, self._square = (torch.zeros(d_sae, dtype=torch.float64) for _ in range(2))
        self._count = torch.zeros(d_sae, dtype=torch.int64)
        self._least = torch.full((d_sae,), torch.inf, dtype=torch.float64)
        self._most = torch.full((d_sae,), -torch.inf, dtype=torch.float64)
        self._n_samples = 0

    def update(self, activations: SparseCodes | Tensor, embeddings: Tensor) -> None:
        """Take in a batch; arguments and errors as in `StreamingClarity.update`."""
        unit = self._sums.unit(embeddings)
        active = self._sums.active(activations, len(unit))
        self._sums.add(active, active.value, unit)
        self._all += unit.sum(dim=0)
        self._weight.index_add_(0, active.latent, active.value)
        self._square.index_add_(0, active.latent, active.value.square())
        self._count += torch.bincount(active.latent, minlength=len(self._count))
        self._least.scatter_reduce_(0, active.latent, active.value, "amin")
        self._most.scatter_reduce_(0, active.latent, active.value, "amax")
        self._n_samples += len(unit)

    def merge(self, other: StreamingMonosemanticity) -> StreamingMonosemanticity:
        """Take in the images of another pass; returns this one.

        Raises:
            InputError: the two have other sizes.
        """
        self._sums.check(other._sums)
        self._sums.total += other._sums.total
        for name in ("_all", "_weight", "_square", "_count", "_n_samples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._least = torch.minimum(self._least, other._least)
        self._most = torch.maximum(self._most, other._most)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, for a checkpoint."""
        own = {name: getattr(self, f"_{name}").clone() for name in self._TENSORS}
        return {"total": self._sums.total.clone(), **own, "n_samples": self._n_samples}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said.

        Raises:
            InputError: the state is of other sizes.
        """
        mine, other = list(self._sums.total.shape), list(state["total"].shape)
        if mine != other:
            raise InputError(f"the state is of other sizes: {other}, and these sums are {mine}")
        self._sums.total, self._n_samples = state["total"].clone(), int(state["n_samples"])
        for name in self._TENSORS:
            setattr(self, f"_{name}", state[name].clone())

    def result(self) -> LatentScores:
        """The score of every latent; NaN where fewer than two images have weight, or all have the same activation."""
        n = self._n_samples
        absent = self._count < n  # on some image the activation is 0
        least = torch.where(absent, self._least.clamp(max=0), self._least)
        most = torch.where(absent, self._most.clamp(min=0), self._most)
        silent = self._count == 0
        least, most = least.masked_fill(silent, 0), most.masked_fill(silent, 0)
        constant = most - least <= _LEAST_SPREAD * torch.maximum(least.abs(), most.abs())
        vector = self._sums.total - least[:, None] * self._all
        total = (self._weight - least * n).square()
        square = self._square - 2 * least * self._weight + least.square() * n
        among = total - square
        alone = ~(among > LEAST_SHARE * total)
        value = (vector.square().sum(dim=1) - square) / among
        return LatentScores(
            "monosemanticity", value.masked_fill(constant | alone, torch.nan), torch.full_like(self._count, n),
            (-1.0, 1.0), undefined({"no image activates it": silent, _CONSTANT: constant, ONE_SAMPLE: alone}),
            {"weights": "activations of all images"},
        )  # fmt: skip
