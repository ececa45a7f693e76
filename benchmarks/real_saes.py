"""SAEs of a real CLIP: trained on ImageNet photos, checked on COCO photos that they never saw.

`python -m benchmarks.real_saes --data FOLDER` trains TopK SAEs at four blocks of OpenAI's ViT-B/16 in one pass over the
photos, on every token, and on the CLS token in a pass over crops of the photos; checks each with `check_sae`; and writes
the section `real_saes` of docs/results.md. FOLDER holds `openai_vit_b16.py`, `embeddings/` and `images/`. A run that is
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from sae_lens import SAE
from safetensors import safe_open
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.crops import Crops
from benchmarks.page import table, write_section
from benchmarks.timing import machine

BLOCKS = (5, 8, 10, 11)
HOOKS = tuple(f"blocks.{block}.hook_resid_post" for block in BLOCKS)
D_SAE, K, TOKENS = 4096, 32, 600_000
N_CHECKED = 50  # COCO photos
CLS_D_SAE, CLS_CROPS, CLS_TOKENS = 1024, 4, 200_000  # one row an image: fewer latents, and crops beside the photos


def real_tower(data: Path, runs: Path) -> cle.HookedCLIP:
    """The image tower with its real weights, made once by the folder's own script."""
    weights = runs / "openai_vit_b16.safetensors"
    if not weights.exists():
        runs.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, data / "openai_vit_b16.py", weights], check=True)
    return cle.load_clip("ViT-B-16-quickgelu", weights)


def read_embeddings(path: Path) -> tuple[Tensor, list[str]]:
    """Text embeddings `[name d_embed]`, and their names."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("embeddings").float(), json.loads(file.metadata()["names"])


def all_token_saes(clip: cle.HookedCLIP, data: Path, runs: Path) -> dict[str, SAE]:
    """The SAEs of every token at each hook, trained once."""
    return cle.train_saes(
        clip.vision, data / "images" / "imagenet", preprocess=clip.preprocess, hook_names=HOOKS, token_scope="all",
        d_sae=D_SAE, k=K, n_training_tokens=TOKENS, batch_size=2048, seed=0, output_dir=runs / "all",
    )  # fmt: skip


def cls_saes(clip: cle.HookedCLIP, data: Path, runs: Path) -> dict[str, SAE]:
    """The SAEs of the CLS token at each hook, trained once on the photos and crops of them."""
    photos = sorted((data / "images" / "imagenet").glob("*.jpg"))
    return cle.train_saes(
        clip.vision, Crops(photos, CLS_CROPS), preprocess=clip.preprocess, hook_names=HOOKS, token_scope="cls",
        d_sae=CLS_D_SAE, k=K, n_training_tokens=CLS_TOKENS, batch_size=512, seed=0, output_dir=runs / "cls",
        cache_dir=runs / "cls-activations",
    )  # fmt: skip


def row(clip: cle.HookedCLIP, sae: SAE, photos: list[Path]) -> list[str]:
    """One SAE: what was measured when it was trained, and what on photos of another data set."""
    metadata = sae.cfg.metadata
    found = cle.check_sae(clip.vision, photos, sae, preprocess=clip.preprocess, n_images=len(photos))
    print(found)
    q = found.quality
    return [
        f"`{metadata.hook_name}`", str(metadata.token_scope), f"{sae.cfg.d_sae}", f"{metadata.explained_variance:.3f}",
        f"**{q.explained_variance:.3f}**", f"{q.cosine:.3f}", f"{q.l0:.1f}", f"{100 * q.dead_latents:.1f}%",
        f"{found.embedding_cosine:.3f}", f"{found.embedding_cosine_with_error:.3f}",
        "; ".join([found.verdict, *(cause.what for cause in found.causes)]),
    ]  # fmt: skip


def main() -> None:
    """Train, check, print, and write the section `real_saes` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/real"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where weights and SAEs are kept")
    args = parser.parse_args()
    clip = real_tower(args.data, args.runs)
    photos = sorted((args.data / "images" / "coco").glob("*.jpg"))[:N_CHECKED]
    saes = all_token_saes(clip, args.data, args.runs)
    of_cls = cls_saes(clip, args.data, args.runs)
    rows = [row(clip, sae, photos) for sae in (*saes.values(), *of_cls.values())]
    metadata, cls = (next(iter(found.values())).cfg.metadata for found in (saes, of_cls))
    header = [
        "hook", "tokens", "latents", "explained variance, held-out images", f"on {len(photos)} COCO photos", "cosine", "L0", "never fire", "embedding without the error term", "with it", "verdict",
    ]  # fmt: skip
    text = f"""
`make real`, that is `python -m benchmarks.real_saes` ({machine()})

TopK SAEs of OpenAI's ViT-B/16 (k = {K}), four hooks in one pass. On all tokens: {TOKENS:,} tokens drawn from
{metadata.n_training_images} ImageNet photos, {metadata.n_held_out_images} photos held out. On the CLS token, of which a photo has one: {CLS_TOKENS:,} rows drawn from
{cls.n_training_images} images, the photos and {CLS_CROPS} random crops of each; the {cls.n_held_out_images} held-out images are crops of the same photos,
so look at the COCO columns: `check_sae` on COCO photos, which no SAE saw. The embedding columns are the mean cosine of the
image embedding with that of the pass through the SAE.

{table(header, rows)}
"""
    print(text)
    write_section("real_saes", text)


if __name__ == "__main__":
    main()
