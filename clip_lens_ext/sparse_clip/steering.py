"""Steering: features of a concept at zero, those of another at a strength, in a code or in a running model.

`z'_i = 0` for suppressed features, `z'_i = strength` for boosted ones (set, not added), `z'_i = z_i` for the rest. The
code is the un-normalised one, as activations are printed in the paper; what follows divides it by its new length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.provenance import versions
from clip_lens_ext.result_files import load_result, save_result
from clip_lens_ext.sparse_clip.checks import (
    checked_codes,
    checked_count,
    checked_features,
    checked_strengths,
    checked_words,
)
from clip_lens_ext.sparse_clip.metrics import StreamingActivity
from clip_lens_ext.towers.clip import HookedCLIP

EMBEDDING = "hook_embedding"
Features = Sequence[int] | Tensor


def steer(codes: Tensor, suppress: Features = (), boost: Features = (), strength: float = 2.0) -> Tensor:
    """Codes with some features at zero and others at a strength.

    `z'_i = 0` where `i` is suppressed, `strength` where it is boosted, `z_i` elsewhere. Steering twice is steering
    once, and steering nothing changes nothing. A code whose active features are all suppressed has no direction left.

    Args:
        codes: un-normalised, `[sample d_code]`, none below zero; not changed.
        suppress: features to set to zero: numbers for all samples, or a tensor `[sample feature]` of each sample's own.
        boost: features to set to `strength`, likewise.
        strength: what boosted features become, in units of activation; 2.0 with one or two features is what the paper
            recommends for its own models. See `SteeringData.typical_activation` for yours.

    Returns:
        A new tensor of the same shape, dtype and device; differentiable with regard to what was left.

    Raises:
        InputError: codes that are none, a feature that the code does not have, one named twice or in both lists, or a
            strength that is not above zero.

    Example:
        >>> steer(torch.tensor([[1.2, 0.0, 0.5]]), suppress=[0], boost=[1])
        tensor([[0.0000, 2.0000, 0.5000]])

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075.
    """
    checked_codes(codes)
    values = checked_strengths(strength)
    if len(values) > 1:
        raise InputError(f"all features are boosted to one strength, and here are {len(values)}: call it for each")
    off, on = _places(suppress, boost, len(codes), codes.shape[1])
    off, on = off.to(codes.device), on.to(codes.device)
    return codes.scatter(1, off, 0.0).scatter(1, on, values[0]) if off.numel() or on.numel() else codes.clone()


@contextmanager
def steered(
    clip: HookedCLIP, *, suppress: Sequence[int] = (), boost: Sequence[int] = (), strength: float = 2.0
) -> Iterator[HookedCLIP]:
    """The model whose vision tower gives steered codes, while the context lasts.

    Everything that reads the tower's embedding sees them: `embed_images`, `similarity`, hooks that are added later.
    Contexts may be nested: the inner one acts on what the outer one gives. The text tower is left alone.

    Args:
        clip: a Sparse CLIP; its weights are not touched, and its hooks are those of before when the context ends, also
            by an exception.
        suppress, boost, strength: as in `steer`, the same features for all pictures.

    Yields:
        `clip`.

    Raises:
        InputError: as `steer` raises, when the context is entered; and for codes below zero, as a dense model has, when
            it runs.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> clip, picture = add_sparse_heads(cle.planted_clip(), 64), torch.zeros(1, 3, 48, 48)
        >>> with steered(clip, suppress=[3], boost=[5]) as other:
        ...     code = other.embed_images(picture)[0]
        >>> code[3].item(), code[5].item(), clip.embed_images(picture)[0, 5].item() == 2
        (0.0, 2.0, False)

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075.
    """
    d_code = clip.vision.cfg.d_embed
    checked_strengths(strength)
    off, on = (_one_row(given, d_code, what) for given, what in ((suppress, "suppress"), (boost, "boost")))
    _places(off, on, 1, d_code)

    def edit(code: Tensor, hook: Any) -> Tensor:
        return steer(code, off, on, strength)

    with clip.vision.hooks(fwd_hooks=[(EMBEDDING, edit)]):
        yield clip


@dataclass(frozen=True, eq=False)
class ConceptFeatures:
    """The features that words activate most in the text tower.

    Attributes:
        words: what they are of.
        features: of each word, the most active first, `[word k]`.
        activations: theirs, un-normalised, `[word k]`.
        share: of the words compared with, the share that activates each of them, in 0..1, `[word k]`.
        left_out: features that were no candidates because more than `max_share` of those words activate them.
        n_compared: words that the share is of.
        max_share: as asked for.
        template: what the words were put into.
        d_code: features of the code.
        provenance: model and versions.
    """

    words: tuple[str, ...]
    features: Tensor
    activations: Tensor
    share: Tensor
    left_out: Tensor
    n_compared: int
    max_share: float | None
    template: str
    d_code: int
    provenance: dict[str, Any]

    def of(self, word: str) -> list[int]:
        """The features of one word, for `steer`.

        Raises:
            InputError: it is none of the words.
        """
        if word not in self.words:
            raise InputError(f"no features of {word!r} were asked for{near(word, self.words)}")
        return self.features[self.words.index(word)].tolist()

    def to_frame(self) -> pd.DataFrame:
        """A row for each word and feature."""
        k = self.features.shape[1]
        return pd.DataFrame({
            "word": [word for word in self.words for _ in range(k)], "feature": self.features.flatten().numpy(),
            "activation": self.activations.flatten().numpy(), "share": self.share.flatten().numpy(),
        })  # fmt: skip

    def __repr__(self) -> str:
        return f"ConceptFeatures({len(self.words)} words, {self.features.shape[1]} of {self.d_code} features each)"

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> ConceptFeatures:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        return load_result(cls, path, fits=lambda found: found.features.shape == found.activations.shape
                           == found.share.shape and len(found.features) == len(found.words))  # fmt: skip


@torch.no_grad()
def features_of(
    clip: HookedCLIP,
    words: str | Sequence[str],
    k: int = 2,
    *,
    template: str = "{}",
    max_share: float | None = None,
    among: Sequence[str] | None = None,
) -> ConceptFeatures:
    """The `k` features that each concept word activates most in the text tower.

    Features that very many words activate say nothing of any of them, and steering them steers every concept: with
    `max_share` they are no candidates. Which template the paper puts words into is not stated; the bare word is taken.

    Args:
        clip: a Sparse CLIP.
        words: one word or phrase, or several.
        k: features of each.
        template: with one `{}` for the word.
        max_share: leave out the features that more than this share of the words of `among` activate, in 0..1.
        among: the words that the share is of; None: `words` themselves. A vocabulary is better.

    Returns:
        `ConceptFeatures` on the CPU, equal activations in the order of their numbers.

    Raises:
        InputError: no word, an empty one or one twice, a word that activates fewer than `k` features (of those not left
            out), a share out of range, one word alone to take it of, or a model that is not sparse.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> found = features_of(add_sparse_heads(cle.planted_clip(), 64), ["heart", "kite"], k=3)
        >>> found.features.shape, len(found.of("kite")), bool((found.activations > 0).all())
        (torch.Size([2, 3]), 3, True)

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075.
    """
    named, compared = checked_words(words), checked_words(words if among is None else among, what="among")
    checked_count(k, "k")
    if not isinstance(template, str) or template.count("{}") != 1:
        raise InputError(f"a template has one {{}} for the word, and not so {template!r}")
    if max_share is not None and not 0 <= max_share < 1:
        raise InputError(f"max_share is a share in [0, 1), got {max_share!r}")
    if max_share is not None and len(compared) < 2:
        raise InputError("max_share is a share of words, and one word has no others to be compared with: pass among=")
    codes = text_codes(clip, [template.replace("{}", word) for word in named])
    share = (codes > 0).double().mean(dim=0) if among is None else _share_of(clip, compared, template)
    left_out = (share > max_share).nonzero().flatten() if max_share is not None else torch.zeros(0, dtype=torch.int64)
    candidates = codes.index_fill(1, left_out, 0.0)
    n_active = (candidates > 0).sum(dim=1)
    if bool((n_active < k).any()):
        at = int((n_active < k).int().argmax())
        after = f" after {len(left_out)} that many words share were left out" if len(left_out) else ""
        raise InputError(f"the word {named[at]!r} activates {int(n_active[at])} features in the text tower{after}, and "
                         f"k={k} were asked for")  # fmt: skip
    found = candidates.sort(dim=1, descending=True, stable=True)
    features = found.indices[:, :k].contiguous()
    return ConceptFeatures(
        named, features, found.values[:, :k].contiguous(), share[features], left_out, len(compared), max_share,
        template, codes.shape[1], {"model": clip.model_name, "versions": versions()},
    )  # fmt: skip


def _share_of(clip: HookedCLIP, words: Sequence[str], template: str, batch_size: int = 512) -> Tensor:
    """Share of some words that activate each feature, `[d_code]`; the codes of a vocabulary are not held at once."""
    activity = StreamingActivity(clip.vision.cfg.d_embed, threshold=0.0)
    for start in range(0, len(words), batch_size):
        prompts = [template.replace("{}", word) for word in words[start : start + batch_size]]
        activity.update(text_codes(clip, prompts))
    return activity.result().frequency


def text_codes(clip: HookedCLIP, texts: Sequence[str], *, batch_size: int = 512) -> Tensor:
    """Codes `[text d_code]` of texts, float32 or float64 on the CPU, without gradients.

    Raises:
        InputError: the model has no text tower, or one that is not sparse.
    """
    parts = []
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            parts.append(wide(clip.embed_texts(list(texts[start : start + batch_size]))))
    return checked_codes(torch.cat(parts), what="codes of texts")


def wide(codes: Tensor) -> Tensor:
    """On the CPU, float64 as it is and anything less as float32."""
    return (codes if codes.dtype == torch.float64 else codes.float()).cpu()


def _one_row(features: Features, d_code: int, what: str) -> Tensor:
    found = checked_features(features, d_code, what=what)
    if found.dim() != 1:
        raise InputError(f"{what} of a running model are the same features for all pictures, got {list(found.shape)}")
    return found


def _places(suppress: Features, boost: Features, n_sample: int, d_code: int) -> tuple[Tensor, Tensor]:
    """Both as `[sample feature]`, and no feature in both."""
    rows = []
    for given, what in ((suppress, "suppress"), (boost, "boost")):
        found = checked_features(given, d_code, what=what)
        if found.dim() == 2 and len(found) != n_sample:
            raise InputError(f"{what} has rows for {len(found)} samples, and there are {n_sample}")
        rows.append(found if found.dim() == 2 else found.expand(n_sample, -1))
    both = (rows[0][:, :, None] == rows[1][:, None, :].to(rows[0].device)).nonzero()
    if len(both):
        feature = int(rows[0][both[0, 0], both[0, 1]])
        raise InputError(f"the feature {feature} is to be suppressed and boosted: leave it out of one of them")
    return rows[0], rows[1]
