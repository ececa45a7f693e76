"""One step: the loss by its formula, and a batch in parts with the gradient of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip import SparseHead
from clip_lens_ext.sparse_clip.contrastive import contrastive_step

N, D, CODE = 12, 5, 40


def embeddings(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = SparseHead(D, CODE, seed=0).double(), SparseHead(D, CODE, seed=1).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(embeddings(2)[rows]), self.text(embeddings(3)[rows])


def loss_by_loops(heads: Heads, l1: float) -> float:
    """Cross-entropy of each row and each column of the scaled cosines, and the penalty."""
    with torch.no_grad():
        image, text = (codes.tolist() for codes in heads.codes(torch.arange(N)))
    length = [[math.sqrt(sum(v * v for v in code)) for code in codes] for codes in (image, text)]
    s = math.exp(float(heads.scale))
    logits = [[s * sum(a * b for a, b in zip(image[i], text[j], strict=True)) / length[0][i] / length[1][j]
               for j in range(N)] for i in range(N)]  # fmt: skip
    rows = [math.log(sum(math.exp(v) for v in logits[i])) - logits[i][i] for i in range(N)]
    columns = [math.log(sum(math.exp(logits[i][j]) for i in range(N))) - logits[j][j] for j in range(N)]
    penalty = sum(sum(abs(v) for v in code) for codes in (image, text) for code in codes) / (2 * N)
    return (sum(rows) + sum(columns)) / (2 * N) + l1 * penalty


@pytest.mark.parametrize("l1", [0.0, 0.03])
@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3)])
def test_the_loss_and_its_gradient(l1: float, sizes: tuple[int, ...]) -> None:
    heads = Heads()
    parts = torch.arange(N).split(list(sizes))
    step = contrastive_step(heads.codes, parts, heads.scale, l1=l1)
    assert step.loss == pytest.approx(loss_by_loops(heads, l1), rel=1e-5)  # the loss is taken in float32
    with torch.no_grad():
        image, text = heads.codes(torch.arange(N))
    assert step.l0_image == pytest.approx(float((image > 0).sum()) / N)
    assert step.l0_text == pytest.approx(float((text > 0).sum()) / N)
    for parameter in heads.parameters():
        assert parameter.grad is not None
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for place in (0, len(flat) // 2, len(flat) - 1):
            kept = float(flat[place])
            ends = []
            for shift in (1e-5, -1e-5):
                flat[place] = kept + shift
                ends.append(loss_by_loops(heads, l1))
            flat[place] = kept
            assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_wrong_batches() -> None:
    heads = Heads()
    with pytest.raises(InputError, match="no part"):
        contrastive_step(heads.codes, [], heads.scale)
    with pytest.raises(InputError, match="two pairs"):
        contrastive_step(heads.codes, [torch.tensor([0])], heads.scale)
    with torch.no_grad():
        heads.image.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN or infinite"):
        contrastive_step(heads.codes, [torch.arange(N)], heads.scale)
