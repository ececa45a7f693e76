"""What the command line prints, as docs/cli.md shows it: `python -m benchmarks.transcripts` writes its sections."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

import clip_lens_ext as cle
from benchmarks.page import write_section

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
LEGEND = "attribution and exact ablation are in cosine points"


def draw_pictures(folder: Path) -> None:
    """`crane.png`, and a folder with two pictures and one that is cut off."""
    world = cle.PlantedWorld(0)
    (folder / "pictures").mkdir()
    for place, name, seed in [("crane.png", "crane", 3), ("pictures/crown.png", "crown", 4), ("pictures/gear.png", "gear", 5)]:
        picture = world.sample(1, seed=seed, split="test", classes=[name]).images[0]
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / place)
    whole = (folder / "pictures" / "gear.png").read_bytes()
    (folder / "pictures" / "cut.png").write_bytes(whole[: len(whole) // 2])


def run(command: str, folder: Path) -> list[str]:
    """The lines that a command prints, on stdout and stderr."""
    name, *arguments = shlex.split(command)
    assert name == "clip-lens"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "clip_lens_ext", *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.stdout.rstrip("\n").splitlines()


def legend_of(lines: list[str]) -> tuple[int, int]:
    """Where the legend begins and ends."""
    start = next(index for index, line in enumerate(lines) if line.startswith(LEGEND))
    return start, next(index for index in range(start, len(lines)) if lines[index].startswith("model ")) + 1


def write(name: str, lines: list[str]) -> None:
    """One section of the page, as a console block."""
    write_section(name, "\n".join(["```console", *lines, "```"]), PAGE)


def main() -> None:
    """Run the commands and write the sections."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_pictures(folder)
        demo = run("clip-lens demo", folder)
        start, end = legend_of(demo)
        heads = [index for index, line in enumerate(demo[:start]) if line.startswith("held-out ")]
        write("demo", ["$ clip-lens demo", demo[0], "...", *demo[heads[-1] :]])
        write("legend", demo[start:end])
        command = 'clip-lens attribute pictures --prompt "a photo of a gear" --prompt "a photo of a crown" --top 2'
        files = run(command, folder)
        start, end = legend_of(files)
        shown = [line for line in files[:start] if not line.startswith("No --model is given")]
        write("files", [f"$ {command}", *shown, "...", *files[end:]])
        command = "clip-lens attribute crane.png --top 3 --csv crane.csv --json crane.json"
        tables = run(command, folder)
        start, end = legend_of(tables)
        shown = [line for line in tables[:start] if not line.startswith("No --model is given")]
        rows = (folder / "crane.csv").read_text().splitlines()[:3]
        write("tables", [f"$ {command}", *shown, "...", *tables[end:], "$ head -3 crane.csv", *rows])
        lines = []
        for command in ("clip-lens check-sae", "clip-lens check-sae --hook blocks.1.hook_resid_post"):
            lines += [f"$ {command}", *run(command, folder)]
        write("check", lines)
        command = (
            "clip-lens train-sae --n-images 200 --hook blocks.1.hook_resid_post --hook blocks.2.hook_resid_post "
            "--d-sae 256 --k 8 --n-training-tokens 200000 --batch-size 1024 --out saes"
        )
        write("train", [f"$ {command}", *run(command, folder)])
        command = "clip-lens spectrum --n-images 1500 --rule pooled --rule cross_covariance --ranks 16 96 --n-bootstrap 200"
        lines = run(command, folder)
        start = next(index for index, line in enumerate(lines) if line.startswith("in words"))
        kept = [line for line in lines[start:] if "linear probe" in line or line.startswith(("in words", "picture", "table", "split"))]
        write("spectrum", [f"$ {command}", *lines[:start], *kept[:1], "...", *kept[1:]])
        command = "clip-lens train-sparse --out sparse --n-images 1500 --batch-size 250 --lr 0.003 --cap 30"
        write("train_sparse", [f"$ {command}", *run(command, folder)])
        command = "clip-lens name --by lift"
        write("name", [f"$ {command}", *run(command, folder)])
        wrong = [
            "clip-lens attribute pictures/cut.png",
            'clip-lens attribute crane.png --prompt ""',
            'clip-lens attribute crane.png --prompt "a photo of a crance"',
            "clip-lens attribute crane.png --hook blocks.2.hook_resid_pots",
            "clip-lens attribute crane.png --model ViT-B-32/openai",
            "clip-lens attribute crane.png --sae nowhere",
            "clip-lens attribute pictures --out all.png",
        ]
        lines = []
        for command in wrong:
            printed = [line for line in run(command, folder) if not line.startswith("No --model is given")]
            lines += [f"$ {command}", *printed]
        write("errors", lines)


if __name__ == "__main__":
    main()
