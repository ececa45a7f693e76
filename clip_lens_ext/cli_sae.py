"""`clip-lens check-sae`: parse, call `check_sae`, print."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from clip_lens_ext.errors import InputError


def add_check_sae(commands: Any) -> None:
    """Give the parser the command `check-sae`."""
    parser = commands.add_parser(
        "check-sae", help="does an SAE fit a model's activations, and if not, why",
        description="Measure an SAE on pictures, and try the hooks, tokens and conventions under which it would fit.",
    )  # fmt: skip
    parser.set_defaults(command=_check)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files and folders; needed with --model")
    add("--sae", metavar="PATH", help="the SAE, of any format; without it the planted model's own")
    add("--model", metavar="NAME/TAG", help="as in `attribute`; without it the embedded planted model")
    add("--hook", metavar="NAME", help="the SAE's hook, where its file does not say")
    add("--tokens", metavar="SCOPE", choices=("cls", "patches", "all", "pooled"), help="the tokens that it reads")
    add("--format", metavar="FORMAT", help="the family of the file, where it could be several's")
    add("--k", type=int, metavar="K", help="latents that a TopK SAE keeps, where its file does not say")
    add("--n-images", type=int, default=64, metavar="N", help="pictures to read at most (default: 64)")
    add("--json", metavar="FILE", help="write the result as JSON")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: cpu)")
    add("--no-progress", action="store_true", help="no progress bar")


def _check(arguments: argparse.Namespace) -> None:
    import clip_lens_ext as cle

    if arguments.model and not arguments.sae:
        raise InputError("--model needs --sae PATH: the SAE to check")
    if arguments.model and not arguments.images:
        raise InputError("--model needs IMAGE: the files or folders to check the SAE on")
    if arguments.n_images < 1:
        raise InputError(f"--n-images takes a positive number, not {arguments.n_images}")
    if arguments.json and Path(arguments.json).is_dir():
        raise InputError(f"--json {arguments.json} is a folder")
    device = arguments.device
    clip = cle.load_clip(arguments.model, device=device) if arguments.model else cle.planted_clip(device)
    place: dict[str, Any] = {"hook_name": arguments.hook, "token_scope": arguments.tokens}
    if arguments.sae:
        sae = cle.load_sae(
            arguments.sae, format=arguments.format, k=arguments.k, device=arguments.device, model_name=None, **place
        )
    else:
        sae = cle.planted_sae(device=arguments.device)
    images: Any = arguments.images
    if not images:
        images = cle.planted.normalise(cle.PlantedWorld(0).sample(arguments.n_images, seed=2, split="test").images)
    found = cle.check_sae(
        clip.vision, images, sae, preprocess=clip.preprocess, n_images=arguments.n_images,
        progress=not arguments.no_progress and sys.stderr.isatty(), **place,
    )  # fmt: skip
    print(found)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"table: {arguments.json}")
