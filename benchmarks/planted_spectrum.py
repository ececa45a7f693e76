"""Signal and noise of the planted CLIP, both towers: `python -m benchmarks.planted_spectrum`.

Splits of the embedding by every rule, the noise of subsets of pictures, what pruning does to eight measures over the
number of dimensions with every control, and spectra of the residual streams; section `planted_spectrum`.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.plots import plot_overlap, plot_pruning, plot_spectrum

N_PICTURES, N_CONTROL, N_STREAM, N_BOOTSTRAP = 6000, 3000, 1500, 500
RANKS = (8, 16, 32, 64, 96, 104, 112, 120)
SHOWN = ("zero-shot top-1", "image to text R@1", "kNN", "linear probe")
SAID = ("32", "96", "112")  # ranks whose verdict stands on the page
FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def evaluation_data(world: PlantedWorld, n: int, seed: int) -> tuple[cle.EvaluationData, list[str]]:
    """Held-out pictures with the word of their caption as the class, captions, and the background of each."""
    batch = world.sample(n, seed=seed, split="test")
    names = list(dict.fromkeys(entry.name for entry in world.classes))
    labels = torch.tensor([names.index(world.classes[number].name) for number in batch.labels.tolist()])
    images = normalise(batch.images)
    return cle.EvaluationData(images, labels=labels, classes=names, captions=batch.captions), batch.backgrounds


def rules_table(found: cle.SpectrumAnalysis) -> str:
    """A row for each rule."""
    rows = []
    for split in found.splits:
        a, b = split.space_dimensions
        overlap = "-" if split.overlap is None or split.overlap != split.overlap else f"{split.overlap:.3f}"
        chance = "-" if split.overlap is None or split.overlap != split.overlap else f"{split.overlap_by_chance:.3f}"
        rows.append([f"`{split.rule}`", f"`{split.cut}`", f"{a}", f"{b}", f"{split.rank}", f"{split.n_by_chance}", overlap, chance])
    rows += [[f"`{name}`", "", "", "", why, "", "", ""] for name, why in found.not_split.items()]
    return table(["rule", "cut", "noise of images", "of texts", "shared noise", "shared by counting alone", "overlap", "by chance"], rows)


def scores_table(found: cle.PruningEvaluation, measures: tuple[str, ...]) -> str:
    """A row for each rank and measure, with the interval of the noise's difference from nothing and from the lowest variance."""
    rows = []
    for i, rank in enumerate(found.ranks):
        for measure in measures:
            k = found.measures.index(measure)
            scores = [f"{float(value):.3f}" for value in found.score[i, :, k]]
            ends = [found.difference_interval[i, found.pruned.index(name), k] for name in ("none", "lowest variance")]
            rows.append([str(rank), measure, *scores, *(f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in ends)])
    return table(
        ["pruned", "measure", *found.pruned, "noise less none, points", "noise less lowest variance, points"], rows
    )  # fmt: skip


def streams_table(clip: cle.HookedCLIP, data: cle.EvaluationData) -> str:
    """Of every block of both towers: how many directions carry half and 99% of the variance, and where noise begins."""
    assert clip.text is not None
    rows = []
    inputs = {"vision": data.images[:N_STREAM], "text": clip.tokenize(list(dict.fromkeys(data.captions or ()))[:N_STREAM])}
    for which, tower in (("vision", clip.vision), ("text", clip.text)):
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(tower.cfg.n_layers)]
        scopes = ["cls", "patches"] if which == "vision" else ["eot"]
        for part in cle.collect_covariance(tower, inputs[which], hooks, token_scope=scopes, progress=False):
            values = torch.linalg.eigvalsh(part.covariance).flip(0).clamp_min(0)
            share = values.cumsum(0) / values.sum()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                noise = [cle.split_noise(part, cut=cut).rank for cut in ("marchenko_pastur", "knee", "variance_share")]
            half, most = (int((share < level).sum()) + 1 for level in (0.5, 0.99))
            rows.append([which, str(part.hook_name), str(part.token_scope), f"{part.d}", f"{part.count:,}", f"{half}", f"{most}", *map(str, noise)])
    return table(
        ["tower", "hook", "tokens", "d", "rows", "for half of the variance", "for 99%", "noise: MP", "knee", "1% of variance"], rows
    )  # fmt: skip


def subsets(clip: cle.HookedCLIP, data: cle.EvaluationData, backgrounds: list[str], rank: int) -> cle.SubgroupOverlap:
    """The noise of pictures of the four most frequent backgrounds."""
    with torch.no_grad():
        rows = torch.cat([clip.embed_images(part, normalize=True) for part in data.images.split(200)])
    frequent = sorted(set(backgrounds), key=lambda name: -backgrounds.count(name))[:4]
    groups = {name: rows[torch.tensor([one == name for one in backgrounds])] for name in frequent}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cle.subgroup_overlap(cle.split_subgroups(groups, rule="pooled", cut=rank, n_bootstrap=100))


def main() -> None:
    """Analyse, draw, print, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=N_PICTURES)
    args = parser.parse_args()
    clip, world = cle.planted_clip(), PlantedWorld(0)
    data, backgrounds = evaluation_data(world, args.n, seed=51)
    mixed = world.sample(N_CONTROL, seed=52, split="test")
    control = cle.EvaluationData(cle.shuffled_pixels(normalise(mixed.images)), captions=cle.shuffled_words(mixed.captions))
    found = cle.analyse_spectrum(clip, data, control=control, ranks=None, n_bootstrap=N_BOOTSTRAP)
    curve = cle.analyse_spectrum(clip, data, rules="pooled", ranks=RANKS, n_bootstrap=N_BOOTSTRAP)
    assert found.evaluation is not None
    assert curve.evaluation is not None
    overlap = subsets(clip, data, backgrounds, 104)
    FIGURES.mkdir(exist_ok=True)
    plot_spectrum(found.cuts, found.image, found.text, FIGURES / "planted_spectrum.png", title="The embedding of the planted CLIP")
    plot_pruning(curve.evaluation, FIGURES / "planted_pruning.png", title="Pruning the embedding of the planted CLIP, by the pooled rule")
    plot_overlap(overlap, FIGURES / "planted_overlap.png", title="Noise of pictures on four backgrounds")
    frame = overlap.to_frame()
    verdicts = [
        f"- {line}" for line in curve.evaluation.verdict().splitlines()
        if line.split()[0] in SAID and any(f"pruned, {measure}:" in line for measure in SHOWN)
    ]  # fmt: skip
    text = "\n\n".join([
        f"`python -m benchmarks.planted_spectrum`: {args.n:,} held-out pictures with their captions; splits are made of one half, pruning is "
        f"tried on the other. The control of `generalised`: {N_CONTROL:,} pictures with shuffled pixels, and captions of shuffled words. "
        f"Intervals: 95% bootstrap over the samples, {N_BOOTSTRAP} draws. Every rule is a candidate of ours.",
        "**The embedding, by every rule.**", rules_table(found),
        f"The pooled covariance by every cut: {', '.join(f'`{split.cut}` {split.rank}' for split in found.cuts)} of {found.image.d} dimensions are noise.",
        "![Spectra of both towers' embeddings](figures/planted_spectrum.png)",
        "**What pruning each rule's noise does.**", scores_table(found.evaluation, SHOWN),
        f"**A curve over the number of dimensions**, by the pooled rule; {', '.join(f'{name}: {why}' for name, why in curve.evaluation.left_out.items()) or 'every control'}.",
        scores_table(curve.evaluation, SHOWN), "![Scores over the number of pruned dimensions](figures/planted_pruning.png)",
        "In words, as `verdict()` says it:", "\n".join(verdicts),
        f"**Is it the same noise in other pictures?** 104 dimensions of lowest variance, of pictures on {len(overlap.names)} backgrounds: overlap "
        f"{frame.overlap.min():.3f} to {frame.overlap.max():.3f}; by chance {frame.by_chance.mean():.3f}; two halves of one subset {frame.split_half.mean():.3f}.",
        "![Overlap of subsets](figures/planted_overlap.png)",
        "**Residual streams.**", streams_table(clip, data),
    ])  # fmt: skip
    print(text)
    write_section("planted_spectrum", text)


if __name__ == "__main__":
    main()
