"""Labels and scores of 30,000 latents against the textbook loops: `python -m benchmarks.semantics`.

Every way runs in a process of its own, for its peak memory. The loops are timed on a part of the work and scaled up,
which the page says. Embeddings are random around a common mean; the cost does not depend on them, save for the number
of iterations of 2-means.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import combinations

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from torch.nn import functional as F

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.timing import machine

LATENTS, TERMS, D_EMBED, K = 30_000, 20_000, 512, 20
SAMPLES = 100_000  # images that are a reference of some latent
PAIR_LATENTS, COSINE_LATENTS, IMAGES = 200, 200, 512
SCORES = ("clarity", "monosemanticity", "polysemanticity")


def reference_embeddings(n_latents: int) -> cle.ReferenceEmbeddings:
    """References of every latent, three samples of which stand for one meaning and the rest for others."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(SAMPLES, D_EMBED, generator=generator) + torch.randn(D_EMBED, generator=generator)
    row = torch.randint(0, SAMPLES, (n_latents, K), generator=generator)
    activation = torch.rand(n_latents, K, generator=generator).sort(dim=1, descending=True).values
    return cle.ReferenceEmbeddings(
        vectors, torch.arange(SAMPLES), row, activation, torch.zeros(n_latents), "judge", "hook", "cls", {}
    )


def judge_of(n_terms: int) -> cle.HookedCLIP:
    """A dual encoder with a small random text tower and a token for each term: what a real one costs is not asked here."""
    vision = CLIPVisionCfg(image_size=32, patch_size=16, width=64, layers=1, head_width=64)
    text = CLIPTextCfg(context_length=2, vocab_size=n_terms + 2, width=64, heads=1, layers=1)
    native = CLIP(D_EMBED, vision, text).eval()

    def tokens(texts: list[str]) -> Tensor:
        return torch.tensor([[0, int(text or n_terms) + 1] for text in texts])

    return cle.HookedCLIP(native, tokenizer=tokens, model_name="judge")


def work(way: str, n_latents: int, n_terms: int, n_images: int) -> dict[str, float]:
    """Seconds of one way, the share of the work that it did, the process's peak memory, and a number that ways share."""
    torch.manual_seed(0)
    name, _, method = way.partition(":")
    if name == "references":
        return references(method, n_latents, n_images)
    embeddings = reference_embeddings(n_latents)
    few = slice(0, min(PAIR_LATENTS, n_latents))
    vectors = embeddings.gather(few).vectors
    share, seconds, value = 1.0, 0.0, 0.0
    if name == "align":
        judge = judge_of(n_terms)
        vocabulary = cle.Vocabulary.from_terms([str(i) for i in range(n_terms)])
        terms = vocabulary.embed(judge, progress=False)
        start = time.perf_counter()
        if method == "ours":
            found = cle.align(embeddings, vocabulary, judge, progress=False)
            value = float(found.alignment[few].double().sum())
        else:
            mean = torch.stack([embeddings.vectors[row].mean(dim=0) for row in embeddings.row[few]])
            empty = F.cosine_similarity(mean, terms.empty[None], dim=-1)
            best = []
            for some in mean.split(2):  # the broadcast makes [latent term d_embed]
                best.append(F.cosine_similarity(some[:, None], terms.vectors[None], dim=-1).amax(dim=1))
            value, share = float((torch.cat(best) - empty).double().sum()), len(mean) / n_latents
        seconds = time.perf_counter() - start
    elif method == "ours":
        start = time.perf_counter()
        found = getattr(cle, name)(embeddings)
        seconds = time.perf_counter() - start
        value = float(found.value[few].sum())
    else:
        start = time.perf_counter()
        for latent in range(len(vectors)):
            value += pairwise(name, vectors[latent], embeddings.activation[latent])
        seconds, share = time.perf_counter() - start, len(vectors) / n_latents
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "share": share, "peak": peak / 1024, "value": value}


def pairwise(name: str, vectors: Tensor, activation: Tensor) -> float:
    """One latent's score by a loop: over pairs, or over the starts and iterations of 2-means."""
    if name == "polysemanticity":
        return two_means_by_loop(vectors)
    above = below = 0.0
    weight = activation if name == "monosemanticity" else torch.ones(len(vectors))
    for i, j in combinations(range(len(vectors)), 2):
        both = float(weight[i] * weight[j])
        above += both * float(F.cosine_similarity(vectors[i], vectors[j], dim=0))
        below += both
    return above / below


def two_means_by_loop(vectors: Tensor) -> float:
    """2-means of one latent with ten starts, as a library call for each latent would do it."""
    best = (torch.inf, 0.0)
    for _ in range(10):
        centres = vectors[torch.randperm(len(vectors))[:2]].clone()
        label = None
        for _ in range(100):
            new = torch.cdist(vectors, centres).argmin(dim=1)
            if label is not None and torch.equal(new, label):
                break
            label = new
            for cluster in range(2):
                if (label == cluster).any():
                    centres[cluster] = vectors[label == cluster].mean(dim=0)
        cost = float((vectors - centres[label]).square().sum())
        best = min(best, (cost, 1 - float(F.cosine_similarity(centres[0], centres[1], dim=0))))
    return best[1]


def references(method: str, n_latents: int, n_images: int) -> dict[str, float]:
    """One pass over random pictures with a small tower and a wide SAE; the other way keeps the dense `[sample d_sae]`."""
    vision = CLIPVisionCfg(image_size=32, patch_size=16, width=64, layers=1, head_width=64)
    tower = cle.HookedTower(CLIP(D_EMBED, vision, CLIPTextCfg(layers=1)).eval().visual)
    hook = "blocks.0.hook_resid_post"
    metadata = SAEMetadata(hook_name=hook, token_scope="all", tower="vision", sha256=None, format="random")
    sae = TopKSAE(TopKSAEConfig(d_in=64, d_sae=n_latents, k=32, metadata=metadata)).eval()
    x = torch.randn(n_images, 3, 32, 32)
    start = time.perf_counter()
    if method == "ours":
        found = cle.collect_references(tower, x, sae, k=K, progress=False)
        value = float(found.activation.double().sum())
    else:
        with torch.no_grad():
            dense = torch.cat([sae.encode(tower.run_to(part, hook)).amax(dim=1) for part in x.split(32)])
        value = float(dense.topk(min(K, n_images), dim=0).values.clamp(min=0).double().sum())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "share": 1.0, "peak": peak / 1024, "value": value}


def main() -> None:
    """Measure, print, and, at the full size, write the section `semantics` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=LATENTS)
    parser.add_argument("--terms", type=int, default=TERMS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--way")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(work(args.way, args.latents, args.terms, args.images)))
        return
    found: dict[str, dict[str, float]] = {}
    for name in ("align", *SCORES, "references"):
        for method in ("ours", "loop"):
            command = [sys.executable, "-m", "benchmarks.semantics", "--way", f"{name}:{method}", "--latents", str(args.latents),
                       "--terms", str(args.terms), "--images", str(args.images)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[f"{name}:{method}"] = json.loads(done.stdout.strip().splitlines()[-1])
    names = {
        "align": (
            f"`align`, {args.terms:,} terms",
            f"`cosine_similarity` of `[latent 1 d]` and `[1 term d]` ({COSINE_LATENTS} latents)",
        ),
        "clarity": ("`clarity`", f"a loop over pairs ({PAIR_LATENTS} latents)"),
        "monosemanticity": ("`monosemanticity`", f"a loop over pairs ({PAIR_LATENTS} latents)"),
        "polysemanticity": ("`polysemanticity`", f"2-means latent by latent ({PAIR_LATENTS} latents)"),
        "references": (f"`collect_references`, {args.images} images", "the dense `[sample d_sae]`, then `topk`"),
    }
    rows = []
    for name, (ours, other) in names.items():
        mine, loop = found[f"{name}:ours"], found[f"{name}:loop"]
        difference = abs(mine["value"] - loop["value"]) / (
            1 if name == "references" else min(PAIR_LATENTS, args.latents)
        )
        # 2-means from other random starts ends in other optima now and then.
        allowed = {"polysemanticity": 0.05, "references": 1e-5 * abs(loop["value"])}.get(name, 1e-6)
        assert difference < allowed, f"{name}: {mine['value']} and {loop['value']} differ"
        whole = loop["seconds"] / loop["share"]
        rows.append([ours, other, f"{mine['seconds']:.1f}", f"{whole:.1f}", f"{whole / mine['seconds']:.0f}x", f"{mine['peak']:.0f}",
                     f"{loop['peak']:.0f}", f"{difference:.0e}"])  # fmt: skip
    text = (
        f"`python -m benchmarks.semantics` ({machine()}; {args.latents:,} latents with {K} references each out of {SAMPLES:,} images, "
        f"embeddings of {D_EMBED} numbers, random; each way in a process of its own). The other way is timed on the latents in brackets "
        "and scaled to all. Memory: peak of the whole process, libraries and inputs included. Difference: between the two ways' mean scores of "
        "the latents that both did, for references between their sums of activations.\n\n"
        + table(
            [
                "here",
                "the other way",
                "seconds",
                "seconds, other",
                "ratio",
                "memory, MB",
                "memory, other",
                "difference",
            ],
            rows,
        )
    )
    print(text)
    if (args.latents, args.terms) == (LATENTS, TERMS):
        write_section("semantics", text)


if __name__ == "__main__":
    main()
