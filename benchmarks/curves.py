"""Deletion and insertion curves of six methods at the last block: `python -m benchmarks.curves`.

The alternative re-runs the whole native model for every step of every curve, in batches, with the edited CLS token put
in by a hook. Both start from the same six attributions.
"""

from __future__ import annotations

import argparse
import time

import open_clip
import torch
from sae_lens import SAE
from torch import Tensor, nn

import clip_lens_ext as cle
from benchmarks.attribution import random_sae
from benchmarks.page import table, write_section
from benchmarks.timing import machine

METHODS = ("attribution_patching", "activation_x_logit_lens", "logit_lens", "activation_energy", "exact_ablation",
           "random")  # fmt: skip
N_STEPS, BATCH = 64, 32


@torch.no_grad()
def rerun(native: nn.Module, x: Tensor, rows: Tensor, target: cle.Target) -> Tensor:
    """Predictions `[step]` of one image `x` with each of `rows` `[step d_model]` as the CLS token of the last block."""
    found = []
    for part in rows.split(BATCH):

        def put(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, part: Tensor = part) -> Tensor:
            return torch.cat([part[:, None], out[:, 1:]], dim=1)

        handle = native.transformer.resblocks[-1].register_forward_hook(put)
        found.append(target(native(x.expand(len(part), -1, -1, -1)))[:, 0])
        handle.remove()
    return torch.cat(found)


@torch.no_grad()
def by_rerunning(
    native: nn.Module, tower: cle.HookedTower, x: Tensor, sae: SAE, target: cle.Target, results: list[cle.Attribution]
) -> tuple[Tensor, Tensor]:
    """Both curves `[method sample step]`, every step a run of the whole model."""
    activation = tower.run_to(x, str(sae.cfg.metadata.hook_name))[:, 0]
    codes = sae.encode(activation)
    error = activation - sae.decode(codes)
    both = torch.empty(2, len(results), len(x), N_STEPS + 1, device=x.device)
    for row, result in enumerate(results):
        for sample in range(len(x)):
            own = result.sample == sample
            order = result.latent[own][result.value[own][:, 0].argsort(descending=True, stable=True)]
            deleted = codes[sample].repeat(N_STEPS + 1, 1)
            inserted = torch.zeros_like(deleted)
            for step in range(1, N_STEPS + 1):
                deleted[step:, order[step - 1]] = 0
                inserted[step:, order[step - 1]] = codes[sample, order[step - 1]]
            for way, edited in enumerate((deleted, inserted)):
                both[way, row, sample] = rerun(
                    native, x[sample : sample + 1], sae.decode(edited) + error[sample], target
                )
    return both[0], both[1]


def main() -> None:
    """Measure, print, and write the section `curves` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of the fast way; re-running is timed once")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = open_clip.create_model("ViT-B-32", pretrained=None, device=device).eval().visual
    tower = cle.HookedTower(native, model_name="ViT-B-32, random weights")
    sae = random_sae(tower.cfg.d_model, f"blocks.{tower.cfg.n_layers - 1}.hook_resid_post", device)
    target = cle.direction_target(torch.randn(1, tower.cfg.d_embed, device=device))
    x = torch.randn(args.images, 3, 224, 224, device=device)
    results = [cle.METHODS[name](tower, x, sae, target) for name in METHODS]

    def curves() -> cle.Faithfulness:
        return cle.faithfulness(tower, x, sae, target, results, n_steps=N_STEPS, progress=False)  # type: ignore[arg-type]

    found, ours = curves(), []
    for _ in range(args.rounds):
        start = time.perf_counter()
        found = curves()
        ours.append(time.perf_counter() - start)
    start = time.perf_counter()
    deletion, insertion = by_rerunning(native, tower, x, sae, target, results)  # type: ignore[arg-type]
    theirs = time.perf_counter() - start
    worst = max(float((found.deletion[:, :, 0] - deletion).abs().max()),
                float((found.insertion[:, :, 0] - insertion).abs().max()))  # fmt: skip
    assert worst < 1e-4, f"the two ways differ by a cosine of {worst:.1e}"
    mine = sorted(ours)[len(ours) // 2]
    rows = [
        ["re-running the model for every step", f"{theirs:.2f}", "1"],
        ["`faithfulness`, prefix, ranks and all", f"{mine:.3f}", f"{theirs / mine:.0f}"],
    ]
    images = "1 image" if args.images == 1 else f"{args.images} images"
    text = f"""
`python -m benchmarks.curves` ({machine()}; ViT-B/32 vision tower and TopK SAE with 30,000 latents, k = 64, CLS token at
`{sae.cfg.metadata.hook_name}`, random weights, {images}, one target, {len(METHODS)} methods, {N_STEPS} steps of deletion and of insertion; re-running in
batches of {BATCH}, timed once; the other the median of {args.rounds} rounds). The curves agree to {worst:.0e} of cosine.

{table(["way", "seconds", "times as fast"], rows)}

To reach: >= 50 times as fast.
"""
    print(text)
    write_section("curves", text)


if __name__ == "__main__":
    main()
