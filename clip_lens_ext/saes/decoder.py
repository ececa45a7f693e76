"""What one unit of a latent adds to an SAE's reconstruction.

`decode` of every SAELens class is affine in the latents: `x_hat = scale * (z @ D) + c`. `D` is `W_dec`, with the rows
divided by their norms where the SAE rescales its latents by them; `scale` is one number per token where the SAE
normalises its input (layer norm, constant norm), and 1 else. Attribution needs both, and reading `W_dec` alone is
silently wrong wherever one of them is not trivial.
"""

from __future__ import annotations

import weakref

import torch
from sae_lens import SAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.clip_sae import ClipSAE

_CHECKED: weakref.WeakSet[SAE] = weakref.WeakSet()


def decoder_rows(sae: SAE, latents: Tensor) -> Tensor:
    """Rows `D[latents]` `[n d_in]` of the effective decoder."""
    rows = sae.W_dec[latents]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows


@torch.no_grad()
def output_scale(sae: SAE, rows: Tensor) -> Tensor:
    """The factor `[row 1]` between `z @ D` and the reconstruction, for the input rows `[row d_in]`."""
    if isinstance(sae, ClipSAE):
        return _normalised_scale(sae, (rows - sae.input_mean) * sae.input_scale) / sae.input_scale
    return _normalised_scale(sae, rows)


def _normalised_scale(sae: SAE, rows: Tensor) -> Tensor:
    kind = sae.cfg.normalize_activations
    if kind == "layer_norm":
        return (rows - rows.mean(dim=-1, keepdim=True)).std(dim=-1, keepdim=True)
    if kind == "constant_norm_rescale":
        return rows.norm(dim=-1, keepdim=True) / sae.cfg.d_in**0.5
    return rows.new_ones(len(rows), 1)


def check_reconstructs(sae: SAE) -> None:
    """Raise `InputError` for a transcoder, which gives another hook's activations and reconstructs none.

    Example:
        >>> from sae_lens import StandardSAE, StandardSAEConfig
        >>> check_reconstructs(StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)))
    """
    if isinstance(sae, Transcoder):
        source, to = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out or "another hook"
        raise InputError(
            f"this is a transcoder from {source} to {to}: it reconstructs neither, so that there is no error term, and "
            "nothing to splice or to attribute at one hook; encode() gives its latents, and sae(x) its output"
        )


@torch.no_grad()
def check_decoder(sae: SAE, row: Tensor, latents: Tensor) -> None:
    """Raise `InputError` unless `decode` is the affine map that this module says. Each SAE is tried once.

    Args:
        sae: the SAE.
        row: one input row `[1 d_in]`.
        latents: latents to try, together and with different amounts.
    """
    check_reconstructs(sae)
    if sae in _CHECKED:
        return
    row, latents = row.to(sae.dtype), latents.unique()[:16]
    codes = sae.encode(row) * 0  # encode comes before each decode: SAEs that normalise keep its scale for it
    base = sae.decode(codes)
    amounts = torch.linspace(1, 2, len(latents), dtype=sae.dtype, device=row.device)
    codes = sae.encode(row) * 0
    codes[0, latents] = amounts
    found = sae.decode(codes) - base
    expected = output_scale(sae, row) * (amounts @ decoder_rows(sae, latents))
    # The difference of two reconstructions carries their rounding, hence the size of `base` in the tolerance.
    slack = 100 * torch.finfo(sae.dtype).eps * (expected.abs().max() + base.abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=float(slack)):
        raise InputError(
            f"{type(sae).__name__}.decode is not what SAELens' classes compute: its latents add something else "
            "than their decoder rows, so attributions from W_dec would be wrong for it"
        )
    _CHECKED.add(sae)
