"""SAELens SAEs with random weights, and what each computes, written down from its definition in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

CLASSES: dict[str, tuple[type, type]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
}
# Every class, every way in which one unit of a latent is not one decoder row, and every input normalisation.
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "standard, b_dec kept": {"architecture": "standard", "apply_b_dec_to_input": False},
    "topk": {"architecture": "topk", "k": 6},
    "topk rescaled": {"architecture": "topk", "k": 6, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "standard, layer norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "topk rescaled, layer norm": {
        "architecture": "topk",
        "k": 6,
        "rescale_acts_by_decoder_norm": True,
        "normalize_activations": "layer_norm",
    },
    "jumprelu, constant norm": {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
}


def build_sae(
    kind: str,
    d_in: int,
    hook_name: str | None,
    token_scope: str | None,
    *,
    d_sae: int = 37,
    tower: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    reshape: bool = False,
) -> SAE[Any]:
    """An SAE of one of `KINDS` with random weights: decoder rows of every length, biases and thresholds that matter."""
    settings = dict(KINDS[kind])
    sae_class, config_class = CLASSES[settings.pop("architecture")]
    metadata = SAEMetadata(hook_name=hook_name)
    if token_scope is not None:
        metadata.token_scope = token_scope
    if tower is not None:
        metadata.tower = tower
    name = {torch.float64: "float64", torch.float32: "float32"}[dtype]
    sae = sae_class(
        config_class(
            d_in=d_in,
            d_sae=d_sae,
            dtype=name,
            metadata=metadata,
            reshape_activations="hook_z" if reshape else "none",
            **settings,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(sae.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter_name == "threshold":
                noise = 0.2 + 0.3 * noise.abs()
            elif parameter.dim() == 1:
                noise = 0.2 * noise
            elif parameter_name == "W_enc":
                noise = noise / d_in**0.5
            else:
                noise = noise * torch.linspace(0.3, 1.5, d_sae, dtype=torch.float64)[:, None] / d_in**0.5
            parameter.copy_(noise)
    return sae


class SAEFormula:
    """Encode and decode of one input row `[d_in]`, from the definition of its class."""

    def __init__(self, sae: SAE[Any]) -> None:
        self.cfg = sae.cfg
        self.architecture = sae.cfg.architecture()
        self.weights = {name: value.detach().double() for name, value in sae.state_dict().items()}

    def scale_and_shift(self, row: Tensor) -> tuple[float, float, Tensor]:
        """The factor and the shift that `decode` applies at the end, and the normalised row."""
        if self.cfg.normalize_activations == "layer_norm":
            mean = float(row.mean())
            deviation = math.sqrt(float(((row - mean) ** 2).sum()) / (len(row) - 1))
            return deviation, mean, (row - mean) / (deviation + 1e-5)
        if self.cfg.normalize_activations == "constant_norm_rescale":
            scale = math.sqrt(float((row**2).sum()) / len(row))
            return scale, 0.0, row / scale
        return 1.0, 0.0, row

    def encode(self, row: Tensor) -> Tensor:
        """Latents `[d_sae]`."""
        w = self.weights
        x = self.scale_and_shift(row.double())[2]
        if self.cfg.apply_b_dec_to_input:
            x = x - w["b_dec"]
        if self.architecture == "gated":
            gate = (x @ w["W_enc"] + w["b_gate"]) > 0
            return gate * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).clamp(min=0)
        pre = x @ w["W_enc"] + w["b_enc"]
        if self.architecture == "standard":
            return pre.clamp(min=0)
        if self.architecture == "jumprelu":
            return pre.clamp(min=0) * (pre > w["threshold"])
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * (w["W_dec"] ** 2).sum(-1).sqrt()
        kept = sorted(range(len(pre)), key=lambda i: -float(pre[i]))[: self.cfg.k]
        out = torch.zeros_like(pre)
        for i in kept:
            out[i] = max(float(pre[i]), 0.0)
        return out

    def decode(self, latents: Tensor, row: Tensor) -> Tensor:
        """Reconstruction `[d_in]` of the row that the latents came from."""
        w = self.weights
        scale, shift, _ = self.scale_and_shift(row.double())
        total = w["b_dec"].clone()
        for i in range(len(latents)):
            direction = w["W_dec"][i]
            if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
                direction = direction / (direction**2).sum().sqrt()
            total = total + latents[i] * direction
        return total * scale + shift


def scope_tokens(scope: str, n_token: int, eot: int | None = None) -> list[int]:
    """Positions of the tokens of a scope."""
    if scope == "eot":
        assert eot is not None
        return [eot]
    return {"cls": [0], "patches": list(range(1, n_token)), "all": list(range(n_token))}[scope]
