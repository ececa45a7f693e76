"""Attribution on a real CLIP: OpenAI's ViT-B/16 image tower, COCO text embeddings, photos.

`python -m benchmarks.real_clip --data FOLDER` takes the SAE of block 10 that `benchmarks.real_saes` trains (all tokens),
explains COCO photos with the text embedding of their best class, and writes the section `real_clip` of docs/results.md
and the figure beside it. FOLDER holds `openai_vit_b16.py`, `embeddings/` and `images/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

import clip_lens_ext as cle
from benchmarks.methods import NAMES, faithfulness_of_all, method_table
from benchmarks.page import PAGE, write_section
from benchmarks.real_saes import D_SAE, K, all_token_saes, read_embeddings, real_tower
from benchmarks.timing import machine

HOOK = "blocks.10.hook_resid_post"
N_STEPS = 20
SHOWN_STEPS = (0, 1, 2, 5, 10, 20)


def explain(clip: cle.HookedCLIP, sae: SAE, photo: Path, classes: cle.Target) -> dict[str, Any]:
    """Every method on one photo, for the class of the greatest cosine; the prefix runs once."""
    pixels = clip.pixels(cle.read_image(photo))
    with torch.no_grad():
        cosines = classes(clip.vision(pixels))[0]
    best = int(cosines.argmax())
    target = cle.direction_target(classes.vectors[best], labels=[classes.labels[best]])
    found = faithfulness_of_all(clip.vision, pixels, sae, target, n_steps=N_STEPS)
    return {"name": photo.name, "class": classes.labels[best], "found": found}


def figure(curves: Tensor, methods: tuple[str, ...], path: Path, n_photos: int) -> None:
    """Mean deletion curves with the standard error of the mean over photos."""
    fig = Figure(figsize=(7, 4.2), layout="constrained")
    axes = fig.subplots()
    for row, method in enumerate(methods):
        mean, error = 100 * curves[row].mean(dim=0), 100 * curves[row].std(dim=0) / n_photos**0.5
        line = axes.plot(range(N_STEPS + 1), mean, label=NAMES[method], linewidth=1.8)[0]
        axes.fill_between(
            range(N_STEPS + 1), mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.set_xlabel("latents set to zero, greatest first")
    axes.set_xticks(range(0, N_STEPS + 1, 5))
    axes.set_ylabel("cosine with the best class, points")
    axes.set_title(f"Deletion on {n_photos} COCO photos, OpenAI ViT-B/16, {HOOK}, error term kept", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


def main() -> None:
    """Train, explain, print, and write the section `real_clip` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/real"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where weights and SAEs are kept")
    parser.add_argument("--photos", type=int, default=30)
    args = parser.parse_args()
    clip = real_tower(args.data, args.runs)
    sae = all_token_saes(clip, args.data, args.runs)[HOOK]
    metadata = sae.cfg.metadata
    vectors, names = read_embeddings(args.data / "embeddings" / "coco_171.safetensors")
    things = cle.direction_target(vectors[:80], labels=names[:80])
    listed = json.loads((args.data / "images" / "coco.json").read_text())
    photos = sorted((args.data / entry["file"] for entry in listed), key=lambda path: path.name)[: args.photos]
    annotated = {Path(entry["file"]).name: entry["objects"] for entry in listed}
    explained = [explain(clip, sae, photo, things) for photo in tqdm(photos, desc="photos")]
    right = sum(row["class"] in annotated[row["name"]] for row in explained)
    found = [row["found"] for row in explained]
    n_active = torch.cat([one.n_active for one in found]).double()
    curves = torch.stack([one.deletion[:, 0, 0] for one in found], dim=1)
    figure(curves, found[0].methods, PAGE.parent / "figures" / "real_clip_deletion.png", len(photos))
    text = f"""
`make real`, that is `python -m benchmarks.real_clip` ({machine()})

**The SAE**: TopK, {D_SAE} latents, k = {K}, `{HOOK}`, all tokens, trained on {metadata.n_training_tokens:,} tokens
drawn from {metadata.n_training_images} ImageNet photos. On the {metadata.n_held_out_images} photos held out: explained
variance {metadata.explained_variance:.3f}, cosine {metadata.cosine:.3f}, L0 {metadata.l0:.1f}, dead latents
{100 * metadata.dead_latents:.1f}%.

**The explanation**: the first {len(photos)} COCO photos by file name, each with the text embedding of its best class of
80 (an annotated object in {right} of them). Error term kept. {n_active.mean():.0f} active latents a photo on average
({int(n_active.min())} to {int(n_active.max())}). Rank correlation: Spearman's with exact ablation over the active latents,
mean over photos ± its standard error. Deletion: cosine in points (100 x cosine) after the top n latents of each photo were
set to zero, mean over photos; the area is the mean over the steps 0 to {N_STEPS}; lower is better.

{method_table(found, SHOWN_STEPS)}

![deletion curves](figures/real_clip_deletion.png)
"""
    print(text)
    write_section("real_clip", text)


if __name__ == "__main__":
    main()
