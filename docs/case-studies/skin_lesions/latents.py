"""Which latents a classifier rests on and the words do not, and what becomes of a picture's embedding without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measures import Array, LinearClassifier
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError

LEAST, MOST = 0.01, 16


@dataclass(frozen=True, eq=False)
class Suspects:
    """Latents with a greater share of the attribution under the classifier than under the class prompts.

    Attributes:
        latents: greatest excess first; none, where no excess reaches the least that counts.
        excess: share under the classifier less the share under the prompts, or less nothing where the prompts count the
            latent against the class; of the class where it is greatest.
        of_class: that class.
        share_probe, share_text: both shares.
        comparison: `compare_heads`' result, with every latent.
    """

    latents: tuple[int, ...]
    excess: tuple[float, ...]
    of_class: tuple[str, ...]
    share_probe: tuple[float, ...]
    share_text: tuple[float, ...]
    comparison: cle.HeadComparison


def find_suspects(
    clip: cle.HookedCLIP,
    images: Any,
    sae: SAE[Any],
    labels: NDArray[np.int64],
    classifier: LinearClassifier,
    prompts: Sequence[str],
    *,
    classes: Sequence[str],
    least: float = LEAST,
    most: int = MOST,
    progress: bool = True,
) -> Suspects:
    """Compare the classifier with the class prompts on the pictures of each class; no answer key is read.

    The classifier's target for the first class is its logit with the sign turned, and the prompts' target for a class
    is the cosine with its prompt less that with the other: both heads are contrasts of the two classes.

    Args:
        clip, images, sae: as in `cle.compare_heads`.
        labels: 0 or 1, `[picture]`.
        classifier: of unit embeddings.
        prompts: one for each class.
        classes: their names.
        least: the excess from which a latent counts.
        most: at most so many latents, those of the greatest excess, and at most half of those that are ever active:
            as many have to be left for a control.
        progress: draw a bar.
    """
    weight = torch.tensor(classifier.weight)
    probe = cle.probe_target(
        torch.stack([-weight, weight]),
        torch.tensor([-classifier.bias, classifier.bias]),
        labels=classes,
        normalize=True,
    )
    texts = cle.contrast_target(clip, list(prompts), list(prompts))
    found = cle.compare_heads(
        clip.vision, images, sae, probe, texts, target_of=labels.tolist(), preprocess=clip.preprocess, progress=progress
    )
    frame = found.to_frame()
    # A latent that the prompts count against a class is no suspect for that alone: the classifier must rest on it.
    frame = frame.assign(excess=frame.share_probe - frame.share_text.clip(lower=0))
    frame = frame.sort_values("excess", ascending=False, kind="stable").drop_duplicates("latent")
    n_active = int((found.probe.n_active.sum(dim=0) > 0).sum())
    frame = frame[frame.excess >= least].head(min(most, n_active // 2))
    return Suspects(
        tuple(frame.latent.tolist()), tuple(frame.excess.tolist()), tuple(frame["class"].tolist()),
        tuple(frame.share_probe.tolist()), tuple(frame.share_text.tolist()), found,
    )  # fmt: skip


def class_direction(clip: cle.HookedCLIP, prompts: Sequence[str]) -> LinearClassifier:
    """Zero-shot as a linear classifier: the cosine with the second prompt less that with the first."""
    if len(prompts) != 2 or prompts[0] == prompts[1]:
        raise InputError(f"two different prompts are needed, one for each class, got {list(prompts)}")
    with torch.no_grad():
        first, second = clip.embed_texts(list(prompts), normalize=True).double().cpu().numpy()
    return LinearClassifier(second - first, 0.0)


@torch.no_grad()
def embed_without(
    clip: cle.HookedCLIP,
    images: Any,
    sae: SAE[Any],
    sets: Sequence[Sequence[int]],
    *,
    what: str = "embedding",
    progress: bool = True,
) -> Array:
    """Unit embeddings of the pictures with each set of latents at zero, error term kept: `[set picture d_embed]`.

    The empty set is the model as it is. The prefix of a batch runs once for all sets.

    Args:
        clip, images: as everywhere; what cannot be read has to be left out before.
        sae: at a hook of the residual stream, where the rest of the tower can run on from the activation.
        sets: which latents to set to zero.
        what: the bar's name.
        progress: draw a bar.
    """
    tower, hook = clip.vision, sae.cfg.metadata.hook_name
    masks = []
    for latents in sets:
        mask = torch.ones(sae.cfg.d_sae, device=tower.cfg.device)
        mask[list(latents)] = 0
        masks.append(mask)
    batches = cle.image_batches(images, preprocess=clip.preprocess, batch_size=64, strict=True)
    rows: list[Tensor] = []
    with tqdm(total=batches.n_samples, desc=what, unit="image", disable=not progress) as bar:
        for batch in batches:
            activation = tower.run_to(batch.pixels.to(tower.cfg.device, tower.cfg.dtype), hook)
            found = []
            for latents, mask in zip(sets, masks, strict=True):
                if not latents:
                    found.append(tower.run_from(hook, activation))
                    continue
                with tower.saes(sae), tower.hooks(fwd_hooks=[(f"{hook}.hook_sae_acts_post", _times(mask))]):
                    found.append(tower.run_from(hook, activation))
            rows.append(F.normalize(torch.stack(found).double().cpu(), dim=-1))
            bar.update(len(activation))
    return torch.cat(rows, dim=1).numpy()


def _times(mask: Tensor) -> Any:
    return lambda z, hook: z * mask.to(z.dtype)


def activations(clip: cle.HookedCLIP, images: Any, sae: SAE[Any]) -> NDArray[np.float32]:
    """The greatest activation of each latent over the SAE's tokens, `[picture d_sae]`."""
    cfg = clip.vision.cfg
    batches = cle.image_batches(images, preprocess=clip.preprocess, batch_size=64, strict=True)
    rows = [
        cle.encode(clip.vision, batch.pixels.to(cfg.device, cfg.dtype), sae).dense().amax(dim=1) for batch in batches
    ]
    return torch.cat(rows).float().cpu().numpy()


def matched_sets(
    active: NDArray[np.float32], latents: Sequence[int], *, n_sets: int, nearest: int = 8, seed: int = 0
) -> list[list[int]]:
    """Random latents of like activation, as a control: each takes the place of one suspect.

    Each is drawn from the `nearest` latents whose mean activation over the pictures is nearest to the suspect's, in
    ratio, suspects and those already drawn left out.

    Args:
        active: activations `[picture d_sae]`.
        latents: the suspects.
        n_sets: how many controls.
        nearest: how many candidates for each.
        seed: of the draws.

    Raises:
        InputError: fewer latents are ever active than a control needs.
    """
    mean = active.mean(axis=0)
    rng = np.random.default_rng(seed)
    sets: list[list[int]] = []
    for _ in range(n_sets):
        drawn: list[int] = []
        for latent in latents:
            free = [i for i in np.flatnonzero(mean > 0) if i not in latents and i not in drawn]
            if not free:
                raise InputError(f"{int((mean > 0).sum())} latents are ever active: too few for a control")
            away = np.abs(np.log(mean[free]) - np.log(max(float(mean[latent]), 1e-12)))
            drawn.append(int(rng.choice(np.array(free)[away.argsort(kind="stable")[:nearest]])))
        sets.append(drawn)
    return sets
