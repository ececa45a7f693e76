"""Sparse CLIP beside a dense CLIP with an SAE, and beside SpLiCE: `python -m benchmarks.sparse_methods`.

All of them read the same embeddings of the planted CLIP. An SAE is trained at the L0 of the Sparse CLIP, and one at 32;
SpLiCE has fewer words than that, and stands at an L0 of 8 and at the greatest that its words come to. Sections
`sparse_methods` and `sparse_attribution`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.sparse_findings import DECIDED, Interval, between, both, over
from benchmarks.sparse_rivals import LEAST_L1, SAE, joint_sae, of_sae, of_splice
from benchmarks.sparse_scores import JUDGES, THERE, hits, row_of
from benchmarks.sparse_setup import CAP, N_TEST, N_TRAIN, TEMPLATE, WIDTH, Setup, codes_of, setup, train
from clip_lens_ext.planted import normalise
from clip_lens_ext.sparse_clip import add_sparse_heads, additive_attribution, feature_ablation

N_EXPLAINED, L0 = 60, 32
OURS, UNTRAINED = "Sparse CLIP", "the same, untrained"


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
        found = method(data.dense.vision, site, sae, target).dense()
        rows.append(_compared(f"dense and SAE, {name}", found, exact, own))
    return rows


def _compared(name: str, values: Tensor, exact: Tensor, own: Tensor) -> list[str]:
    """Means over pictures, each with the prompt of its own class: active features, rank correlation, and overlap of the
    top ten, or of the upper half where that is less, beside the overlap of as many drawn at random.
    """
    correlations, overlaps, chances, active = [], [], [], []
    for i, target in enumerate(own.tolist()):
        kept = (exact[i, target] != 0).nonzero().flatten()
        a, b = values[i, target, kept], exact[i, target, kept]
        active.append(len(kept))
        n_top = min(10, len(kept) // 2)  # ten of ten would always agree
        if n_top < 2:
            continue
        correlations.append(float(spearmanr(a.numpy(), b.numpy()).statistic))
        overlaps.append(len(set(a.topk(n_top).indices.tolist()) & set(b.topk(n_top).indices.tolist())) / n_top)
        chances.append(n_top / len(kept))
    n = len(correlations)
    return [name, f"{sum(active) / len(active):.0f}", f"{sum(correlations) / n:.3f}", f"{sum(overlaps) / n:.2f}",
            f"{sum(chances) / n:.2f}", str(n)]  # fmt: skip


def of_saes(n_active: int) -> str:
    """The name of an SAE's row."""
    return f"dense and TopK SAE, {n_active} active"


def head(row: dict[str, Any]) -> list[str]:
    """Of the table; what chance gives to every row alike is in it."""
    return ["", "zero-shot of codes", "of reconstructions", "image to text", "text to image", "L0 of pictures",
            "of texts", "features", "in use", f"Clarity ({row['clarity baseline']:.3f} by chance)",
            f"same class ({100 * row['same class chance']:.0f}% by chance)",
            "bimodal", "by chance", "name is there", "by chance"]  # fmt: skip


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        name, over(row["hits"]).number, over(row["through"]).number if "through" in row else "-",
        *(f"{row[key]:.3f}" for key in ("i2t", "t2i")), f"{row['L0 image']:.0f}", f"{row['L0 text']:.0f}",
        str(len(row["clarities"])), f"{100 * row['active']:.0f}%", f"{row['clarity']:.3f}",
        *(f"{100 * row[key]:.0f}%" for key in ("same class", "bimodal", "bimodal chance", "truth", "truth chance")),
    ]  # fmt: skip


def findings(rows: dict[str, dict[str, Any]], dense: Tensor) -> list[str]:
    """What of the paper's findings holds in these rows; each sentence is decided by them.

    Args:
        rows: of the table, by name; the SAE of the same L0 is that of the Sparse CLIP's L0, rounded.
        dense: whether zero-shot of the dense model is right on each picture.
    """
    ours, untrained = rows[OURS], rows[UNTRAINED]
    same = of_saes(round(ours["L0 image"]))
    sae = rows[same]
    lost = over(ours["hits"].double() - dense.double())
    clarity, truth = (between(ours[key], sae[key]) for key in ("clarities", "same classes"))
    share, beside = over(ours["bimodals"]), between(ours["bimodals"], untrained["bimodals"])
    dominated = both(share.above(0.5), share.above(ours["bimodal chance"]), beside.above())
    theirs = over(sae["bimodals"])
    return [
        "- *A Sparse CLIP is about as accurate as the dense model* (zero-shot at most a point below): "
        f"{lost.above(-0.01)}. It moves {lost.points}.",
        f"- *Its features are clearer than those of a post-hoc SAE*, at the same L0 ({ours['L0 image']:.0f}), by "
        f"Clarity: {clarity.above()}. {ours['clarity']:.3f} and {sae['clarity']:.3f}, a difference of "
        f"{signed(clarity)}.",
        f"- The same by the truth of the world: {truth.above()}. {100 * ours['same class']:.0f}% and "
        f"{100 * sae['same class']:.0f}% of pairs show the same object, a difference of {truth.points}.",
        "- *It is dominated by bimodal features* (more than half, more than by chance, and more than in untrained "
        f"heads): {dominated}. {share.percent} are bimodal, {100 * ours['bimodal chance']:.0f}% by chance, and in "
        f"untrained heads {100 * untrained['bimodal']:.0f}%, a difference of {beside.points}.",
        f"- *Features of a post-hoc SAE are mostly of one modality*: {theirs.below(0.5)}. {theirs.percent} are bimodal "
        f"in the SAE of the same L0, {100 * sae['bimodal chance']:.0f}% by chance.",
    ]  # fmt: skip


def signed(difference: Interval) -> str:
    """In words."""
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def main() -> None:
    """Train what is not trained yet, measure, and write the sections."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    sparse = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU").clip
    codes = codes_of(sparse, data)
    rows: dict[str, dict[str, Any]] = {OURS: row_of(codes, data)}
    d_code, k = codes.images.shape[1], round(rows[OURS]["L0 image"])
    rows[UNTRAINED] = row_of(codes_of(add_sparse_heads(data.dense, d_code), data), data)
    for n_active in sorted({k, L0}):
        of, through = of_sae(joint_sae(data.pairs, d_code, n_active, runs), data)
        rows[of_saes(n_active)] = row_of(of, data) | {"through": through}
    gaps = []
    for name, sparsity in (("L0 of 8", {"l0": 8.0}), ("hardly a penalty", {"l1": LEAST_L1})):
        of, through, found = of_splice(data, **sparsity)
        rows[f"dense and SpLiCE, {name}"] = row_of(of, data) | {"through": through}
        gaps.append(float(found.gap.max()))
    dense = hits(data.images, data.prompts, data.labels)
    write_section("sparse_methods", page(rows, dense, len(data.words), max(gaps)))
    write_section("sparse_attribution", "\n".join([
        f"{N_EXPLAINED} held-out pictures, each with the prompt of its own class: attribution of every active feature "
        "against its exact ablation, the rest renormalised. On the Sparse CLIP the sum of attributions *is* the "
        "cosine; what rank correlation lacks of 1 is the length of the code, which an ablation changes. Of few active "
        "features more are the same by chance: compare each overlap with its own.", "",
        table(["", "active features", "rank correlation with exact ablation", "overlap of the top ten, or of half",
               "overlap by chance", "pictures"], attribution_rows(data, sparse)),
    ]))  # fmt: skip


def page(rows: dict[str, dict[str, Any]], dense: Tensor, n_words: int, gap: float) -> str:
    """The section of the methods."""
    ours, most = rows[OURS], max(row["L0 image"] for name, row in rows.items() if "SpLiCE" in name)
    reach = "comes near that" if most > 0.9 * ours["L0 image"] else "cannot come to that"
    return "\n".join([
        f"All on the same embeddings of {N_TEST:,} held-out pictures of the planted world, where the dense model has "
        f"{over(dense).number} zero-shot; trained, where there is something to train, on {N_TRAIN:,} pairs. In "
        f"brackets the 95% interval of the bootstrap over pictures. The cap of the Sparse CLIP is {CAP:g}. The SAEs "
        f"are trained on embeddings of pictures and captions together, {SAE['n_steps']:,} steps by SAELens' trainer "
        f"with its auxiliary loss for dead latents, one of them at the L0 of the Sparse CLIP. SpLiCE has {n_words} "
        f"words and {reach}: with hardly a penalty (l1 {LEAST_L1:g}) it has an L0 of {most:.0f}. Its greatest duality "
        f"gap: {gap:.1e}.", "",
        table(head(ours), [cells(name, row) for name, row in rows.items()]),
        "", JUDGES, "",
        f"{THERE} Were drawn words to count as well, {100 * ours['truth or drawn']:.0f}% instead of "
        f"{100 * ours['truth']:.0f}% in the Sparse CLIP ({100 * ours['truth or drawn chance']:.0f}% by chance).", "",
        f"{DECIDED} Intervals of Clarity, same class and modality are over features, those of zero-shot over "
        "pictures.", "",
        *findings(rows, dense),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
