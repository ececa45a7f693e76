"""Ambiguous words on a real CLIP: what each retrieves from photos, whether that is two things, and which latents say so.

`python -m benchmarks.real_flags_words --data FOLDER` asks the 606 COCO and ImageNet photos for the 80 COCO names, by their
text embeddings, and for ImageNet's words that have two classes, by the rows of the classifier, splits what comes back
with `find_picture_senses`, flags with `flag_components`, and writes the section `real_flags_words` of docs/results.md. The
photos are not free: a sheet for each word goes to RUNS/words. What is finished is kept.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import open_clip
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.real_saes import all_token_saes, read_embeddings, real_tower
from benchmarks.timing import machine

HOOK = "blocks.10.hook_resid_post"
N = 8  # photos of each name: more than the photos show of most
WORDS = ("mouse", "kite", "baseball bat", "orange", "remote", "keyboard", "tie")
# Words that no COCO name has: the mean of the rows of all classes that the word names.
CLASSES = {"crane": (134, 517), "bow": (456, 457), "maillot": (638, 639)}
PARTS = ("hot dog", "dog", "teddy bear", "bear")  # names of COCO of which one is a word of another


def targets(data: Path) -> cle.Target:
    """The 80 COCO names by text, and the words of `CLASSES` by the classifier."""
    vectors, names = read_embeddings(data / "embeddings" / "coco_171.safetensors")
    with safe_open(data / "embeddings" / "imagenet_probe.safetensors", framework="pt") as file:
        weight = F.normalize(file.get_tensor("weight").float(), dim=1)
    rows = torch.stack([weight[list(numbers)].mean(dim=0) for numbers in CLASSES.values()])
    return cle.direction_target(torch.cat([vectors[:80], rows]), labels=[*names[:80], *CLASSES])


def photos_of(data: Path) -> tuple[list[Path], list[str]]:
    """All photos, and what each shows by its annotation or class."""
    coco = json.loads((data / "images" / "coco.json").read_text())
    imagenet = json.loads((data / "images" / "imagenet.json").read_text())
    shown = [", ".join(entry["objects"]) for entry in coco]
    shown += [f"[{open_clip.IMAGENET_CLASSNAMES[entry['class_index']]}]" for entry in imagenet]
    return [data / entry["file"] for entry in [*coco, *imagenet]], shown


def sheet(
    path: Path, title: str, photos: list[Path], groups: Tensor, crops: list[tuple[str, cle.ReferenceCrops]]
) -> None:
    """The photos that a word retrieves, by group, and the references of the latents that are flagged or greatest."""
    fig = Figure(figsize=(14, 2.2 * (1 + len(crops)) + 0.4), layout="constrained")
    all_axes = fig.subplots(1 + len(crops), N, squeeze=False)
    for axes in all_axes.flatten():
        axes.axis("off")
    for axes, photo, group in zip(all_axes[0], photos, groups.tolist(), strict=True):
        axes.imshow(cle.read_image(photo).resize((224, 224)))
        axes.set_title(f"group {group}", fontsize=8)
    for line, (name, found) in zip(all_axes[1:], crops, strict=True):
        for axes, picture in zip(line, found.pictures, strict=False):
            low, high = float(picture.min()), float(picture.max())
            axes.imshow(((picture - low) / (high - low)).permute(1, 2, 0))
        line[0].set_title(name, fontsize=8, loc="left")
    fig.suptitle(title)
    fig.savefig(path, dpi=80)


def main() -> None:
    """Retrieve, split, flag, print, and write the section `real_flags_words` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/real"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where weights, SAEs and results are kept")
    args = parser.parse_args()
    clip = real_tower(args.data, args.runs)
    sae = all_token_saes(clip, args.data, args.runs)[HOOK]
    target = targets(args.data)
    photos, shown = photos_of(args.data)
    folder = args.runs / "words"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "senses.safetensors").exists():
        kept = {"checkpoint": folder / "senses.pass"}
        cle.find_picture_senses(clip, photos, sae, target, n=N, batch_size=8, **kept).save(folder / "senses.safetensors")
    senses = cle.PictureSenses.load(folder / "senses.safetensors")
    asked = [target.labels.index(name) for name in (*WORDS, *CLASSES, *PARTS)]
    # COCO's photos and what the words retrieve: what the sheets show.
    n_coco = sum(not what.startswith("[") for what in shown)
    few = [photos[i] for i in sorted({*range(n_coco), *senses.sample[asked].flatten().tolist()})]
    references = cle.collect_references(
        clip.vision, few, sae, k=N, preprocess=clip.preprocess, batch_size=8, checkpoint=folder / "references"
    )
    own = target.select(asked)
    attributions = cle.aggregate_attributions(
        clip.vision, [photos[i] for i in senses.sample[asked].flatten().tolist()], sae, own,
        target_of=torch.arange(len(asked)).repeat_interleave(N), preprocess=clip.preprocess, batch_size=8,
        checkpoint=folder / "attributions",
    )  # fmt: skip
    terms = cle.TermEmbeddings.from_vectors(target.vectors[:80], target.labels[:80], model=clip.model_name)
    alignment = cle.align(references, terms, clip, scorer="decoder", sae=sae, progress=False)
    flags = cle.flag_components(attributions, alignment, references, target=own, senses=senses)
    rows = []
    for place, name in enumerate(own.labels):
        row = senses.names.index(name)
        retrieved = [shown[i] for i in senses.sample[row].tolist()]
        group = senses.group[row]
        two = float(senses.bimodality[row]) >= senses.bimodality_threshold()
        flagged = [flag for flag in flags.about(name) if flag.kind in ("polysemous", "compound noun")]
        greatest = attributions.top(3).latents[place].tolist()
        about = [f"{flag.kind} {flag.latent} ({flag.label}, group {int(flag.number('group'))})" if flag.kind == "polysemous"
                 else f"{flag.kind}, {flag.subject}: {flag.latent} ({flag.label})" for flag in flagged]  # fmt: skip
        rows.append([
            name, "; ".join(what for i, what in enumerate(retrieved) if not group[i]),
            "; ".join(what for i, what in enumerate(retrieved) if group[i]),
            f"{float(senses.bimodality[row]):.3f}{' (two groups)' if two else ''}",
            ", ".join(f"{latent} ({alignment.labels[latent]})" for latent in greatest), "; ".join(about) or "none",
        ])  # fmt: skip
        latents = list(dict.fromkeys([*(flag.latent for flag in flagged), *greatest]))[:4]
        crops = [(f"latent {latent}, {alignment.labels[latent]}",
                  cle.crop_references(references, latent, few, clip.vision, preprocess=clip.preprocess))
                 for latent in latents]  # fmt: skip
        sheet(
            folder / f"{name.replace(' ', '_')}.png",
            name,
            [photos[i] for i in senses.sample[row].tolist()],
            group,
            crops,
        )
    often = Counter(latent for row in attributions.top(3).latents.tolist() for latent in row)
    flagged_latents = sorted({flag.latent for flag in flags.flags if flag.kind in ("polysemous", "compound noun")})
    shared = "; ".join(f"latent {latent} is among the greatest three of {often[latent]} of the {len(own.labels)} words"
                       for latent in flagged_latents)  # fmt: skip
    kinds = Counter(flag.kind for flag in flags.flags)
    header = ["word", "photos, larger group", "photos, smaller group", "bimodality", "greatest latents", "flags"]
    text = f"""
`make real`, that is `python -m benchmarks.real_flags_words` ({machine()})

What each word retrieves from the {len(photos)} COCO and ImageNet photos, {N} of them, in the two groups of `find_picture_senses` at `{HOOK}`
with COCO's annotations, or in brackets ImageNet's class. The directions are the text embeddings of the COCO names; of {", ".join(CLASSES)}, which no
COCO name has, the mean of the rows of ImageNet's classifier for all of their classes ({CLASSES}). Two groups: a bimodality of at least
{senses.bimodality_threshold():.3f}, from the controls. Latents: of the greatest share of the attributions, with the COCO name that is nearest to their decoder
rows. {len(flags)} flags in all: {", ".join(f"{n} {kind}" for kind, n in kinds.items())}.
Of the polysemous and compound flags: {shared or "there are none"}. A latent that many words share tells nothing of one word.

{table(header, rows)}

With {N} photos of a word groups are told by chance now and then ([limits](flags.md#limits)), and most of these words have one of their things among
the photos. The photos, and the crops that activate the latents, are in `RUNS/words/*.png`, which the command writes and the
repository does not hold.
"""
    print(text)
    write_section("real_flags_words", text)


if __name__ == "__main__":
    main()
