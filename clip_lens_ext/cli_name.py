"""`clip-lens name`: parse, call one public function, print, draw."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lens_ext.errors import InputError, LoadError

_N_PLANTED = 400  # pictures, where no folder is given

if TYPE_CHECKING:
    from clip_lens_ext.sparse_clip import ConceptNames
    from clip_lens_ext.towers.clip import HookedCLIP


def add_name(commands: Any) -> None:
    """Give the parser the command `name`."""
    parser = commands.add_parser(
        "name", help="name the concepts of a Sparse CLIP by words and pictures",
        description="For every feature of a Sparse CLIP the words that activate it most in the text tower and the "
        "pictures that do in the vision tower, and whether both agree, beside the words of other features.",
    )  # fmt: skip
    parser.set_defaults(command=_name)
    add = parser.add_argument
    add("images", nargs="?", metavar="FOLDER", help="a folder of images; a broken one is skipped; needed with --model")
    add("--model", metavar="FOLDER", help="a Sparse CLIP, as training wrote it; without it the embedded planted one")
    add("--dense", metavar="NAME/TAG|FOLDER", help="the dense model under the heads of --model, as `attribute --model` "
        "takes it (default: the name that it had; a model of a folder has none)")  # fmt: skip
    add("--vocabulary", metavar="FILE", help="text file with one word a line; needed with --model")
    add("--template", action="append", metavar="TEXT", help="what a word is put into, with one {}; may be repeated "
        "(default: the bare word)")  # fmt: skip
    add("--texts", metavar="FILE", help="captions, one a line, for modality and density; without it the words stand in")
    add("--judge", metavar="NAME/TAG", help="the CLIP that judges the agreement (default: the dense model below)")
    add("--words", type=int, default=5, metavar="K", help="words of a feature (default: 5)")
    add("--pictures", type=int, default=20, metavar="K", help="pictures of a feature (default: 20)")
    add("--top", type=int, default=8, metavar="N", help="features to print and to draw (default: 8)")
    add("--by", default="density", choices=("density", "agreement", "lift"),
        help="which features those are: greatest density, agreement, or agreement above the control")  # fmt: skip
    add("--checkpoint", metavar="FILE", help="go on from this file after an interruption, and write to it")
    add("--out", default="concepts", metavar="DIR", help="folder for tables, names and the page (default: concepts)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: cpu)")
    add("--no-progress", action="store_true", help="no progress bars")


def _name(arguments: argparse.Namespace) -> None:
    for name in ("words", "pictures", "top"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} takes a positive number, not {getattr(arguments, name)}")
    out = Path(arguments.out)
    if arguments.model and not (arguments.images and arguments.vocabulary):
        raise InputError("--model needs FOLDER and --vocabulary FILE: pictures, and words to name its features by")
    if arguments.dense and not arguments.model:
        raise InputError("--dense is the model under the heads of --model, and goes with it")
    if arguments.images and not Path(arguments.images).is_dir():
        raise InputError(f"no such folder of images: {arguments.images!r}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    import clip_lens_ext as cle
    from clip_lens_ext.plots.concepts import plot_concepts
    from clip_lens_ext.sparse_clip import name_concepts

    templates = arguments.template or "{}"
    images: Any = arguments.images
    texts = None if arguments.texts is None else _lines(Path(arguments.texts))
    if images is None:
        batch = cle.PlantedWorld(0).sample(_N_PLANTED, seed=9, split="test")
        images, texts = cle.planted.normalise(batch.images), texts or batch.captions
    if arguments.vocabulary:
        vocabulary = cle.Vocabulary.from_file(arguments.vocabulary, templates=templates)
    else:
        vocabulary = cle.Vocabulary.from_terms(cle.PlantedWorld(0).vocabulary, templates=templates)
    clip = _opened(arguments.model, arguments.dense, arguments.device)
    found = name_concepts(
        clip, vocabulary, images, k_words=arguments.words, k_images=arguments.pictures, texts=texts,
        judge=cle.load_clip(arguments.judge, device=arguments.device) if arguments.judge else None,
        checkpoint=arguments.checkpoint, progress=not arguments.no_progress and sys.stderr.isatty(),
    )  # fmt: skip
    features = found.top(arguments.top, by=arguments.by)
    _say(found, features, arguments.by)
    out.mkdir(parents=True, exist_ok=True)
    found.to_frame().to_csv(out / "concepts.csv", index=False)
    (out / "concepts.json").write_text(json.dumps(_plain(found), indent=1) + "\n", encoding="utf-8")
    found.save(out / "concepts.safetensors")
    print()
    for kind, name in (("table", "concepts.csv"), ("table", "concepts.json"), ("names", "concepts.safetensors")):
        print(f"{kind}: {out / name}")
    if features:
        plot_concepts(found, images, out / "concepts.png", features=features)
        print(f"picture: {out / 'concepts.png'}")


def _opened(folder: str | None, dense: str | None, device: str) -> HookedCLIP:
    """The model; the planted one under its heads ships, and others are opened by their name."""
    import clip_lens_ext as cle

    if folder is None:
        return cle.planted_sparse_clip(device)
    from clip_lens_ext.planted.load import MODEL_NAME
    from clip_lens_ext.towers.from_sparse import read

    named = read(folder).dense
    if dense is not None:
        return cle.load_sparse_clip(folder, cle.load_clip(dense, device=device), device=device)
    if named == MODEL_NAME:
        return cle.load_sparse_clip(folder, cle.planted_clip(), device=device)
    try:
        return cle.load_sparse_clip(folder, device=device)
    except LoadError as error:
        raise LoadError(f"the dense model {named!r} under the heads in {folder} cannot be opened by its name: pass "
                        f"--dense NAME/TAG or --dense FOLDER ({error})") from error  # fmt: skip


def _lines(path: Path) -> list[str]:
    """The texts of a file; one that is there twice counts twice."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read texts from {str(path)!r}: {type(error).__name__}: {error}") from error
    if not any(lines):
        raise InputError(f"{str(path)!r} has no text: one a line is needed")
    return [line for line in lines if line]


def _say(found: ConceptNames, features: list[int], by: str) -> None:
    """The counts, and some features as a table."""
    n = len(found)
    print(f"{n} features: {n - found.n_unnamed} with words of {len(found.terms)}, {n - found.n_without_images} with "
          f"pictures of {found.images.n_samples}")  # fmt: skip
    print(f"agreement by {found.judge}: mean {found.mean_agreement:+.3f}, with the words of other features "
          f"{found.mean_control:+.3f}; own words first for {found.retrieval_accuracy:.1%} of {found.n_scored} features "
          f"(by chance {found.retrieval_chance:.1%})")  # fmt: skip
    source = "the words of the vocabulary" if found.text_source == "vocabulary" else f"{found.n_texts} texts"
    print(f"modality 1 is of pictures alone, 0 of texts alone; energies over texts are those over {source}")
    print(f"\nfeatures of greatest {by} that have words and pictures")
    print(f"{'feature':>9}{'agreement':>11}{'control':>9}{'rank':>7}{'modality':>10}{'density':>10}  words")
    for feature in features:
        concept = found.of(feature)
        words = ", ".join(word.name for word in concept.words)
        print(f"{feature:>9}{concept.agreement:>+11.3f}{concept.control:>+9.3f}{concept.rank:>7g}"
              f"{concept.modality:>10.3f}{concept.density:>10.3g}  {words}")  # fmt: skip
    if found.images.skipped:
        skipped = "; ".join(f"{skip.name}: {skip.reason}" for skip in found.images.skipped)
        print(f"clip-lens: {len(found.images.skipped)} images skipped ({skipped})", file=sys.stderr)


def _plain(found: ConceptNames) -> dict[str, Any]:
    """Everything as JSON; what is not defined is null."""
    features = []
    for feature in range(len(found)):
        concept = found.of(feature)._asdict()
        for name in ("words", "images"):
            concept[name] = [one._asdict() for one in concept[name]]
        features.append({name: None if value != value else value for name, value in concept.items()})
    about = {
        "judge": found.judge, "text_source": found.text_source, "n_texts": found.n_texts,
        "n_images": found.images.n_samples, "templates": list(found.templates), "vocabulary": found.vocabulary,
        "skipped": [{"name": skip.name, "reason": skip.reason} for skip in found.images.skipped],
        "provenance": {**found.provenance_of_names, "images": found.images.provenance},
    }  # fmt: skip
    return {**about, "features": features}
