"""Names for the features of a Sparse CLIP: the words and the pictures that activate each most, and whether they agree.

Words go through the text tower and pictures through the vision tower of one model, and a feature is the same entry of
both codes: so no other model names it. Another model, the judge, only says how well its words fit its pictures.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.data import ImageBatch, Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import run_pass
from clip_lens_ext.provenance import fingerprint, versions
from clip_lens_ext.semantics.peaks import Peaks
from clip_lens_ext.semantics.reference_embeddings import embed_references
from clip_lens_ext.semantics.reference_pass import ReferenceAccumulator, ReferenceBatch
from clip_lens_ext.semantics.references import References
from clip_lens_ext.semantics.term_embeddings import TermEmbeddings
from clip_lens_ext.semantics.vocabulary import Vocabulary
from clip_lens_ext.sparse_clip.agreement import Agreement, agreement
from clip_lens_ext.sparse_clip.code_measures import check_codes
from clip_lens_ext.sparse_clip.concept_names import ConceptNames
from clip_lens_ext.sparse_clip.metrics import StreamingActivity
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.families.headed import HeadedCLIP
from clip_lens_ext.towers.identity import tower_sha256

_HOOK, _SCOPE = "hook_embedding", "pooled"


@torch.no_grad()
def name_concepts(
    clip: HookedCLIP,
    vocabulary: Vocabulary,
    images: Any,
    *,
    k_words: int = 5,
    k_images: int = 20,
    texts: Sequence[str] | None = None,
    judge: HookedCLIP | None = None,
    judge_terms: TermEmbeddings | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> ConceptNames:
    """The top words by the text tower and the top pictures by the vision tower, for every feature of the code.

    A word's activation of feature `i` is entry `i` of its un-normalised code `z_txt(w)`, the mean over the vocabulary's
    templates; a picture's that of `z_img(p)`. Only activations above 0 count; equal ones go to the word or picture that
    comes first. The agreement of a feature's words with its pictures is a mean cosine by the judge, beside a control;
    see `ConceptNames` and `agreement`.

    Args:
        clip: a Sparse CLIP; its codes are zero or positive.
        vocabulary: the words. The bare word by default; which template the paper uses is not stated.
        images: pictures, as `clip_lens_ext.data.image_batches` takes them; read once by the model, and those that
            activate a feature most once more by the judge. What cannot be read is in `.images.skipped`.
        k_words, k_images: how many to keep for each feature.
        texts: captions or the like, for each feature's mean activation over texts, of which modality and density are
            made. None: the words of the vocabulary stand in for them, which `text_source` says.
        judge: any other CLIP; None: the dense model below the heads. That one is no stranger: the heads read its
            embeddings, so an agreement by it is easier won than one by another model.
        judge_terms: the judge's embeddings of the same words, for a judge without a text tower.
        preprocess: PIL picture to tensor for the model (and for the dense model below it) instead of its own.
        batch_size: pictures, or words, in a batch.
        checkpoint: a file; a pass that was interrupted goes on from it, and gives what an uninterrupted one gives. The
            judge's pass has the same name with `.judge` behind it.
        checkpoint_every: batches between two writes.
        progress: draw bars.

    Returns:
        `ConceptNames`, on the CPU.

    Raises:
        InputError: a model without a text tower; codes that are negative, NaN or infinite; no dense model below the
            heads and no judge; embeddings of other words; `k_words` or `k_images` out of range; no picture that can be
            read; a checkpoint of another pass.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> clip, world = add_sparse_heads(cle.planted_clip(), 256), cle.PlantedWorld(0)
        >>> words = cle.Vocabulary.from_terms(dict.fromkeys(entry.name for entry in world.classes))
        >>> pixels = cle.planted.normalise(world.sample(20, seed=0, split="test").images)
        >>> found = name_concepts(clip, words, pixels, k_images=4, progress=False)
        >>> len(found), found.word.shape, found.names[3] in words.terms, len(found.of(3).images)
        (256, torch.Size([256, 5]), True, 4)

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075, for words and pictures; the agreement is ours.
    """
    for name, k in (("k_words", k_words), ("k_images", k_images)):
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"{name} must be a positive integer, got {k!r}")
    if clip.text is None:
        raise InputError(f"{clip.model_name} is a vision tower alone: its features cannot be named by words")
    if isinstance(texts, str) or (texts is not None and not len(texts)):
        raise InputError("texts is a list of at least one string; None: the words of the vocabulary")
    judge = judge or _dense_part(clip, preprocess)
    if judge_terms is not None and judge_terms.terms != vocabulary.terms:
        raise InputError("judge_terms are the embeddings of other words than the vocabulary's, or in another order")
    if judge_terms is None and judge.text is None:
        raise InputError(f"the judge {judge.model_name!r} is a vision tower alone: pass judge_terms= with its "
                         "embeddings of the words")  # fmt: skip
    batches = image_batches(images, preprocess=preprocess or clip.preprocess, batch_size=batch_size)
    batches.keeping_order("the judge looks at the pictures in a second pass, by their position")
    words = _words(clip, vocabulary, k_words, batch_size, progress)
    energy = words.count.result().total / len(vocabulary) if texts is None else _energy(clip, texts, batch_size)
    found = _pictures(clip, batches, k_images, checkpoint, checkpoint_every, progress)
    scores = _agreement(
        words.top.sample, vocabulary, found, images, judge, judge_terms,
        batch_size=batch_size, checkpoint=checkpoint, checkpoint_every=checkpoint_every, progress=progress,
    )  # fmt: skip
    provenance = {
        "model": clip.model_name, "text_sha256": tower_sha256(clip.text), "judge": judge.model_name,
        "judge_vision_sha256": tower_sha256(judge.vision),
        "judge_text_sha256": tower_sha256(judge.text) if judge_terms is None and judge.text else None,
        "texts": None if texts is None else fingerprint(clip.tokenize(texts)), "versions": versions(),
    }  # fmt: skip
    return ConceptNames(
        words.top.sample, words.top.activation, words.count.result().n_active, found, scores.score, scores.control,
        scores.rank, scores.first, energy, len(vocabulary if texts is None else texts),
        "vocabulary" if texts is None else "texts", vocabulary.terms, vocabulary.templates, vocabulary.fingerprint,
        judge.model_name, provenance,
    )  # fmt: skip


def _dense_part(clip: HookedCLIP, preprocess: Preprocess | None) -> HookedCLIP:
    """The dense model that the heads read, hooked."""
    if not isinstance(clip.native, HeadedCLIP):
        raise InputError(f"{clip.model_name} has no dense model below its embedding: pass judge=, any CLIP")
    return HookedCLIP(
        clip.native.dense, preprocess=preprocess or clip.preprocess, tokenizer=clip.tokenizer,
        model_name=f"the dense part of {clip.model_name}",
    )  # fmt: skip


def _peaks(codes: Tensor, d_code: int) -> Peaks:
    """The activations above zero of codes `[sample d_code]`; there are no tokens, and no position."""
    check_codes(codes, d_code)
    codes = codes.cpu()
    sample, feature = (codes > 0).nonzero(as_tuple=True)
    return Peaks(sample, feature, codes[sample, feature].float(), torch.full_like(sample, -1))


def _words(clip: HookedCLIP, vocabulary: Vocabulary, k: int, batch_size: int, progress: bool) -> ReferenceAccumulator:
    """The words that activate each feature most; of several templates the mean."""
    d_code, n_templates = clip.vision.cfg.d_embed, len(vocabulary.templates)
    if clip.text is not None and clip.text.cfg.d_embed != d_code:
        raise InputError(f"the towers have codes of {d_code} and {clip.text.cfg.d_embed} features: they share none")
    found = ReferenceAccumulator(d_code, k)
    at_once = max(1, batch_size // n_templates)
    with tqdm(total=len(vocabulary), desc="words", unit="word", disable=not progress) as bar:
        for start in range(0, len(vocabulary), at_once):
            terms = vocabulary.terms[start : start + at_once]
            codes = clip.embed_texts([prompt for term in terms for prompt in vocabulary.prompts(term)])
            mean = codes.view(len(terms), n_templates, -1).mean(dim=1)
            indexes = range(start, start + len(terms))
            found.update(ReferenceBatch(_peaks(mean, d_code), terms, indexes, _HOOK, _SCOPE))
            bar.update(len(terms))
    return found


def _energy(clip: HookedCLIP, texts: Sequence[str], batch_size: int) -> Tensor:
    """Mean activation of each feature over texts, `[d_code]`."""
    activity = StreamingActivity(clip.vision.cfg.d_embed, threshold=0.0)
    for start in range(0, len(texts), batch_size):
        activity.update(clip.embed_texts(list(texts[start : start + batch_size])))
    return activity.result().mean


def _pictures(
    clip: HookedCLIP, batches: Any, k: int, checkpoint: str | os.PathLike[str] | None, every: int, progress: bool
) -> References:
    """The pictures that activate each feature most: one pass, `[d_code k]` whatever the data."""
    cfg = clip.vision.cfg
    model = tower_sha256(clip.vision)

    def step(batch: ImageBatch) -> ReferenceBatch:
        if not batch.pixels.is_floating_point():
            raise InputError("these samples are token ids, and pictures are needed: words come from the vocabulary")
        codes = clip.embed_images(batch.pixels.to(cfg.device, cfg.dtype))
        return ReferenceBatch(_peaks(codes, cfg.d_embed), batch.names, batch.indexes, _HOOK, _SCOPE)

    found = ReferenceAccumulator(cfg.d_embed, k)
    settings = {"what": "names of concepts", "k_images": k, "batch_size": batches.batch_size, "model_sha256": model}
    report = run_pass(
        batches, step, found, checkpoint=checkpoint, checkpoint_every=every, settings=settings,
        description="images", progress=progress,
    )  # fmt: skip
    provenance = {
        "model": clip.model_name,
        "sae_sha256": model,  # what makes the codes: here the tower itself
        "sae_format": "sparse_clip",
        "data_fingerprint": report.fingerprint,
        "versions": versions(),
    }
    return References(
        found.top.sample, found.top.activation, found.top.position, len(found.names), tuple(found.names),
        torch.tensor(found.indexes), _HOOK, _SCOPE, report.skipped, None, provenance, found.count.result(),
    )  # fmt: skip


def _agreement(
    word: Tensor, vocabulary: Vocabulary, found: References, images: Any, judge: HookedCLIP,
    judge_terms: TermEmbeddings | None, *, batch_size: int, checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int, progress: bool,
) -> Agreement:  # fmt: skip
    terms = judge_terms or vocabulary.embed(judge, progress=progress)
    if int((found.sample >= 0).sum()) == 0:  # nothing activates anything: no score, as for each such feature
        return Agreement(*(torch.full((len(word),), torch.nan, dtype=torch.float64) for _ in Agreement._fields))
    seen = embed_references(
        found, images, judge, batch_size=batch_size, checkpoint=None if checkpoint is None else f"{checkpoint}.judge",
        checkpoint_every=checkpoint_every, progress=progress,
    )  # fmt: skip
    if terms.vectors.shape[1] != seen.vectors.shape[1]:
        raise InputError(f"the judge's embeddings of words have {terms.vectors.shape[1]} numbers, and those of "
                         f"pictures {seen.vectors.shape[1]}")  # fmt: skip
    return agreement(word, terms.vectors, seen.row, seen.vectors)
