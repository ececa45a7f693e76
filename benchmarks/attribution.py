"""Attribution patching of a 30,000-latent CLS SAE at the last block: `python -m benchmarks.attribution`.

The alternatives are one plain forward of the same tower, and the textbook way: the SAE inside the graph, autograd to
every latent.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.timing import machine, milliseconds, ratio, time_in_turns

D_SAE, K = 30_000, 64


def random_sae(d_in: int, hook_name: str, device: str) -> SAE:
    """A TopK SAE of P2's size (30,000 latents, k = 64, unit decoder rows) with random weights."""
    metadata = SAEMetadata(hook_name=hook_name, token_scope="cls", tower="vision")
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=D_SAE, k=K, device=device, metadata=metadata)).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae.requires_grad_(False)


def textbook(tower: cle.HookedTower, x: Tensor, sae: SAE, target: cle.Target) -> Tensor:
    """`z * dy/dz` `[sample target d_sae]` by autograd through the whole tower with the SAE spliced in."""
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: object) -> None:
        kept["z"] = activation

    hook_name = f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"
    with torch.enable_grad(), tower.saes(sae):
        prediction = target(tower.run_with_hooks(x, fwd_hooks=[(hook_name, keep)]))
        gradients = [
            torch.autograd.grad(prediction[:, index].sum(), kept["z"], retain_graph=True)[0]
            for index in range(len(target))
        ]
    return torch.stack([(kept["z"] * gradient).sum(dim=1) for gradient in gradients], dim=1).detach()


def main() -> None:
    """Measure, print, and write the section `attribution` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = open_clip.create_model("ViT-B-32", pretrained=None, device=device).eval().visual
    tower = cle.HookedTower(native, model_name="ViT-B-32, random weights")
    hook_name = f"blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
    sae = random_sae(tower.cfg.d_model, hook_name, device)
    target = cle.direction_target(torch.randn(1, tower.cfg.d_embed, device=device))
    rows = []
    for batch in (8, 1):
        x = torch.randn(batch, 3, 224, 224, device=device)
        ours, theirs = cle.attribution_patching(tower, x, sae, target).dense(), textbook(tower, x, sae, target)
        worst = float((ours - theirs).abs().max() / theirs.abs().max())
        assert worst < 1e-5, f"patching and autograd differ by {worst:.1e} of the greatest attribution"

        def forward(x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return tower(x)

        ways = {
            "forward": forward,
            "patching": lambda x=x: cle.attribution_patching(tower, x, sae, target),
            "textbook": lambda x=x: textbook(tower, x, sae, target),
        }
        seconds = time_in_turns(ways, rounds=args.rounds)
        names = {"forward": "plain forward", "patching": "attribution patching", "textbook": "the textbook way"}
        for name in ways:
            value, low, high = ratio(seconds, name, "forward")
            rows.append([
                str(batch), names[name], f"{milliseconds(seconds[name]):.1f}", f"{value:.3f}", f"{low:.3f} to {high:.3f}",
            ])  # fmt: skip
    text = (
        f"`python -m benchmarks.attribution` ({machine()}; ViT-B/32 vision tower and TopK SAE with {D_SAE:,} latents, "
        f"k = {K}, CLS token at `{hook_name}`, random weights, one prompt, {args.rounds} rounds in turns). The textbook "
        "way is autograd through the whole tower with the SAE spliced in; its numbers agree to 1e-5 of the greatest.\n\n"
        + table(["batch", "work", "median ms", "ratio to the forward, median of rounds", "quartiles"], rows)
        + "\n\nTo reach: attribution patching <= 1.10 of the plain forward."
    )
    print(text)
    write_section("attribution", text)


if __name__ == "__main__":
    main()
