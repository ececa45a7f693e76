"""Does a classifier of skin lesions look at the lesion? `python study.py` on generated ones, `--folder` on yours.

Without a folder the command draws lesions, trains a small CLIP and an SAE on them (once: OUT keeps both), fits linear
classifiers on sets in which a ruler, a colour patch or a vignette goes with melanoma, and compares them with prompts.
With `--folder` it does so on labelled pictures with any CLIP. Tables go to OUT/report.md, figures beside it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from figures import SuspectRow, draw_accuracy, draw_bars, draw_examples, draw_suspects
from folder import LabelledFolder, read_folder
from folder_study import FolderStudy, folder_sae, study_folder
from generated import Settings, Study, run_study
from lesions import LesionWorld
from report import folder_section, strong_agreement, study_section

import clip_lens_ext as cle
from benchmarks.page import write_section
from benchmarks.timing import machine
from clip_lens_ext.errors import ClipLensError, InputError
from clip_lens_ext.planted import normalise

PROMPTS = ("naevus=a photo of a naevus", "melanoma=a photo of a melanoma")
COMMAND = "python docs/case-studies/skin_lesions/study.py"
FIGURES = ("examples.png", "accuracy.png", "suspects.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two studies and write what was found."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    try:
        if asked.folder is None:
            _generated(asked)
        else:
            _on_folder(asked)
    except ClipLensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/skin_lesions"), help="models, figures, report.md (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    generated = parser.add_argument_group("generated lesions")
    generated.add_argument("--steps", type=int, default=Settings.n_steps, help="of the CLIP's training (%(default)s)")
    generated.add_argument("--control", action="store_true", help="also a second CLIP, whose pretraining is biased")
    generated.add_argument(
        "--page", type=Path, help="also write the section `study` of this page, and figures/ beside it"
    )
    yours = parser.add_argument_group("your pictures")
    yours.add_argument("--folder", type=Path, help="where the pictures are")
    yours.add_argument("--labels", type=Path, help="CSV with a row for each picture")
    yours.add_argument("--file-column", default="file", help="(%(default)s)")
    yours.add_argument("--label-column", default="label", help="(%(default)s)")
    yours.add_argument(
        "--annotations", nargs="*", default=[], metavar="COLUMN", help="columns of 1 and 0, for checks alone: ruler ..."
    )
    yours.add_argument("--prompts", nargs=2, default=PROMPTS, metavar="LABEL=PROMPT",
                       help="the two labels and their prompts; a positive score speaks for the second")  # fmt: skip
    yours.add_argument("--model", help="as in clip_lens_ext.load_clip: ViT-B-32, hf-hub:org/name, a local folder")
    yours.add_argument("--pretrained", help="tag, or a weight file")
    yours.add_argument("--sae", help="as in clip_lens_ext.load_sae; by default one is trained on the training half")
    yours.add_argument("--hook", help="of the SAE (default: after the last block)")
    yours.add_argument("--d-sae", type=int, help="latents of an SAE that is trained (default: twice the tower's width)")
    yours.add_argument("--k", type=int, default=16, help="active latents in a token (%(default)s)")
    yours.add_argument("--sae-tokens", type=int, help="to train the SAE on (default: ten times those there are)")
    return parser


def _generated(asked: argparse.Namespace) -> None:
    settings = Settings(seed=asked.seed, n_steps=asked.steps)
    asked.out.mkdir(parents=True, exist_ok=True)
    study = run_study(settings, asked.out, control=asked.control, progress=not asked.quiet)
    draw_generated(study, asked.out)
    extra = "".join(f" --{name} {value}" for name, value in (("seed", asked.seed), ("steps", asked.steps))
                    if value != getattr(Settings, {"steps": "n_steps"}.get(name, name)))  # fmt: skip
    text = study_section(study, COMMAND + extra + " --control" * asked.control, machine())
    (asked.out / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if asked.page is not None:
        write_section("study", text, asked.page)
        figures = asked.page.parent / "figures"
        figures.mkdir(exist_ok=True)
        for name in FIGURES:
            shutil.copyfile(asked.out / name, figures / name)


def draw_generated(study: Study, out: Path, *, n_pictures: int = 8) -> None:
    """The three figures of the generated study."""
    world = LesionWorld(study.settings.seed)
    draw_examples(world, out / "examples.png")
    draw_accuracy(study, out / "accuracy.png")
    pictures = world.sample(study.settings.n_test, seed=1, split="test", agreement={})
    strong = strong_agreement(study.settings.agreements)
    cells = [cell for cell in study.cells if cell.agreement == strong]
    latents = [latent for cell in cells for latent in cell.suspects.latents]
    rows = []
    if latents:
        found = cle.collect_references(
            study.clip.vision, normalise(pictures.images), study.sae, k=n_pictures, latents=latents, progress=False
        )
        for cell in cells:
            suspects = cell.suspects
            for place, latent in enumerate(suspects.latents[:3]):
                rows.append(SuspectRow(
                    f"{cell.shortcut}: latent {latent}",
                    f"{100 * suspects.share_probe[place]:.0f}% of the attribution under the classifier,\n"
                    f"{100 * suspects.share_text[place]:.0f}% under the prompts; area {cell.key[place].value:.2f}",
                    [pictures.images[row] for row in found.of(latent).sample.tolist()],
                ))  # fmt: skip
    about = f"Up to three suspects of each classifier, at an agreement of {strong:g}, on pictures of a fair set"
    draw_suspects(rows, out / "suspects.png", title="What the suspects show", about=about)


def _on_folder(asked: argparse.Namespace) -> None:
    if asked.labels is None or asked.model is None:
        raise InputError("--folder needs --labels, a CSV, and --model, the CLIP: see --help")
    pairs = [one.partition("=") for one in asked.prompts]
    if any(not (label and prompt) for label, _, prompt in pairs):
        raise InputError(f"--prompts are LABEL=PROMPT twice, got {list(asked.prompts)}")
    pictures = read_folder(
        asked.folder, asked.labels, [label for label, _, _ in pairs], annotations=asked.annotations,
        file_column=asked.file_column, label_column=asked.label_column, progress=not asked.quiet,
    )  # fmt: skip
    for line in pictures.skipped:
        print(f"left out: {line}", file=sys.stderr)
    clip = cle.load_clip(asked.model, asked.pretrained)
    study = run_on_folder(clip, pictures, [prompt for _, _, prompt in pairs], asked)
    print((asked.out / "report.md").read_text(encoding="utf-8"))
    print(f"{len(study.suspects.latents)} suspects; report.md, accuracy.png and suspects.png are in {asked.out}")


def run_on_folder(
    clip: cle.HookedCLIP, pictures: LabelledFolder, prompts: list[str], asked: argparse.Namespace
) -> FolderStudy:
    """The study of a folder with a model that is loaded, written to `asked.out`."""
    asked.out.mkdir(parents=True, exist_ok=True)
    train, test = pictures.split(seed=asked.seed)
    if asked.sae:
        sae = cle.load_sae(asked.sae, hook_name=asked.hook)
    else:
        sae = folder_sae(
            clip, train, asked.out / "sae", hook_name=asked.hook, d_sae=asked.d_sae, k=asked.k,
            n_training_tokens=asked.sae_tokens, seed=asked.seed, progress=not asked.quiet,
        )  # fmt: skip
    study = study_folder(clip, train, test, sae, prompts, seed=asked.seed, progress=not asked.quiet)
    text = folder_section(study, prompts, clip.model_name)
    (asked.out / "report.md").write_text(text + "\n", encoding="utf-8")
    draw_bars(study.accuracy, asked.out / "accuracy.png", title="Each head on the test pictures")
    suspects = study.suspects
    rows = [
        SuspectRow(
            f"latent {latent}, for {suspects.of_class[place]}",
            f"{100 * suspects.share_probe[place]:.0f}% of the attribution under the classifier,\n"
            f"{100 * suspects.share_text[place]:.0f}% under the prompts",
            [_square(path) for path in study.references[latent]],
        )
        for place, latent in enumerate(suspects.latents)
    ]
    draw_suspects(rows, asked.out / "suspects.png", title="What the suspects show",
                  about="The training pictures that activate each suspect most")  # fmt: skip
    return study


def _square(path: Path, side: int = 160) -> torch.Tensor:
    """The middle of a picture, small, uint8 `[3 side side]`."""
    picture = cle.read_image(path)
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    small = picture.crop((left, top, left + edge, top + edge)).resize((side, side))
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)


if __name__ == "__main__":
    sys.exit(main())
