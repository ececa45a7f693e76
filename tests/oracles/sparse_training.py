"""A tiny Sparse CLIP with its data, and a training of heads written from the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.sparse_clip import EmbeddedPairs, SparseTraining, add_sparse_heads
from oracles.models import build_clip

N, CODE = 26, 48
QUICK: dict[str, Any] = {"batch_size": 8, "n_epochs": 3, "lr": 1e-2, "largest_logit_scale": 16.0, "progress": False}


def tokenizer(texts: list[str]) -> Tensor:
    """Nine token ids of each text, the last one the largest, where open_clip pools."""
    rows = [[(7 * i + ord(c)) % 48 for i, c in enumerate(f"{text:<8}"[:8])] + [49] for text in texts]
    return torch.tensor(rows)


def dense(**settings: Any) -> cle.HookedCLIP:
    return cle.HookedCLIP(build_clip(**settings), tokenizer=tokenizer, model_name="tiny")


def sparse(**settings: Any) -> cle.HookedCLIP:
    return add_sparse_heads(dense(), CODE, seed=4, **settings)


def data() -> tuple[Tensor, list[list[str]]]:
    images = torch.randn(N, 3, 24, 32, generator=torch.Generator().manual_seed(5))
    return images, [[f"picture {i}"] + [f"also {i}"] * (i % 3 == 0) for i in range(N)]


def weights(found: SparseTraining) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.clip.native.state_dict().items()}


def same(one: SparseTraining, other: SparseTraining, **tolerance: float) -> None:
    there = weights(other)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, there[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)
    assert one.history.columns.equals(other.history.columns)
    np.testing.assert_allclose(one.history, other.history, rtol=tolerance.get("rtol", 0) * 10)


def by_the_formula(
    clip: cle.HookedCLIP, pairs: EmbeddedPairs, cap: float, lr: float, n_steps: int, l1: float, n_warmup: int
) -> Any:
    """AdamW as it is published, on the loss as the paper has it; the batches by the order that is documented."""
    native: Any = clip.native
    image, text, log_scale = (
        value.detach().double().clone().requires_grad_()
        for value in (native.image_head.weight, native.text_head.weight, native.logit_scale)
    )
    moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in (image, text, log_scale)]
    losses = []
    per_epoch = len(pairs.images) // 8
    for step in range(n_steps):
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(1_000_003 + epoch)
        order = torch.randperm(len(pairs.images), generator=generator)[8 * place : 8 * place + 8].tolist()
        draws = torch.rand(len(pairs.images), generator=generator, dtype=torch.float64)
        chosen = []
        for i in order:
            own = pairs.entries[pairs.first[i] : pairs.first[i + 1]].tolist()
            chosen.append(own[int(draws[i] * len(own))])
        z, t = (
            (pairs.images[order].double() @ image.T).clamp(min=0),
            (pairs.texts[chosen].double() @ text.T).clamp(min=0),
        )
        logits = log_scale.exp() * (z / z.norm(dim=1, keepdim=True)) @ (t / t.norm(dim=1, keepdim=True)).T
        own = logits.diagonal()
        loss = ((logits.logsumexp(1) - own).mean() + (logits.logsumexp(0) - own).mean()) / 2
        loss = loss + l1 * (z.abs().sum(1).mean() + t.abs().sum(1).mean()) / 2
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, (image, text, log_scale))
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        rate = lr * (step + 1) / n_warmup if step < n_warmup else (
            lr * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))
        )  # fmt: skip
        with torch.no_grad():
            for w, g, (m, v) in zip((image, text, log_scale), gradients, moments, strict=True):
                g = g * min(1.0, 1 / norm)
                if w.ndim == 2:
                    w -= rate * 0.2 * w
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.98).add_(0.02 * g * g)
                w -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.98 ** (step + 1))).sqrt() + 1e-6)
            log_scale.clamp_(0, math.log(cap))
    return image, text, log_scale, losses
