"""One step of the contrastive loss, over a batch that may be larger than what fits into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from clip_lens_ext.errors import InputError

Encode = Callable[[Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """What one step saw.

    Attributes:
        loss: contrastive loss of the whole batch, with the penalty.
        l0_image, l0_text: mean number of entries above zero in a code.
    """

    loss: float
    l0_image: float
    l0_text: float


def contrastive_step(
    encode: Encode,
    parts: Sequence[Any],
    logit_scale: Tensor,
    *,
    l1: float = 0.0,
    loss_of: ClipLoss | None = None,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> Step:
    """Add the gradient of the loss over all parts together to every parameter that `encode` depends on.

    The loss is open_clip's, of the cosines of codes times `exp(logit_scale)`, plus `l1` times the mean absolute sum of
    the un-normalised codes. With several parts all codes are made once without gradients, and then those of each part
    again with them: the gradient is that of one large batch, and memory that of one part.

    Args:
        encode: a part to codes of pictures and texts, un-normalised, `[sample d_code]`; the same part twice gives the
            same codes.
        parts: the batch in parts.
        logit_scale: natural logarithm of the factor on the cosines; it gets its gradient once.
        l1: weight of the penalty; 0 in Sparse CLIP, and an ablation otherwise.
        loss_of: open_clip's loss, which gathers over processes if it was made to; None: of one process.
        backward: what is called on a loss; the gradients are those of what it does.

    Returns:
        `Step`.

    Raises:
        InputError: no part, a batch of one sample, or a loss that is NaN or infinite.

    Example:
        >>> weight = torch.eye(2, requires_grad=True)
        >>> pictures, texts = torch.tensor([[1.0, 0.1], [0.2, 1.0]]), torch.eye(2)
        >>> step = contrastive_step(lambda rows: (pictures[rows] @ weight, texts[rows]), [[0, 1]], torch.tensor(2.0))
        >>> step.l0_image, step.l0_text, weight.grad is not None
        (2.0, 1.0, True)
    """
    if not parts:
        raise InputError("no part of a batch")
    loss_of = loss_of or ClipLoss()
    if len(parts) == 1:
        image, text = encode(parts[0])
        loss = _loss(image, text, logit_scale, l1, loss_of)
        backward(loss)
        return _seen(float(loss.detach()), image, text)
    with torch.no_grad():
        codes = [encode(part) for part in parts]
    images, texts = [image for image, _ in codes], [text for _, text in codes]
    for number, part in enumerate(parts):
        image, text = encode(part)
        whole = (
            torch.cat([*images[:number], image, *images[number + 1 :]]),
            torch.cat([*texts[:number], text, *texts[number + 1 :]]),
        )
        last = number == len(parts) - 1
        loss = _loss(*whole, logit_scale if last else logit_scale.detach(), l1, loss_of)
        backward(loss)
    return _seen(float(loss.detach()), torch.cat(images), torch.cat(texts))


def _loss(image: Tensor, text: Tensor, logit_scale: Tensor, l1: float, loss_of: ClipLoss) -> Tensor:
    if len(image) < 2:
        raise InputError("a contrastive loss needs two pairs or more in a batch")
    image, text = (code if code.dtype == torch.float64 else code.float() for code in (image, text))
    loss = loss_of(F.normalize(image, dim=-1), F.normalize(text, dim=-1), logit_scale.exp())
    if l1:
        loss = loss + l1 * (image.abs().sum(dim=-1).mean() + text.abs().sum(dim=-1).mean()) / 2
    if not torch.isfinite(loss):
        raise InputError("the loss is NaN or infinite: is the learning rate too high, or a code without direction?")
    return loss


@torch.no_grad()
def _seen(loss: float, image: Tensor, text: Tensor) -> Step:
    return Step(loss, *(float((code > 0).float().sum(dim=-1).mean()) for code in (image, text)))
