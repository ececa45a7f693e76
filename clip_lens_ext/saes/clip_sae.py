"""What SAEs of CLIP compute and no class of SAELens says: raw-sign TopK and thresholds, soft caps, input statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAEConfig
from torch import Tensor, nn

ARCHITECTURE = "clip_lens"


@dataclass
class ClipSAEConfig(SAEConfig):
    """How a `ClipSAE` activates.

    Attributes:
        activation: `"relu"`; `"topk"`: the k greatest; `"threshold"`: what is above a threshold of its own.
        k: of TopK.
        keep_sign: TopK and thresholds keep negative values, which other families set to zero.
        inclusive: a value at its threshold is kept.
        soft_cap: the latents are `soft_cap * tanh(z / soft_cap)`; 0 for none.
    """

    activation: Literal["relu", "topk", "threshold"] = "relu"
    k: int = 0
    keep_sign: bool = False
    inclusive: bool = False
    soft_cap: float = 0.0

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens' registry."""
        return ARCHITECTURE


class ClipSAE(SAE[ClipSAEConfig]):
    """An SAE with the conventions that CLIP's families have and SAELens' classes have not.

    `u = (x - input_mean) * input_scale`, less `b_dec` where `apply_b_dec_to_input`; `z = act(u W_enc + b_enc)`, with
    the soft cap after it; `x_hat = (z W_dec + b_dec) / input_scale + input_mean`.

    Attributes:
        b_enc, threshold: `[d_sae]`; the threshold counts for `activation="threshold"` alone.
        input_mean: `[d_in]`; zeros for none.
        input_scale: `[1]`; one for none.

    Example:
        >>> sae = ClipSAE(ClipSAEConfig(d_in=4, d_sae=8, activation="topk", k=3, keep_sign=True))
        >>> int((sae.encode(torch.ones(1, 4)) != 0).sum())
        3
    """

    b_enc: nn.Parameter

    def __init__(self, cfg: ClipSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)

    def initialize_weights(self) -> None:
        """As SAELens' own, with the parameters that are more here."""
        super().initialize_weights()
        like = {"dtype": self.dtype, "device": self.device}
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, **like))
        self.threshold = nn.Parameter(torch.zeros(self.cfg.d_sae, **like))
        self.input_mean = nn.Parameter(torch.zeros(self.cfg.d_in, **like))
        self.input_scale = nn.Parameter(torch.ones(1, **like))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The encoder's input: SAELens' steps, with the input statistics before them."""
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        x = self.run_time_activation_norm_fn_in((x - self.input_mean) * self.input_scale)
        return x - self.b_dec * self.cfg.apply_b_dec_to_input

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[... d_sae]`."""
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        z = self._activate(pre)
        if self.cfg.soft_cap:
            z = self.cfg.soft_cap * torch.tanh(z / self.cfg.soft_cap)
        return self.hook_sae_acts_post(z)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[... d_in]`."""
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        out = self.run_time_activation_norm_fn_out(out) / self.input_scale + self.input_mean
        return self.reshape_fn_out(out, self.d_head)

    def _activate(self, pre: Tensor) -> Tensor:
        if self.cfg.activation == "relu":
            return pre.relu()
        if self.cfg.activation == "topk":
            value, index = pre.topk(self.cfg.k, dim=-1, sorted=False)
            value = value if self.cfg.keep_sign else value.relu()
            return torch.zeros_like(pre).scatter(-1, index, value)
        shown = pre if self.cfg.keep_sign else pre.relu()
        passes = shown >= self.threshold if self.cfg.inclusive else shown > self.threshold
        return torch.where(passes, shown, torch.zeros_like(shown))

    def fold_W_dec_norm(self) -> None:
        """Refused: rescaled latents would pass other thresholds, another TopK and another cap."""
        raise NotImplementedError("folding decoder norms would change which latents of a ClipSAE are active")


if ARCHITECTURE not in SAE_CLASS_REGISTRY:  # a module may be imported again under test runners
    register_sae_class(ARCHITECTURE, ClipSAE, ClipSAEConfig)
