"""Steering a Sparse CLIP beside steering a dense CLIP through an SAE: `python -m benchmarks.sparse_steering_methods`.

The same pictures, classes and number of active features. Section `sparse_steering_methods`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sae_lens import TopKTrainingSAE
from torch import Tensor

from benchmarks.page import table, write_section
from benchmarks.sparse_methods import joint_sae, of_sae
from benchmarks.sparse_setup import N_TEST, TEMPLATE, WIDTH, Setup, accuracy, codes_of, setup, train
from benchmarks.sparse_steering import N_STEERED, steering_data
from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.sparse_clip import ConceptFeatures, SteeringData, steer, steering_effect
from clip_lens_ext.sparse_clip.steering_data import plan_steering

FEATURES, TIMES, N_CONTROLS = (1, 2, 4, 8), (1.0, 2.0, 4.0), 5


@torch.no_grad()
def through_sae(sae: TopKTrainingSAE, data: Setup, like: SteeringData, kept: Tensor) -> SteeringData | None:
    """The same pictures and classes in the latents of an SAE; None where a prompt activates too few of them."""
    k, names = like.concepts.features.shape[1], like.classes
    codes, _ = of_sae(sae, data)
    prompts = codes.prompts[torch.tensor([data.names.index(name) for name in names])]
    if bool(((prompts > 0).sum(dim=1) < k).any()):
        return None
    best = prompts.sort(dim=1, descending=True, stable=True)
    features = best.indices[:, :k].contiguous()
    concepts = ConceptFeatures(
        names, features, best.values[:, :k].contiguous(), (prompts > 0).double().mean(dim=0)[features],
        torch.zeros(0, dtype=torch.int64), len(names), None, TEMPLATE, prompts.shape[1], {},
    )  # fmt: skip
    return SteeringData(codes.images[kept], like.labels, concepts, prompts)


@torch.no_grad()
def reconstructed(sae: TopKTrainingSAE, data: Setup, given: SteeringData, strength: float) -> list[str]:
    """Success of the concepts and of the controls where steered latents are decoded, and compared with dense prompts."""
    plan = plan_steering(given, n_controls=N_CONTROLS, seed=1)
    prompts = F.normalize(data.prompts[torch.tensor([data.names.index(name) for name in given.classes])], dim=-1)
    hits = []
    for off, on in zip(plan.suppress, plan.boost, strict=True):
        embedding = sae.decode(steer(given.codes, off, on, strength))
        hits.append(((F.normalize(embedding, dim=-1) @ prompts.T).argmax(dim=1) == plan.new_labels).double())
    return [span(hits[0]), span(torch.stack(hits[1:]).mean(dim=0))]


def span(hits: Tensor) -> str:
    """A share with its interval over pictures."""
    low, high = bootstrap_intervals(hits[None], n_bootstrap=1000, confidence=0.95, seed=1)[0].tolist()
    return f"{100 * float(hits.mean()):.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def main() -> None:
    """Train what is not trained yet, steer, and write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    runs = parser.parse_args().runs
    data = setup(runs)
    sparse = train(data, output_dir=runs / "ablations" / f"x{WIDTH}_ReLU").clip
    codes = codes_of(sparse, data)
    l0 = round(float((codes.images > 0).double().sum(dim=1).mean()))
    saes = {n: joint_sae(data, codes.images.shape[1], n, runs) for n in sorted({l0, 32})}
    rows, too_few = [], []
    for k in FEATURES:
        like, kept = steering_data(sparse, data, k)
        ways: list[tuple[str, SteeringData, TopKTrainingSAE | None]] = [("Sparse CLIP", like, None)]
        for n_active, sae in saes.items():
            given = through_sae(sae, data, like, kept)
            if given is None:
                too_few.append(f"{k} of {n_active}")
                continue
            ways += [(f"SAE, {n_active} active, latents", given, None),
                     (f"SAE, {n_active} active, reconstruction", given, sae)]  # fmt: skip
        for times in TIMES:
            for name, given, sae in ways:
                strength = times * given.typical_activation
                if sae is None:
                    frame = steering_effect(given, strengths=strength, n_controls=N_CONTROLS, seed=1, progress=False).to_frame()
                    cells = [f"{100 * row.success:.0f}% ({100 * row.success_low:.0f} to {100 * row.success_high:.0f})"
                             for row in frame.itertuples() if row.arm != "as is"]  # fmt: skip
                else:
                    cells = reconstructed(sae, data, given, strength)
                rows.append([name, str(k), f"{times:g}", *cells])
                print(*rows[-1], flush=True)
    worth = ", ".join(
        f"{accuracy(of_sae(sae, data)[0].images, of_sae(sae, data)[0].prompts, data.labels):.3f} in latents and "
        f"{of_sae(sae, data)[1]['through']:.3f} in reconstructions of the SAE with {n} active" for n, sae in saes.items()
    )  # fmt: skip
    left_out = f" Left out, for a prompt activates fewer: {', '.join(too_few)}." if too_few else ""
    write_section("sparse_steering_methods", "\n".join([
        f"Up to {N_STEERED} of {N_TEST:,} held-out pictures. The features of a class are those that its prompt activates most, in the "
        f"Sparse CLIP ({l0} active in a picture) by the text head, in an SAE by its encoder on the prompt's embedding. Those of the "
        "picture's class are set to 0, those of another class to the strength, in units of the median activation that such features "
        f"have where active. Zero-shot without steering: {accuracy(codes.images, codes.prompts, data.labels):.3f} in the Sparse CLIP, "
        f"{worth}.{left_out}", "",
        table(["", "features", "strength", "says the new class", "random features of like activation"], rows),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
