"""The planted world's dual encoder and SAEs, both towers: `python -m benchmarks.planted`."""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import clip_lens_ext as cle
from benchmarks.methods import faithfulness_of_all, method_table
from benchmarks.page import PAGE, table, write_section
from benchmarks.timing import machine
from clip_lens_ext.planted import measure_clip, normalise
from clip_lens_ext.planted.load import WEIGHTS
from clip_lens_ext.planted.store import read_clip

PLANTED_PAGE = PAGE.parent / "planted_world.md"
VISION_HOOKS = ("blocks.2.hook_resid_post", "blocks.3.hook_resid_post")
TEXT_HOOK = "blocks.1.hook_resid_post"
N_STEPS = 8


def accuracy(clip: cle.HookedCLIP, world: cle.PlantedWorld) -> str:
    """Zero-shot accuracy by kind of class."""
    report = measure_clip(clip.native, world, clip.tokenizer, n_per_class=40)
    rows = [[kind, f"{value:.3f}", f"{report.decorrelated[kind]:.3f}"] for kind, value in report.accuracy.items()]
    name, worst = report.worst_class
    return (
        f"Zero-shot accuracy, {report.n_per_class} pictures of each class, no word drawn. Held out: drawn as the training pictures are, from "
        "seeds that no training saw. Decorrelated: overlays and backgrounds independent of the class, which shows what the model "
        f"learnt from them instead of the object. The unambiguous classes (one object to a name, no compound): **{report.unambiguous:.3f}** "
        f"held out (the worst, {name}: {worst:.3f}).\n\n" + table(["kind", "held out", "decorrelated"], rows)
    )


def write_shipped_figures(world: cle.PlantedWorld) -> None:
    """The tables of docs/planted_world.md, from the metadata of the weights that ship."""
    figures = read_clip(WEIGHTS / "clip.safetensors")[2]["training"]["figures"]
    rows = [[kind, f"{value:.3f}", f"{figures['decorrelated'][kind]:.3f}"] for kind, value in figures["accuracy"].items()]
    text = (
        f"Zero-shot accuracy, {figures['n_per_class']} pictures of each class without drawn words, all names as candidates, prompts "
        f"\"a photo of a ...\". Over the {len(world.unambiguous_classes)} unambiguous classes: **{figures['unambiguous']:.3f}** held out.\n\n"
    )
    write_section("accuracy", text + table(["kind", "held out", "decorrelated"], rows), PLANTED_PAGE)
    rows = []
    for hook_name, tower in [*((hook, "vision") for hook in VISION_HOOKS), (TEXT_HOOK, "text")]:
        cfg = cle.planted_sae(hook_name, tower=tower).cfg
        metadata = cfg.metadata
        rows.append([
            f"`{hook_name}`" + (" (the default)" if hook_name == VISION_HOOKS[0] else ""), tower, str(metadata.token_scope), str(cfg.d_sae),
            str(cfg.k), f"{metadata.explained_variance:.3f}", f"{metadata.l0:.0f}", f"{100 * metadata.dead_latents:.0f}%",
        ])  # fmt: skip
    header = ["hook", "tower", "tokens", "latents", "k", "explained variance", "L0", "dead latents"]
    write_section("saes", table(header, rows), PLANTED_PAGE)


def quality(tower: str, sae: object) -> str:
    """What `train_sae` measured on held-out samples, from the metadata that ship."""
    cfg = sae.cfg
    return (
        f"`planted_sae({cfg.metadata.hook_name!r}, tower={tower!r})`: {cfg.d_sae} latents, {cfg.metadata.token_scope} tokens; on "
        f"{cfg.metadata.n_held_out_images} held-out samples explained variance {cfg.metadata.explained_variance:.3f}, L0 "
        f"{cfg.metadata.l0:.1f}, dead latents {100 * cfg.metadata.dead_latents:.1f}%."
    )


def main() -> None:
    """Measure, print, and write the section `planted` of docs/results.md and the tables of docs/planted_world.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=60, help="pictures and prompts to explain")
    args = parser.parse_args()
    clip, world = cle.planted_clip(), cle.PlantedWorld(0)
    batch = world.sample(args.samples, seed=7, split="test")
    pixels, prompts = normalise(batch.images), [world.prompts()[label] for label in batch.labels]
    write_shipped_figures(world)
    parts = [f"`python -m benchmarks.planted` ({machine()})", accuracy(clip, world)]
    for hook_name in VISION_HOOKS:
        sae = cle.planted_sae(hook_name)
        found = [
            faithfulness_of_all(clip.vision, picture[None], sae, cle.text_target(clip, prompt), n_steps=N_STEPS)
            for picture, prompt in tqdm(list(zip(pixels, prompts, strict=True)), desc=f"vision {hook_name}")
        ]
        parts += [
            f"**Pictures.** {quality('vision', sae)} {args.samples} test pictures, each with its own prompt.",
            method_table(found),
        ]
    sae = cle.planted_sae(TEXT_HOOK, tower="text")
    assert clip.text is not None  # the planted model has both towers
    with torch.no_grad():
        images = F.normalize(clip.vision(pixels), dim=-1)
    tokens = clip.tokenize(list(batch.captions))
    found = [
        faithfulness_of_all(clip.text, ids[None], sae, cle.direction_target(image), n_steps=N_STEPS)
        for ids, image in tqdm(list(zip(tokens, images, strict=True)), desc=f"text {TEXT_HOOK}")
    ]
    parts += [
        f"**Captions.** {quality('text', sae)} The captions of the same pictures, each with its picture's embedding.",
        method_table(found),
        f"Rank correlation: Spearman's with exact ablation over the active latents. Areas: mean over 0 to {N_STEPS} latents "
        "deleted (lower is better) or put back (higher is better), in cosine points. In brackets: bootstrap interval of 95% over the samples.",
    ]
    text = "\n\n".join(parts)
    print(text)
    write_section("planted", text)


if __name__ == "__main__":
    main()
