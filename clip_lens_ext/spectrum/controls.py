"""Subspaces of the same dimension as the noise that a pruning is held against.

Directions of little variance are nearly harmless to prune whatever they are, and so are random ones where the space is
wider than what is in it. Only what the noise does beyond these says something of the noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_lens_ext.errors import UnsupportedModelError
from clip_lens_ext.spectrum.folding import projection_of
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.tower import HookedTower


def random_bases(d: int, n: int, *, seed: int) -> list[Tensor]:
    """Random (Haar) orthonormal bases of the whole space, float64 `[d d]`; the first `k` columns are the control.

    One basis serves every dimension, so a control of more dimensions holds that of fewer, as the noise does.
    """
    generator = torch.Generator().manual_seed(seed)
    return [haar(d, generator) for _ in range(n)]


def haar(d: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix `[d d]`, uniform over all of them: QR of normal numbers, with R's signs taken out."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def variance_basis(covariance: Tensor) -> Tensor:
    """Eigenvectors of a covariance, greatest variance first, `[d d]`."""
    return torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)


@torch.no_grad()
def projector_basis(clip: HookedCLIP) -> Tensor:
    """Directions of the embedding by how unevenly the projections' weights scale them, most uneven first, `[d d]`.

    With `W` the projection of a tower `[d_in d_embed]`, its last LayerNorm's gain multiplied into it, and
    `M = W'W / ||W||_F^2`: eigenvectors of the mean `M` of both towers, ordered by `|log(l / median l)|`. No data enter.

    A candidate of ours, after the idea of pruning what is anisotropic in the projectors.

    Raises:
        UnsupportedModelError: a tower does not end in a linear map.

    Reference:
        IsoCLIP, arXiv 2603.19862, for the idea; its exact procedure was not available to us.
    """
    parts = [_gram(tower) for tower in (clip.vision, clip.text) if tower is not None]
    values, vectors = torch.linalg.eigh(torch.stack(parts).mean(dim=0))
    scale = values.clamp_min(torch.finfo(values.dtype).tiny).log()
    return vectors[:, (scale - scale.median()).abs().argsort(descending=True, stable=True)]


def _gram(tower: HookedTower) -> Tensor:
    found: Any = projection_of(tower.native)
    if found is None:
        raise UnsupportedModelError(f"the {tower.cfg.tower} tower does not end in a linear map")
    weight = found.weight.T if isinstance(found, torch.nn.Linear) else found
    gain = _last_gain(tower, len(weight))
    weight = weight.double().cpu() if gain is None else weight.double().cpu() * gain[:, None]
    gram = weight.T @ weight
    return gram / gram.trace()


def _last_gain(tower: HookedTower, width: int) -> Tensor | None:
    """The gain of the LayerNorm before the projection, where there is one of that width."""
    gain = getattr(getattr(tower.reading, "ln_final", None), "weight", None)
    return gain.detach().double().cpu() if isinstance(gain, Tensor) and gain.shape == (width,) else None
