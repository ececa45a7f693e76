"""`clip-lens train-sparse`: parse, call public functions, print."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lens_ext.errors import InputError

if TYPE_CHECKING:
    from clip_lens_ext.sparse_clip.training_result import SparseTraining
    from clip_lens_ext.towers.clip import HookedCLIP


def add_train_sparse(commands: Any) -> None:
    """Give the parser the command `train-sparse`."""
    parser = commands.add_parser(
        "train-sparse", help="train a Sparse CLIP on pictures and captions",
        description="Put a ReLU behind a widened projection in both towers, train with CLIP's loss, and measure on "
        "pairs that are held out, beside the dense model. The same command again goes on where it was interrupted.",
    )  # fmt: skip
    parser.set_defaults(command=_train)
    add = parser.add_argument
    add("pairs", nargs="?", metavar="FILE",
        help="CSV with the columns `image`, a path from the file's folder, and `caption`; a picture with several "
        "captions has several rows. Needed with --model")  # fmt: skip
    add("--out", metavar="DIR", required=True, help="where state, checkpoints and model go")
    add("--model", metavar="NAME/TAG", help="as in `attribute`; without it the embedded planted model")
    add("--d-code", type=int, metavar="N", help="features of the code (default: 16 times the width of the embedding)")
    add("--train", default="heads", choices=("heads", "all"), metavar="WHAT",
        help="heads, on embeddings that are made once, or all: towers too (default: heads)")  # fmt: skip
    add("--cap", type=float, default=50.0, metavar="FACTOR",
        help="greatest factor on the cosines; in the paper a lower one leaves fewer features active, once the factor "
        "has reached it (default: 50)")  # fmt: skip
    add("--activation", default="relu", choices=("relu", "none", "topk"), metavar="NAME",
        help="relu, or the ablations none and topk (default: relu)")  # fmt: skip
    add("--k", type=int, metavar="K", help="features that topk keeps")
    add("--l1", type=float, default=0.0, metavar="WEIGHT", help="of a penalty on the codes, an ablation (default: 0)")
    add("--epochs", type=float, default=30, metavar="N", help="times that all pairs are seen (default: 30)")
    add("--batch-size", type=int, default=1024, metavar="N", help="pairs in a step (default: 1024)")
    add("--parts", type=int, default=1, metavar="N", help="parts of a batch, for memory (default: 1)")
    add("--lr", type=float, default=5e-4, metavar="RATE", help="greatest learning rate (default: 0.0005)")
    add("--precision", default="float32", choices=("float32", "bfloat16", "float16"), metavar="NAME",
        help="of the forward pass: float32, bfloat16 or float16 (default: float32)")  # fmt: skip
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of the pairs, to measure on (default: 0.1)")
    add("--workers", type=int, default=0, metavar="N",
        help="processes that read pictures, with --train all (default: 0)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of weights, order and what is held out (default: 0)")
    add("--n-images", type=int, default=4000, metavar="N", help="pairs of the planted world (default: 4000)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: cpu)")
    add("--no-progress", action="store_true", help="no progress bar")


def read_pairs(path: Path) -> tuple[list[Path], list[list[str]]]:
    """Pictures and the captions of each, from a CSV file, in the order in which they first come.

    Raises:
        InputError: no such file, a column is missing, a row lacks a value or names a picture that is not there, or
            there is no row; it says which.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [name for name in ("image", "caption") if name not in (rows.fieldnames or ())]
            if missing:
                there = list(rows.fieldnames or ())
                raise InputError(f"{path} has no column {' and no '.join(missing)}; it has {there}")
            found: dict[Path, list[str]] = {}
            for row in rows:
                if not row["image"] or not row["caption"]:
                    raise InputError(f"line {rows.line_num} of {path} lacks its image or its caption")
                if not (path.parent / row["image"]).is_file():
                    raise InputError(f"line {rows.line_num} of {path}: there is no file {path.parent / row['image']}")
                found.setdefault(path.parent / row["image"], []).append(row["caption"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    if not found:
        raise InputError(f"{path} has no rows")
    return list(found), list(found.values())


def _train(arguments: argparse.Namespace) -> None:
    import torch

    import clip_lens_ext as cle
    from clip_lens_ext.sparse_clip import add_sparse_heads
    from clip_lens_ext.sparse_clip.head import FIRST_SCALE

    if bool(arguments.model) != bool(arguments.pairs):
        raise InputError("--model and FILE go together: the model, and the pairs that it is trained on")
    if not 0 < arguments.held_out < 1:
        raise InputError(f"--held-out is a share of the pairs, in (0, 1); got {arguments.held_out}")
    device = arguments.device
    clip = cle.load_clip(arguments.model, device=device) if arguments.model else cle.planted_clip(device)
    images: Any
    captions: list[Any]
    if arguments.pairs:
        images, captions = read_pairs(Path(arguments.pairs))
    else:
        if arguments.n_images < 8:
            raise InputError(f"--n-images takes 8 or more, not {arguments.n_images}")
        batch = cle.PlantedWorld(0).sample(arguments.n_images, seed=11, split="train")
        images, captions = cle.planted.normalise(batch.images), batch.captions
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    n_held = max(4, round(arguments.held_out * len(captions)))
    held, rest = sorted(order[:n_held]), sorted(order[n_held:])
    if len(rest) < 2:
        raise InputError(f"{len(captions)} pairs, of which {n_held} are held out: too few to train on")
    # Before the training: held-out captions that the tokenizer refuses would be found after it.
    clip.tokenize([text for given in captions for text in ([given] if isinstance(given, str) else given)])
    d_code = 16 * clip.vision.cfg.d_embed if arguments.d_code is None else arguments.d_code
    sparse = add_sparse_heads(clip, d_code, activation=arguments.activation, k=arguments.k, seed=arguments.seed,
                         logit_scale=min(FIRST_SCALE, arguments.cap))  # fmt: skip
    progress = not arguments.no_progress and sys.stderr.isatty()
    found = cle.train_sparse_clip(
        sparse, _some(images, rest), [captions[i] for i in rest], trained=arguments.train, n_epochs=arguments.epochs,
        batch_size=arguments.batch_size, lr=arguments.lr, largest_logit_scale=arguments.cap, l1=arguments.l1,
        precision=arguments.precision, n_accumulated=arguments.parts, output_dir=arguments.out,
        n_workers=arguments.workers, seed=arguments.seed, progress=progress,
    )  # fmt: skip
    _say(found, clip, len(rest), Path(arguments.out))
    largest = max(min(FIRST_SCALE, arguments.cap), float(found.history.logit_scale.max()))
    if largest < arguments.cap * (1 - 1e-4):  # the factor is read from a logarithm in float32
        print(f"the cap of {arguments.cap:g} was not reached, and had no part in this")
    if arguments.activation == "none":
        print("no ReLU, so the codes are dense: this is the ablation")
    test = torch.zeros(n_held, dtype=torch.bool)
    test[1:] = True  # retrieval needs no training half, and a split has one
    data = cle.EvaluationData(_some(images, held), captions=[captions[i] for i in held], is_test=test,
                              preprocess=clip.preprocess)  # fmt: skip
    beside = cle.beside_dense(found.clip, data, dense=clip, seed=arguments.seed, progress=progress)
    skipped = f", {len(beside.skipped)} pictures skipped" * bool(beside.skipped)
    print(f"on {int(beside.n_samples[beside.measures.index('image to text R@1')])} pairs that were held out{skipped}:")
    for skip in beside.skipped[:5]:
        print(f"  skipped {skip.name}: {skip.reason}")
    print(beside)


def _some(images: Any, indexes: list[int]) -> Any:
    return [images[i] for i in indexes] if isinstance(images, list) else images[indexes]


def _say(found: SparseTraining, clip: HookedCLIP, n_pairs: int, out: Path) -> None:
    first, last = found.history.iloc[0], found.history.iloc[-1]
    d_code = found.clip.vision.cfg.d_embed
    skipped = f", {len(found.skipped)} pictures skipped" * bool(found.skipped)
    print(f"Sparse CLIP on {clip.model_name}: {d_code} features, {found.n_steps} steps on {n_pairs} pairs{skipped}")
    for name, row in (("first step", first), ("last step", last)):
        active = f"{row.l0_image:.1f} in a picture, {row.l0_text:.1f} in a text"
        print(f"  {name:<10}  loss {row.loss:.3f}  active features {active}  factor {row.logit_scale:.1f}")
    for skip in found.skipped[:5]:
        print(f"  skipped {skip.name}: {skip.reason}")
    print(f"model: {out} (open it with load_sparse_clip), history: {out / 'history.csv'}")
    found.history.to_csv(out / "history.csv", index=False)
    print(f"checkpoints: {', '.join(f'{one.share:.0%}' for one in found.checkpoints)} of the training, in "
          f"{out / 'checkpoints'}")  # fmt: skip
