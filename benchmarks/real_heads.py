"""A linear classifier and text embeddings on the same photos: which latents carry each decision of a real CLIP.

`python -m benchmarks.real_heads --data FOLDER` takes the SAE of block 10 that `benchmarks.real_saes` trains, the ImageNet
classifier and the COCO text embeddings of FOLDER, and compares the shares of every latent under both heads for the
classes that both have. It writes the section `real_heads` of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import open_clip
from safetensors import safe_open

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.real_saes import all_token_saes, read_embeddings, real_tower
from benchmarks.timing import machine

HOOK, K = "blocks.10.hook_resid_post", 10


def shared_classes(names: list[str]) -> dict[str, int]:
    """Names that ImageNet's classes have too, and their numbers there."""
    imagenet = [name.lower() for name in open_clip.IMAGENET_CLASSNAMES]
    return {name: imagenet.index(name.lower()) for name in names if name.lower() in imagenet}


def photos_of(data: Path, classes: dict[str, int]) -> list[tuple[Path, str]]:
    """Every photo of one of the classes, once for each class that it shows."""
    found = []
    for entry in json.loads((data / "images" / "coco.json").read_text()):
        found += [(data / entry["file"], name) for name in entry["objects"] if name in classes]
    numbers = {number: name for name, number in classes.items()}
    for entry in json.loads((data / "images" / "imagenet.json").read_text()):
        if entry["class_index"] in numbers:
            found.append((data / entry["file"], numbers[entry["class_index"]]))
    return found


def main() -> None:
    """Compare, print, and write the section `real_heads` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/real"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where weights and SAEs are kept")
    args = parser.parse_args()
    clip = real_tower(args.data, args.runs)
    sae = all_token_saes(clip, args.data, args.runs)[HOOK]
    vectors, names = read_embeddings(args.data / "embeddings" / "coco_171.safetensors")
    both = shared_classes(names)
    photos = photos_of(args.data, both)
    classes = [name for name in both if any(shown == name for _, shown in photos)]
    with safe_open(args.data / "embeddings" / "imagenet_probe.safetensors", framework="pt") as file:
        weight, bias = file.get_tensor("weight").float(), file.get_tensor("bias").float()
    rows = [both[name] for name in classes]
    found = cle.compare_heads(
        clip.vision, [path for path, _ in photos], sae,
        cle.probe_target(weight[rows], bias[rows], labels=classes, normalize=True),  # it was trained on unit embeddings
        cle.direction_target(vectors[[names.index(name) for name in classes]], labels=classes),
        target_of=[classes.index(name) for _, name in photos], k=K, preprocess=clip.preprocess,
    )  # fmt: skip
    shown = []
    for number, name in enumerate(classes):
        first, second = found.probe.share[number], found.texts.share[number]
        by_probe, by_text = int(first.nan_to_num(-1).argmax()), int(second.nan_to_num(-1).argmax())
        shown.append([
            name, str(int(found.probe.n_images[number])), f"{float(found.rank_correlation[number]):.3f}",
            f"{float(found.overlap[number]):.1f}",
            f"{by_probe}: {100 * float(first[by_probe]):.1f}% ({100 * float(second[by_probe]):.1f}%)",
            f"{by_text}: {100 * float(second[by_text]):.1f}% ({100 * float(first[by_text]):.1f}%)",
        ])  # fmt: skip
    header = ["class", "photos", "rank correlation", f"overlap, top {K}", "greatest under the classifier (by text)", "greatest by text (under the classifier)"]
    text = f"""
`make real`, that is `python -m benchmarks.real_heads` ({machine()})

`compare_heads` with attribution patching, `{HOOK}`, all tokens: the {len(classes)} classes that ImageNet's classifier and the COCO text
embeddings both have, on the {len(photos)} (photo, class) pairs of the COCO and ImageNet photos that show them. A share is a latent's mean
attribution over the sum of the positive means. Rank correlation: Spearman's of the two shares over the latents that are active in a
photo of the class, mean over classes **{float(found.rank_correlation.nanmean()):.3f}**; of the ten greatest shares the two heads have
**{10 * float(found.overlap.nanmean()):.1f}** in common on average.

{table(header, shown)}
"""
    print(text)
    write_section("real_heads", text)


if __name__ == "__main__":
    main()
