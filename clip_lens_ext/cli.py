"""`clip-lens`: parse, call one public function, print a table, write pictures.

Everything heavy is imported inside the commands, so that `clip-lens --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lens_ext.cli_name import add_name
from clip_lens_ext.cli_sae import add_check_sae, add_train_sae
from clip_lens_ext.cli_sparse import add_train_sparse
from clip_lens_ext.cli_spectrum import add_spectrum
from clip_lens_ext.errors import ClipLensError, InputError, LoadError, near

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

    from clip_lens_ext.attribution.targets import Target
    from clip_lens_ext.data import Skipped
    from clip_lens_ext.explanation import Explanation
    from clip_lens_ext.planted.roles import PlantedClass
    from clip_lens_ext.planted.world import PlantedWorld
    from clip_lens_ext.towers.clip import HookedCLIP

_PLANTED = (
    "No --model is given, so the embedded planted-0 runs: a small CLIP that was trained on synthetic pictures "
    "of 48 x 48 pixels, and knows the words of that world alone."
)
_SHOWN_SEED, _REFERENCE_SEED, _N_REFERENCES = 6, 2_000, 400


def main(argv: Sequence[str] | None = None) -> int:
    """Run `clip-lens`.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0; 2 where the input is wrong (one line on stderr says what); 130 after Ctrl-C.

    Example:
        >>> main(["--version"])
        clip-lens-ext ...
        0
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # or a name that the terminal cannot show is a traceback
    try:
        command: Callable[[argparse.Namespace], None] = arguments.command
        if hasattr(arguments, "device"):
            _check_device(arguments.device)
        command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does; the interpreter would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ClipLensError, OSError) as error:
        print(f"clip-lens: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clip-lens: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-lens", description="Which SAE latents drive a CLIP decision? Attribution, checked against ablation."
    )
    parser.add_argument("--version", action="version", version=f"clip-lens-ext {version('clip-lens-ext')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    attribute = commands.add_parser(
        "attribute", help="explain images: a table, and a picture for each",
        description="Print the latents that an image's score for a prompt rests on, and draw them.",
    )
    attribute.set_defaults(command=_attribute)
    add = attribute.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files and folders; a broken image in a folder is skipped")
    add("--prompt", action="append", metavar="TEXT", help="what the image is compared with; may be repeated")
    add("--model", metavar="NAME/TAG",
        help="an open_clip name with its tag or with a weight file, as ViT-B-32/laion2b_s34b_b79k or "
        "ViT-B-32/file.safetensors; without it the embedded planted model runs")
    add("--sae", metavar="PATH", help="folder or file of the SAE; needed with --model")
    add("--hook", metavar="NAME", help="the SAE's hook, where its file does not say (hook_name)")
    add("--tokens", metavar="SCOPE", choices=("cls", "patches", "all", "pooled"),
        help="the tokens that the SAE reads, where its file does not say (token_scope): cls, patches, all, pooled")
    add("--references", metavar="FOLDER", help="images among which to look for those that activate the latents most")
    add("--text-embeddings", metavar="FILE",
        help="safetensors file with `embeddings` [n d_embed] and the metadata `names`, a JSON list; --prompt then "
        "chooses by name. For a model without a text tower")
    add("--drop-error", action="store_true", help="let the model see the SAE's reconstruction alone")
    _add_output(attribute, out="explained")
    add("--csv", metavar="FILE", help="write every active latent as CSV")
    add("--json", metavar="FILE", help="write every active latent as JSON, with where the numbers come from")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: cpu)")
    demo = commands.add_parser(
        "demo", help="explain four held-out pictures of the planted world",
        description="The main job on the embedded model: four held-out pictures, a table and a picture for each.",
    )
    demo.set_defaults(
        command=_attribute, images=[], prompt=None, model=None, sae=None, hook=None, tokens=None, references=None,
        text_embeddings=None, drop_error=False, csv=None, json=None, device="cpu",
    )
    _add_output(demo, out="demo")
    add_check_sae(commands)
    add_train_sae(commands)
    add_spectrum(commands)
    add_train_sparse(commands)
    add_name(commands)
    return parser


def _add_output(parser: argparse.ArgumentParser, *, out: str) -> None:
    parser.add_argument("--top", type=int, default=5, metavar="K", help="latents of each ranking (default: 5)")
    parser.add_argument("--out", default=out, metavar="PATH",
                        help=f"folder for the pictures, or one .png, .pdf, .svg or .jpg file (default: {out})")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


@dataclass(frozen=True, eq=False)
class _Job:
    """What is explained by what: the arguments as objects."""

    clip: HookedCLIP
    sae: SAE[Any]
    images: Any
    target: Target
    choose: Any = "all"
    names: list[str] | None = None
    references: Any = None


def _attribute(arguments: argparse.Namespace) -> None:
    if arguments.top < 1:
        raise InputError(f"--top takes a positive number, not {arguments.top}")
    if arguments.model and not arguments.sae:
        raise InputError("--model needs --sae PATH: an SAE that was trained on activations of that model")
    if arguments.model and not arguments.images:
        raise InputError("--model needs IMAGE: the files or folders to explain")
    outputs = _Outputs(arguments)
    if not arguments.model:
        print(_PLANTED, flush=True)
    from clip_lens_ext.data import image_batches, read_image
    from clip_lens_ext.explain import explain_images

    for path in arguments.images:
        if not Path(path).is_dir():
            read_image(path)  # one that is named must be good; those in a folder may be skipped
    job = _job(arguments)
    images = image_batches(job.images, preprocess=job.clip.preprocess)
    outputs.check_number(len(images) * (len(job.target) if job.choose == "all" else 1))
    explanation = explain_images(
        job.clip, images, job.sae, job.target, k=arguments.top, choose=job.choose, names=job.names,
        reference_images=job.references, token_scope=arguments.tokens,
        error_term="dropped" if arguments.drop_error else "kept",
        progress=not arguments.no_progress and sys.stderr.isatty(),
    )
    outputs.write(explanation)


def _job(arguments: argparse.Namespace) -> _Job:
    from clip_lens_ext.attribution.targets import text_target
    from clip_lens_ext.planted import PlantedWorld, normalise, planted_clip, planted_sae
    from clip_lens_ext.saes.load import load_sae
    from clip_lens_ext.towers.load import load_clip

    device = arguments.device
    clip = load_clip(arguments.model, device=device) if arguments.model else planted_clip(device)
    if arguments.sae:
        sae = load_sae(arguments.sae, hook_name=arguments.hook, token_scope=arguments.tokens, device=device)
    else:
        sae = planted_sae(arguments.hook, device=device) if arguments.hook else planted_sae(device=device)
    world = None if arguments.model else PlantedWorld(0)
    images, names, references = arguments.images, None, arguments.references
    choose: Any = "all" if arguments.prompt else "best"
    if arguments.text_embeddings:
        target = _named_embeddings(Path(arguments.text_embeddings), arguments.prompt)
    elif clip.text is None:
        raise InputError(f"{clip.model_name} has no text tower: pass --text-embeddings FILE, made by the model's own")
    elif arguments.prompt is None and world is None:
        raise InputError("--model needs --prompt TEXT: what the images are compared with")
    else:
        every = list(dict.fromkeys(world.prompts())) if world is not None else []
        target = text_target(clip, arguments.prompt or every)
    if world is not None and not images:
        images, names = _held_out(world)
    if world is not None and references is None:
        references = normalise(world.sample(_N_REFERENCES, seed=_REFERENCE_SEED, split="test").images)
    return _Job(clip, sae, images, target, choose, names, references)


def _held_out(world: PlantedWorld) -> tuple[Tensor, list[str]]:
    """Four pictures with something planted on each, and their names."""
    import torch

    from clip_lens_ext.planted import normalise

    def first(kind: str) -> PlantedClass:
        return next(entry for entry in world.classes if entry.kind == kind)

    overlay, word = world.key.artifacts[first("artifact").name], world.key.typographic[1]
    wanted: list[tuple[PlantedClass, str, dict[str, str]]] = [
        (first("polysemous"), "", {}), (first("compound"), "", {}),
        (first("artifact"), f" with the overlay {overlay}", {"overlay": overlay}),
        (first("plain"), f" with the word {word}", {"word": word}),
    ]
    pictures, names = [], []
    for seed, (entry, note, planted) in enumerate(wanted, start=_SHOWN_SEED):
        plain: dict[str, Any] = {"overlay": None, "word": None}
        pictures.append(world.sample(1, seed=seed, split="test", classes=[entry], **(plain | planted)).images)
        names.append(f"held-out {entry.name}{f' ({entry.object})' if entry.object != entry.name else ''}{note}")
    return normalise(torch.cat(pictures)), names


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch without this kind of device
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def _named_embeddings(path: Path, names: Sequence[str] | None) -> Target:
    """Text embeddings from a file, those of some names or all."""
    from safetensors import SafetensorError, safe_open

    from clip_lens_ext.attribution.targets import direction_target

    try:
        with safe_open(path, framework="pt") as file:
            known = json.loads((file.metadata() or {})["names"])
            vectors = file.get_tensor("embeddings")
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} is no file of text embeddings: a tensor `embeddings` [n d_embed], and a JSON list "
                        f"`names` in the metadata, are needed ({type(error).__name__}: {error})") from error
    if not isinstance(known, list) or vectors.dim() != 2 or len(known) != len(vectors):
        raise LoadError(f"{path} has embeddings {list(vectors.shape)}, and no list of as many names in its metadata")
    wanted = list(names) if names else known
    for name in wanted:
        if name not in known:
            raise InputError(f"--prompt {name!r} is none of the {len(known)} names in {path}{near(name, known)}")
    return direction_target(vectors[[known.index(name) for name in wanted]], labels=wanted)


class _Outputs:
    """Where tables and pictures go; everything that can be wrong with a path is wrong before any work is done."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from clip_lens_ext.data import IMAGE_SUFFIXES
        from clip_lens_ext.plots.page import FORMATS, check_format

        out = Path(arguments.out)
        if out.suffix.lower() in IMAGE_SUFFIXES:
            check_format(out)
        self.file = out if out.suffix.lower() in FORMATS else None
        if self.file and self.file.resolve() in {Path(path).resolve() for path in arguments.images}:
            raise InputError(f"--out {out} is one of the images to explain: it would be overwritten")
        self.folder = out.parent if self.file else out
        self.tables = {"csv": arguments.csv, "json": arguments.json}
        self.folders = {self.folder, *(Path(path).parent for path in self.tables.values() if path)}
        for folder in self.folders:
            exists = next(place for place in (folder, *folder.parents) if place.exists())
            if not exists.is_dir() or not os.access(exists, os.W_OK):
                why = "read-only" if exists.is_dir() else "a file"
                raise InputError(f"cannot write into {folder}: {exists} is {why}")

    def check_number(self, n_pictures: int) -> None:
        """Several pictures do not fit into one file."""
        if self.file and n_pictures > 1:
            raise InputError(f"--out {self.file} is one picture, and there are {n_pictures} to write: name a folder")

    def write(self, explanation: Explanation) -> None:
        """Print the tables, write the files, and say where they are."""
        from clip_lens_ext.plots import explanation_legend, explanation_table, plot_explanation

        _say_skipped("image", explanation.skipped)
        _say_skipped("reference image", () if explanation.references is None else explanation.references.skipped)
        for number in range(len(explanation.decisions)):
            print(f"\n{explanation_table(explanation, decision=number)}")
        print(f"\n{explanation_legend(explanation)}\n", flush=True)
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(self._paths(explanation)):
            plot_explanation(explanation, path, decision=number)
            print(f"picture: {path}", flush=True)
        if self.tables["csv"]:
            explanation.to_frame().to_csv(self.tables["csv"], index=False)
            print(f"table: {self.tables['csv']}")
        if self.tables["json"]:
            Path(self.tables["json"]).write_text(json.dumps(explanation.to_dict(), indent=1) + "\n", encoding="utf-8")
            print(f"table: {self.tables['json']}")

    def _paths(self, explanation: Explanation) -> list[Path]:
        if self.file:
            return [self.file]
        images = [decision.image for decision in explanation.decisions]
        paths: list[Path] = []
        for decision in explanation.decisions:
            words = Path(decision.image).stem
            if images.count(decision.image) > 1:
                words += f" {decision.prompt}"
            stem = re.sub(r"\W+", "-", words).strip("-")[:80] or "image"
            names = (f"{stem}{number}-explained.png" for number in ("", *(f"-{n}" for n in range(2, len(images) + 1))))
            paths.append(next(self.folder / name for name in names if self.folder / name not in paths))
        return paths


def _say_skipped(what: str, skipped: Sequence[Skipped]) -> None:
    if skipped:
        named = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped)
        print(f"clip-lens: {len(skipped)} {what}{'s' * (len(skipped) > 1)} skipped ({named})", file=sys.stderr)
