"""What transcoders of CLIP compute and no class of SAELens says: an input bias, TopK, and layer norm around a skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from torch import Tensor, nn

ARCHITECTURE = "clip_lens_transcoder"


@dataclass
class ClipTranscoderConfig(TranscoderConfig):
    """How a `ClipTranscoder` activates.

    Attributes:
        apply_b_dec_to_input: always False: the decoder's bias is the output's.
        activation: `"relu"`, or `"topk"`: the k greatest, of which the positive ones stay.
        k: of TopK.
    """

    apply_b_dec_to_input: bool = False
    activation: Literal["relu", "topk"] = "relu"
    k: int = 0

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens' registry."""
        return ARCHITECTURE


class ClipTranscoder(Transcoder):
    """A transcoder: it reads one hook and gives what another one has, `[... d_in]` to `[... d_out]`.

    `z = act((norm(x) - b_in) W_enc + b_enc)`; `y = unnorm(z W_dec + b_dec + x W_skip^T)`. The norm is a layer norm or
    nothing; it is undone with the input's own mean and deviation, around the skip connection as well, which reads the
    input as it comes. `decode` gives `z W_dec + b_dec` alone.

    Attributes:
        b_in: `[d_in]`; zeros for none.
        W_skip: `[d_out d_in]`; zeros for none.

    Example:
        >>> sae = ClipTranscoder(ClipTranscoderConfig(d_in=4, d_out=6, d_sae=8, activation="topk", k=3))
        >>> sae(torch.ones(2, 4)).shape
        torch.Size([2, 6])
    """

    cfg: ClipTranscoderConfig

    def initialize_weights(self) -> None:
        """As SAELens' own, with the parameters that are more here."""
        super().initialize_weights()
        like = {"dtype": self.dtype, "device": self.device}
        self.b_in = nn.Parameter(torch.zeros(self.cfg.d_in, **like))
        self.W_skip = nn.Parameter(torch.zeros(self.cfg.d_out, self.cfg.d_in, **like))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The encoder's input: normalised, less the input bias."""
        return super().process_sae_in(sae_in) - self.b_in

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[... d_sae]`, never negative."""
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if self.cfg.activation == "topk":
            value, index = pre.topk(self.cfg.k, dim=-1, sorted=False)
            pre = torch.zeros_like(pre).scatter(-1, index, value)
        return self.hook_sae_acts_post(pre.relu())

    def forward(self, x: Tensor) -> Tensor:
        """What the other hook has, `[... d_out]`."""
        return self.forward_with_activations(x)[0]

    def forward_with_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the other hook has, `[... d_out]`, and the latents `[... d_sae]`."""
        z = self.encode(x)
        y = self.decode(z) + x.to(self.dtype) @ self.W_skip.T
        return self.run_time_activation_norm_fn_out(y), z


if ARCHITECTURE not in SAE_CLASS_REGISTRY:  # a module may be imported again under test runners
    register_sae_class(ARCHITECTURE, ClipTranscoder, ClipTranscoderConfig)
