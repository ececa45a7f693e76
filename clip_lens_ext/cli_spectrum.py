"""`clip-lens spectrum`: parse, call one public function, print, draw."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lens_ext.errors import InputError, LoadError

if TYPE_CHECKING:
    from clip_lens_ext.spectrum import EvaluationData, PruningEvaluation, SpectrumAnalysis
    from clip_lens_ext.towers.clip import HookedCLIP


def add_spectrum(commands: Any) -> None:
    """Give the parser the command `spectrum`."""
    parser = commands.add_parser(
        "spectrum", help="which directions are noise, and does the model do as well without them",
        description="Split the space of the embedding, or of a residual stream, into signal and noise by each rule; "
        "compare subsets; prune, and measure beside random, top-variance and lowest-variance controls.",
    )  # fmt: skip
    parser.set_defaults(command=_spectrum)
    add = parser.add_argument
    add("images", nargs="?", metavar="FOLDER", help="a folder of images; its subfolders are classes, if it has any")
    add("--captions", metavar="FILE", help="JSON: the text, or texts, of each image by its name in the folder")
    add("--model", metavar="NAME/TAG", help="as in `attribute`; without it the embedded planted model")
    add("--hook", default="hook_embedding", metavar="NAME",
        help="the embedding, or a hook of the vision tower's residual stream (default: hook_embedding)")  # fmt: skip
    add(
        "--tokens",
        metavar="SCOPE",
        choices=("cls", "patches", "all"),
        help="tokens of a residual stream: cls, patches, all",
    )
    add("--rule", action="append", metavar="NAME", help="rule of the split; may be repeated (default: all that apply)")
    add("--cut", metavar="NAME", help="where noise begins: the name of a cut, or a number of dimensions")
    add("--ranks", type=int, nargs="+", metavar="K",
        help="prune so many dimensions each, by the first rule: a curve instead of the rules' own numbers")  # fmt: skip
    add("--template", default="a photo of a {}", metavar="TEXT", help="prompt for the name of a class, with one {}")
    add("--no-evaluation", action="store_true", help="split alone, and prune nothing")
    add("--n-images", type=int, default=2000, metavar="N", help="pictures of the planted world (default: 2000)")
    add("--n-bootstrap", type=int, default=500, metavar="N", help="draws of every interval (default: 500)")
    add("--seed", type=int, default=0, metavar="N", help="of the test half, the draws and the controls (default: 0)")
    add("--out", default="spectrum", metavar="DIR", help="folder for pictures, tables and splits (default: spectrum)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: cpu)")
    add("--no-progress", action="store_true", help="no progress bars")


def _spectrum(arguments: argparse.Namespace) -> None:
    import clip_lens_ext as cle

    if arguments.model and not arguments.images:
        raise InputError("--model needs FOLDER: the images whose spectrum is meant")
    for name in ("n_images", "n_bootstrap"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} takes a positive number, not {getattr(arguments, name)}")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    device = arguments.device
    clip = cle.load_clip(arguments.model, device=device) if arguments.model else cle.planted_clip(device)
    if arguments.images:
        data, control = _folder(arguments, clip), None
    else:
        data, control = _planted(arguments)
    cut = int(arguments.cut) if (arguments.cut or "").isdigit() else arguments.cut
    found = cle.analyse_spectrum(
        clip, data, hook_name=arguments.hook, token_scope=arguments.tokens, rules=arguments.rule, cut=cut,
        ranks=arguments.ranks,
        control=control, evaluate=not arguments.no_evaluation, n_bootstrap=arguments.n_bootstrap, seed=arguments.seed,
        progress=not arguments.no_progress and sys.stderr.isatty(),
    )  # fmt: skip
    _say(found)
    _write(found, out)


def _planted(arguments: argparse.Namespace) -> tuple[EvaluationData, EvaluationData]:
    """Pictures and captions of the planted world, and others that mean nothing."""
    import torch

    import clip_lens_ext as cle

    world = cle.PlantedWorld(0)
    batch = world.sample(arguments.n_images, seed=5, split="test")
    names = list(dict.fromkeys(entry.name for entry in world.classes))
    labels = torch.tensor([names.index(world.classes[number].name) for number in batch.labels.tolist()])
    images = cle.planted.normalise(batch.images)
    data = cle.EvaluationData(
        images, labels=labels, classes=names, captions=batch.captions, templates=arguments.template,
        seed=arguments.seed,
    )  # fmt: skip
    mixed = cle.shuffled_pixels(images, seed=arguments.seed)
    control = cle.EvaluationData(mixed, captions=cle.shuffled_words(batch.captions, seed=arguments.seed))
    return data, control


def _folder(arguments: argparse.Namespace, clip: HookedCLIP) -> EvaluationData:
    """The images of a folder, with the subfolders as classes and the captions of a file, as far as there are any."""
    import torch

    import clip_lens_ext as cle
    from clip_lens_ext.image_files import image_files

    folder = Path(arguments.images)
    if not folder.is_dir():
        raise InputError(f"no such folder: {str(folder)!r}")
    paths = image_files(folder, recursive=True)
    names = [path.relative_to(folder).as_posix() for path in paths]
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    loose = [name for name in names if "/" not in name]
    if classes and loose:
        raise InputError(f"{folder} has subfolders and {len(loose)} images beside them ({loose[0]}, ...): whether the "
                         "subfolders are classes is not clear")  # fmt: skip
    captions = _captions(Path(arguments.captions), names) if arguments.captions else None
    if not classes and captions is None:
        raise InputError(f"{folder} has no subfolders that are classes, and there is no --captions FILE: what pruning "
                         "does cannot be told without one of them")  # fmt: skip
    labels = torch.tensor([classes.index(name.split("/")[0]) for name in names]) if classes else None
    words = [name.replace("_", " ") for name in classes] if len(classes) > 1 and clip.text is not None else None
    return cle.EvaluationData(
        paths, labels=labels, classes=words, captions=captions, templates=arguments.template, seed=arguments.seed,
        preprocess=clip.preprocess,
    )  # fmt: skip


def _captions(path: Path, names: list[str]) -> list[Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} is no JSON file of captions ({type(error).__name__}: {error})") from error
    if not isinstance(given, dict):
        raise LoadError(f"{path} has to be a JSON object: the text, or texts, of each image by its name in the folder")
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(f"{path} has no caption of {len(missing)} images: {', '.join(missing[:3])}, ...")
    return [given[name] for name in names]


def _say(found: SpectrumAnalysis) -> None:
    """The splits as a table, the subsets, and the scores with the verdict."""
    text = "" if found.text is None else f", {found.text.count:,} of texts"
    print(f"{found.image.hook_name}: {found.image.d} dimensions, {found.image.count:,} rows of images{text}")
    print(f"  {'rule':<18}{'cut':<26}{'noise':>6}  {'shared by counting':>19}  {'overlap':>8}  {'by chance':>10}")
    for split in found.splits:
        shared = "-" if split.n_by_chance is None else str(split.n_by_chance)
        seen, chance = (_number(value) for value in (split.overlap, split.overlap_by_chance))
        print(f"  {split.rule:<18}{split.cut:<26}{split.rank:>6}  {shared:>19}  {seen:>8}  {chance:>10}")
    for name, why in found.not_split.items():
        print(f"  {name:<18}no split: {why}")
    for sentence in dict.fromkeys(sentence for split in found.splits for sentence in split.warnings):
        print(f"  note: {sentence}")
    by_cut = ", ".join(f"{split.cut} {split.rank}" for split in found.cuts)
    print(f"noise of the pooled covariance by each cut: {by_cut}")
    if found.overlap is not None:
        frame = found.overlap.to_frame()
        print(f"noise of {len(found.overlap.names)} subsets: overlap {frame.overlap.min():.3f} to "
              f"{frame.overlap.max():.3f}, by chance {frame.by_chance.mean():.3f}, of two halves of one subset "
              f"{frame.split_half.mean():.3f}")  # fmt: skip
    if found.skipped:
        print(f"clip-lens: {len(found.skipped)} images skipped "
              f"({'; '.join(f'{skip.name}: {skip.reason}' for skip in found.skipped)})", file=sys.stderr)  # fmt: skip
    if found.evaluation is not None:
        _say_scores(found.evaluation)


def _say_scores(found: PruningEvaluation) -> None:
    for i, rank in enumerate(found.ranks):
        print(f"\n{rank} of {found.d} dimensions pruned: share that is right, on test images alone")
        print("  " + f"{'':<20}" + "".join(f"{name:>18}" for name in found.pruned))
        for k, measure in enumerate(found.measures):
            print("  " + f"{measure:<20}" + "".join(f"{float(value):>18.3f}" for value in found.score[i, :, k]))
    print("\nin words, each difference with its bootstrap interval")
    print("\n".join(f"  {line}" for line in found.summary().splitlines()))


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _write(found: SpectrumAnalysis, out: Path) -> None:
    from clip_lens_ext.plots import plot_overlap, plot_pruning, plot_spectrum

    out.mkdir(parents=True, exist_ok=True)
    plot_spectrum(found.splits, found.image, found.text, out / "spectrum.png")
    plot_spectrum(
        found.cuts,
        found.image,
        found.text,
        out / "cuts.png",
        title=f"{found.image.hook_name}: the pooled rule, by every cut",
    )
    written = ["spectrum.png", "cuts.png"]
    if found.overlap is not None:
        plot_overlap(found.overlap, out / "overlap.png")
        found.overlap.to_frame().to_csv(out / "overlap.csv", index=False)
        written += ["overlap.png", "overlap.csv"]
    if found.evaluation is not None:
        plot_pruning(found.evaluation, out / "pruning.png")
        found.evaluation.to_frame().to_csv(out / "pruning.csv", index=False)
        written += ["pruning.png", "pruning.csv"]
    for split in found.splits:
        name = f"split-{split.rule}-{split.cut}.safetensors"
        split.save(out / name)
        written.append(name)
    print()
    for name in written:
        kind = {".png": "picture", ".csv": "table"}.get(Path(name).suffix, "split")
        print(f"{kind}: {out / name}")
