"""The study on generated lesions: a CLIP that has seen lesions, an SAE, and classifiers on biased sets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from heads import PROMPTS, Heads, agreeing, chosen, fit_heads
from latents import Suspects, activations, class_direction, embed_without, find_suspects, matched_sets
from lesions import CLASSES, SHORTCUTS, LesionWorld
from measures import Accuracy, Measured, accuracy, auroc, fit_classifier
from sae_lens import SAE
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import LoadError
from clip_lens_ext.planted import PlantedWorld, normalise, preprocess
from clip_lens_ext.planted.model import ClipConfig
from clip_lens_ext.planted.store import read_clip, write_clip
from clip_lens_ext.planted.train_clip import TrainConfig, train_clip

TELLS = 0.8
"""A latent carries a shortcut where the area under the ROC curve is at least this, or at most 1 less this."""
PROMPTS_OF = ("a photo of a naevus", "a photo of a melanoma")
SAME, FREE, REVERSED = "same bias", "shortcut-free", "reversed"
BIASED = {"ruler": 0.95}


@dataclass(frozen=True)
class Settings:
    """How large the study is.

    `n_train` and `n_test` are lesions, each drawn with and without a shortcut; `n_explained` of the training pictures
    are attributed; `n_random` controls are drawn.
    """

    seed: int = 0
    n_steps: int = 800
    model: ClipConfig = dataclasses.field(
        default_factory=lambda: ClipConfig(
            embed_dim=64, patch_size=12, vision_layers=3, vision_width=96, text_layers=1, text_width=64
        )
    )
    hook_name: str = "blocks.2.hook_resid_post"
    n_sae_pictures: int = 4000
    d_sae: int = 256
    k: int = 16
    n_sae_tokens: int = 300_000
    n_train: int = 600
    n_test: int = 500
    n_explained: int = 300
    n_random: int = 4
    shortcuts: tuple[str, ...] = SHORTCUTS
    agreements: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class Cell:
    """One shortcut at one agreement.

    Attributes:
        shortcut, agreement: which.
        accuracy: pictures -> head -> accuracy, for the pictures `SAME`, `FREE` and `REVERSED`.
        suspects: what the comparison of the heads found.
        key: of each suspect the area under the ROC curve of its activation, of pictures with the shortcut against the
            same ones without. Near 0 it is active where the shortcut is missing.
        keyed: all latents that carry the shortcut, whatever the classifier rests on, those of the clearest area first.
    """

    shortcut: str
    agreement: float
    accuracy: dict[str, dict[str, Accuracy]]
    suspects: Suspects
    key: tuple[Measured, ...]
    keyed: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Study:
    """All cells, and the models that they are of; `control`
    has the prompts of a CLIP with a biased pretraining, shortcut -> pictures -> accuracy, or nothing."""

    settings: Settings
    clip: cle.HookedCLIP
    sae: SAE[Any]
    check: cle.SAECheck
    cells: tuple[Cell, ...]
    control: dict[str, dict[str, Accuracy]]

    def cell(self, shortcut: str, agreement: float) -> Cell:
        """One of the cells."""
        return next(one for one in self.cells if (one.shortcut, one.agreement) == (shortcut, agreement))


def lesion_clip(
    world: LesionWorld, settings: Settings, out: Path, *, progress: bool = True
) -> tuple[cle.HookedCLIP, Path]:
    """The CLIP of a world, trained once: a second call reads it, a call that was cut short goes on.

    Returns:
        The model, and its folder. The folder's name has the hash of what the generator draws and of the settings, so
        that another version of either is another model.

    Raises:
        LoadError: the folder holds a model of another world.
    """
    config = TrainConfig(n_steps=settings.n_steps, n_warmup=min(50, settings.n_steps), model=settings.model)
    origin = {"world": world.fingerprint, **dataclasses.asdict(config)}
    sizes = "-".join(str(value) for value in dataclasses.astuple(settings.model))
    folder = out / f"clip-{world.fingerprint}-{settings.n_steps}-{sizes}"
    path = folder / "clip.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # train_clip asks a world for its seed, its vocabulary and sample(n, seed=): a lesion world has all three.
        trained = train_clip(cast(PlantedWorld, world), config, checkpoint=folder / "checkpoint.pt", progress=progress)
        write_clip(path, trained, settings.model, vocabulary=world.vocabulary, training=origin)
        (folder / "checkpoint.pt").unlink()
    native, tokenizer, metadata = read_clip(path, vocabulary=world.vocabulary)
    if metadata["training"] != origin:
        raise LoadError(f"{path} is of {metadata['training']}, and not of {origin}: delete it")
    name = f"lesions-{world.fingerprint}"
    return cle.HookedCLIP(native, preprocess=preprocess, tokenizer=tokenizer, model_name=name).eval(), folder


def lesion_sae(
    clip: cle.HookedCLIP, world: LesionWorld, settings: Settings, folder: Path, *, progress: bool = True
) -> tuple[SAE[Any], cle.SAECheck]:
    """The SAE on the class token at the study's hook, trained once, and its check on other pictures."""
    batches = range(-(-settings.n_sae_pictures // 500))
    drawn = torch.cat([world.sample(500, seed=seed, split="sae", agreement={}).images for seed in batches])
    sae = cle.train_sae(
        clip.vision, normalise(drawn[: settings.n_sae_pictures]), hook_name=settings.hook_name, d_sae=settings.d_sae,
        k=settings.k, token_scope="cls", n_training_tokens=settings.n_sae_tokens, batch_size=1024,
        image_batch_size=128, seed=settings.seed, progress=progress,
        output_dir=folder / f"sae-{settings.d_sae}-{settings.k}-{settings.n_sae_pictures}-{settings.n_sae_tokens}",
    )  # fmt: skip
    others = normalise(world.sample(128, seed=len(batches), split="sae", agreement={}).images)
    return sae, cle.check_sae(clip.vision, others, sae, n_images=128, progress=progress)


def run_study(settings: Settings, out: Path, *, control: bool = False, progress: bool = True) -> Study:
    """Everything: models, and a cell for each shortcut and agreement.

    Args:
        settings: how large.
        out: where the models are kept.
        control: also train a CLIP whose pretraining is biased, and ask its prompts.
        progress: draw bars.
    """
    world = LesionWorld(settings.seed)
    clip, folder = lesion_clip(world, settings, out, progress=progress)
    sae, check = lesion_sae(clip, world, settings, folder, progress=progress)
    cells = [cell for name in settings.shortcuts for cell in _cells(clip, sae, world, settings, name, progress)]
    found = {}
    if control:
        biased, _ = lesion_clip(LesionWorld(settings.seed, BIASED, mention=0.0), settings, out, progress=progress)
        found = _control(biased, world, settings)
    return Study(settings, clip, sae, check, tuple(cells), found)


def versions(world: LesionWorld, shortcut: str, n: int, split: str) -> tuple[Tensor, Any]:
    """The same lesions without and with a shortcut, uint8 `[version picture 3 48 48]`, and their labels `[picture]`.

    Other shortcuts lie on one picture in five, whatever its diagnosis.
    """
    pair = [world.sample(n, seed=1, split=split, agreement={}, present={shortcut: on}) for on in (False, True)]
    return torch.stack([batch.images for batch in pair]), pair[0].labels.numpy()


def shown_in(labels: Any, agreement: float, draws: Any) -> dict[str, Any]:
    """Which test pictures show the shortcut in each of the three sets."""
    return {SAME: agreeing(labels, agreement, draws), FREE: np.zeros_like(labels), REVERSED: 1 - labels}


def _cells(
    clip: cle.HookedCLIP, sae: SAE[Any], world: LesionWorld, settings: Settings, shortcut: str, progress: bool
) -> list[Cell]:
    def embed(pictures: Tensor, sets: list[Any], what: str) -> Any:
        """`[set version picture d_embed]`."""
        rows = embed_without(clip, normalise(pictures.flatten(0, 1)), sae, sets, what=what, progress=progress)
        return rows.reshape(len(sets), *pictures.shape[:2], -1)

    prompts = class_direction(clip, PROMPTS_OF)
    train, labels = versions(world, shortcut, settings.n_train, "train")
    test, truth = versions(world, shortcut, settings.n_test, "test")
    rng = np.random.default_rng(settings.seed)
    draws, test_draws = rng.random(len(labels)), rng.random(len(truth))
    plain = embed(train, [[]], f"{shortcut}: training pictures")
    active = activations(clip, normalise(test.flatten(0, 1)), sae)
    flag = np.repeat([0, 1], len(truth))
    clearest = np.array([abs(auroc(active[:, j], flag) - 0.5) for j in range(settings.d_sae)])
    keyed = [int(j) for j in (-clearest).argsort(kind="stable") if clearest[j] >= TELLS - 0.5]
    fitted = []
    sets: list[list[int]] = [[], keyed]
    for agreement in settings.agreements:
        shown = agreeing(labels, agreement, draws)
        classifier = fit_classifier(chosen(plain, shown)[0], labels)
        rows = np.arange(settings.n_explained)
        explained = normalise(train[torch.from_numpy(shown[rows]), torch.from_numpy(rows)])
        suspects = find_suspects(
            clip, explained, sae, labels[rows], classifier, PROMPTS_OF, classes=CLASSES, progress=progress
        )
        own: dict[str, Any] = {"keyed": 1 if keyed else None}
        if suspects.latents:
            controls = matched_sets(
                activations(clip, explained, sae), suspects.latents, n_sets=settings.n_random, seed=settings.seed
            )
            own |= {"suspects": len(sets), "controls": range(len(sets) + 1, len(sets) + 1 + len(controls))}
            sets += [list(suspects.latents), *controls]
        fitted.append((agreement, shown, classifier, suspects, own))
    without = embed(train, sets, f"{shortcut}: training pictures without latents")
    test_without = embed(test, sets, f"{shortcut}: test pictures without latents")
    cells = []
    for agreement, shown, classifier, suspects, own in fitted:
        heads = fit_heads(chosen(without, shown), labels, classifier, prompts, **own)
        found = {
            name: heads.accuracy(chosen(test_without, there), truth)
            for name, there in shown_in(truth, agreement, test_draws).items()
        }
        key = tuple(accuracy(active[:, latent], flag).auroc for latent in suspects.latents)
        cells.append(Cell(shortcut, agreement, found, suspects, key, tuple(keyed)))
    return cells


def _control(clip: cle.HookedCLIP, world: LesionWorld, settings: Settings) -> dict[str, dict[str, Accuracy]]:
    """The prompts of a CLIP in whose pretraining the ruler went with melanomas: shortcut -> pictures -> accuracy."""
    found = {}
    heads = Heads({PROMPTS: [(0, class_direction(clip, PROMPTS_OF))]})
    for shortcut in settings.shortcuts:
        pictures, truth = versions(world, shortcut, settings.n_test, "test")
        with torch.no_grad():
            rows = [clip.embed_images(normalise(one), normalize=True).double().numpy() for one in pictures]
        draws = np.random.default_rng(settings.seed).random(len(truth))
        found[shortcut] = {
            name: heads.accuracy(chosen(np.stack(rows)[None], there), truth)[PROMPTS]
            for name, there in shown_in(truth, BIASED["ruler"], draws).items()
        }
    return found
