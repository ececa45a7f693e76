"""What the pictures of a prompt show: one thing or two, and does a word of the prompt alone name another thing?"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import versions
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.semantics.picture_reader import PictureReader
from clip_lens_ext.semantics.prompts import Target, embedded_prompts
from clip_lens_ext.semantics.sense_results import PictureSenses
from clip_lens_ext.semantics.two_groups import (
    Discriminants,
    Split,
    auroc,
    bimodality,
    principal_components,
    purity,
    split_in_two,
    welch_t,
)
from clip_lens_ext.semantics.word_match import FUNCTION_WORDS
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.positions import TokenScope


@torch.no_grad()
def find_picture_senses(
    clip: HookedCLIP,
    images: Any,
    sae: SAE,
    names: Sequence[str] | Target,
    *,
    template: str = "a photo of a {}",
    n: int = 80,
    n_dims: int = 6,
    n_controls: int = 60,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    seed: int = 0,
    ignore: Sequence[str] = FUNCTION_WORDS,
    preprocess: Preprocess | None = None,
    batch_size: int = 64,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> PictureSenses:
    """Split the pictures that each prompt retrieves into two groups, and compare the split with controls.

    The features of a picture are the greatest activations of its latents over the SAE's tokens. A prompt's pictures are
    the `n` of greatest cosine; two means split them, in the directions that tell the pictures of the other prompts
    apart. `separation` is the share of the spread there that the two means explain; `bimodality` is that share along
    the line between the groups, for pictures that had no part in drawing the line. The controls are the other prompts,
    and random pairs of prompts, half and half. For each word of a name of several, the pictures of the name and those
    of the word alone are split alike.

    Args:
        clip: the model.
        images: pictures without labels, as `clip_lens_ext.data.image_batches` takes them, to be read by position.
        sae: an SAE of the vision tower.
        names: what the prompts are about, at least four; each once. A `Target` of directions, such as
            `direction_target(vectors, labels=names)`, for a model without a text tower: its labels are the names and
            the prompts, and the single words of a name are looked at where they are names too.
        template: with one `{}` for the name; not used with a `Target`.
        n: pictures of a prompt: about as many as show one thing.
        n_dims: directions in which groups are looked for.
        n_controls: random pairs of prompts.
        hook_name, token_scope: instead of the SAE's own.
        seed: of the pairs and of the starts of 2-means.
        ignore: words of a name that name nothing alone.
        preprocess: instead of the model's own.
        batch_size: pictures in a batch.
        checkpoint: a file to resume the pass over all pictures from if it exists, and to write to; None: neither.
        checkpoint_every: batches between two writes.
        progress: draw bars.

    Returns:
        `PictureSenses` on the CPU. What could not be read is in `skipped`. The cosines of all pictures and the latents
        of those that a prompt retrieves are held meanwhile, `[sample prompt]` and `[picture d_sae]`.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: fewer than four names, one twice, a template without its place, fewer pictures than `n`, names that
            all retrieve the same pictures, data that cannot be read by position or that change meanwhile, or a
            checkpoint of another pass.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pictures = cle.planted.normalise(world.sample(60, seed=3, split="test").images)
        >>> names = ["bat", "crown", "duck", "glass moth", "glass"]
        >>> senses = find_picture_senses(clip, pictures, sae, names, n=6, n_controls=4, progress=False)
        >>> senses.sample.shape, senses.part_words
        (torch.Size([6, 6]), ('glass', 'moth'))

    References:
        The rule is a candidate: Dreyer et al., arXiv 2505.20229, report polysemous words and compound nouns, and no
        rule that finds them.
    """
    asked = _asked(names, template, ignore)
    _check(asked.names, n, n_dims, n_controls)
    vectors = embedded_prompts(clip, names if isinstance(names, Target) else asked.prompts).vectors
    names, texts, prompts, parts = asked
    tower = clip.vision
    name = sae_hook_name(tower, sae, hook_name)
    scope = token_scope or sae.cfg.metadata.token_scope
    batches = image_batches(images, preprocess=preprocess or clip.preprocess, batch_size=batch_size)
    batches.select([])  # the second pass reads single pictures: data in one order alone are refused before the first
    reader = PictureReader(clip, sae, name, scope, vectors, progress)
    (cosine, indexes), report = reader.all_pictures(batches, checkpoint, checkpoint_every)
    if len(cosine) < n:
        raise InputError(f"there are {len(cosine)} readable pictures, and n is {n}: take fewer for each prompt")
    best = cosine.topk(n, dim=0)
    sample = best.indices.T
    if bool((sample[: len(names)].sort(dim=1).values == sample[0].sort().values).all()):
        raise InputError(
            f"every name retrieves the same {n} pictures, so that nothing tells the pictures of one from those of "
            "another: take a smaller n, more pictures, or names that the model tells apart"
        )
    latents, row_of = reader.latents(batches.select(indexes[sample.unique()].tolist()), sample)
    features = principal_components(latents, seed=seed)
    space = Discriminants(features, row_of[sample[: len(names)]], min(n_dims, len(names) - 2, features.shape[1]))
    rng = random.Random(seed)

    def halves(rows: Tensor, *places: int) -> tuple[Split, float]:
        left_out = [place for place in places if place < len(names)]
        found = split_in_two(features[rows] @ space.without(*left_out), seed=seed)
        return found, bimodality(features[rows], found.group, space.within(*left_out), seed=seed)

    groups, split, latent_t, chance_t = [], [], [], []
    for place in range(len(texts)):
        found, two = halves(row_of[sample[place]], place)
        groups.append(found.group)
        split.append((found.separation, two))
        active = latents[row_of[sample[place]]]
        latent_t.append(welch_t(active[found.group == 0], active[found.group == 1]))
        shuffled = found.group[torch.randperm(n, generator=torch.Generator().manual_seed(seed + place))]
        chance_t.append(_chance(active[shuffled == 0], active[shuffled == 1]))
    half = n // 2
    source = torch.arange(2 * half) // half

    def mixed(first: int, second: int) -> tuple[float, float, float]:
        rows = row_of[torch.cat([sample[first][:half], sample[second][:half]])]
        found, two = halves(rows, first, second)
        return found.separation, two, purity(found.group, source)

    pairs = [tuple(rng.sample(range(len(names)), 2)) for _ in range(n_controls)]
    controls = torch.tensor([mixed(*pair) for pair in pairs], dtype=torch.float64)
    measured = [mixed(place, texts.index(word)) for place, word in parts]
    compared = torch.tensor(measured, dtype=torch.float64).reshape(-1, 3)
    whole = torch.tensor(split, dtype=torch.float64)
    belongs = torch.zeros(len(texts), 3, len(latents), dtype=torch.bool)
    for place, group in enumerate(groups):
        rows = row_of[sample[place]]
        belongs[place, 2, rows] = True
        belongs[place, group, rows] = True
    areas = auroc(latents, belongs.flatten(0, 1)).unflatten(0, (len(texts), 3)).float()
    part_t, part_chance = [], []
    for part, (place, word) in enumerate(parts):
        both = [latents[row_of[sample[one]]] for one in (place, texts.index(word))]
        part_t.append(welch_t(*both))
        order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed + len(texts) + part))
        part_chance.append(_chance(*torch.cat(both)[order].split(n)))
    return PictureSenses(
        names=tuple(names), texts=texts, prompts=prompts, sample=indexes[sample], cosine=best.values.T.contiguous(),
        group=torch.stack(groups), separation=whole[:, 0].contiguous(), bimodality=whole[:, 1].contiguous(),
        latent_t=torch.stack(latent_t), chance_t=torch.stack(chance_t), group_auroc=areas[:, :2].contiguous(),
        text_auroc=areas[:, 2].contiguous(),
        mixed_separation=controls[:, 0].contiguous(), mixed_bimodality=controls[:, 1].contiguous(),
        mixed_purity=controls[:, 2].contiguous(),
        part_of=torch.tensor([place for place, _ in parts], dtype=torch.int64),
        part_words=tuple(word for _, word in parts), part_separation=compared[:, 0].contiguous(),
        part_purity=compared[:, 2].contiguous(),
        part_latent_t=torch.stack(part_t) if part_t else latents.new_zeros(0, latents.shape[1]),
        part_chance_t=torch.stack(part_chance) if part_chance else latents.new_zeros(0),
        vectors=vectors.float().cpu(), hook_name=name, token_scope=str(scope), seed=seed, skipped=report.skipped,
        provenance={"model": clip.model_name, "sae_sha256": sae.cfg.metadata.sha256, "n_dims": space.n_dims,
                    "data_fingerprint": report.fingerprint, "versions": versions()},
    )  # fmt: skip


def _chance(first: Tensor, second: Tensor) -> Tensor:
    """The greatest absolute t of any latent; infinite where a group of one picture has no spread to compare with."""
    if min(len(first), len(second)) < 2:
        return torch.tensor(torch.inf, dtype=first.dtype)
    return welch_t(first, second).abs().max()


class _Asked(NamedTuple):
    """What is looked for: names, texts (the names and single words of them), their prompts, and whose word each is."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    parts: list[tuple[int, str]]


def _asked(names: Sequence[str] | Target, template: str, ignore: Sequence[str]) -> _Asked:
    if isinstance(names, str) or template.count("{}") != 1:
        raise InputError(f"names are a list, and a template has one {{}} for the name; got {names!r} and {template!r}")
    given = tuple(names.labels) if isinstance(names, Target) else tuple(names)
    parts = [
        (place, word) for place, name in enumerate(given) for word in dict.fromkeys(name.split())
        if len(name.split()) > 1 and word.lower() not in ignore
    ]  # fmt: skip
    if isinstance(names, Target):
        return _Asked(given, given, given, [(place, word) for place, word in parts if word in given])
    texts = tuple(dict.fromkeys((*given, *(word for _, word in parts))))
    return _Asked(given, texts, tuple(template.replace("{}", text) for text in texts), parts)


def _check(names: tuple[str, ...], n: int, n_dims: int, n_controls: int) -> None:
    if len(names) < 4 or len(set(names)) < len(names):
        raise InputError("names are at least four, each once: directions come from the pictures of the other prompts")
    if n < 4 or n_dims < 1 or n_controls < 1:
        raise InputError(f"n must be at least 4, n_dims and n_controls at least 1, got {n}, {n_dims} and {n_controls}")
