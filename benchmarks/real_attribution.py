"""Attribution on a real CLIP at several blocks: OpenAI's ViT-B/16 image tower, COCO text embeddings, photos.

`python -m benchmarks.real_attribution --data FOLDER` takes the SAEs that `benchmarks.real_saes` trains, explains COCO photos
with the text embedding of their best class by every method, on the CLS token alone and on all tokens, each with SAEs of
its own, and writes the section `real_attribution` of docs/results.md and the figure beside it. FOLDER holds
`openai_vit_b16.py`, `embeddings/` and `images/`. What is finished of a photo is kept: a run that is interrupted goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

import clip_lens_ext as cle
from benchmarks.methods import NAMES, by_input, faithfulness_of_all, method_table
from benchmarks.page import PAGE, table, write_section
from benchmarks.real_saes import all_token_saes, cls_saes, read_embeddings, real_tower
from benchmarks.timing import machine
from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.towers.positions import TokenScope

SCOPES: tuple[TokenScope, ...] = ("cls", "all")
STEPS: dict[TokenScope, tuple[int, ...]] = {"cls": (1, 2, 5, 10), "all": (1, 2, 5, 10, 20)}
N_SAMPLED = 64  # latents that are ablated where all of them would take minutes a photo
GOOD = 0.7  # a rank correlation with exact ablation from which an order is called good
LATE = 10  # from this block on the rest of the model is at most one block for one token, and all latents are ablated
SHOWN = (
    "attribution_patching",
    "integrated_gradients",
    "activation_x_logit_lens",
    "logit_lens",
    "activation_energy",
    "random",
)


def explain(
    clip: cle.HookedCLIP, sae: SAE, photo: Path, classes: cle.Target, scope: TokenScope, file: Path
) -> cle.Faithfulness:
    """Every method on one photo, for the class of the greatest cosine; from `file` if it is there."""
    if file.exists():
        return cle.Faithfulness.load(file)
    pixels = clip.pixels(cle.read_image(photo))
    with torch.no_grad():
        best = int(classes(clip.vision(pixels))[0].argmax())
    target = classes.select([best])
    site = cle.open_site(clip.vision, pixels, sae, token_scope=scope)
    late = int(str(sae.cfg.metadata.hook_name).split(".")[1]) >= LATE
    exact = None
    if not late and scope == "all":
        exact = cle.exact_ablation(clip.vision, site, sae, target, latents=sampled(site), progress=False)
    found = faithfulness_of_all(clip.vision, site, sae, target, steps=STEPS[scope], exact=exact)
    file.parent.mkdir(parents=True, exist_ok=True)
    found.save(file)
    return found


def sampled(site: cle.Site) -> Tensor:
    """Some of the active latents, drawn with a seed."""
    active = site.codes.latent.unique()
    order = torch.randperm(len(active), generator=torch.Generator().manual_seed(0))
    return active[order[:N_SAMPLED]]


def figure(found: list[cle.Faithfulness], title: str, path: Path) -> None:
    """Mean deletion and insertion curves with the standard error of the mean over photos."""
    fig = Figure(figsize=(10, 4), layout="constrained")
    both = fig.subplots(1, 2, sharey=True)
    for axes, name in zip(both, ("deletion", "insertion"), strict=True):
        for method in (*SHOWN, "exact_ablation"):
            curves = 100 * torch.stack([getattr(one, name)[one.methods.index(method), 0, 0] for one in found])
            mean, error = curves.mean(dim=0), curves.std(dim=0) / len(found) ** 0.5
            style = {"exact_ablation": ("#111111", "--"), "random": ("#999999", "--")}.get(method, (None, "-"))
            line = axes.plot(
                found[0].steps, mean, label=NAMES[method], linewidth=1.7, color=style[0], linestyle=style[1]
            )[0]
            axes.fill_between(
                found[0].steps, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0
            )
        axes.set_xlabel(
            "latents set to zero, greatest first" if name == "deletion" else "latents put back, greatest first"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(found[0].steps)
    both[0].set_ylabel("cosine with the best class, points")
    both[1].legend(frameon=False, fontsize=8)
    fig.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


IN_OVERVIEW = ("attribution_patching", "integrated_gradients", "frozen_layer_norm", "activation_x_logit_lens_frozen_norm",
               "activation_x_logit_lens", "logit_lens", "activation_energy")  # fmt: skip
LENSES = ("activation_x_logit_lens", "logit_lens")


def overview(sites: dict[str, list[cle.Faithfulness]]) -> str:
    """Rank correlations of the main methods at every site, and in words where the Logit Lens can be trusted."""
    rows = [
        [f"`{site}`", *(f"{by_input(found, name, 'rank_correlation').nanmean():.3f}" for name in IN_OVERVIEW)]
        for site, found in sites.items()
    ]
    words = [f"{NAMES[name]}: {verdict(sites, name)}." for name in LENSES]
    header = ["site", *(NAMES[name] for name in IN_OVERVIEW)]
    return f"{table(header, rows)}\n\n" + "\n".join(f"- {line}" for line in words)


def verdict(sites: dict[str, list[cle.Faithfulness]], lens: str) -> str:
    """What a lens is worth at each site, from the interval of its rank correlation and the curves beside patching's."""
    sorted_sites: dict[str, list[str]] = {}
    for site, found in sites.items():
        values = by_input(found, lens, "rank_correlation")
        low, high = bootstrap_intervals(values[None], n_bootstrap=2000, seed=0, confidence=0.95)[0].tolist()
        kind = (
            "good, above 0.7" if low > GOOD
            else "better than chance, and not good (above 0, below 0.7)" if low > 0 and high < GOOD
            else "no better than chance or worse (not above 0)" if low <= 0 and high < GOOD
            else "undecided"
        )  # fmt: skip
        sorted_sites.setdefault(kind, []).append(f"{site} ({values.nanmean():.3f})")
    return "; ".join(f"{kind}, at {', '.join(where)}" for kind, where in sorted_sites.items())


def main() -> None:
    """Explain, print, and write the section `real_attribution` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/real"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where weights, SAEs and results are kept")
    parser.add_argument("--photos", type=int, default=50)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[11, 10, 8, 5], help="the early ones take an hour each on two cores"
    )
    args = parser.parse_args()
    clip = real_tower(args.data, args.runs)
    saes = {"all": all_token_saes(clip, args.data, args.runs), "cls": cls_saes(clip, args.data, args.runs)}
    vectors, names = read_embeddings(args.data / "embeddings" / "coco_171.safetensors")
    things = cle.direction_target(vectors[:80], labels=names[:80])
    listed = json.loads((args.data / "images" / "coco.json").read_text())
    photos = sorted((args.data / entry["file"] for entry in listed), key=lambda path: path.name)[: args.photos]
    annotated = {Path(entry["file"]).name: entry["objects"] for entry in listed}
    parts, right = [], 0
    sites: dict[str, list[cle.Faithfulness]] = {}
    for block, scope in ((block, scope) for scope in SCOPES for block in args.blocks):
        hook = f"blocks.{block}.hook_resid_post"
        site = f"{hook}, {'CLS token' if scope == 'cls' else 'all tokens'}"
        folder = args.runs / "attribution" / f"{hook}-{scope}"
        one = partial(explain, clip, saes[scope][hook], classes=things, scope=scope)
        found = [one(photo=photo, file=folder / f"{photo.stem}.safetensors") for photo in tqdm(photos, desc=site)]
        sites[site] = found
        right = sum(one.labels[0] in annotated[photo.name] for one, photo in zip(found, photos, strict=True))
        n_active = torch.cat([one.n_active for one in found]).double()
        compared = torch.cat([one.n_compared for one in found]).double()
        if torch.equal(n_active, compared):
            over = "all of them"
        else:
            over = f"{compared.mean():.0f} of them, drawn: exact ablation's own order has only those"
        parts.append(
            f"### {site}\n\n{n_active.mean():.0f} active latents a photo on average, ablated {over}.\n\n{method_table(found)}"
        )
        if (block, scope) == (10, "all"):
            title = f"{len(photos)} COCO photos, OpenAI ViT-B/16, {hook}, all tokens, error term kept"
            figure(found, title, PAGE.parent / "figures" / "real_attribution.png")
    text = f"""
`python -m benchmarks.real_attribution --blocks {" ".join(map(str, args.blocks))}` ({machine()})

The first {len(photos)} COCO photos by file name, each with the text embedding of its best class of 80 (an annotated object in
{right} of them); the SAEs of the next section; error term kept. Means over photos, in brackets the bootstrap interval of 95%
over photos. Rank correlation: Spearman's with exact ablation over the latents that were ablated. Overlap: of the ten greatest with
those of exact ablation. Areas: cosine in points (100 x cosine), mean over {", ".join(map(str, (0, *STEPS["all"])))} latents set to zero
(deletion, lower is better) or put back into none (insertion, higher is better), at the CLS token up to {STEPS["cls"][-1]}. A method without a row has nothing of its own to
say at that site. The SAEs of the CLS token saw few images and explain less of it than those of all tokens do (next section): methods
are compared on one and the same decomposition, and how good that is is another question.

Rank correlation at every site:

{overview(sites)}

{chr(10).join(f"{part}{chr(10)}" for part in parts)}
![deletion and insertion curves](figures/real_attribution.png)
"""
    print(text)
    write_section("real_attribution", text)


if __name__ == "__main__":
    main()
