"""What a Sparse CLIP is compared with on the same embeddings: an SAE of pictures and captions, and SpLiCE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.sparse_scores import hits
from benchmarks.sparse_setup import Codes, Setup
from clip_lens_ext.sparse_clip import Decomposition, EmbeddedPairs, decompose

SAE: dict[str, Any] = {"n_steps": 3000, "batch_size": 512, "lr": 1e-3, "dead_feature_window": 100, "seed": 0}
LEAST_L1 = 1e-4  # of SpLiCE: below it hardly a word is added, and solving takes ever longer


def joint_sae(pairs: EmbeddedPairs, d_sae: int, k: int, runs: Path) -> TopKTrainingSAE:
    """A TopK SAE on the unit-length embeddings of pictures and captions together, half of each batch each.

    By SAELens' own trainer and loss, with the auxiliary loss that revives latents; kept in `runs` under a name that
    changes with the data and the settings.
    """
    images, texts = (F.normalize(rows, dim=-1) for rows in (pairs.images, pairs.texts))
    file = runs / sae_file(pairs, d_sae, k)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SAE["seed"])
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=images.shape[1], d_sae=d_sae, k=k))
        if file.exists():
            sae.load_state_dict(torch.load(file, weights_only=True))
            return sae.eval()
        with torch.no_grad():
            sae.b_dec.copy_((images.mean(0) + texts.mean(0)) / 2)
        n_steps, batch_size = SAE["n_steps"], SAE["batch_size"]
        settings = SAETrainerConfig(
            total_training_samples=n_steps * batch_size, train_batch_size_samples=batch_size, lr=SAE["lr"],
            lr_end=SAE["lr"] / 10, lr_warm_up_steps=n_steps // 20, lr_decay_steps=n_steps // 5,
            dead_feature_window=SAE["dead_feature_window"], logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        SAETrainer(settings, sae, _batches(images, texts[pairs.entries], batch_size)).fit()
    torch.save(sae.state_dict(), file)
    return sae.eval()


def sae_file(pairs: EmbeddedPairs, d_sae: int, k: int) -> str:
    """The name of the file, which another data set or other settings do not share."""
    said = json.dumps([pairs.sha256(), d_sae, k, SAE], sort_keys=True)
    return f"joint_sae_{d_sae}_{k}_{hashlib.sha256(said.encode()).hexdigest()[:12]}.pt"


def _batches(images: Tensor, texts: Tensor, batch_size: int) -> Iterator[Tensor]:
    half = batch_size // 2
    while True:
        yield torch.cat([rows[torch.randint(len(rows), (half,))] for rows in (images, texts)])


@torch.no_grad()
def of_sae(sae: TopKTrainingSAE, data: Setup) -> tuple[Codes, Tensor]:
    """Codes of everything, and whether zero-shot is right where pictures and prompts are reconstructed."""
    parts = [F.normalize(rows, dim=-1) for rows in (data.images, data.prompts, data.captions, data.word_vectors)]
    codes = Codes(*(sae.encode(part) for part in parts))
    return codes, hits(sae.decode(codes.images), sae.decode(codes.prompts), data.labels)


@torch.no_grad()
def of_splice(data: Setup, **sparsity: float) -> tuple[Codes, Tensor, Decomposition]:
    """Words of the planted vocabulary, without grammar, as features; `l0` or `l1` as in `decompose`."""
    terms = cle.Vocabulary.from_terms(data.words).embed(data.dense, progress=False)
    means = [F.normalize(rows, dim=-1).mean(0) for rows in (data.pairs.images, data.pairs.texts)]
    images = decompose(data.images, terms, image_mean=means[0], progress=False, **sparsity)
    texts = [decompose(rows, terms, l1=images.l1, image_mean=means[1], progress=False)
             for rows in (data.prompts, data.captions, data.word_vectors)]  # fmt: skip
    codes = Codes(*(one.dense().float() for one in (images, *texts)))
    return codes, hits(images.to_embedding(), data.prompts, data.labels), images
