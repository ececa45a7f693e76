"""Sparse CLIP beside a dense CLIP with an SAE, and beside SpLiCE: `python -m benchmarks.sparse_methods`.

All of them read the same embeddings of the planted CLIP, and are matched in the number of active features. Sections
`sparse_methods` and `sparse_attribution`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.sparse_setup import (
    CAP,
    N_TEST,
    N_TRAIN,
    TEMPLATE,
    WIDTH,
    Codes,
    Setup,
    accuracy,
    codes_of,
    row_of,
    setup,
    train,
)
from clip_lens_ext.planted import normalise
from clip_lens_ext.sparse_clip import add_sparse_heads, additive_attribution, decompose, feature_ablation

N_STEPS, BATCH, N_EXPLAINED = 3000, 512, 60


def joint_sae(data: Setup, d_sae: int, k: int, runs: Path) -> TopKTrainingSAE:
    """A TopK SAE of SAELens on the unit-length embeddings of pictures and captions together, half of each batch each."""
    torch.manual_seed(0)
    images, texts = (F.normalize(rows, dim=-1) for rows in (data.pairs.images, data.pairs.texts))
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=images.shape[1], d_sae=d_sae, k=k))
    file = runs / f"joint_sae_{d_sae}_{k}.pt"
    if file.exists():
        sae.load_state_dict(torch.load(file, weights_only=True))
        return sae.eval()
    with torch.no_grad():
        sae.b_dec.copy_((images.mean(0) + texts.mean(0)) / 2)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, N_STEPS)
    captions = data.pairs.entries
    for _ in tqdm(range(N_STEPS), desc=f"SAE of {d_sae} latents, {k} active"):
        rows = torch.randint(len(images), (BATCH // 2,))
        x = torch.cat([images[rows], texts[captions[torch.randint(len(captions), (BATCH // 2,))]]])
        loss = (sae.decode(sae.encode(x)) - x).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            sae.W_dec.data = F.normalize(sae.W_dec.data, dim=-1)
    torch.save(sae.state_dict(), file)
    return sae.eval()


@torch.no_grad()
def of_sae(sae: TopKTrainingSAE, data: Setup) -> tuple[Codes, dict[str, float]]:
    """Codes of everything, and what its reconstructions are worth."""
    parts = [F.normalize(rows, dim=-1) for rows in (data.images, data.prompts, data.captions, data.word_vectors)]
    codes = Codes(*(sae.encode(part) for part in parts))
    images, prompts = (sae.decode(sae.encode(part)) for part in parts[:2])
    return codes, {"through": accuracy(images, prompts, data.labels)}


@torch.no_grad()
def of_splice(data: Setup, l0: float) -> tuple[Codes, dict[str, float]]:
    """Words of the planted vocabulary, without grammar, as features."""
    vocabulary = cle.Vocabulary.from_terms(data.words)
    terms = vocabulary.embed(data.dense, progress=False)
    train_images = F.normalize(data.pairs.images, dim=-1).mean(0)
    train_texts = F.normalize(data.pairs.texts, dim=-1).mean(0)
    images = decompose(data.images, terms, l0=l0, image_mean=train_images, progress=False)
    texts = [
        decompose(rows, terms, l1=images.l1, image_mean=train_texts, progress=False)
        for rows in (data.prompts, data.captions, data.word_vectors)
    ]
    codes = Codes(*(one.dense().float() for one in (images, *texts)))
    return codes, {"through": accuracy(images.to_embedding(), data.prompts, data.labels), "gap": float(images.gap.max())}


def attribution_rows(data: Setup, sparse: cle.HookedCLIP) -> list[list[str]]:
    """Methods against exact ablation of single features: on the Sparse CLIP, and on the dense one through its SAE."""
    pixels = normalise(data.batch.images[:N_EXPLAINED])
    prompts = [TEMPLATE.format(data.names[int(label)]) for label in data.labels[:N_EXPLAINED]]
    targets = list(dict.fromkeys(prompts))
    own = torch.tensor([targets.index(prompt) for prompt in prompts])
    added, exact = (method(sparse, pixels, targets).dense() for method in (additive_attribution, feature_ablation))
    rows = [_compared("Sparse CLIP, additive", added, exact, own)]
    sae = cle.planted_sae("blocks.3.hook_resid_post")
    target = cle.text_target(data.dense, targets)
    site = cle.open_site(data.dense.vision, pixels, sae)
    exact = cle.exact_ablation(data.dense.vision, site, sae, target).dense()
    for name, method in (
        ("attribution patching", cle.attribution_patching), ("integrated gradients", cle.integrated_gradients),
        ("Logit Lens", cle.logit_lens), ("activation energy", cle.activation_energy),
    ):  # fmt: skip
        rows.append(_compared(f"dense and SAE, {name}", method(data.dense.vision, site, sae, target).dense(), exact, own))
    return rows


def _compared(name: str, values: Tensor, exact: Tensor, own: Tensor) -> list[str]:
    """Rank correlation and overlap of the top ten, or of the upper half where that is less, of each picture with the prompt of its own class; means."""
    correlations, overlaps, active = [], [], []
    for i, target in enumerate(own.tolist()):
        kept = (exact[i, target] != 0).nonzero().flatten()
        a, b = values[i, target, kept], exact[i, target, kept]
        active.append(len(kept))
        n_top = min(10, len(kept) // 2)  # ten of ten would always agree
        if n_top < 2:
            continue
        correlations.append(float(spearmanr(a.numpy(), b.numpy()).statistic))
        overlaps.append(len(set(a.topk(n_top).indices.tolist()) & set(b.topk(n_top).indices.tolist())) / n_top)
    n = len(correlations)
    return [name, f"{sum(active) / len(active):.0f}", f"{sum(correlations) / n:.3f}", f"{sum(overlaps) / n:.2f}", str(n)]


def cells(name: str, row: dict[str, Any], extra: dict[str, float]) -> list[str]:
    """A row of the table."""
    return [
        name, f"{row['zero-shot']:.3f}", f"{extra['through']:.3f}" if "through" in extra else "-",
        *(f"{row[key]:.3f}" for key in ("i2t", "t2i")), f"{row['L0 image']:.0f}", f"{row['L0 text']:.0f}",
        f"{100 * row['active']:.0f}%", f"{row['clarity']:.3f}",
        *(f"{100 * row[key]:.0f}%" for key in ("bimodal", "bimodal chance", "truth", "truth chance")),
    ]  # fmt: skip


def main() -> None:
    """Train what is not trained yet, measure, and write the sections."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    sparse = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU").clip
    codes = codes_of(sparse, data)
    row = row_of(codes, data)
    d_code, k = codes.images.shape[1], round(row["L0 image"])
    found = [cells(f"Sparse CLIP, {d_code} features", row, {})]
    untrained = add_sparse_heads(data.dense, d_code)
    found.append(cells("the same, untrained", row_of(codes_of(untrained, data), data), {}))
    for n_active in sorted({k, 32}):
        of, extra = of_sae(joint_sae(data, d_code, n_active, runs), data)
        found.append(cells(f"dense and TopK SAE, {d_code} latents, {n_active} active", row_of(of, data), extra))
    of, extra = of_splice(data, 8.0)
    found.append(cells(f"dense and SpLiCE, {len(data.words)} words", row_of(of, data), extra))
    head = ["", "zero-shot of codes", "of reconstructions", "image to text", "text to image", "L0 of pictures", "of texts",
            "in use", "Clarity", "bimodal", "by chance", "name is there", "by chance"]  # fmt: skip
    dense = accuracy(data.images, data.prompts, data.labels)
    write_section("sparse_methods", "\n".join([
        f"All on the same embeddings of {N_TEST:,} held-out pictures of the planted world, where the dense model has "
        f"{dense:.3f} zero-shot; trained, where there is something to train, on {N_TRAIN:,} pairs. The SAE is trained on "
        f"embeddings of pictures and captions together. The cap of the Sparse CLIP is {CAP:g}. Clarity of all pairs: "
        f"{row['clarity baseline']:.3f}. Greatest duality gap of SpLiCE: {extra['gap']:.1e}.", "",
        table(head, found),
    ]))  # fmt: skip
    write_section("sparse_attribution", "\n".join([
        f"{N_EXPLAINED} held-out pictures, each with the prompt of its own class: attribution of every active feature against "
        "its exact ablation, the rest renormalised. On the Sparse CLIP the sum of attributions *is* the cosine; what rank "
        "correlation lacks of 1 is the length of the code, which an ablation changes.", "",
        table(["", "active features", "rank correlation with exact ablation", "overlap of the top ten, or of half", "pictures"],
              attribution_rows(data, sparse)),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
