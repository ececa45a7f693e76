"""A Sparse CLIP from scratch, towers and heads, beside a dense CLIP from scratch: `python -m benchmarks.sparse_scratch`.

Both begin with the same fresh towers of the planted architecture and see the same pairs in the same order. The heads
of the dense one are square and without ReLU, and an SAE is trained on its embeddings at the L0 of the sparse one.
Section `sparse_scratch`; half an hour on two cores, and it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import clip_lens_ext as cle
from benchmarks import sparse_methods
from benchmarks.page import table, write_section
from benchmarks.sparse_ablations import SHARES, early, steps
from benchmarks.sparse_findings import DECIDED, over
from benchmarks.sparse_rivals import joint_sae, of_sae
from benchmarks.sparse_scores import THERE, hits, retrieval, row_of
from benchmarks.sparse_setup import CAP, N_TEST, TEMPLATE, WIDTH, Codes, Setup, setup
from clip_lens_ext.planted import WordTokenizer, normalise
from clip_lens_ext.planted.load import preprocess
from clip_lens_ext.planted.model import CONTEXT_LENGTH, ClipConfig, build_clip
from clip_lens_ext.sparse_clip import SparseTraining, add_sparse_heads, embed_pairs, train_sparse_clip

N_PAIRS, SEED = 24_000, 31
TOWERS: dict[str, Any] = {"batch_size": 64, "n_epochs": 8, "lr": 1e-3, "weight_decay": 0.05, "precision": "bfloat16"}
DENSE = "dense, from scratch"


def fresh(data: Setup) -> cle.HookedCLIP:
    """Towers as the planted CLIP's were before their training."""
    tokenizer = WordTokenizer(data.world.vocabulary, CONTEXT_LENGTH)
    native = build_clip(ClipConfig(), tokenizer, seed=SEED)
    return cle.HookedCLIP(native, preprocess=preprocess, tokenizer=tokenizer, model_name="fresh").eval()


def from_scratch(
    start: cle.HookedCLIP, batch: Any, output_dir: Path, *, largest_logit_scale: float
) -> SparseTraining:  # fmt: skip
    """Towers and heads; the state is kept in `output_dir`."""
    # The fused attention's backward is many times slower than the plain one in bfloat16 on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        return train_sparse_clip(start, normalise(batch.images), batch.captions, trained="all", output_dir=output_dir,
                                 largest_logit_scale=largest_logit_scale, **TOWERS)  # fmt: skip


@torch.no_grad()
def codes_by(clip: cle.HookedCLIP, data: Setup) -> Codes:
    """What a model embeds the held-out pictures, prompts, captions and words as."""
    pictures = normalise(data.batch.images).split(250)
    captions = list(dict.fromkeys(data.batch.captions))
    return Codes(
        torch.cat([clip.embed_images(part) for part in pictures]),
        clip.embed_texts([TEMPLATE.format(name) for name in data.names]), clip.embed_texts(captions),
        clip.embed_texts(data.words),
    )  # fmt: skip


def of_post_hoc_sae(dense: cle.HookedCLIP, codes: Codes, data: Setup, batch: Any, k: int, runs: Path) -> dict[str, Any]:
    """The row of a TopK SAE on the embeddings of the dense model."""
    pairs = embed_pairs(dense, normalise(batch.images), batch.captions)
    sae = joint_sae(pairs, WIDTH * pairs.images.shape[1], k, runs)
    embedded = dataclasses.replace(data, images=codes.images, prompts=codes.prompts, captions=codes.captions,
                                   word_vectors=codes.words)  # fmt: skip
    of, through = of_sae(sae, embedded)
    return row_of(of, data) | {"through": through}


def page(rows: dict[str, dict[str, Any]], dense: Codes, data: Setup, shares: dict[str, float]) -> str:
    """The section; `shares` has the L0 of the pictures of the batch along the training."""
    right = hits(dense.images, dense.prompts, data.labels)
    to_text, to_image = retrieval(dense.images, dense.captions, data.own)
    ours = rows[sparse_methods.OURS]
    plain = [DENSE, over(right).number, "-", f"{to_text:.3f}", f"{to_image:.3f}", *["all"] * 2,
             str(dense.images.shape[1]), "all", *["-"] * 6]  # fmt: skip
    n_steps = N_PAIRS // TOWERS["batch_size"] * TOWERS["n_epochs"]
    return "\n".join([
        f"Fresh towers of the planted architecture, trained with their heads on {N_PAIRS:,} pairs for "
        f"{TOWERS['n_epochs']} epochs of batches of {TOWERS['batch_size']} ({n_steps:,} steps), sparse and dense from "
        "the same weights on the same batches; the planted CLIP that ships had nearly twice as many steps, each on new "
        f"pictures. Heads of the sparse one: x{WIDTH} with ReLU and a cap of {CAP:g}, at which the factor begins; of "
        "the dense one: x1 without, and a cap of 100. The SAE is a TopK SAE on embeddings of the dense one, at the L0 "
        f"of the sparse one. {N_TEST:,} held-out pictures; in brackets the 95% interval of the bootstrap over them. "
        "Before training, *untrained*, are towers and heads.", "",
        table(sparse_methods.head(ours),
              [plain, *(sparse_methods.cells(name, row) for name, row in rows.items())]),
        "",
        "*Clarity* is judged by the planted CLIP that ships, which is none of the rows'; *same class*, by the truth of "
        f"the world: the share of the pairs of pictures of a feature that show the same main object. {THERE}", "",
        f"{DECIDED} Intervals of Clarity, same class and modality are over features, those of zero-shot over "
        "pictures.", "",
        *sparse_methods.findings(rows, right),
        "- The L0 of the pictures of the batch after " + ", ".join(f"{share:.0%}" for share in SHARES)
        + " of the steps: " + ", ".join(f"{shares[key]:.0f}" for key in steps()) + ".",
    ])  # fmt: skip


def main() -> None:
    """Train what is not trained yet, measure, and write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data, out = setup(runs), runs / "scratch"
    batch = data.world.sample(N_PAIRS, seed=SEED, split="train")
    towers = fresh(data)
    d_embed = towers.vision.cfg.d_embed
    start = add_sparse_heads(towers, WIDTH * d_embed, logit_scale=CAP)
    found = from_scratch(start, batch, out / "sparse", largest_logit_scale=CAP)
    dense = from_scratch(add_sparse_heads(towers, d_embed, activation="none"), batch, out / "dense",
                         largest_logit_scale=100.0).clip  # fmt: skip
    embedded = codes_by(dense, data)
    rows = {sparse_methods.OURS: row_of(codes_by(found.clip, data), data),
            sparse_methods.UNTRAINED: row_of(codes_by(start, data), data)}  # fmt: skip
    k = round(rows[sparse_methods.OURS]["L0 image"])
    rows[sparse_methods.of_saes(k)] = of_post_hoc_sae(dense, embedded, data, batch, k, runs)
    write_section("sparse_scratch", page(rows, embedded, data, early(found.history)))


if __name__ == "__main__":
    main()
