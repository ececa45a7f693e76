"""Forward, and forward with backward, of a tower of each family against the native one: `python -m benchmarks.families`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import clip_lens_ext as cle
from benchmarks.copied import CopiedTower, check
from benchmarks.page import table, write_section
from benchmarks.timing import machine, milliseconds, ratio, time_in_turns


def models() -> dict[str, Callable[[], cle.HookedTower]]:
    """A tower of each family, of the size that users have, with random weights."""

    def of_open_clip(name: str, kind: str) -> cle.HookedTower:
        clip = cle.load_clip(open_clip.create_model(name, pretrained=None).eval())
        return clip.vision if kind == "vision" else clip.text

    def of_hugging_face(model: nn.Module, kind: str) -> cle.HookedTower:
        clip = cle.load_clip(model.eval())
        return clip.vision if kind == "vision" else clip.text

    clip32 = {"vision_config": {"patch_size": 32}, "projection_dim": 512}
    return {
        "open_clip ViT-B/32, vision": lambda: of_open_clip("ViT-B-32", "vision"),
        "open_clip ViT-B/32, text": lambda: of_open_clip("ViT-B-32", "text"),
        "open_clip CoCa ViT-B/32, vision": lambda: of_open_clip("coca_ViT-B-32", "vision"),
        "Hugging Face CLIP B/32, vision": lambda: of_hugging_face(CLIPModel(CLIPConfig(**clip32)), "vision"),
        "Hugging Face CLIP B/32, text": lambda: of_hugging_face(CLIPModel(CLIPConfig(**clip32)), "text"),
        "Hugging Face SigLIP B/32, vision": lambda: of_hugging_face(
            SiglipModel(SiglipConfig(vision_config={"patch_size": 32})), "vision"
        ),
        "timm SigLIP 2 B/32, vision": lambda: of_open_clip("ViT-B-32-SigLIP2-256", "vision"),
        "open_clip ResNet-50, vision": lambda: of_open_clip("RN50", "vision"),
    }


def inputs(tower: cle.HookedTower, batch: int) -> Tensor:
    """Random pictures, or prompts of random words."""
    if tower.cfg.tower == "vision":
        return torch.randn(batch, 3, *tower.cfg.image_size)
    ids = torch.randint(1, 1000, (batch, tower.cfg.n_ctx))
    ids[:, -1] = tower.cfg.vocab_size - 1
    return ids


def ways_of(tower: cle.HookedTower, x: Tensor, *, backward: bool) -> dict[str, Callable[[], object]]:
    """What is timed: the native forward, ours, ours with caches, and where there is one the copied re-implementation."""

    def run(call: Callable[[], Tensor]) -> Callable[[], object]:
        def forward() -> object:
            with torch.set_grad_enabled(backward):
                embedding = call()
            if backward:
                embedding.square().sum().backward()
                tower.native.zero_grad()
            return embedding

        return forward

    def is_resid_post(name: str) -> bool:
        return name.endswith("hook_resid_post")

    ways = {
        "native": run(lambda: tower.reading.native_forward(x)),
        "no hook live": run(lambda: tower(x)),
        "resid_post cached": run(lambda: tower.run_with_cache(x, names_filter=is_resid_post)[0]),
        "all cached": run(lambda: tower.run_with_cache(x)[0]),
    }
    if tower.cfg.family == "open_clip" and tower.cfg.tower == "vision" and tower.cfg.pooling == "cls":
        copied = CopiedTower(tower)
        assert check(copied, tower, x) < 1e-4
        ways["copied weights"] = run(lambda: copied(x))
    return ways


def main() -> None:
    """Measure, print, and write the section `families` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    columns = ["native", "no hook live", "resid_post cached", "all cached", "copied weights"]
    tables = {}
    for backward in (False, True):
        rows = []
        for name, make in models().items():
            torch.manual_seed(0)
            tower = make()
            x = inputs(tower, args.batch)
            ways = ways_of(tower, x, backward=backward)
            seconds = time_in_turns(ways, rounds=args.rounds, warm_up=2)
            cells = [f"{milliseconds(seconds['native']):.0f}"]
            for column in columns[1:]:
                if column not in ways:
                    cells.append("")
                    continue
                value, low, high = ratio(seconds, column, "native")
                cells.append(f"{value:.3f} ({low:.2f} to {high:.2f})")
            rows.append([name, *cells])
            print(rows[-1])
        tables[backward] = table(["tower", "native, ms", *columns[1:]], rows)
    text = (
        f"`python -m benchmarks.families` ({machine()}; random weights, batch {args.batch}, {args.rounds} rounds in turns). Ratios to the "
        "native forward of the same model: median of rounds, with quartiles. *Copied weights* is a re-implementation in "
        "TransformerLens' manner, written for this benchmark, with no hook live.\n\nForward, no gradients:\n\n"
        + tables[False] + "\n\nForward and backward to all weights:\n\n" + tables[True]
        + "\n\nTo reach: <= 1.02 with no hook live."
    )  # fmt: skip
    write_section("families", text)


if __name__ == "__main__":
    main()
