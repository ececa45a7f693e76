"""Signal and noise of a real CLIP's image tower: `python -m benchmarks.real_spectrum --data FOLDER`.

One pass over the ImageNet and COCO photos and crops of them keeps the CLS token at four blocks and the embedding, and
the covariance of the patches; a run that is interrupted goes on. Then spectra, the noise of three kinds of photos beside
chance and random halves, and what pruning does to zero-shot, kNN and a linear probe; section `real_spectrum`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm

import clip_lens_ext as cle
from benchmarks.crops import Crops
from benchmarks.page import table, write_section
from benchmarks.planted_spectrum import FIGURES, scores_table
from benchmarks.real_saes import HOOKS, read_embeddings, real_tower
from clip_lens_ext.plots import plot_overlap, plot_pruning, plot_spectrum

N_CROPS = {"imagenet": 3, "coco": 7}
CHUNK, BATCH = 128, 16
ANIMALS = 398  # ImageNet's classes begin with as many animals
RANKS = (16, 64, 128, 192, 256, 320, 384, 448)
KINDS = ((0, "fish, amphibians, reptiles"), (7, "birds"), (25, "fish, amphibians, reptiles"), (69, "invertebrates"), (80, "birds"),
         (101, "other mammals"), (107, "invertebrates"), (127, "birds"), (147, "other mammals"), (151, "dogs"), (269, "other mammals"),
         (300, "invertebrates"), (330, "other mammals"), (389, "fish, amphibians, reptiles"), (398, "things"))  # fmt: skip


def photos_of(data: Path, which: str) -> list[Path]:
    """The photos in the order of their list."""
    return [data / one["file"] for one in json.loads((data / "images" / f"{which}.json").read_text())]


def kept_rows(clip: cle.HookedCLIP, data: Path, runs: Path) -> dict[str, dict[str, Tensor]]:
    """Of ImageNet and COCO: the CLS token at each hook, the embedding, and the mean of the patches' outer products."""
    runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Tensor]] = {}
    for which, n_crops in N_CROPS.items():
        pictures = Crops(photos_of(data, which), n_crops)
        starts = range(0, len(pictures), CHUNK)
        for start in tqdm(starts, desc=which, unit="chunk"):
            path = runs / f"{which}-{start}.safetensors"
            if not path.exists():
                rows = chunk_rows(clip, Subset(pictures, range(start, min(start + CHUNK, len(pictures)))))
                save_file(rows, path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
        parts = [load_file(runs / f"{which}-{start}.safetensors") for start in starts]
        found[which] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return found


@torch.no_grad()
def chunk_rows(clip: cle.HookedCLIP, pictures: Subset[object]) -> dict[str, Tensor]:
    """Rows of some pictures; of the patches a few of each, which is what a covariance of 768 dimensions needs."""
    rows: dict[str, list[Tensor]] = {}
    for batch in cle.image_batches(pictures, preprocess=clip.preprocess, batch_size=BATCH):
        embedding, cache = clip.vision.run_with_cache(batch.pixels, names_filter=list(HOOKS))
        rows.setdefault("hook_embedding", []).append(embedding)
        for hook in HOOKS:
            rows.setdefault(hook, []).append(cache[hook][:, 0])
            rows.setdefault(f"{hook} patches", []).append(cache[hook][:, 1::14].flatten(0, 1))  # one column of the grid
    return {name: torch.cat(parts).contiguous() for name, parts in rows.items()}


def moments(rows: Tensor) -> cle.Covariance:
    """Mean and covariance."""
    found = cle.StreamingCovariance(rows.shape[1])
    found.update(rows)
    return found.result()


def spectra(rows: dict[str, dict[str, Tensor]]) -> Iterator[list[str]]:
    """A row for each place and set of photos."""
    for hook in [*HOOKS, *(f"{hook} patches" for hook in HOOKS), "hook_embedding"]:
        for which in N_CROPS:
            values = rows[which][hook]
            values = torch.nn.functional.normalize(values, dim=-1) if hook == "hook_embedding" else values
            covariance = moments(values)
            spectrum = torch.linalg.eigvalsh(covariance.covariance).flip(0).clamp_min(0)
            share = spectrum.cumsum(0) / spectrum.sum()
            half, most = (int((share < level).sum()) + 1 for level in (0.5, 0.99))
            loudest = float(spectrum[0] / spectrum.sum())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                noise = [cle.split_noise(covariance, cut=cut).rank for cut in ("marchenko_pastur", "knee", "variance_share")]
            name, _, patches = hook.partition(" ")
            tokens = patches or ("-" if name == "hook_embedding" else "cls")
            yield [f"`{name}`", tokens, which, f"{covariance.d}", f"{covariance.count:,}", f"{100 * loudest:.1f}%", f"{half}", f"{most}", *map(str, noise)]


def kind_of(class_index: int) -> str:
    """Which kind of thing an ImageNet class is, by the ranges in which ImageNet orders them."""
    return [name for start, name in KINDS if start <= class_index][-1]


def main() -> None:
    """Run, draw, print, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    args = parser.parse_args()
    clip = real_tower(args.data, args.runs)
    rows = kept_rows(clip, args.data, args.runs / "spectrum")
    classes = torch.tensor([one["class_index"] for one in json.loads((args.data / "images" / "imagenet.json").read_text())])
    n_photo = len(classes)
    image, coco = rows["imagenet"]["hook_embedding"], rows["coco"]["hook_embedding"]
    photo_class = classes.repeat(1 + N_CROPS["imagenet"])  # the photos whole, then their crops
    unit = torch.nn.functional.normalize(image, dim=-1)
    probe = load_file(args.data / "embeddings" / "imagenet_probe.safetensors")["weight"].float()

    # A photo and its crops are on one side, so that no test picture has a crop of itself among its neighbours.
    generator = torch.Generator().manual_seed(0)
    is_test = (torch.rand(n_photo, generator=generator) < 0.5).repeat(1 + N_CROPS["imagenet"])
    whole = torch.arange(len(image)) < n_photo
    kinds = sorted({kind_of(int(index)) for index in classes})
    labels = torch.tensor([kinds.index(kind_of(int(index))) for index in photo_class])
    training = moments(unit[~is_test])
    tried = whole | ~is_test  # crops train; a test photo counts once
    names = [read_embeddings(args.data / "embeddings" / f"{name}.safetensors")[0] for name in ("coco_171", "voc_20")]
    texts = moments(torch.nn.functional.normalize(torch.cat(names), dim=-1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        splits = [cle.split_noise(training, texts, rule="pooled", cut=k) for k in RANKS]
        named = [cle.split_noise(training, cut=cut) for cut in ("marchenko_pastur", "knee", "variance_share", "gap")]
    coarse = cle.evaluate_pruning(clip, splits, cle.EvaluationData(image[tried], labels=labels[tried], is_test=is_test[tried]), covariance=training, n_bootstrap=500)
    exact = cle.evaluate_pruning(
        clip, splits, cle.EvaluationData(image[whole], labels=classes, classes=probe, is_test=is_test[whole]),
        covariance=training, n_bootstrap=500,
    )  # fmt: skip
    groups = {"ImageNet, animals": unit[photo_class < ANIMALS], "ImageNet, things": unit[photo_class >= ANIMALS],
              "COCO": torch.nn.functional.normalize(coco, dim=-1)}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        overlaps = {k: cle.subgroup_overlap(cle.split_subgroups(groups, rule="pooled", cut=k, n_bootstrap=30)) for k in (64, 128, 256)}
    plot_spectrum(named, training, None, FIGURES / "real_spectrum.png", title="The embedding of OpenAI's ViT-B/16, ImageNet photos")
    plot_pruning(coarse, FIGURES / "real_pruning.png", title="Pruning the embedding of OpenAI's ViT-B/16")
    plot_overlap(overlaps[128], FIGURES / "real_overlap.png", title="Is it the same noise in other photos?")
    lines = []
    for k, overlap in overlaps.items():
        for _, pair in overlap.to_frame().iterrows():
            lines.append([str(k), f"{pair['first']} ({len(groups[pair['first']]):,})", f"{pair['second']} ({len(groups[pair['second']]):,})", f"{pair.overlap:.3f}",
                          f"{pair.low:.3f} to {pair.high:.3f}", f"{pair.by_chance:.3f}", f"{pair.split_half:.3f}"])  # fmt: skip
    counts = ", ".join(f"{kind} {int((labels[whole] == kinds.index(kind)).sum())}" for kind in kinds)
    wordings = [f"- {line}" for found in (exact, coarse) for line in found.verdict().splitlines() if line.split()[0] in ("64", "128", "256", "384")]
    content = "\n\n".join([
        f"`python -m benchmarks.real_spectrum --data FOLDER`: OpenAI's ViT-B/16 image tower; {n_photo} ImageNet photos with {N_CROPS['imagenet']} crops of each, "
        f"{len(coco) // (1 + N_CROPS['coco'])} COCO photos with {N_CROPS['coco']}. Crops of one photo are not independent: rows are not evidence. There is no text tower here, "
        f"and of texts {texts.count} embeddings of class names, which fill {texts.count - 1} of {texts.d} dimensions at most.",
        "**Spectra.** How many directions carry half and 99% of the variance, the share of the loudest, and how many each cut calls noise.",
        table(["hook", "tokens", "photos", "d", "rows", "loudest", "for half", "for 99%", "noise: MP", "knee", "1% of variance"], list(spectra(rows))),
        "![Spectrum of the embedding](figures/real_spectrum.png)",
        "**Is it the same noise in other photos?** The noise is the `k` directions of lowest variance. The interval takes off what few rows add to a subspace, so it may lie above the overlap; crops of one photo make it too narrow.",
        table(["k", "first (rows)", "second (rows)", "overlap", "interval", "by chance", "two halves of one"], lines), "![Overlap](figures/real_overlap.png)",
        f"**What pruning does.** The noise is that of the pooled rule, of the photos and the {texts.count} class names; the lowest variance is that of the photos alone. Splits are made of half of the photos with their crops, and tried on the other half. Zero-shot: the {int(is_test[whole].sum())} test photos "
        f"against the {len(probe)} rows of a linear classifier in place of class embeddings. kNN and linear probe: {len(kinds)} kinds of things ({counts} photos), trained on the other half's photos and crops.",
        scores_table(exact, exact.measures), scores_table(coarse, coarse.measures), "![Scores over the number of pruned dimensions](figures/real_pruning.png)",
        "In words, as `verdict()` says it:", "\n".join(wordings),
    ])  # fmt: skip
    print(content)
    write_section("real_spectrum", content)


if __name__ == "__main__":
    main()
