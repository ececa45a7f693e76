"""Makes everything that ships for a planted world: `python -m clip_lens_ext.planted.train --seed 0 --out DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from clip_lens_ext.planted.measure import PlantedReport, measure_clip
from clip_lens_ext.planted.store import read_clip, write_clip, write_manifest
from clip_lens_ext.planted.train_clip import TrainConfig, train_clip
from clip_lens_ext.planted.train_saes import train_saes
from clip_lens_ext.planted.world import PlantedWorld

__all__ = ["main", "make_clip"]


def make_clip(
    world: PlantedWorld, out: Path, config: TrainConfig, *, work: Path, progress: bool = True
) -> PlantedReport:
    """Trains, rounds, measures and writes the dual encoder of a world.

    Args:
        world: The world.
        out: Folder that `clip.safetensors` goes to.
        config: How to train.
        work: Folder of the checkpoint; a training that was cut short goes on from there.
        progress: Show a progress bar.

    Returns:
        The figures of the weights as they are on disk, in half precision; the file has them in its metadata.
    """
    out.mkdir(parents=True, exist_ok=True)
    clip = train_clip(world, config, checkpoint=work / "clip.pt", progress=progress)
    path = out / "clip.safetensors"
    training = {"world_seed": world.seed, **dataclasses.asdict(config)}
    write_clip(path, clip, config.model, vocabulary=world.vocabulary, training=training)
    stored, tokenizer, _ = read_clip(path)
    report = measure_clip(stored, world, tokenizer)
    names = ("n_per_class", "unambiguous", "accuracy", "decorrelated")
    figures = {name: getattr(report, name) for name in names}
    write_clip(path, clip, config.model, vocabulary=world.vocabulary, training=training | {"figures": figures})
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the dual encoder and its SAEs, measures them, and writes the folder that ships."""
    parser = argparse.ArgumentParser(prog="python -m clip_lens_ext.planted.train", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the planted world (default 0)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the weights; an unfinished run is kept in OUT.work"
    )
    parser.add_argument(
        "--steps", type=int, default=TrainConfig.n_steps, help="steps of the dual encoder (default %(default)s)"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default=TrainConfig.precision, help="of the forward pass"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    config = TrainConfig(n_steps=asked.steps, precision=asked.precision)
    # Beside the folder and not in it: what is in it gets packaged.
    work = asked.out.with_name(asked.out.name + ".work")
    report = make_clip(PlantedWorld(asked.seed), asked.out, config, work=work, progress=not asked.quiet)
    print(json.dumps(report.to_dict(), indent=2))
    print(json.dumps(train_saes(asked.out, work=work, progress=not asked.quiet), indent=2))
    write_manifest(asked.out)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
