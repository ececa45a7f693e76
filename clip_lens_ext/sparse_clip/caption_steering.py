"""What a captioner says of steered codes: does the sentence change its subject, and does it stay a sentence?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import fingerprint, module_sha256, versions
from clip_lens_ext.sparse_clip.caption_steering_result import CaptionSteering
from clip_lens_ext.sparse_clip.captioner import Captions, SparseCaptioner
from clip_lens_ext.sparse_clip.checks import checked_count, checked_seed, checked_strengths
from clip_lens_ext.sparse_clip.steering import steer
from clip_lens_ext.sparse_clip.steering_data import SteeringData, plan_steering
from clip_lens_ext.sparse_clip.steering_effect import STRENGTHS
from clip_lens_ext.sparse_clip.steering_result import check_interval


@torch.no_grad()
def caption_steering(
    captioner: SparseCaptioner,
    data: SteeringData,
    *,
    longest: int,
    strengths: float | Sequence[float] = STRENGTHS,
    n_controls: int = 2,
    named: Callable[[str], Collection[str]] | None = None,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> CaptionSteering:
    """Suppress the features of each picture's class, boost those of another class, and caption again.

    - success: the caption names the new class and not the old one;
    - kept: it names the old one and not the new one;
    - corrupted: it names no class, or has more than `longest` tokens, or no end. It may be a success all the same.

    A class is named where its words stand side by side in the caption; where a longer name stands around it
    ("glass" in "a glass moth"), only that one is named. The paper asks for the main subject, takes the cosine of the
    answer with both labels by a sentence encoder, and counts abnormally long answers: pass `named` for a measure of
    your own.

    Args:
        captioner: trained.
        data: pictures, classes and their features.
        longest: tokens of the longest caption that counts as whole: `CaptionTraining.longest`.
        strengths: what boosted features are set to, one after the other.
        n_controls: draws of random features of like activation, as many as the concepts' (see `plan_steering`).
        named: the classes that a caption names, instead of by their words.
        n_bootstrap, confidence: of the intervals, over pictures.
        seed: of the new classes, the controls and the intervals.
        batch_size: codes at once.
        progress: draw a bar.

    Returns:
        `CaptionSteering`; its `.to_frame()` has a row for each strength, of the concepts and of the controls.

    Raises:
        InputError: a captioner of another width, a strength or count out of range, `named` that gives no class of the
            data, or too few features for a control.

    Example:
        >>> import clip_lens_ext as cle
        >>> from transformers import GPT2Config
        >>> from clip_lens_ext.sparse_clip import SteeringData, sparse_captioner, add_sparse_heads
        >>> sparse, pictures = add_sparse_heads(cle.planted_clip(), 256), torch.zeros(2, 3, 48, 48)
        >>> data = SteeringData.from_clip(sparse, pictures, [0, 1], ["heart", "kite"], k=1, progress=False)
        >>> config = GPT2Config(vocab_size=sparse.tokenizer.vocab_size, n_positions=32, n_embd=32, n_layer=1, n_head=2)
        >>> captioner = sparse_captioner(config, sparse.tokenizer, d_code=256)
        >>> found = caption_steering(captioner, data, longest=4, strengths=2, n_controls=1, progress=False)
        >>> found.names_new.shape, list(found.to_frame().arm)
        (torch.Size([1, 2, 2]), ['as is', 'concept', 'control'])

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075.
    """
    values = checked_strengths(strengths)
    checked_count(longest, "longest")
    checked_count(n_bootstrap, "n_bootstrap")
    check_interval(confidence)
    checked_seed(seed)
    if captioner.d_code != data.codes.shape[1]:
        raise InputError(f"the captioner reads codes of {captioner.d_code} features, and the data have "
                         f"{data.codes.shape[1]}")  # fmt: skip
    plan = plan_steering(data, n_controls=n_controls, seed=seed)
    of = named or (lambda text: named_classes(text, data.classes))
    # Twice as many tokens as a whole caption has: a runaway shows, and does not run on.
    room = captioner.n_positions
    most = 2 * longest if room is None else min(2 * longest, room - captioner.n_prefix)
    if most <= longest:
        raise InputError(f"captions of {longest} tokens fill the {room} places of the language model: "
                         "which are too long cannot be told")  # fmt: skip

    def said(codes: Tensor) -> tuple[Captions, Tensor]:
        found = captioner.generate(codes, max_tokens=most, batch_size=batch_size)
        return found, _judged(found, of, data, plan.new_labels, longest)

    n_arm = 1 + n_controls
    before, judged_before = said(data.codes)
    texts: list[str] = []
    judged: list[Tensor] = []
    with tqdm(total=len(values) * n_arm, desc="captions of steered codes", disable=not progress) as bar:
        for strength in values:
            for arm in range(n_arm):
                found, about = said(steer(data.codes, plan.suppress[arm], plan.boost[arm], strength))
                texts += found.texts
                judged.append(about)
                bar.update()
    whole = torch.stack(judged).unflatten(0, (len(values), n_arm))
    return CaptionSteering(
        classes=data.classes, strengths=values, labels=data.labels, new_labels=plan.new_labels,
        texts_before=before.texts, texts=tuple(texts), judged_before=judged_before, names_old=whole[:, :, 0],
        names_new=whole[:, :, 1], corrupted=whole[:, :, 2], longest=longest, k=data.concepts.features.shape[1],
        n_bootstrap=n_bootstrap, confidence=confidence, seed=seed,
        provenance={**data.concepts.provenance, "codes": fingerprint(data.codes),
                    "captioner": module_sha256(captioner), "versions": versions()},
    )  # fmt: skip


def named_classes(text: str, classes: Sequence[str]) -> set[str]:
    """The classes whose words stand side by side in a text; of names that overlap, the longest.

    Example:
        >>> sorted(named_classes("a glass moth and a red kite", ["glass", "glass moth", "kite", "red"]))
        ['glass moth', 'kite', 'red']
    """
    words = _words(text)
    names = sorted(((tuple(_words(name)), name) for name in classes), key=lambda pair: -len(pair[0]))
    found, place = set(), 0
    while place < len(words):
        here = next((pair for pair in names if tuple(words[place : place + len(pair[0])]) == pair[0]), None)
        if here is not None:
            found.add(here[1])
        place += 1 if here is None else len(here[0])
    return found


def _words(text: str) -> list[str]:
    return [word.strip(".,;:!?\"'()") for word in text.lower().split()]


def _judged(
    found: Captions, named: Callable[[str], Collection[str]], data: SteeringData, new_labels: Tensor, longest: int
) -> Tensor:
    """Of each caption whether it names the old class, the new one, and whether it is corrupted, bool `[3 picture]`."""
    rows = []
    labels = zip(data.labels.tolist(), new_labels.tolist(), strict=True)
    for text, n, ended, (old, new) in zip(found.texts, found.n_tokens, found.ended, labels, strict=True):
        names = set(named(text))
        if not names <= set(data.classes):
            raise InputError(f"`named` says that {text!r} names {sorted(names - set(data.classes))}, which are no "
                             "classes of the data")  # fmt: skip
        rows.append([data.classes[old] in names, data.classes[new] in names, not names or not ended or n > longest])
    return torch.tensor(rows).T
