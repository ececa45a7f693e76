"""Steering a Sparse CLIP beside steering a dense CLIP through an SAE: `python -m benchmarks.sparse_steering_methods`.

With one number of features the same pictures are steered to the same classes in every code: a new class is drawn among
those that share no feature with the picture's own one in *any* of them. Section `sparse_steering_methods`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sae_lens import TopKTrainingSAE
from torch import Tensor

from benchmarks.page import table, write_section
from benchmarks.sparse_findings import counted, over
from benchmarks.sparse_rivals import joint_sae, of_sae
from benchmarks.sparse_setup import N_TEST, WIDTH, Codes, Setup, codes_of, setup, train
from benchmarks.sparse_steering import N_STEERED, steered_pictures
from clip_lens_ext.sparse_clip import steer
from clip_lens_ext.sparse_clip.steering_data import N_NEAREST

FEATURES, TIMES, N_CONTROLS, SEED, L0 = (1, 2, 4, 8), (1.0, 2.0, 4.0), 5, 1, 32
OURS = "Sparse CLIP"


@dataclass(frozen=True, eq=False)
class Way:
    """One way to steer: a code of the pictures, one of the classes, and what decides on a class afterwards."""

    name: str
    codes: Tensor
    """Of the pictures, none below zero, `[picture feature]`."""
    texts: Tensor
    """Of the classes' prompts, which say what the features of a class are, `[class feature]`."""
    seen: Callable[[Tensor], Tensor]
    """From a code, as it is or steered, to what is compared with `classes`, `[picture d]`."""
    classes: Tensor
    """`[class d]`."""

    def features(self, k: int) -> Tensor | None:
        """The `k` features of each class that its prompt activates most, `[class k]`; None if one activates fewer."""
        if bool(((self.texts > 0).sum(dim=1) < k).any()):
            return None
        return self.texts.sort(dim=1, descending=True, stable=True).indices[:, :k]


def apart(features: Tensor) -> Tensor:
    """Whether two classes share no feature, bool `[class class]`, of features `[class k]`."""
    return ~(features[:, None, :, None] == features[None, :, None, :]).any(dim=-1).any(dim=-1)


def draw_targets(labels: Tensor, choices: Tensor, *, seed: int) -> Tensor:
    """For each picture a class that its own one can be steered to, at random; -1 where there is none.

    Args:
        labels: the class of each picture, `[picture]`.
        choices: bool `[class class]`.
        seed: a picture's draw depends on it and on the picture's own place alone.
    """
    found = []
    for picture, label in enumerate(labels.tolist()):
        free = choices[label].nonzero().flatten().tolist()
        found.append(free[np.random.default_rng([seed, picture]).integers(len(free))] if free else -1)
    return torch.tensor(found)


def draw_controls(codes: Tensor, off: Tensor, on: Tensor, live: Tensor, *, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """For each feature of a concept a random other one of like activation in the picture, `n` times.

    One of the `N_NEAREST` whose activation is nearest, what is equally near in random order; none of the concept's own,
    and none twice.

    Args:
        codes: `[picture feature]`.
        off, on: what the concept suppresses and boosts, `[picture k]` both.
        live: features that may be boosted: those of no text could do nothing, bool `[feature]`.
        n: draws.
        seed: a picture's draws depend on it and on the picture's own place alone.

    Returns:
        What the controls suppress and boost, `[n picture k]` both.
    """
    found = torch.zeros(2, n, *off.shape, dtype=torch.int64)
    may = live.numpy(), np.ones(codes.shape[1], dtype=bool)
    for picture, code in enumerate(codes.double().numpy()):
        rng = np.random.default_rng([seed, picture, 1])
        own = on[picture].tolist(), off[picture].tolist()
        for draw in range(n):
            free = np.ones(len(code), dtype=bool)
            free[[*own[0], *own[1]]] = False
            for side in (0, 1):
                for place, feature in enumerate(own[side]):
                    candidates = np.flatnonzero(free & may[side])
                    distance = np.abs(code[candidates] - code[feature])
                    nearest = np.lexsort((rng.random(len(candidates)), distance))[:N_NEAREST]
                    taken = int(candidates[nearest[rng.integers(len(nearest))]])
                    free[taken] = False
                    found[1 - side, draw, picture, place] = taken
    return found[0], found[1]


def said(way: Way, codes: Tensor) -> Tensor:
    """The class of the greatest cosine, -1 where two are equally great, `[picture]`."""
    cosine = F.normalize(way.seen(codes).double(), dim=-1) @ F.normalize(way.classes.double(), dim=-1).T
    greatest = cosine.max(dim=1, keepdim=True)
    alone = (cosine == greatest.values).sum(dim=1) == 1
    return greatest.indices[:, 0].where(alone, torch.tensor(-1))


def typical(codes: Tensor, own: Tensor) -> float:
    """Median activation of features `[picture k]` where they are active; NaN where none ever is."""
    values = codes.gather(1, own)
    return float(values[values > 0].median()) if bool((values > 0).any()) else float("nan")


class Steered(NamedTuple):
    """Pictures that were steered from their class to given ones."""

    answers: Tensor
    """What zero-shot says of each, the concept first, `[1 + control picture]`."""
    labels: Tensor
    targets: Tensor

    def new(self, arm: int | slice = 0) -> Tensor:
        """Whether it says the new class, 0 or 1, `[picture]`; of several arms `[picture arm]`."""
        return (self.answers == self.targets).double().T[:, arm]

    def old(self, arm: int | slice = 0) -> Tensor:
        """Whether it still says the old one, likewise."""
        return (self.answers == self.labels).double().T[:, arm]


@torch.no_grad()
def steered(
    way: Way, labels: Tensor, targets: Tensor, k: int, times: tuple[float, ...] = TIMES
) -> dict[float, Steered]:
    """Set the features of each picture's class to 0 and those of its target to a strength, and classify again.

    Args:
        way: with `k` features of each class or more.
        labels, targets: the class of each picture, and the one that it is steered to; -1: it is left out.
        k: features of each class.
        times: strengths, in units of `typical`; without that there is no strength, and nothing in the result.
    """
    features, kept = way.features(k), targets >= 0
    assert features is not None
    labels, targets = labels[kept], targets[kept]
    off, on = features[labels], features[targets]
    unit = typical(way.codes[kept], off)
    if not unit > 0:
        return {}
    offs, ons = draw_controls(way.codes[kept], off, on, (way.texts > 0).any(dim=0), n=N_CONTROLS, seed=SEED)
    arms = [(off, on), *zip(offs, ons, strict=True)]
    found = {}
    for factor in times:
        answers = []
        for arm_off, arm_on in arms:
            codes = way.codes.clone()
            codes[kept] = steer(way.codes[kept], arm_off, arm_on, factor * unit)
            answers.append(said(way, codes)[kept])
        found[factor] = Steered(torch.stack(answers), labels, targets)
    return found


def same(codes: Tensor) -> Tensor:
    """A code is compared as it is."""
    return codes


@torch.no_grad()
def ways_of(data: Setup, codes: Codes, saes: dict[int, TopKTrainingSAE], kept: Tensor, classes: Tensor) -> list[Way]:
    """The Sparse CLIP; and each SAE in its latents, and in the embedding with what the SAE leaves out kept.

    Args:
        data: everything embedded.
        codes: of the Sparse CLIP.
        saes: by their number of active latents.
        kept: the pictures.
        classes: the number in `data.names` of each class.
    """
    ways = [Way(OURS, codes.images[kept], codes.prompts[classes], same, codes.prompts[classes])]
    embedding, prompts = F.normalize(data.images[kept], dim=-1), F.normalize(data.prompts[classes], dim=-1)
    for n, sae in saes.items():
        of, _ = of_sae(sae, data)
        latents, texts = of.images[kept], of.prompts[classes]
        rest = embedding - sae.decode(latents)
        ways += [Way(f"SAE, {n} active, latents", latents, texts, same, texts),
                 Way(f"SAE, {n} active, embedding", latents, texts,
                     lambda steered, sae=sae, rest=rest: sae.decode(steered) + rest, prompts)]  # fmt: skip
    return ways


def compared(found: dict[tuple[str, int, float], Steered]) -> list[str]:
    """Of each way, in how many settings the Sparse CLIP steers more pictures to the new class, and in how many less."""
    sentences = []
    for name in dict.fromkeys(name for name, _, _ in found if name != OURS):
        settings = [(k, times) for other, k, times in found if other == name and (OURS, k, times) in found]
        verdicts = [over(found[(OURS, *at)].new() - found[(name, *at)].new()).above() for at in settings]
        more, less, open_ = counted(verdicts)
        sentences.append(f"- Beside *{name}* the Sparse CLIP steers more pictures in {more} of {len(settings)} "
                         f"settings, fewer in {less}, and is not told apart in {open_}.")  # fmt: skip
    return sentences


def main() -> None:
    """Train what is not trained yet, steer, and write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    sparse = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU").clip
    codes = codes_of(sparse, data)
    l0 = round(float((codes.images > 0).double().sum(dim=1).mean()))
    names, kept, labels = steered_pictures(data)
    classes = torch.tensor([data.names.index(name) for name in names])
    saes = {n: joint_sae(data.pairs, codes.images.shape[1], n, runs) for n in sorted({l0, L0})}
    ways = ways_of(data, codes, saes, kept, classes)
    found: dict[tuple[str, int, float], Steered] = {}
    for k in FEATURES:
        able = {way.name: features for way in ways if (features := way.features(k)) is not None}
        if not able:
            continue
        choices = torch.stack([apart(features) for features in able.values()]).all(dim=0)
        targets = draw_targets(labels, choices, seed=SEED)
        for way in ways:
            if way.name in able and bool((targets >= 0).any()):
                found |= {(way.name, k, times): one for times, one in steered(way, labels, targets, k).items()}
                print(way.name, k, [f"{float(found[way.name, k, times].new().mean()):.3f}" for times in TIMES
                                    if (way.name, k, times) in found], flush=True)  # fmt: skip
    write_section("sparse_steering_methods", page(ways, labels, found, l0))


def page(ways: list[Way], labels: Tensor, found: dict[tuple[str, int, float], Steered], l0: int) -> str:
    """The section."""
    rows = [[way.name, "", "", str(len(labels)), "-", over((said(way, way.codes) == labels).double()).percent, "-", "-"]
            for way in ways]  # fmt: skip
    for (name, k, times), one in sorted(found.items(), key=lambda entry: entry[0][1:]):
        shares = one.new(), one.old(), one.new(slice(1, None)), one.old(slice(1, None))
        rows.append([name, str(k), f"{times:g}", str(len(one.labels)), *(over(share).percent for share in shares)])
    missing = [f"{way.name} with {k}" for way in ways for k in FEATURES if (way.name, k, TIMES[0]) not in found]
    return "\n".join([
        f"Up to {N_STEERED} of {N_TEST:,} held-out pictures. With one number of features the same pictures are steered "
        "to the same classes in every code: a new class is drawn among those that share no feature with the picture's "
        "own one in any of the codes. A picture whose class has no such other is left out; the more features, the more "
        "are. The features of a class are those that its prompt activates most: in the Sparse CLIP by the text head "
        f"({l0} active in a picture), in an SAE by its encoder on the prompt's embedding. Those of the picture's class "
        "are set to 0, those of the new one to the strength, in units of the median activation that the features of a "
        "picture's own class have in it where active. *Latents* are compared with the latents of the prompts; "
        "*embedding*: the steered latents are decoded, what the SAE leaves out is added as it was, and the result is "
        "compared with dense prompts. The controls steer as many random features of like activation."
        + (f" Not measured, for a prompt activates fewer, no picture does, or no class is apart: {', '.join(missing)}."
           if missing else ""), "",
        table(["", "features", "strength", "pictures", "says the new class", "still the old one",
               "by the control: the new class", "the old one"], rows),
        "", "By 95% intervals of the difference on the same pictures:", "", *compared(found),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
