"""Sites that attribution is tested at: tower, variant of it, hook, token scope, width of the SAE's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oracles.models import build, inputs
from oracles.saes import build_sae

Site = tuple[str, str, str, str, int]
SITES: list[Site] = [
    ("vision", "plain", "hook_embed", "patches", 48),
    ("vision", "plain", "hook_full_embed", "all", 48),
    ("vision", "plain", "blocks.0.hook_resid_pre", "cls", 48),
    ("vision", "average", "blocks.0.hook_resid_mid", "patches", 48),
    ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48),
    ("vision", "plain", "blocks.1.hook_resid_pre", "all", 48),
    ("vision", "plain", "blocks.1.hook_resid_mid", "cls", 48),
    ("vision", "plain", "blocks.1.hook_resid_post", "cls", 48),
    ("vision", "plain", "blocks.1.hook_resid_post", "all", 48),
    ("vision", "late_norm", "blocks.1.hook_resid_post", "cls", 48),
    ("vision", "bare", "blocks.1.hook_resid_post", "patches", 48),
    ("vision", "plain", "hook_pooled", "pooled", 48),
    ("vision", "bare", "hook_embedding", "pooled", 20),
    ("text", "flattened", "blocks.0.hook_resid_mid", "all", 40),
    ("text", "eos", "blocks.1.hook_resid_post", "eot", 40),
    ("text", "flattened", "blocks.2.hook_resid_post", "eot", 40),
    ("text", "module", "blocks.2.hook_resid_post", "all", 40),
    ("text", "last", "blocks.2.hook_resid_pre", "all", 40),
    ("text", "unprojected", "hook_pooled", "pooled", 40),
    # What a block adds to the stream, with layer scale and without.
    ("vision", "plain", "blocks.0.hook_attn_out", "patches", 48),
    ("vision", "average", "blocks.0.hook_mlp_out", "all", 48),
    ("vision", "plain", "blocks.1.hook_attn_out", "cls", 48),
    ("vision", "late_norm", "blocks.1.hook_mlp_out", "cls", 48),
    ("text", "eos", "blocks.1.hook_attn_out", "eot", 40),
    ("text", "flattened", "blocks.2.hook_mlp_out", "eot", 40),
    ("text", "last", "blocks.2.hook_mlp_out", "all", 40),
]
IDS = ["-".join(site[:4]) for site in SITES]


def vectors(d_embed: int, n: int = 3, *, seed: int = 0) -> Tensor:
    """Random directions of different lengths, `[n d_embed]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_embed, generator=generator, dtype=torch.float64) * torch.arange(1, n + 1)[:, None]


def make(
    site: Site, kind: str = "topk", *, batch: int = 2, dtype: torch.dtype = torch.float64, d_sae: int = 37
) -> tuple[nn.Module, Tensor, Any, Tensor]:
    """Native model, input, SAE, and three target vectors."""
    tower, variant, hook, scope, width = site
    model = build(tower, variant).to(dtype)
    sae = build_sae(kind, width, hook, scope, dtype=dtype, tower=tower, d_sae=d_sae)
    return model, inputs(tower, batch, dtype=dtype), sae, vectors(40 if variant == "unprojected" else 20).to(dtype)
