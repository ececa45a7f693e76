"""The same study on somebody's pictures: a classifier, the prompts, the suspects, and what annotations say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from folder import LabelledFolder
from heads import fit_heads
from latents import Suspects, activations, class_direction, embed_without, find_suspects, matched_sets
from measures import Accuracy, Measured, accuracy, fit_classifier
from numpy.typing import NDArray
from sae_lens import SAE

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError

ALL = "all test pictures"


@dataclass(frozen=True, eq=False)
class FolderStudy:
    """What was found on a folder.

    Attributes:
        train, test: the two halves.
        check: of the SAE, on the test half.
        accuracy: pictures -> head -> accuracy: all test pictures, and for each annotation those without it and those
            on which it goes against the diagnosis.
        suspects: what the comparison of the heads found on the training half.
        agreement: of each annotation the share of training pictures on which it agrees with the diagnosis, taken the
            way round in which that is the more.
        key: of each annotation and suspect how well the activation tells test pictures with it from those without.
        not_measured: sets of pictures that lack a class, and why.
        references: the training pictures that activate each suspect most.
    """

    train: LabelledFolder
    test: LabelledFolder
    check: cle.SAECheck
    accuracy: dict[str, dict[str, Accuracy]]
    suspects: Suspects
    agreement: dict[str, float]
    key: dict[str, tuple[Measured, ...]]
    not_measured: tuple[str, ...]
    references: dict[int, tuple[Path, ...]]


def folder_sae(
    clip: cle.HookedCLIP, pictures: LabelledFolder, out: Path, *, hook_name: str | None = None,
    d_sae: int | None = None, k: int = 16, n_training_tokens: int | None = None, seed: int = 0, progress: bool = True,
) -> SAE[Any]:  # fmt: skip
    """An SAE on the folder's own training half, at the end of the last block unless another hook is named.

    It reads the class token where there is one and every token otherwise. A few thousand pictures are few for an SAE:
    look at its check. The same call again gives it back.
    """
    cfg = clip.vision.cfg
    return cle.train_sae(
        clip.vision, list(pictures.files), hook_name=hook_name or f"blocks.{cfg.n_layers - 1}.hook_resid_post",
        d_sae=d_sae or 2 * cfg.d_model, k=k, token_scope="cls" if cfg.n_prefix_tokens else "all",
        preprocess=clip.preprocess, n_training_tokens=n_training_tokens, batch_size=1024, seed=seed, output_dir=out,
        progress=progress,
    )  # fmt: skip


def study_folder(
    clip: cle.HookedCLIP,
    train: LabelledFolder,
    test: LabelledFolder,
    sae: SAE[Any],
    prompts: Sequence[str],
    *,
    n_random: int = 5,
    n_references: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> FolderStudy:
    """Fit, compare, ablate.

    Args:
        clip: the model; its text tower reads the prompts.
        train, test: the two halves of the folder.
        sae: at a hook of the residual stream.
        prompts: one for each class, in the order of `train.classes`.
        n_random: controls.
        n_references: pictures of each suspect.
        seed: of the controls and the bootstrap.
        progress: draw bars.
    """
    if sae.cfg.metadata.hook_name not in clip.vision.split_names():
        raise InputError(
            f"the SAE reads {sae.cfg.metadata.hook_name}: this study needs a hook at which the rest of the tower can "
            "run on alone; see tower.split_names()"
        )
    zero_shot = class_direction(clip, prompts)
    plain = embed_without(clip, list(train.files), sae, [[]], what="training pictures", progress=progress)
    classifier = fit_classifier(plain[0], train.labels)
    suspects = find_suspects(
        clip, list(train.files), sae, train.labels, classifier, prompts, classes=train.classes, progress=progress
    )
    sets: list[list[int]] = [[]]
    active = activations(clip, list(train.files), sae)
    # Of the half that they were found on: there every suspect is active.
    strongest = {
        latent: tuple(train.files[row] for row in (-active[:, latent]).argsort(kind="stable")[:n_references]
                      if active[row, latent] > 0)
        for latent in suspects.latents
    }  # fmt: skip
    if suspects.latents:
        sets += [list(suspects.latents), *matched_sets(active, suspects.latents, n_sets=n_random, seed=seed)]
    without = embed_without(clip, list(train.files), sae, sets, what="without latents", progress=progress)
    heads = fit_heads(
        without, train.labels, classifier, zero_shot, suspects=1 if suspects.latents else None,
        controls=range(2, len(sets)),
    )  # fmt: skip
    rows = embed_without(clip, list(test.files), sae, sets, what="test pictures", progress=progress)
    agreement = {name: float((column == train.labels).mean()) for name, column in train.annotations.items()}
    found, not_measured = {}, []
    for name, shown in _sets_of_pictures(test, agreement).items():
        counts = np.bincount(test.labels[shown], minlength=2)
        if counts.min() < 2:
            lacking = ", ".join(f"{n} of {label!r}" for n, label in zip(counts, test.classes, strict=True))
            not_measured.append(f"{name}: {lacking}")
            continue
        found[name] = heads.accuracy(rows[:, shown], test.labels[shown], seed=seed)
    active = activations(clip, list(test.files), sae)
    key = {
        name: tuple(accuracy(active[:, latent], column).auroc for latent in suspects.latents)
        for name, column in test.annotations.items()
        if len(np.unique(column)) == 2
    }
    check = cle.check_sae(clip.vision, list(test.files), sae, preprocess=clip.preprocess, progress=progress)
    more = {name: max(share, 1 - share) for name, share in agreement.items()}
    return FolderStudy(train, test, check, found, suspects, more, key, tuple(not_measured), strongest)


def _sets_of_pictures(test: LabelledFolder, agreement: dict[str, float]) -> dict[str, NDArray[np.int64]]:
    """Rows of the test pictures: all, and for each annotation those without it and those on which it goes against."""
    sets = {ALL: np.arange(len(test))}
    for name, column in test.annotations.items():
        speaks_for = test.labels if agreement[name] >= 0.5 else 1 - test.labels
        sets[f"without {name}"] = np.flatnonzero(column == 0)
        sets[f"{name} against the diagnosis"] = np.flatnonzero(column != speaks_for)
    return sets
