"""Which features a cosine is made of: in a sparse code it is a sum over features, and nothing has to be estimated.

`y = sum_i z_i z'_i / (|z| |z'|)`, with `z` the code of a picture and `z'` that of a text. The terms are exact and add
up; with codes that are nowhere below zero, none of them is negative. A term is what a feature adds to the cosine with
the lengths as they are. Setting the feature to zero also shortens the code, which raises all the other terms; that is
what `feature_ablation` has, exactly too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.targets import Target, text_target
from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import versions
from clip_lens_ext.sparse_clip.checks import checked_codes
from clip_lens_ext.sparse_clip.steering import EMBEDDING
from clip_lens_ext.towers.clip import HookedCLIP

_DOMINANT = 1 - 1e-6  # share of the squared length from which on subtracting it would lose the digits of the rest


class Contributions(NamedTuple):
    """Of every active feature of every sample, float64."""

    sample: Tensor
    """`[pair]`, sorted by sample, then feature."""
    feature: Tensor
    """`[pair]`."""
    value: Tensor
    """`[pair target]`."""
    cosine: Tensor
    """`[sample target]`."""


def additive_attribution(
    clip: HookedCLIP,
    images: Any,
    texts: str | Sequence[str] | Target,
    *,
    logit_scale: bool = False,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
) -> Attribution:
    """How much each active feature adds to the cosine of each picture with each text: `z_i z'_i / (|z| |z'|)`.

    The attributions of a sample add up to its cosine. Positive where the feature is active in the text too, zero
    where it is not; never negative between two codes of ReLU heads.

    Args:
        clip: a Sparse CLIP.
        images: as `clip_lens_ext.data.image_batches` takes them.
        texts: prompts, or a target of the code's width, such as `image_target` and `direction_target` make.
        logit_scale: times `exp(clip.logit_scale)`: what each feature adds to the logit.
        preprocess: instead of the model's own.
        batch_size: pictures in a batch.

    Returns:
        `Attribution` at `hook_embedding`, on the CPU. There is no SAE, and so nothing that one leaves out: its error
        term is `"none"`.

    Raises:
        InputError: codes below zero, as of a dense model; a target of another width, or whose prediction is no cosine;
            no picture that can be read.

    Numerics:
        In float64, stored as float32 where the model is not in float64: sums agree with the cosine to 1e-6.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> sparse, picture = add_sparse_heads(cle.planted_clip(), 64), torch.zeros(1, 3, 48, 48)
        >>> found = additive_attribution(sparse, picture, "a heart")
        >>> bool((found.dense().sum(-1) - sparse.similarity(picture, "a heart").detach()).abs().max() < 1e-6)
        True

    Reference:
        The cosine is that of Qin et al. (2026), Sparse CLIP, arXiv 2601.20075; the sum is its definition.
    """
    return _attribution(clip, images, texts, "additive", logit_scale, preprocess, batch_size)


def feature_ablation(
    clip: HookedCLIP,
    images: Any,
    texts: str | Sequence[str] | Target,
    *,
    logit_scale: bool = False,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
) -> Attribution:
    """How far the cosine falls with one feature of the picture set to zero, exactly: `y - y_without_i`.

    `y_without_i = (y |z| - z_i z'_i / |z'|) / sqrt(|z|^2 - z_i^2)`: no model is run for it. Positive where the feature
    raises the cosine, the sign of `exact_ablation`; negative where the text does not have the feature, which then only
    lengthens the code. A code of that feature alone has no direction without it, and the cosine is zero then.

    Args:
        clip, images, texts, logit_scale, preprocess, batch_size: as in `additive_attribution`.

    Returns:
        `Attribution` at `hook_embedding`, on the CPU.

    Raises:
        InputError: as `additive_attribution` raises.

    Numerics:
        In float64. Where one feature has all but a millionth of the squared length, the rest is summed anew.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> sparse, picture = add_sparse_heads(cle.planted_clip(), 64), torch.zeros(1, 3, 48, 48)
        >>> feature_ablation(sparse, picture, ["a heart", "a kite"]).top(2).values.shape
        torch.Size([1, 2, 2])
    """
    return _attribution(clip, images, texts, "feature_ablation", logit_scale, preprocess, batch_size)


@torch.no_grad()
def contributions(codes: Tensor, vectors: Tensor) -> Contributions:
    """The terms `z_i z'_i / (|z| |z'|)` of cosines of codes `[sample d_code]` and vectors `[target d_code]`.

    Features that are not active in the sample are left out. A code or vector of zeros has the cosine zero.

    Raises:
        InputError: codes that are none, or vectors of another width or not finite.

    Example:
        >>> found = contributions(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
        >>> found.feature, found.value.flatten()
        (tensor([0, 1]), tensor([0.0000, 0.8000], dtype=torch.float64))
    """
    unit, target = _units(codes, vectors)
    sample, feature = (codes > 0).nonzero(as_tuple=True)
    value = unit[sample, feature][:, None] * target.T[feature]
    return Contributions(sample, feature, value, unit @ target.T)


@torch.no_grad()
def ablated_cosines(codes: Tensor, vectors: Tensor) -> Contributions:
    """The cosines without each active feature of each sample, as `value`, and those with all as `cosine`.

    Raises:
        InputError: as `contributions` raises.

    Example:
        >>> found = ablated_cosines(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0]]))
        >>> found.feature, found.value.flatten()
        (tensor([0, 1, 1]), tensor([1., 0., 0.], dtype=torch.float64))
    """
    unit, target = _units(codes, vectors)
    sample, feature, value, cosine = contributions(codes, vectors)
    share = unit[sample, feature].square()  # of the squared length
    without = (cosine[sample] - value) / (1 - share).clamp(min=1e-300).sqrt()[:, None]
    dominant = (share > _DOMINANT).nonzero().flatten()
    if len(dominant):
        rest = codes[sample[dominant]].double()
        rest[torch.arange(len(dominant)), feature[dominant]] = 0
        without[dominant] = F.normalize(rest, dim=-1, eps=1e-300) @ target.T
    return Contributions(sample, feature, without, cosine)


def _units(codes: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    checked_codes(codes)
    if vectors.dim() != 2 or vectors.shape[1] != codes.shape[1] or not torch.isfinite(vectors).all():
        raise InputError(f"vectors are finite [target {codes.shape[1]}], got {list(vectors.shape)}")
    return (F.normalize(codes.double(), dim=-1, eps=1e-300),
            F.normalize(vectors.to(codes.device).double(), dim=-1, eps=1e-300))  # fmt: skip


def _attribution(
    clip: HookedCLIP, images: Any, texts: str | Sequence[str] | Target, method: str, logit_scale: bool,
    preprocess: Preprocess | None, batch_size: int,
) -> Attribution:  # fmt: skip
    target = texts if isinstance(texts, Target) else text_target(clip, texts)
    if not target.cosine:
        raise InputError("predictions are cosines here, and this target's is an inner product: pass "
                         "direction_target(vectors)")  # fmt: skip
    factor = float(clip.logit_scale.detach().double().exp()) if logit_scale else 1.0
    batches = image_batches(images, preprocess=preprocess or clip.preprocess, batch_size=batch_size)
    cfg = clip.vision.cfg
    parts: list[Contributions] = []
    activation: list[Tensor] = []
    names: list[str] = []
    n_empty = 0
    for batch in batches:
        with torch.no_grad():
            codes = clip.embed_images(batch.pixels.to(cfg.device, cfg.dtype))
        found = (contributions if method == "additive" else ablated_cosines)(codes, target.vectors)
        value = found.value if method == "additive" else found.cosine[found.sample] - found.value
        parts.append(Contributions(found.sample + len(names), found.feature, value * factor, found.cosine * factor))
        activation.append(codes[found.sample, found.feature])
        n_empty += int((~(codes > 0).any(dim=1)).sum())
        names += batch.names
    n_mute = int((~(target.vectors != 0).any(dim=1)).sum())
    for n, what in ((n_empty, "pictures"), (n_mute, "texts")):
        if n:
            warnings.warn(f"{n} {what} have a code of zeros, which has no direction: their cosines are set to zero",
                          stacklevel=3)  # fmt: skip
    if batches.skipped:
        named = "; ".join(f"{skip.name}: {skip.reason}" for skip in batches.skipped[:3])
        warnings.warn(f"{len(batches.skipped)} pictures could not be read and are left out ({named})", stacklevel=3)
    dtype = torch.float64 if cfg.dtype == torch.float64 else torch.float32
    sample, latent, value, prediction = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Attribution(
        method=method, sample=sample, latent=latent, value=value.to(dtype), activation=torch.cat(activation).cpu(),
        prediction=prediction.to(dtype), labels=target.labels, n_sample=len(names), d_sae=cfg.d_embed,
        hook_name=EMBEDDING, tower="vision", token_scope="pooled", error_term="none",
        unit="logit" if logit_scale else "cosine", sample_names=tuple(names),
        provenance={"model": clip.model_name, "data_fingerprint": batches.fingerprint,
                    "target_fingerprint": target.fingerprint, "versions": versions(),
                    "skipped": [[skip.name, skip.reason] for skip in batches.skipped]},
    )  # fmt: skip
