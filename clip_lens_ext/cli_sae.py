"""`clip-lens check-sae` and `clip-lens train-sae`: parse, call one public function, print."""

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


def add_train_sae(commands: Any) -> None:
    """Give the parser the command `train-sae`."""
    parser = commands.add_parser(
        "train-sae", help="train SAEs on a model's activations",
        description="Train a sparse autoencoder at one hook or several, in one pass over the pictures, measured on "
        "pictures that are held out. The same command again goes on where it was interrupted.",
    )  # fmt: skip
    parser.set_defaults(command=_train)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files and folders; needed with --model")
    add("--out", metavar="DIR", required=True, help="where checkpoints go, and the SAEs, in a folder for each hook")
    add("--model", metavar="NAME/TAG", help="as in `attribute`; without it the embedded planted model")
    add("--hook", metavar="NAME", action="append", help="the hook; several with --hook A --hook B")
    add("--tokens", metavar="SCOPE", choices=("cls", "patches", "all", "pooled"), default="all",
        help="the tokens to train on: cls, patches, all or pooled (default: all)")  # fmt: skip
    add("--d-sae", type=int, default=1024, metavar="N", help="number of latents (default: 1024)")
    add(
        "--architecture", default="topk", metavar="NAME", help="topk, batchtopk, matryoshka or jumprelu (default: topk)"
    )
    add("--k", type=int, default=32, metavar="K", help="active latents in a token (default: 32)")
    add("--n-training-tokens", type=int, metavar="N", help="tokens to train on (default: ten times those there are)")
    add("--batch-size", type=int, default=4096, metavar="N", help="tokens in a training batch (default: 4096)")
    add("--lr", type=float, default=1e-3, metavar="RATE", help="learning rate (default: 0.001)")
    add("--normalize", default="expected_average_only_in", metavar="HOW",
        help="of the inputs: expected_average_only_in, layer_norm or none")  # fmt: skip
    add("--cache", metavar="DIR", help="keep the activations there, for further runs on the same pictures")
    add("--seed", type=int, default=0, metavar="N", help="of the split, the order and the weights (default: 0)")
    add("--n-images", type=int, default=1000, metavar="N", help="pictures of the planted world (default: 1000)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: cpu)")
    add("--no-progress", action="store_true", help="no progress bar")


def _train(arguments: argparse.Namespace) -> None:
    import clip_lens_ext as cle

    if arguments.model and not (arguments.images and arguments.hook):
        raise InputError("--model needs IMAGE and --hook: what to train on, and where")
    if arguments.n_images < 1:
        raise InputError(f"--n-images takes a positive number, not {arguments.n_images}")
    clip = cle.load_clip(arguments.model, device=arguments.device) if arguments.model else cle.planted_clip(
        arguments.device
    )  # fmt: skip
    images: Any = arguments.images
    if not images:
        images = cle.planted.normalise(cle.PlantedWorld(0).sample(arguments.n_images, seed=1, split="train").images)
    hooks = arguments.hook or ["blocks.2.hook_resid_post"]
    found = cle.train_saes(
        clip.vision, images, hook_names=hooks, d_sae=arguments.d_sae, architecture=arguments.architecture,
        k=arguments.k, token_scope=arguments.tokens, n_training_tokens=arguments.n_training_tokens,
        batch_size=arguments.batch_size, lr=arguments.lr, normalize_activations=arguments.normalize,
        preprocess=clip.preprocess, output_dir=arguments.out, cache_dir=arguments.cache, seed=arguments.seed,
        progress=not arguments.no_progress and sys.stderr.isatty(),
    )  # fmt: skip
    metadata = next(iter(found.values())).cfg.metadata
    skipped = f", {metadata.n_skipped_images} skipped" * bool(metadata.n_skipped_images)
    print(
        f"{len(found)} {arguments.architecture} SAE{'s' * (len(found) > 1)} of {metadata.model_name}, "
        f"{arguments.d_sae} latents, {metadata.token_scope} tokens: trained on {metadata.n_training_tokens:,} tokens "
        f"of {metadata.n_training_images} pictures, measured on {metadata.n_held_out_images} held out{skipped}"
    )
    width = max(len(name) for name in (*found, "hook"))
    print(f"  {'hook':<{width}}  explained variance  cosine     L0  never fire")
    for name, sae in found.items():
        m = sae.cfg.metadata
        explained = "none to explain" if m.explained_variance is None else f"{m.explained_variance:.3f}"
        print(f"  {name:<{width}}  {explained:>18}  {m.cosine:>6.3f}  {m.l0:>5.1f}  {100 * m.dead_latents:>9.1f}%")
    for name in found:
        print(f"SAE: {Path(arguments.out, name)}")


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
