"""Codes of an all-token SAE of 49,152 latents, against `sae.encode` and `.to_sparse()`: `python -m benchmarks.encode`.

Each way runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import open_clip
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.timing import machine

D_SAE, K, HOOK = 49_152, 32, "blocks.9.hook_resid_post"


def one_way(way: str, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a way, the peak memory of its process, and a sum that all ways have to share."""
    torch.manual_seed(0)
    tower = cle.HookedTower(open_clip.create_model("ViT-B-32", pretrained=None).eval().visual)
    metadata = SAEMetadata(hook_name=HOOK, token_scope="all", tower="vision")
    sae = TopKSAE(TopKSAEConfig(d_in=768, d_sae=D_SAE, k=K, metadata=metadata)).eval()
    x = torch.randn(batch, 3, 224, 224)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        if way == "nothing":
            with torch.no_grad():
                total = float(tower.run_to(x, HOOK).sum()) * 0
        elif way == "dense":
            with torch.no_grad():
                codes = sae.encode(tower.run_to(x, HOOK)).to_sparse()
            total = float(codes.values().double().sum())
        else:
            total = float(cle.encode(tower, x, sae, chunk=int(way)).value.double().sum())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": sorted(seconds)[len(seconds) // 2], "peak": peak, "total": total}


def main() -> None:
    """Measure, print, and write the section `encode` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_way(args.way, args.batch, args.rounds)))
        return
    ways = {"nothing": "tower up to the hook alone", "dense": "`sae.encode(...)`, then `.to_sparse()`",
            "512": "`encode`, chunk = 512 (default)", "4096": "`encode`, chunk = 4096"}  # fmt: skip
    found = {}
    for way in ways:
        command = [sys.executable, "-m", "benchmarks.encode", "--way", way, "--batch", str(args.batch), "--rounds", str(args.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.strip().splitlines()[-1])
    for way in ("512", "4096"):
        assert abs(found[way]["total"] / found["dense"]["total"] - 1) < 1e-5, "the codes differ"
    base, dense = found["nothing"], found["dense"]
    rows = [
        [name, f"{found[way]['seconds']:.2f}", f"{found[way]['seconds'] / dense['seconds']:.2f}", f"{found[way]['peak'] - base['peak']:.0f}"]
        for way, name in ways.items()
    ]
    text = (
        f"`python -m benchmarks.encode` ({machine()}; ViT-B/32 vision tower and TopK SAE with {D_SAE:,} latents, k = {K}, random weights, "
        f"all tokens at `{HOOK}`, batch {args.batch}: {args.batch * 50:,} tokens; each way in a process of its own, median of {args.rounds}). "
        "Memory: peak of the process beyond that of the tower alone.\n\n"
        + table(["way", "seconds", "ratio to the dense way", "memory, MB"], rows)
    )
    print(text)
    write_section("encode", text)


if __name__ == "__main__":
    main()
