"""What the tables of Sparse CLIP share: pairs of the planted world, held-out pictures with their truth, and heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.planted.backgrounds import BACKGROUNDS
from clip_lens_ext.planted.roles import CATEGORIES
from clip_lens_ext.planted.sprites import COLOURS
from clip_lens_ext.sparse_clip import EmbeddedPairs, embed_pairs

N_TRAIN, N_TEST = 6000, 1500
TEMPLATE = "a photo of a {}"
# Words that the truth of a picture says nothing of: grammar, sizes and colours.
_GRAMMAR = ("a", "photo", "of", "picture", "drawing", "and", "on", "with", "the", "word", "sign", "small", "large")
NOT_JUDGED = frozenset((*_GRAMMAR, *COLOURS))
TRAINING: dict[str, Any] = {"batch_size": 500, "n_epochs": 60, "lr": 5e-3}
WIDTH, CAP = 16, 10.0


@dataclass(frozen=True, eq=False)
class Setup:
    """The world, its dense CLIP, and everything embedded once."""

    world: PlantedWorld
    dense: cle.HookedCLIP
    pairs: EmbeddedPairs
    batch: Any
    """Held-out pictures, as `PlantedWorld.sample` gives them."""
    images: Tensor
    """Their embeddings, `[n d_embed]`."""
    labels: Tensor
    """The number of each one's name in `names`."""
    names: list[str]
    prompts: Tensor
    """Embeddings of the prompts of `names`."""
    captions: Tensor
    """Embeddings of the distinct captions of the held-out pictures."""
    own: Tensor
    """Which captions are a picture's own, bool `[n caption]`."""
    words: list[str]
    """Words that a feature may be named by and the truth can judge."""
    word_vectors: Tensor
    there: Tensor
    """Whether the thing that a word names is on a picture, bool `[n word]`; see `is_there`."""
    drawn: Tensor
    """Whether the word itself is drawn on a picture, bool `[n word]`."""

    @property
    def caption_of(self) -> Tensor:
        """The number of each picture's caption."""
        return self.own.int().argmax(dim=1)


@torch.no_grad()
def setup(runs: Path) -> Setup:
    """Draw and embed; the training pairs are kept in `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    world, dense = PlantedWorld(0), cle.planted_clip()
    file = runs / f"pairs_{N_TRAIN}.safetensors"
    if file.exists():
        pairs = EmbeddedPairs.load(file)
    else:
        drawn = world.sample(N_TRAIN, seed=21, split="train")
        pairs = embed_pairs(dense, normalise(drawn.images), drawn.captions)
        pairs.save(file)
    batch = world.sample(N_TEST, seed=22, split="test")
    images = torch.cat([dense.embed_images(part) for part in normalise(batch.images).split(250)])
    names = list(dict.fromkeys(entry.name for entry in world.classes))
    labels = torch.tensor([names.index(world.classes[number].name) for number in batch.labels.tolist()])
    distinct = list(dict.fromkeys(batch.captions))
    place = torch.tensor([distinct.index(caption) for caption in batch.captions])
    own = F.one_hot(place, len(distinct)).bool()
    words = [word for word in world.vocabulary if word not in NOT_JUDGED]
    there = torch.tensor([[is_there(world, batch, i, word) for word in words] for i in range(len(batch))])
    letters = torch.tensor([[word in (written or "").split() for word in words] for written in batch.words])
    return Setup(
        world, dense, pairs, batch, images, labels, names, dense.embed_texts([TEMPLATE.format(n) for n in names]),
        dense.embed_texts(distinct), own, words, dense.embed_texts(words), there, letters,
    )  # fmt: skip


def objects_of(world: PlantedWorld, word: str) -> set[str]:
    """The objects that a word names: as a name, or as a part of one.

    A compound's part that alone names another object names that one and not the compound's: there is no glass on a
    picture of a glass moth.
    """
    elsewhere = {(compound.phrase, compound.part_word) for compound in world.key.compounds}
    return {entry.object for entry in world.classes
            if word in entry.name.split() and (entry.name, word) not in elsewhere}  # fmt: skip


def is_there(world: PlantedWorld, batch: Any, picture: int, word: str) -> bool:
    """Whether a held-out picture shows what a word names: the background, or an object by its category or name.

    A drawn word is letters and no object: `Setup.drawn` has those.
    """
    if word in BACKGROUNDS:
        return bool(batch.backgrounds[picture] == word)
    shown = set(batch.objects[picture])
    if word in CATEGORIES:
        return any(entry.category == word for entry in world.classes if entry.object in shown)
    return not shown.isdisjoint(objects_of(world, word))


@dataclass(frozen=True)
class Codes:
    """Codes of everything held out, `[... d_code]`."""

    images: Tensor
    prompts: Tensor
    captions: Tensor
    words: Tensor


@torch.no_grad()
def codes_of(clip: cle.HookedCLIP, data: Setup) -> Codes:
    """By the heads of a Sparse CLIP, from the embeddings."""
    native: Any = clip.native
    texts = (native.text_head(part) for part in (data.prompts, data.captions, data.word_vectors))
    return Codes(native.image_head(data.images), *texts)


def train(data: Setup, *, width: int = WIDTH, cap: float = CAP, seed: int = 0, **settings: Any) -> Any:
    """Heads on the pairs; `activation` and `k` are of the heads, the rest of the training.

    The factor begins at its cap, which it would reach in a long training: in one as short as this it would not.
    """
    heads = {name: settings.pop(name) for name in ("activation", "k") if name in settings}
    d_code = width * data.images.shape[1]
    start = cle.add_sparse_heads(data.dense, d_code, logit_scale=cap, seed=seed, **heads)
    return cle.train_sparse_clip(start, data.pairs, largest_logit_scale=cap, **{**TRAINING, **settings})
