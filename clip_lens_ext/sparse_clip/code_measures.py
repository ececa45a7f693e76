"""The published measures of a code, each beside what chance gives: L0, active share, Clarity, modality, density.

For the codes of a Sparse CLIP as for those of an SAE trained afterwards, in one piece or over batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import versions
from clip_lens_ext.saes.codes import SparseCodes
from clip_lens_ext.semantics.peaks import peaks
from clip_lens_ext.semantics.streaming import StreamingClarity
from clip_lens_ext.sparse_clip.chance import PairCosines, shuffled_error
from clip_lens_ext.sparse_clip.code_measures_result import CodeMeasures
from clip_lens_ext.sparse_clip.metrics import StreamingActivity

BAND = (0.25, 0.75)  # neither modality has more than three times the energy of the other
_ROWS = 512  # samples that are made dense at a time


class CodeBatch(NamedTuple):
    """Codes of some pictures with a judge's embeddings of the same, and codes of some texts; either may be missing."""

    images: Tensor | SparseCodes | None = None
    judge: Tensor | None = None
    texts: Tensor | SparseCodes | None = None


class StreamingCodeMeasures:
    """`CodeMeasures` in one pass; an accumulator for `run_pass`.

    Args:
        d_code: features.
        d_embed: length of the judge's embeddings.
        threshold: a sample activates a feature if its activation is greater; the paper's tau.
        n_min: samples that an active feature has at least, 2 or more.
        band: modality scores that count as bimodal, within (0, 1). The paper has no number for it.

    Raises:
        InputError: a width below 1, a negative threshold, `n_min` below 2, or a band that is none.

    Example:
        >>> measures = StreamingCodeMeasures(d_code=2, d_embed=2)
        >>> measures.update(CodeBatch(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.eye(2)))
        >>> measures.update(CodeBatch(texts=torch.tensor([[3.0, 0.0]])))
        >>> found = measures.result()
        >>> found.clarity, found.modality
        (tensor([0., nan], dtype=torch.float64), tensor([0.3333, 1.0000], dtype=torch.float64))
    """

    def __init__(
        self, d_code: int, d_embed: int, *, threshold: float = 0.001, n_min: int = 2, band: tuple[float, float] = BAND
    ) -> None:
        if len(band) != 2 or not 0 < band[0] <= band[1] < 1:
            raise InputError(f"band is the least and the greatest bimodal score, within (0, 1); got {band}")
        self.image, self.text = (StreamingActivity(d_code, threshold=threshold) for _ in range(2))
        self.clarity = StreamingClarity(d_code, d_embed, threshold=threshold, n_min=n_min)
        self.pairs = PairCosines(d_embed)
        self.square = torch.zeros(2, d_code, dtype=torch.float64)
        self.band = (float(band[0]), float(band[1]))

    def update(self, batch: CodeBatch, /) -> None:
        """Take in a batch.

        Args:
            batch: `images` and `texts` are floats `[sample d_code]`, zero or positive, or `SparseCodes`, of which a
                sample counts with its greatest activation over tokens; `judge` is `[sample d_embed]` of the pictures,
                of any length but zero.

        Raises:
            InputError: shapes, dtypes or numbers that do not go together; pictures without a judge's embeddings or
                the other way round; a NaN, infinite or negative activation; an embedding without direction. Nothing
                of the batch is taken in then.
        """
        d_code = len(self.image.total)
        if (batch.images is None) != (batch.judge is None):
            raise InputError("codes of pictures need a judge's embeddings of the same pictures beside them")
        for codes in (batch.images, batch.texts):
            if codes is not None:
                check_codes(codes, d_code)
        if batch.images is not None and batch.judge is not None:
            unit, n = self.pairs.unit(batch.judge), _n_samples(batch.images)
            if len(unit) != n:
                raise InputError(f"codes of {n} pictures and a judge's embeddings of {len(unit)} do not go together")
            for part, rows in _dense(batch.images):
                self.image.update(rows)
                self.square[0] += rows.double().square().sum(dim=0)
                self.clarity.update(rows, unit[part])
            self.pairs.update(unit)
        if batch.texts is not None:
            for _, rows in _dense(batch.texts):
                self.text.update(rows)
                self.square[1] += rows.double().square().sum(dim=0)

    def merge(self, other: StreamingCodeMeasures, /) -> StreamingCodeMeasures:
        """Take in the samples of another one, and return itself.

        Raises:
            InputError: it has other widths, or another threshold, `n_min` or band.
        """
        if self.band != other.band:
            raise InputError(f"measures with the bands {self.band} and {other.band} do not merge")
        self.clarity.merge(other.clarity)  # first: it refuses what does not fit
        self.image.merge(other.image)
        self.text.merge(other.text)
        self.pairs.merge(other.pairs)
        self.square += other.square
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, for a checkpoint."""
        parts = {f"{name}.{key}": value for name, part in self._parts() for key, value in part.state_dict().items()}
        return {**parts, "square": self.square.clone(), "band": ",".join(map(repr, self.band))}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what `state_dict` said.

        Raises:
            InputError: the state is of other widths or settings.
        """
        if state["band"] != ",".join(map(repr, self.band)):
            raise InputError(f"the state has the band {state['band']}, and this one {self.band}")
        for name, part in self._parts():
            part.load_state_dict(
                {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            )
        self.square = state["square"].clone()

    def result(self) -> CodeMeasures:
        """What the features did so far.

        Raises:
            InputError: there is no picture yet.
        """
        if self.image.n == 0:
            raise InputError("no picture yet: Clarity and L0 are of pictures")
        found = self.clarity.result()
        error = self.pairs.error(found.n_samples)
        nothing = torch.full_like(error, torch.nan)
        n = self.image.n, self.text.n
        without = self.text.n == 0
        shuffled = shuffled_error((self.image.total, self.text.total), (self.square[0], self.square[1]), n)
        return CodeMeasures(
            found.value, torch.where(found.value.isnan(), torch.nan, error), self.pairs.mean,
            self.image.total / self.image.n, nothing if without else self.text.total / self.text.n,
            self.image.count.clone(), self.text.count.clone(), nothing if without else shuffled,
            *n, self.image.threshold, self.clarity.n_min, self.band, {"versions": versions()},
        )  # fmt: skip

    def _parts(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in ("clarity", "image", "text", "pairs")]


def code_measures(
    images: Tensor | SparseCodes,
    texts: Tensor | SparseCodes | None,
    judge_embeddings: Tensor,
    *,
    threshold: float = 0.001,
    n_min: int = 2,
    band: tuple[float, float] = BAND,
) -> CodeMeasures:
    """L0, active share, Clarity, modality and density of a code, with what chance gives.

    With `I_i` the pictures whose activation of feature `i` is above the threshold, over features with `n_min` such
    pictures or more, `Clarity = mean_i mean_{j != k in I_i} cos(e_j, e_k)`; its chance is the mean cosine of all pairs
    of pictures. `Modality_i = E_img / (E_img + E_txt)`; its chance is 1/2 with `modality_error`, and for the share of
    bimodal features the share after dealing energies over texts to the features anew.

    Args:
        images: codes of pictures, floats `[sample d_code]`, zero or positive; or `SparseCodes`.
        texts: codes of texts likewise; None: no texts, and no modality.
        judge_embeddings: another model's embeddings of the same pictures, `[sample d_embed]`, of any length but zero.
        threshold, n_min, band: as in `StreamingCodeMeasures`.

    Returns:
        `CodeMeasures`.

    Raises:
        InputError: as `StreamingCodeMeasures` and its `update`.

    Example:
        >>> rows = torch.eye(3).repeat(4, 1)
        >>> found = code_measures(rows, rows[:6], rows + 0.1)
        >>> round(found.mean_clarity, 3), round(found.clarity_baseline, 3), found.l0_image, found.bimodal_share
        (1.0, 0.409, 1.0, 1.0)

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075, equation 2 and figure 3; the chances are ours.
    """
    if isinstance(images, Tensor) and images.dim() != 2:
        raise InputError(f"codes are floats [sample d_code] or SparseCodes, got {images.dtype} {list(images.shape)}")
    if judge_embeddings.dim() != 2:
        raise InputError(f"the judge's embeddings are floats [sample d_embed], got {list(judge_embeddings.shape)}")
    d_code = images.d_sae if isinstance(images, SparseCodes) else images.shape[1]
    measures = StreamingCodeMeasures(d_code, judge_embeddings.shape[1], threshold=threshold, n_min=n_min, band=band)
    measures.update(CodeBatch(images, judge_embeddings, texts))
    return measures.result()


def check_codes(codes: Tensor | SparseCodes, d_code: int) -> None:
    """Raise `InputError` unless these are codes of so many features, none of them NaN, infinite or negative."""
    if isinstance(codes, SparseCodes):
        values, sample, fits = codes.value, codes.sample, codes.d_sae == d_code
        found = f"SparseCodes of {codes.d_sae}"
    else:
        values, sample, fits = codes, None, codes.dim() == 2 and codes.shape[1] == d_code
        found = f"{codes.dtype} {list(codes.shape)}"
    if not fits or not values.is_floating_point():
        raise InputError(f"codes are floats [sample {d_code}] or SparseCodes of as many latents, got {found}")
    bad = ~(torch.isfinite(values) & (values >= 0))
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise InputError(
            f"the code of sample {first if sample is None else int(sample[first])} of the batch has a NaN, infinite or "
            "negative activation: is there a ReLU behind it?"
        )


def _n_samples(codes: Tensor | SparseCodes) -> int:
    return codes.n_sample if isinstance(codes, SparseCodes) else len(codes)


def _dense(codes: Tensor | SparseCodes) -> Iterator[tuple[slice, Tensor]]:
    """Rows `[sample d_code]`, some samples at a time; of several tokens the greatest."""
    found = peaks(codes) if isinstance(codes, SparseCodes) else None
    for start in range(0, _n_samples(codes), _ROWS):
        part = slice(start, min(start + _ROWS, _n_samples(codes)))
        if found is None:
            assert isinstance(codes, Tensor)
            yield part, codes[part].detach().cpu()
        else:
            assert isinstance(codes, SparseCodes)
            first, last = torch.searchsorted(found.sample, torch.tensor([part.start, part.stop])).tolist()
            rows = torch.zeros(part.stop - part.start, codes.d_sae)
            rows[found.sample[first:last] - part.start, found.latent[first:last]] = found.activation[first:last]
            yield part, rows
