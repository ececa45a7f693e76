"""How sparse codes are, and how far a feature is of pictures, of texts, or of both: sums over one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


@dataclass(frozen=True, eq=False)
class CodeActivity:
    """What the features of a code do over some samples.

    Attributes:
        mean: mean activation of each feature, float64 `[d_code]`: its energy, or density (frequency
            weighted by magnitude).
        frequency: share of the samples in which it is active, float64 `[d_code]`.
        count: samples in which it is active, `[d_code]`.
        n: samples.
        threshold: a feature is active where its activation is greater.
    """

    mean: Tensor
    frequency: Tensor
    count: Tensor
    n: int
    threshold: float

    @property
    def l0(self) -> float:
        """Mean number of active features in a sample."""
        return float(self.frequency.sum())

    def active_share(self, n_min: int = 2) -> float:
        """Share of the features that are active in `n_min` samples or more, in 0..1; the paper has 2."""
        return float((self.count >= n_min).double().mean())

    def to_frame(self) -> pd.DataFrame:
        """A row for each feature."""
        return pd.DataFrame(
            {"mean": self.mean.numpy(), "frequency": self.frequency.numpy(), "count": self.count.numpy()}
        )

    def __repr__(self) -> str:
        return f"CodeActivity({self.n} samples, {len(self.mean)} features, L0 {self.l0:.1f})"


class StreamingActivity:
    """`CodeActivity` in one pass; an accumulator for `run_pass`.

    Args:
        d_code: features.
        threshold: a feature is active where its activation is greater; the paper's tau.

    Raises:
        InputError: a width below 1, or a threshold that is negative, NaN or infinite.

    Example:
        >>> activity = StreamingActivity(3)
        >>> activity.update(torch.tensor([[0.0, 2.0, 0.0005], [1.0, 2.0, 0.0]]))
        >>> found = activity.result()
        >>> found.l0, found.active_share(), found.mean[1].item()
        (1.5, 0.3333333333333333, 2.0)
    """

    def __init__(self, d_code: int, *, threshold: float = 0.001) -> None:
        if d_code < 1 or not 0 <= threshold < float("inf"):
            raise InputError(f"d_code is at least 1 and threshold 0 or more, got {d_code} and {threshold}")
        self.total = torch.zeros(d_code, dtype=torch.float64)
        self.count = torch.zeros(d_code, dtype=torch.int64)
        self.n, self.threshold = 0, float(threshold)

    def update(self, codes: Tensor, /) -> None:
        """Take in codes `[sample d_code]`.

        Raises:
            InputError: another shape or dtype, or a NaN, infinite or negative activation.
        """
        if codes.dim() != 2 or codes.shape[1] != len(self.total) or not codes.is_floating_point():
            raise InputError(f"codes are floats [sample {len(self.total)}], got {codes.dtype} {list(codes.shape)}")
        bad = ~(torch.isfinite(codes) & (codes >= 0)).all(dim=1)
        if bad.any():
            raise InputError(f"the code of sample {int(bad.int().argmax())} of the batch has a NaN, infinite or "
                             "negative activation: is there a ReLU behind the head?")  # fmt: skip
        self.total += codes.detach().sum(dim=0, dtype=torch.float64).cpu()
        self.count += (codes > self.threshold).sum(dim=0).cpu()
        self.n += len(codes)

    def merge(self, other: StreamingActivity, /) -> StreamingActivity:
        """Take in the samples of another one, and return itself.

        Raises:
            InputError: it has another width or threshold.
        """
        if len(other.total) != len(self.total) or other.threshold != self.threshold:
            raise InputError("activities of other widths or thresholds do not merge")
        self.total += other.total
        self.count += other.count
        self.n += other.n
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, for a checkpoint."""
        return {"total": self.total.clone(), "count": self.count.clone(), "n": self.n, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said.

        Raises:
            InputError: the state is of another width or threshold.
        """
        if len(state["total"]) != len(self.total) or state["threshold"] != self.threshold:
            raise InputError("the state is of another width or threshold")
        self.total, self.count, self.n = state["total"].clone(), state["count"].clone(), int(state["n"])

    def result(self) -> CodeActivity:
        """What the features did so far.

        Raises:
            InputError: there is no sample yet.
        """
        if self.n == 0:
            raise InputError("no sample yet")
        frequency = self.count.double() / self.n
        return CodeActivity(self.total / self.n, frequency, self.count.clone(), self.n, self.threshold)


def modality_score(image: CodeActivity | Tensor, text: CodeActivity | Tensor) -> Tensor:
    """`E_img / (E_img + E_txt)` of each feature, with `E` its mean activation; float64 `[d_code]` in [0, 1].

    1 is a feature of pictures alone, 0 one of texts alone, 0.5 one of both; NaN one that is never active. Codes are
    taken as they are: whether the published numbers divide each by its length first is not stated. Divide them
    yourself for the other reading.

    Args:
        image, text: the activity over pictures and over texts; or codes `[sample d_code]`.

    Raises:
        InputError: other widths, or what `StreamingActivity` raises.

    Example:
        >>> modality_score(torch.tensor([[1.0, 0.0, 3.0, 0.0]]), torch.tensor([[1.0, 2.0, 1.0, 0.0]]))
        tensor([0.5000, 0.0000, 0.7500,    nan], dtype=torch.float64)

    Reference:
        Papadimitriou et al. 2025, as arXiv 2601.20075 uses it; the formula is second-hand.
    """
    e_image, e_text = (_energy(one) for one in (image, text))
    if e_image.shape != e_text.shape:
        raise InputError(f"codes of {len(e_image)} and {len(e_text)} features have no common score")
    return e_image / (e_image + e_text)


def _energy(given: CodeActivity | Tensor) -> Tensor:
    if isinstance(given, CodeActivity):
        return given.mean
    if given.dim() != 2:
        raise InputError(f"codes are [sample d_code], got {list(given.shape)}")
    activity = StreamingActivity(given.shape[1])
    activity.update(given)
    return activity.result().mean
