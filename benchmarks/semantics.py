"""Labels and scores of 30,000 latents against the textbook loops: `python -m benchmarks.semantics`.

Every way runs in a process of its own, for its peak memory, and what it found is kept in RUNS: a run that is interrupted
goes on where it was. The loops are timed on a part of the work and scaled up, which the page says. The references of
a latent are of two of many groups of random embeddings, so that 2-means has one best answer, which both ways must find.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from torch.nn import functional as F

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.rivals import resident
from benchmarks.timing import machine

LATENTS, TERMS, D_EMBED, K = 30_000, 20_000, 512, 20
SAMPLES, GROUPS = 100_000, 1_000  # images that are a reference of some latent, and how many things they show
FEW_LATENTS = 200  # what the loops are timed on
IMAGES, MORE_IMAGES = 512, 4_096
SCORES = ("clarity", "monosemanticity", "polysemanticity")


def reference_embeddings(n_latents: int) -> cle.ReferenceEmbeddings:
    """References of every latent: most of them show one thing, the others another."""
    generator = torch.Generator().manual_seed(0)
    things = torch.randn(GROUPS, D_EMBED, generator=generator)
    group = torch.arange(SAMPLES) % GROUPS
    vectors = things[group] + 0.5 * torch.randn(SAMPLES, D_EMBED, generator=generator)
    vectors += torch.randn(D_EMBED, generator=generator)  # embeddings of a CLIP have much in common
    two = torch.randint(0, GROUPS, (n_latents, 2), generator=generator)
    two[:, 1] = torch.where(two[:, 0] == two[:, 1], (two[:, 0] + 1) % GROUPS, two[:, 1])
    shown = torch.where(torch.rand(n_latents, K, generator=generator).argsort(dim=1) < 13, two[:, :1], two[:, 1:])
    row = shown + GROUPS * torch.randint(0, SAMPLES // GROUPS, (n_latents, K), generator=generator)
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


def work(way: str, n_latents: int, n_terms: int) -> dict[str, Any]:
    """CPU seconds of one way, the share of the work that it did, the process's peak memory, and values that ways share."""
    torch.manual_seed(0)
    name, _, method = way.partition(":")
    if name.startswith("references"):
        return references(method, n_latents, int(name.removeprefix("references ")))
    embeddings = reference_embeddings(n_latents)
    few = slice(0, min(FEW_LATENTS, n_latents))
    vectors = embeddings.gather(few).vectors
    share = len(vectors) / n_latents
    forget_peak()
    if name == "align":
        judge = judge_of(n_terms)
        vocabulary = cle.Vocabulary.from_terms([str(i) for i in range(n_terms)])
        terms = vocabulary.embed(judge, progress=False)
        start = time.process_time()
        if method == "ours":
            values, share = cle.align(embeddings, vocabulary, judge, progress=False).alignment[few], 1.0
        else:
            assert terms.empty is not None
            mean = torch.stack([embeddings.vectors[row].mean(dim=0) for row in embeddings.row[few]])
            empty = F.cosine_similarity(mean, terms.empty[None], dim=-1)
            best = []
            for some in mean.split(2):  # the broadcast makes [latent term d_embed]
                best.append(F.cosine_similarity(some[:, None], terms.vectors[None], dim=-1).amax(dim=1))
            values = torch.cat(best) - empty
    elif method == "ours":
        start = time.process_time()
        values, share = getattr(cle, name)(embeddings).value[few], 1.0
    else:
        start = time.process_time()
        values = torch.tensor([pairwise(name, vectors[i], embeddings.activation[i]) for i in range(len(vectors))])
    seconds = time.process_time() - start
    return {"seconds": seconds, "share": share, "peak": peak_memory(), "values": values.tolist()}


def peak_memory() -> float:
    """Of this process since `forget_peak`, in MB, with libraries and inputs."""
    return resident("VmHWM")


def forget_peak() -> None:
    """Making the inputs took more than they are: the peak starts anew here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


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


def references(method: str, n_latents: int, n_images: int) -> dict[str, Any]:
    """One pass over random pictures with a small tower and a wide SAE; the other way keeps the dense `[sample d_sae]`."""
    vision = CLIPVisionCfg(image_size=32, patch_size=16, width=64, layers=1, head_width=64)
    tower = cle.HookedTower(CLIP(D_EMBED, vision, CLIPTextCfg(layers=1)).eval().visual)
    hook = "blocks.0.hook_resid_post"
    metadata = SAEMetadata(hook_name=hook, token_scope="all", tower="vision", sha256=None, format="random")
    sae = TopKSAE(TopKSAEConfig(d_in=64, d_sae=n_latents, k=32, metadata=metadata)).eval()
    x = torch.randn(n_images, 3, 32, 32)
    forget_peak()
    start = time.process_time()
    if method == "ours":
        values = cle.collect_references(tower, x, sae, k=K, progress=False).activation.double().sum(dim=1)
    else:
        with torch.no_grad():
            dense = torch.cat([sae.encode(tower.run_to(part, hook)).amax(dim=1) for part in x.split(32)])
        values = dense.topk(min(K, n_images), dim=0).values.clamp(min=0).double().sum(dim=0)
    seconds = time.process_time() - start
    return {"seconds": seconds, "share": 1.0, "peak": peak_memory(), "values": values.tolist()}


def measured(way: str, n_latents: int, n_terms: int, runs: Path) -> dict[str, Any]:
    """What a process of its own says of one way, from the file that it left if it is there."""
    path = runs / f"{way.replace(':', '_').replace(' ', '_')}_{n_latents}_{n_terms}.json"
    if not path.exists():
        command = [
            sys.executable,
            "-m",
            "benchmarks.semantics",
            "--way",
            way,
            "--latents",
            str(n_latents),
            "--terms",
            str(n_terms),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        path.write_text(done.stdout.strip().splitlines()[-1])
    return json.loads(path.read_text())


def main() -> None:
    """Measure, print, and, at the full size, write the section `semantics` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=LATENTS)
    parser.add_argument("--terms", type=int, default=TERMS)
    parser.add_argument("--runs", type=Path, default=Path("runs/semantics"), help="what each way found")
    parser.add_argument("--way")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(work(args.way, args.latents, args.terms)))
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    pairs = f"a loop over pairs ({FEW_LATENTS} latents)"
    names = {
        "align": (
            f"`align`, {args.terms:,} terms",
            f"`cosine_similarity` of `[latent 1 d]` and `[1 term d]` ({FEW_LATENTS} latents)",
        ),
        "clarity": ("`clarity`", pairs),
        "monosemanticity": ("`monosemanticity`", pairs),
        "polysemanticity": ("`polysemanticity`", f"2-means latent by latent ({FEW_LATENTS} latents)"),
        **{f"references {n}": (f"`collect_references`, {n:,} images", "the dense `[sample d_sae]`, then `topk`")
           for n in (IMAGES, MORE_IMAGES)},
    }  # fmt: skip
    rows = []
    for name, (ours, other) in names.items():
        mine, loop = (measured(f"{name}:{method}", args.latents, args.terms, args.runs) for method in ("ours", "loop"))
        one, two = torch.tensor(mine["values"]).double(), torch.tensor(loop["values"]).double()
        difference = float((one - two).abs().max())
        # Of references the sum of up to twenty activations is compared: relative to the greatest of them.
        allowed = 1e-6 * (float(two.abs().max()) if name.startswith("references") else 1)
        assert difference <= allowed, f"{name}: the two ways differ by {difference}"
        whole = loop["seconds"] / loop["share"]
        rows.append([ours, other, f"{mine['seconds']:.1f}", f"{whole:.1f}", f"{whole / mine['seconds']:.1f}x", f"{mine['peak']:.0f}",
                     f"{loop['peak']:.0f}", f"{difference:.0e}"])  # fmt: skip
    text = (
        f"`python -m benchmarks.semantics` ({machine()}; {args.latents:,} latents with {K} references each out of {SAMPLES:,} images, "
        f"embeddings of {D_EMBED} numbers, random, each latent's of two groups; each way in a process of its own). The other way is timed on "
        "the latents in brackets and scaled to all. Seconds are of the CPU. Memory: peak of the whole process while it works, libraries and inputs included. Difference: the "
        "greatest of any latent that both ways did; of references that of the sum of a latent's activations.\n\n"
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
        + "\n\nTo reach: `align` >= 20 times as fast, under 2 GB; the scores >= 20 times as fast, equal to 1e-6; references in one pass with "
        "a memory of `[d_sae k]` whatever the number of images, which is what their two rows compare."
    )
    print(text)
    if (args.latents, args.terms) == (LATENTS, TERMS):
        write_section("semantics", text)


if __name__ == "__main__":
    main()
