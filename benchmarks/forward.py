"""Forward of a hooked tower against the native one, ViT-B/32 with random weights: `python -m benchmarks.forward`."""

from __future__ import annotations

import argparse

import open_clip
import torch

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.timing import machine, milliseconds, ratio, time_in_turns


def main() -> None:
    """Measure, print, and write the section `forward` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = open_clip.create_model("ViT-B-32", pretrained=None, device=device).eval().visual
    tower = cle.HookedTower(native, model_name="ViT-B-32, random weights")
    x = torch.randn(args.batch, 3, 224, 224, device=device)
    middle = "blocks.6.hook_resid_post"
    with torch.no_grad():
        assert torch.equal(tower(x), native(x)), "the hooked forward must be bit-equal"
        ways = {
            "native": lambda: native(x),
            "hooked": lambda: tower(x),
            "one": lambda: tower.run_with_cache(x, names_filter=middle),
            "resid": lambda: tower.run_with_cache(x, names_filter=lambda name: name.endswith("hook_resid_post")),
            "all": lambda: tower.run_with_cache(x),
        }
        seconds = time_in_turns(ways, rounds=args.rounds)
    what = {
        "native": "native forward",
        "hooked": "hooked tower, no hook live",
        "one": f"cache of `{middle}`",
        "resid": "cache of every `hook_resid_post`",
        "all": "cache of every hook",
    }
    rows = []
    for name in ways:
        value, low, high = ratio(seconds, name, "native")
        rows.append([what[name], f"{milliseconds(seconds[name]):.1f}", f"{value:.3f}", f"{low:.3f} to {high:.3f}"])
    text = (
        f"`python -m benchmarks.forward` ({machine()}; ViT-B/32 vision tower, random weights, batch {args.batch}, no "
        f"gradients, {args.rounds} rounds in turns; outputs of the first two are bit-equal)\n\n"
        + table(["forward", "median ms", "ratio to native, median of rounds", "quartiles"], rows)
        + "\n\nTo reach: <= 1.02 with no hook live."
    )
    print(text)
    write_section("forward", text)


if __name__ == "__main__":
    main()
