"""What codes, features and labels have to be, checked before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


def checked_codes(codes: Any, d_code: int | None = None, *, what: str = "codes") -> Tensor:
    """Codes `[sample d_code]` as they are.

    Raises:
        InputError: no tensor, another shape or width, no floats, no sample, or a NaN, infinite or negative activation.

    Example:
        >>> checked_codes(torch.tensor([[0.0, 2.0]])).shape
        torch.Size([1, 2])
    """
    if not isinstance(codes, Tensor):
        raise InputError(f"{what} are a tensor [sample d_code], got a {type(codes).__name__}")
    fits = codes.dim() == 2 and codes.numel() > 0 and (d_code is None or codes.shape[1] == d_code)
    if not fits or not codes.is_floating_point():
        width = "d_code" if d_code is None else d_code
        raise InputError(f"{what} are floats [sample {width}], at least one, got {codes.dtype} {list(codes.shape)}")
    bad = ~(torch.isfinite(codes) & (codes >= 0)).all(dim=1)
    if bad.any():
        raise InputError(
            f"{what}: the code of sample {int(bad.int().argmax())} has a NaN, infinite or negative activation: is "
            "there a ReLU behind the head?"
        )
    return codes


def checked_features(features: Sequence[int] | Tensor, d_code: int, *, what: str = "features") -> Tensor:
    """Numbers of features, int64 `[feature]`, or `[sample feature]` where they are given so.

    Raises:
        InputError: no whole numbers, one that the code does not have, or one twice.

    Example:
        >>> checked_features([3, 1], 4)
        tensor([3, 1])
    """
    try:
        found = torch.as_tensor(features)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} are numbers of features, got {features!r}") from error
    if found.numel() == 0 and found.dim() == 1:
        return found.new_zeros(0, dtype=torch.int64)
    if found.dim() not in (1, 2) or found.is_floating_point() or found.dtype in (torch.bool, torch.complex64):
        raise InputError(
            f"{what} are whole numbers [feature] or [sample feature], got {found.dtype} {list(found.shape)}"
        )
    found = found.long()
    if found.numel() and (int(found.min()) < 0 or int(found.max()) >= d_code):
        wrong = int(found.min()) if int(found.min()) < 0 else int(found.max())
        raise InputError(f"{what}: the code has the features 0..{d_code - 1}, and there is no {wrong}")
    ordered = found.sort(dim=-1).values
    if (ordered.diff(dim=-1) == 0).any():
        raise InputError(f"{what}: a feature is named twice in {found.tolist()}"[:300])
    return found


def checked_labels(labels: Any, n_sample: int, n_class: int) -> Tensor:
    """Classes of samples as int64 `[sample]`.

    Raises:
        InputError: another number of them, no whole numbers, or a class that there is not.

    Example:
        >>> checked_labels([1, 0], 2, 2)
        tensor([1, 0])
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = repr(labels)[:80]
        raise InputError(f"labels are whole numbers, one for each of {n_sample} samples; got {shown}") from error
    if found.shape != (n_sample,) or found.is_floating_point() or found.dtype == torch.bool:
        raise InputError(f"labels are whole numbers, one for each of {n_sample} samples; got {found.dtype} "
                         f"{list(found.shape)}")  # fmt: skip
    if int(found.min()) < 0 or int(found.max()) >= n_class:
        raise InputError(f"labels are in 0..{n_class - 1}, got {int(found.min())}..{int(found.max())}")
    return found.long().cpu()


def checked_words(words: str | Iterable[str], *, what: str = "words") -> tuple[str, ...]:
    """Distinct words or phrases.

    Raises:
        InputError: none, one that is empty or no string, or one twice.

    Example:
        >>> checked_words("dog"), checked_words(["dog", "cat"])
        (('dog',), ('dog', 'cat'))
    """
    found = (words,) if isinstance(words, str) else tuple(words)
    wrong = [word for word in found if not isinstance(word, str) or not word.strip()]
    if not found or wrong:
        shown = repr(wrong[0]) if wrong else "none"
        raise InputError(f"{what} are strings with something in them, at least one; got {shown}")
    if len(set(found)) < len(found):
        twice = next(word for word, n in Counter(found).items() if n > 1)
        raise InputError(f"{what}: {twice!r} is there twice, and each is needed once")
    return found


def checked_count(value: Any, what: str, at_least: int = 1) -> int:
    """A whole number of something.

    Raises:
        InputError: no whole number, or too small.

    Example:
        >>> checked_count(2, "k")
        2
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"{what} is a whole number, at least {at_least}; got {value!r}")
    return value


def checked_strengths(strengths: float | Sequence[float]) -> tuple[float, ...]:
    """Activations above zero that features are set to.

    Raises:
        InputError: none, or one that is not finite or not above zero; a feature at zero is a suppressed one.

    Example:
        >>> checked_strengths([0.5, 2])
        (0.5, 2.0)
    """
    plain: Any = strengths.tolist() if isinstance(strengths, Tensor) else strengths
    given = tuple(plain) if isinstance(plain, Iterable) and not isinstance(plain, str) else (plain,)
    if not given or any(isinstance(one, bool) or not isinstance(one, Real) or not 0 < float(one) < float("inf")
                        for one in given):  # fmt: skip
        raise InputError(f"a strength is an activation above zero and finite, got {strengths!r}; to set a feature to "
                         "zero, suppress it")  # fmt: skip
    return tuple(float(one) for one in given)


def checked_seed(seed: Any) -> int:
    """Of what is drawn at random.

    Raises:
        InputError: no whole number, or one below 0.

    Example:
        >>> checked_seed(0)
        0
    """
    return checked_count(seed, "seed", 0)


def below_float32(weight: Tensor) -> bool:
    """Whether a weight is of a dtype in which an optimiser's small steps are rounded away.

    Example:
        >>> below_float32(torch.zeros(1, dtype=torch.bfloat16)), below_float32(torch.zeros(1))
        (True, False)
    """
    return weight.is_floating_point() and weight.dtype.itemsize < torch.float32.itemsize
