"""What measures of codes come to by chance, in closed form: nothing is drawn, so nothing has a seed.

Three chances, each of another claim:

- pictures dealt to a feature at random, as many as activate it: what Clarity is without any meaning;
- pictures and texts shuffled together: what a modality score does where a feature does not tell them apart;
- energies over texts dealt to the features anew: how many features are bimodal where the two towers share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.errors import InputError


class PairCosines:
    """Mean cosine of all pairs of samples, and its standard deviation over the samples that a feature might have had.

    With unit embeddings `u_i`, `s = sum_i u_i` and `M = sum_i u_i u_i'`, the mean over pairs is
    `(|s|^2 - N) / (N (N - 1))`, and all that its variance over random subsets of `n` samples needs is in `s` and `M`:
    a pass keeps `[d_embed]` and `[d_embed d_embed]`, in float64.

    Args:
        d_embed: length of an embedding.

    Example:
        >>> pairs = PairCosines(2)
        >>> pairs.update(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
        >>> round(pairs.mean, 4), pairs.error(torch.tensor([2, 3])).round(decimals=4)
        (0.3333, tensor([0.4714, 0.0000], dtype=torch.float64))
    """

    def __init__(self, d_embed: int) -> None:
        self.total = torch.zeros(d_embed, dtype=torch.float64)
        self.outer = torch.zeros(d_embed, d_embed, dtype=torch.float64)
        self.n = 0

    def unit(self, embeddings: Tensor) -> Tensor:
        """Embeddings `[sample d_embed]` at unit length, in float64.

        Raises:
            InputError: another shape or dtype, or an embedding without direction.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != len(self.total) or not embeddings.is_floating_point():
            raise InputError(
                f"the judge's embeddings are floats [sample {len(self.total)}], got {embeddings.dtype} "
                f"{list(embeddings.shape)}"
            )
        vectors = embeddings.detach().cpu().double()
        length = vectors.norm(dim=1)
        wrong = (~length.isfinite() | (length == 0)).nonzero().flatten().tolist()
        if wrong:
            raise InputError(f"the judge's embedding of sample {wrong[0]} of the batch is zero or not finite")
        return F.normalize(vectors, dim=1)

    def update(self, embeddings: Tensor, /) -> None:
        """Take in embeddings `[sample d_embed]`, of any length but zero."""
        unit = self.unit(embeddings)
        self.total += unit.sum(dim=0)
        self.outer += unit.T @ unit
        self.n += len(unit)

    def merge(self, other: PairCosines, /) -> PairCosines:
        """Take in the samples of another one, and return itself."""
        self.total += other.total
        self.outer += other.outer
        self.n += other.n
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return {"total": self.total.clone(), "outer": self.outer.clone(), "n": self.n}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said."""
        self.total, self.outer, self.n = state["total"].clone(), state["outer"].clone(), int(state["n"])

    @property
    def mean(self) -> float:
        """Mean cosine of all pairs of different samples; NaN where there are fewer than two."""
        if self.n < 2:
            return float("nan")
        return (float(self.total @ self.total) - self.n) / (self.n * (self.n - 1))

    def error(self, count: Tensor) -> Tensor:
        """Standard deviation of the mean cosine of all pairs among `count` samples drawn without replacement.

        Args:
            count: whole numbers `[feature]`.

        Returns:
            float64 `[feature]`; NaN below two, 0 where all samples are drawn.
        """
        n, whole = count.double(), float(self.n)
        ordered = float(self.total @ self.total) - whole  # sum of the cosines of all ordered pairs
        squares = float(self.outer.square().sum()) - whole
        # Sum over i of the squared sum of its cosines: with what the pairs (i, j), (i, k) share.
        stars = float(self.total @ self.outer @ self.total) - 2 * float(self.total @ self.total) + whole
        # Chances that two, three, four given samples are all drawn.
        two = n * (n - 1) / max(whole * (whole - 1), 1)
        three = two * (n - 2) / max(whole - 2, 1)
        four = three * (n - 3) / max(whole - 3, 1)
        apart = ordered**2 - 4 * stars + 2 * squares
        second = (2 * squares * two + 4 * (stars - squares) * three + apart * four) / (n * (n - 1)).square()
        variance = (second - self.mean**2).clamp(min=0)
        return torch.where(n >= 2, torch.where(n < whole, variance.sqrt(), 0.0), torch.nan)


def shuffled_error(sums: tuple[Tensor, Tensor], squares: tuple[Tensor, Tensor], n: tuple[int, int]) -> Tensor:
    """Standard deviation of each modality score were pictures and texts shuffled together; its mean is then 1/2.

    Shuffled, the pictures' share of a feature's activations is a sum over a random subset of all samples. To first
    order in it the score moves by `n / (4 m n_img n_txt)` times that sum, with `m` the mean over all samples; where
    there are as many pictures as texts this is exact.

    Args:
        sums, squares: of activations and of their squares, over pictures and over texts, `[d_code]` each.
        n: pictures and texts.

    Returns:
        float64 `[d_code]`; NaN for a feature that is never active. Read it where it is small: of a feature that is
        active on a handful of samples the score takes a few values alone.
    """
    whole, (n_image, n_text) = sum(n), n
    total, square = sums[0] + sums[1], squares[0] + squares[1]
    mean = total / whole
    spread = ((square - whole * mean.square()) / max(whole - 1, 1)).clamp(min=0)
    deviation = (n_image * n_text / whole * spread).sqrt()  # of the sum over the pictures
    return deviation * whole / (n_image * n_text) / (4 * mean)


def dealt_share(image: Tensor, text: Tensor, band: tuple[float, float]) -> float:
    """Share of modality scores within a band over all pairs of one feature's pictures and any feature's texts.

    It is the mean over all ways to deal the energies over texts to the features anew.

    Args:
        image, text: energies of each feature over pictures and over texts, float64 `[d_code]`.
        band: the least and the greatest score, above 0 and below 1.

    Returns:
        In [0, 1]; NaN where no feature is active. Pairs without any activation have no score and do not count.
    """
    low, high = band
    alive = image + text > 0
    image, text = image[alive], text[alive].sort().values
    n_pairs = len(image) ** 2 - int((image == 0).sum()) * int((text == 0).sum())
    if n_pairs == 0:
        return float("nan")
    image = image[image > 0]
    # low <= a / (a + b) <= high says of b:
    least, most = image * (1 - high) / high, image * (1 - low) / low
    within = torch.searchsorted(text, most, right=True) - torch.searchsorted(text, least)
    return int(within.sum()) / n_pairs
