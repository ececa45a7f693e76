"""Transcoder checkpoints in the layouts of their families, with a plain re-statement of each forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from oracles.checkpoints import Checkpoint, D, K, N, greatest, noise, save_pickled

D_OUT = D + 3


def prisma_transcoder(
    folder: Path, *, k: int | None = None, layer_norm: bool = False, skip: bool = False, combined: bool = False
) -> Checkpoint:
    d_out = D if layer_norm else D_OUT
    stored = {
        "W_enc": noise(D, N, seed=1), "b_enc": noise(N, seed=2), "W_dec": noise(N, d_out, seed=3),
        "b_dec": noise(D, seed=4), "b_dec_out": noise(d_out, seed=5),
        **({"W_skip": noise(d_out, D, seed=6)} if skip else {}),
    }  # fmt: skip
    fields = {
        "hook_point_layer": 9, "layer_subtype": "ln2.hook_normalized", "expansion_factor": 64, "d_in": D,
        "d_out": d_out, "model_name": "open-clip:laion/some", "activation_fn_str": "relu" if k is None else "topk",
        "activation_fn_kwargs": {} if k is None else {"k": k}, "architecture": "transcoder", "is_transcoder": True,
        "normalize_activations": "layer_norm" if layer_norm else None, "transcoder_with_skip_connection": skip,
        "out_hook_point_layer": 9, "layer_out_subtype": "hook_mlp_out", "cls_token_only": False,
    }  # fmt: skip
    path = folder / ("n_images_1.pt" if combined else "weights.pt")
    if combined:
        save_pickled({"state_dict": stored}, path, "vit_prisma.sae.config.VisionModelSAERunnerConfig", fields, "cfg")
    else:
        torch.save(stored, path)
        (folder / "config.json").write_text(json.dumps(fields))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: value.double() for name, value in stored.items()}
        x = x.double()
        u, mean, std = x, torch.zeros(len(x), 1), torch.ones(len(x), 1)
        if layer_norm:
            mean = x.mean(1, keepdim=True)
            std = ((x - mean) ** 2).sum(1, keepdim=True).div(D - 1).sqrt()
            u = (x - mean) / (std + 1e-5)
        pre = (u - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        z = (pre if k is None else greatest(pre, k)).clamp(min=0)
        y = z @ w["W_dec"] + w["b_dec_out"]
        if skip:
            y = y + x @ w["W_skip"].T  # the input as it comes, not the normalised one
        return z, y * std + mean

    place = {"hook_name": "blocks.9.ln2.hook_normalized", "hook_name_out": "blocks.9.hook_mlp_out", "tower": "vision"}
    return Checkpoint(folder, path, forward, "prisma", metadata=place)


def sparsify_transcoder(folder: Path, *, skip: bool = False) -> Checkpoint:
    stored = {
        "encoder.weight": noise(N, D, seed=1), "encoder.bias": noise(N, seed=2), "W_dec": noise(N, D_OUT, seed=3),
        "b_dec": noise(D_OUT, seed=4), **({"W_skip": noise(D_OUT, D, seed=5)} if skip else {}),
    }  # fmt: skip
    save_file(stored, folder / "sae.safetensors")
    config = {"expansion_factor": 2, "k": K, "activation": "topk", "d_in": D, "transcode": True}
    (folder / "cfg.json").write_text(json.dumps(config))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: value.double() for name, value in stored.items()}
        z = greatest((x.double() @ w["encoder.weight"].T + w["encoder.bias"]).clamp(min=0), K)
        y = z @ w["W_dec"] + w["b_dec"]
        return z, y + x.double() @ w["W_skip"].T if skip else y

    keywords = {"hook_name": "blocks.7.ln2.hook_normalized"}
    return Checkpoint(folder, folder / "sae.safetensors", forward, "sparsify", keywords=keywords)


TRANSCODERS: dict[str, Callable[[Path], Checkpoint]] = {
    "prisma": prisma_transcoder,
    "prisma skip": lambda folder: prisma_transcoder(folder, skip=True),
    "prisma topk": lambda folder: prisma_transcoder(folder, k=K),
    "prisma layer norm": lambda folder: prisma_transcoder(folder, layer_norm=True),
    "prisma layer norm skip": lambda folder: prisma_transcoder(folder, layer_norm=True, skip=True, k=K),
    "prisma combined": lambda folder: prisma_transcoder(folder, skip=True, combined=True),
    "sparsify": sparsify_transcoder,
    "sparsify skip": lambda folder: sparsify_transcoder(folder, skip=True),
}
