"""What sparsity costs: zero-shot, retrieval, neighbours and a linear probe of codes, beside the dense embeddings."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.data import Skipped
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import versions
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.sparse_clip.checks import checked_count, checked_seed
from clip_lens_ext.sparse_clip.head import dense_clip
from clip_lens_ext.sparse_clip.steering_result import check_interval
from clip_lens_ext.spectrum.embedded import embed
from clip_lens_ext.spectrum.evaluation_data import EvaluationData
from clip_lens_ext.spectrum.measures import hits
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.families.headed import HeadedCLIP
from clip_lens_ext.towers.identity import tower_sha256


@dataclass(frozen=True, eq=False)
class BesideDense:
    """Measures of a Sparse CLIP and of the dense model under it, on the same samples.

    Attributes:
        measures: as `evaluate_pruning` names them: `zero-shot top-1`, `image to text R@1`, ...
        sparse, dense: share of samples that are right, in 0..1, float64 `[measure]`.
        interval: percentile interval of `sparse - dense`, over samples drawn anew together, `[measure 2]`.
        n_samples: samples of each measure, `[measure]`.
        confidence: of the intervals.
        l0_image, l0_text: mean number of entries above zero in a code of a picture, and of a caption or class; NaN
            for texts where there are none.
        d_code: entries of a code.
        n_empty: pictures, captions and prompts of classes with a code of zeros, which is like nothing: they are wrong
            in zero-shot, retrieval and kNN, where what is equally near counts as nearer.
        skipped: pictures that could not be read.
        n_bootstrap, seed: of the intervals.
        provenance: both models and hashes of their towers, data fingerprint, versions.
    """

    measures: tuple[str, ...]
    sparse: Tensor
    dense: Tensor
    interval: Tensor
    n_samples: Tensor
    confidence: float
    l0_image: float
    l0_text: float
    d_code: int
    n_empty: int
    skipped: tuple[Skipped, ...]
    n_bootstrap: int
    seed: int
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """A row for each measure."""
        return pd.DataFrame({
            "measure": self.measures, "sparse": self.sparse.numpy(), "dense": self.dense.numpy(),
            "low": self.interval[:, 0].numpy(), "high": self.interval[:, 1].numpy(), "n": self.n_samples.numpy(),
        })  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, `InputError` where that cannot be."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BesideDense:
        """Read what `save` wrote; `LoadError` if the file is something else."""
        return load_result(cls, path, fits=lambda one: len(one.measures) == len(one.sparse))

    def __str__(self) -> str:
        """A line for each measure."""
        width = max(len(name) for name in self.measures)
        active = f"{self.l0_image:.1f} of {self.d_code} features are active in a picture"
        said = "" if self.l0_text != self.l0_text else f", {self.l0_text:.1f} in a text"
        empty = f"; {self.n_empty} codes are all zeros" * bool(self.n_empty)
        lines = [f"{active}{said}{empty}", f"  {'measure':<{width}}  sparse   dense  difference, points"]
        for name, sparse, dense, (low, high) in zip(
            self.measures, self.sparse.tolist(), self.dense.tolist(), self.interval.tolist(), strict=True
        ):
            span = "" if low != low else f" ({100 * low:+.1f} to {100 * high:+.1f})"
            lines.append(f"  {name:<{width}}  {sparse:6.3f}  {dense:6.3f}  {100 * (sparse - dense):+.1f}{span}")
        return "\n".join(lines)


@torch.no_grad()
def beside_dense(
    clip: HookedCLIP,
    data: EvaluationData,
    *,
    dense: HookedCLIP | None = None,
    n_neighbors: int = 10,
    probe_c: float = 1.0,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> BesideDense:
    """Try a Sparse CLIP and its dense model on the same pictures, classes and captions.

    Codes and embeddings are compared by their cosines, as both models do.

    Args:
        clip: a Sparse CLIP.
        data: pictures with labels and classes, captions, or all; no embeddings, which are of one model alone.
        dense: what to compare with; None: the dense model under the heads.
        n_neighbors, probe_c: as in `evaluate_pruning`.
        n_bootstrap, confidence, seed: of the intervals.
        progress: draw a bar.

    Returns:
        `BesideDense`.

    Warns:
        Where codes of pictures or texts are all zeros; how many, is in the result.

    Raises:
        InputError: a model without sparse heads where `dense` is None, embeddings instead of pictures, or nothing
            that can be measured.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> world = cle.PlantedWorld(0)
        >>> batch = world.sample(24, seed=0, split="test")
        >>> data = cle.EvaluationData(cle.planted.normalise(batch.images), captions=batch.captions)
        >>> found = beside_dense(add_sparse_heads(cle.planted_clip(), 256), data, progress=False)
        >>> found.measures
        ('image to text R@1', 'image to text R@5', 'text to image R@1', 'text to image R@5')
    """
    if data.has_embeddings:
        raise InputError("embeddings are of one model, and two are compared: pass the pictures")
    checked_count(n_bootstrap, "n_bootstrap")
    check_interval(confidence)
    checked_seed(seed)
    found = {}
    plain_model = dense or dense_clip(clip)
    for name, model in (("sparse", clip), ("dense", plain_model)):
        headed = isinstance(model.native, HeadedCLIP)  # a dense model that gives zeros is broken
        embedded = embed(model, data, bar=f"{name} embeddings" if progress else None, zero=headed)
        found[name] = embedded, hits(embedded, n_neighbors=n_neighbors, probe_c=probe_c)
    (codes, sparse), (_, plain) = found["sparse"], found["dense"]
    if not sparse:
        raise InputError("nothing to measure: pass captions, or labels with classes")
    differences = [sparse[name] - plain[name] for name in sparse]
    interval = torch.cat([
        bootstrap_intervals(one[None], n_bootstrap=n_bootstrap, seed=seed, confidence=confidence) for one in differences
    ])  # fmt: skip
    texts = [part.flatten(0, -2) for part in (codes.classes, codes.texts) if part is not None]
    empty = [sum(int((~part.any(dim=1)).sum()) for part in parts) for parts in ([codes.images], texts)]
    if any(empty):
        warnings.warn(f"the codes of {empty[0]} pictures and {empty[1]} texts are all zeros: they have no direction, "
                      "and are like nothing", stacklevel=3)  # fmt: skip
    return BesideDense(
        tuple(sparse), torch.stack([one.mean() for one in sparse.values()]),
        torch.stack([plain[name].mean() for name in sparse]), interval,
        torch.tensor([len(one) for one in differences]), confidence, _l0(codes.images),
        _l0(torch.cat(texts)) if texts else float("nan"), codes.images.shape[1], sum(empty), codes.skipped, n_bootstrap,
        seed, {
            "model": clip.model_name, "model_sha256": tower_sha256(clip.vision), "dense": plain_model.model_name,
            "dense_sha256": tower_sha256(plain_model.vision), "data_fingerprint": codes.fingerprint,
            "versions": versions(),
        },
    )  # fmt: skip


def _l0(codes: Tensor) -> float:
    return float((codes > 0).double().sum(dim=1).mean())
