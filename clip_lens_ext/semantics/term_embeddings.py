"""The embeddings of a vocabulary's terms, kept in memory and on disk for the model that they belong to."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.provenance import versions
from clip_lens_ext.result_files import not_written, put_together, read_parts, save_result
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.live import any_live

if TYPE_CHECKING:
    from clip_lens_ext.semantics.vocabulary import Vocabulary

_KEPT_IN_MEMORY = 4  # models per vocabulary; a model that is being trained has new weights at every call
_PROBES = 8
_KIND = "TermEmbeddings"


@dataclass(frozen=True, eq=False)
class TermEmbeddings:
    """One unit vector for each term of a vocabulary, and one for the empty prompt.

    Attributes:
        vectors: of unit length, `[term d_embed]`.
        empty: of the empty prompt, of unit length, `[d_embed]`; None where it is not known.
        terms: one per row.
        templates: the embedding of a term is the normalised mean of its normalised prompts.
        model: name of the model.
        model_hash: of its text tower's weights and configuration.
        vocabulary: the vocabulary's fingerprint.
        provenance: versions that computed them.
    """

    vectors: Tensor
    empty: Tensor | None
    terms: tuple[str, ...]
    templates: tuple[str, ...]
    model: str
    model_hash: str
    vocabulary: str
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.terms)

    def __repr__(self) -> str:
        return f"TermEmbeddings({len(self)} terms, {len(self.templates)} templates, by {self.model!r})"

    @classmethod
    def from_vectors(
        cls, vectors: Tensor, terms: Sequence[str], *, model: str, empty: Tensor | None = None
    ) -> TermEmbeddings:
        """Text embeddings from elsewhere, for a judge without a text tower.

        Args:
            vectors: of the terms, of any length but zero, `[term d_embed]`.
            terms: one per row, each once.
            model: name of the model that embedded them: that of the judge.
            empty: the same model's embedding of the empty prompt, `[d_embed]`; the scorer `"empty_prompt"` needs it.

        Raises:
            InputError: shapes that do not fit, a term twice, or a vector that is zero or not finite.

        Example:
            >>> TermEmbeddings.from_vectors(2 * torch.eye(3), ["duck", "bow", "crane"], model="elsewhere").vectors[0]
            tensor([1., 0., 0.])
        """
        if isinstance(terms, str):
            raise InputError(f"terms are a list of strings, got the string {terms!r}")
        names = tuple(terms)
        rows = [vectors] if empty is None else [vectors, empty[None]]
        if vectors.dim() != 2 or len(names) != len(vectors) or any(row.shape[1:] != vectors.shape[1:] for row in rows):
            raise InputError(
                f"expected vectors [term d_embed], a name for each, and of the empty prompt [d_embed]; got "
                f"{[list(row.shape) for row in rows]} and {len(names)} names"
            )
        if not names or len(set(names)) < len(names):
            raise InputError("at least one term is needed, and each once")
        unit = _normalised(vectors.detach(), names)
        at_empty = None if empty is None else _normalised(empty.detach()[None], ["(the empty prompt)"])[0].to(unit)
        content = _content(unit) if at_empty is None else _content(unit, at_empty)
        fingerprint = hashlib.sha256("\n".join((*names, content)).encode()).hexdigest()
        return cls(unit, at_empty, names, ("{}",), model, content, fingerprint, {"versions": versions()})

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> TermEmbeddings:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        parts = read_parts(path, _KIND)
        content = parts.fields.pop("content", None)  # in files of before: the hash of the vectors alone
        found = put_together(cls, parts, path, fits=lambda found: len(found.vectors) == len(found.terms))
        if content is not None and (found.empty is None or content != _content(found.vectors, found.empty)):
            raise not_written(path, _KIND, "its content is not what was written")
        return found


@torch.no_grad()
def embed_terms(
    vocabulary: Vocabulary,
    clip: HookedCLIP,
    memory: dict[str, TermEmbeddings],
    *,
    cache_dir: str | os.PathLike[str] | None,
    batch_size: int,
    progress: bool,
) -> TermEmbeddings:
    """What `Vocabulary.embed` promises."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a positive integer, got {batch_size!r}")
    clip.tokenize(vocabulary.empty_prompt)  # a model that embeds no text says so here
    assert clip.text is not None
    model_hash = tower_sha256(clip.text)
    if any_live(clip.text.hook_points()) or clip.text.native.training:
        # A hook or dropout may give other embeddings at the next call: they belong to no key.
        return _compute(vocabulary, clip, model_hash, batch_size, progress)
    path = None
    if cache_dir is not None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", clip.model_name)
        path = Path(cache_dir) / f"terms-{name}-{vocabulary.fingerprint[:16]}-{model_hash[:16]}.safetensors"
    found = memory.get(model_hash)
    if found is not None and _stale(found, vocabulary, clip, model_hash) is not None:
        found = None  # the same weights with another tokenizer
    if found is None and path is not None and path.exists():
        found = _from_disk(path, vocabulary, clip, model_hash)
    if found is None:
        found = _compute(vocabulary, clip, model_hash, batch_size, progress)
    memory.pop(model_hash, None)
    memory[model_hash] = found
    while len(memory) > _KEPT_IN_MEMORY:
        memory.pop(next(iter(memory)))
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found


def _from_disk(path: Path, vocabulary: Vocabulary, clip: HookedCLIP, model_hash: str) -> TermEmbeddings | None:
    """What a file of the cache holds; None, with a warning, and the file gone, where it cannot be used."""
    try:
        found = TermEmbeddings.load(path)
        why = _stale(found, vocabulary, clip, model_hash)
    except LoadError as error:
        why = str(error)
    if why is None:
        return found
    warnings.warn(f"the cached term embeddings {path} cannot be used and are computed again: {why}", stacklevel=5)
    path.unlink()
    return None


def _stale(found: TermEmbeddings, vocabulary: Vocabulary, clip: HookedCLIP, model_hash: str) -> str | None:
    """Why embeddings are not those of this vocabulary and model; None where they are.

    The weights do not say everything (a tokenizer, an activation function), so a few terms are embedded again.
    """
    if (found.vocabulary, found.model_hash) != (vocabulary.fingerprint, model_hash):
        return "they are of another vocabulary or model"
    if found.terms != vocabulary.terms or found.templates != vocabulary.templates:
        return "they are of other terms or templates"
    step = max(1, len(vocabulary) // _PROBES)
    probes = range(0, len(vocabulary), step)[:_PROBES]
    fresh = torch.cat([_embed(vocabulary, clip, [vocabulary.terms[i] for i in probes]), _embed_empty(vocabulary, clip)])
    assert found.empty is not None  # what this wrote has one
    kept = torch.cat([found.vectors[list(probes)], found.empty[None]])
    if fresh.shape != kept.shape:
        return f"they have {kept.shape[1]} numbers, the model's {fresh.shape[1]}"
    # Another device or batch differs by rounding alone; in bfloat16 by some 1e-3.
    slack = 2e-2 if clip.text is not None and clip.text.cfg.dtype in (torch.bfloat16, torch.float16) else 1e-4
    gap = float((fresh - kept).norm(dim=-1).max())
    return None if gap <= slack else f"some terms have moved by {gap:.2g} since: is it the same tokenizer and model?"


def _compute(
    vocabulary: Vocabulary, clip: HookedCLIP, model_hash: str, batch_size: int, progress: bool
) -> TermEmbeddings:
    at_once = max(1, batch_size // len(vocabulary.templates))
    parts = []
    with tqdm(total=len(vocabulary), desc="embedding terms", unit="term", disable=not progress) as bar:
        for start in range(0, len(vocabulary), at_once):
            terms = vocabulary.terms[start : start + at_once]
            parts.append(_embed(vocabulary, clip, terms))
            bar.update(len(terms))
    return TermEmbeddings(
        torch.cat(parts), _embed_empty(vocabulary, clip)[0], vocabulary.terms, vocabulary.templates, clip.model_name,
        model_hash, vocabulary.fingerprint, {"versions": versions()},
    )  # fmt: skip


def _embed(vocabulary: Vocabulary, clip: HookedCLIP, terms: tuple[str, ...] | list[str]) -> Tensor:
    """`[term d_embed]`: prompts stand term by term, so the templates of one term are one row of the view."""
    prompts = [prompt for term in terms for prompt in vocabulary.prompts(term)]
    each = _normalised(clip.embed_texts(prompts), prompts)
    mean = each.view(len(terms), len(vocabulary.templates), -1).mean(dim=1)
    return _normalised(mean, terms)


def _embed_empty(vocabulary: Vocabulary, clip: HookedCLIP) -> Tensor:
    return _normalised(clip.embed_texts(vocabulary.empty_prompt), ["(the empty prompt)"])


def _normalised(vectors: Tensor, texts: list[str] | tuple[str, ...]) -> Tensor:
    vectors = vectors.cpu()
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    length = vectors.norm(dim=-1)
    wrong = (~torch.isfinite(length) | (length == 0)).nonzero().flatten().tolist()
    if wrong:
        raise InputError(f"the embedding of {texts[wrong[0]]!r} is zero or not finite: it has no direction")
    return F.normalize(vectors, dim=-1)


def _content(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
