"""Every rule and cut on synthetic noise of known dimension: `python -m benchmarks.noise_truth`."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table, write_section

D, SEEDS = 48, 5
NOISE = 0.1  # standard deviation in every direction; that of the signal is from 3 to 0.5
CUTS = ("marchenko_pastur", "marchenko_pastur_median", "gavish_donoho", "permutation", "knee", "gap", "variance_share")


@dataclass(frozen=True)
class World:
    """Images and texts with shared signal, and what makes one world harder than another."""

    name: str
    n: int = 4000
    n_text: int | None = None
    n_noise: int = 32
    decay: float | None = None
    gap: float = 0.0
    centre: str = "each"
    loud: float = 1.0

    def draw(self, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Image rows, text rows, their controls (noise alone), and the basis of the noise."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        turn, rank = torch.linalg.qr(normal(D, D)).Q, D - self.n_noise
        strength = torch.zeros(D, dtype=torch.float64)
        strength[:rank] = (
            torch.linspace(3, 0.5, rank) if self.decay is None else 3 * torch.arange(1, rank + 1) ** -self.decay
        )
        shared = normal(self.n, D) * strength
        image = shared + NOISE * normal(self.n, D)
        text = (shared + NOISE * normal(self.n, D))[: self.n_text]
        apart = turn[:, -1] * self.gap / 2
        controls = tuple(NOISE * normal(len(rows), D) @ turn.T for rows in (image, text))
        return (
            image @ turn.T + apart,
            self.loud * (text @ turn.T) - apart,
            (controls[0], self.loud * controls[1]),
            turn[:, rank:],
        )


WORLDS = (
    World("as the theory has it: 32 of 48 are noise"),
    World("a quarter is noise: 12", n_noise=12),
    World("slow decay: signal 3/i down to 0.07, 8 are noise", n_noise=8, decay=1.0),
    World("60 rows", n=60),
    World("4000 images, 60 texts", n_text=60),
    World("texts ten times as loud", loud=10.0),
    World("a modality gap of 2 in the noise, not centred", gap=2.0, centre="none"),
)


def cell(world: World, rule: str, cut: str | None) -> str:
    """Mean rank found and the mean squared cosine of what was found with the planted noise, or why there is none."""
    ranks, agreements = [], []
    for seed in range(SEEDS):
        image, text, control, noise = world.draw(seed)
        given: dict[str, Any] = {"control": control} if rule == "generalised" else {}
        try:
            found = cle.split_noise(image, text, rule=rule, cut=cut, centre=world.centre, progress=False, **given)
        except cle.InputError as error:
            return "needs pairs" if "needs pairs" in str(error) else "-"
        ranks.append(found.rank)
        if found.rank:
            agreements.append(float((noise.T @ found.basis).square().sum()) / found.rank)
    shown = f"{mean(ranks):.0f}" if mean(ranks) == round(mean(ranks)) else f"{mean(ranks):.1f}"
    if not agreements:
        return shown
    whole = f"{shown}, {mean(agreements):.2f}"
    return f"**{whole}**" if abs(mean(ranks) - world.n_noise) <= 0.5 and mean(agreements) > 0.98 else whole


def main() -> None:
    """Measure, print, and write the section `noise_truth` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=len(WORLDS))
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # few rows are what some worlds are about
    parts = []
    for world in WORLDS[: args.worlds]:
        lines = [
            [f"`{rule}`", *(cell(world, rule, cut) for cut in CUTS)]
            for rule in cle.RULES
            if rule != "spectral_gap"  # it is the pooled covariance, cut at the gap
        ]
        parts.append(
            f"**{world.name}** (planted: {world.n_noise})\n\n" + table(["rule", *(f"`{cut}`" for cut in CUTS)], lines)
        )
        print(parts[-1])
    text = (
        f"`python -m benchmarks.noise_truth`: {D} dimensions turned at random, noise of standard deviation {NOISE} in all of them, signal "
        f"that images and texts share in some, of standard deviation 3 to 0.5 unless said otherwise; 4000 pairs; mean of {SEEDS} seeds. A cell is the "
        "dimension found, and the mean squared cosine of what was found with the planted noise (1: all of it is noise). Bold: right to half a "
        "dimension and 0.98. A dash: the cut says nothing about what the rule gives, or there are too few rows for it. `spectral_gap` is "
        "`pooled` cut at `gap`; the control of `generalised` is noise alone.\n\n" + "\n\n".join(parts)
    )
    if args.worlds == len(WORLDS):
        write_section("noise_truth", text)


if __name__ == "__main__":
    main()
