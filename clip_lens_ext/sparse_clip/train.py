"""`train_sparse_clip`: heads on cached embeddings, or towers and heads, by CLIP's own loss."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import module_sha256, versions
from clip_lens_ext.sparse_clip.checks import checked_count
from clip_lens_ext.sparse_clip.head import dense_clip, headed
from clip_lens_ext.sparse_clip.paired_captions import PairedCaptions
from clip_lens_ext.sparse_clip.pairs import EmbeddedPairs, embed_pairs
from clip_lens_ext.sparse_clip.processes import Processes
from clip_lens_ext.sparse_clip.shared_pairs import pairs_of_the_first
from clip_lens_ext.sparse_clip.store import save_sparse_clip
from clip_lens_ext.sparse_clip.trainer import COLUMNS, Trainer, check_dtypes, trained_part
from clip_lens_ext.sparse_clip.training_data import HeadData, TowerData, TrainingData
from clip_lens_ext.sparse_clip.training_folder import TrainingFolder
from clip_lens_ext.sparse_clip.training_result import SparseCheckpoint, SparseTraining
from clip_lens_ext.sparse_clip.training_settings import Precision, Trained, TrainingSettings
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.families.headed import HeadedCLIP
from clip_lens_ext.towers.from_sparse import put_together
from clip_lens_ext.towers.identity import tower_sha256
from clip_lens_ext.towers.sparse_head import SparseHead


def train_sparse_clip(
    clip: HookedCLIP,
    images: Any,
    captions: Sequence[str | Sequence[str]] | None = None,
    *,
    trained: Trained = "heads",
    n_epochs: float = 30,
    batch_size: int = 1024,
    lr: float = 5e-4,
    weight_decay: float = 0.2,
    warmup: float = 0.05,
    largest_logit_scale: float = 50.0,
    l1: float = 0.0,
    clip_gradient: float | None = 1.0,
    precision: Precision = "float32",
    n_accumulated: int = 1,
    output_dir: str | os.PathLike[str] | None = None,
    checkpoints: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    checkpoint_every: int = 200,
    stop_after: int | None = None,
    preprocess: Preprocess | None = None,
    n_workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> SparseTraining:
    """Train a Sparse CLIP with CLIP's contrastive loss: of the cosines of the codes, times a factor that is capped.

    Nothing in the loss asks for sparsity but the ReLU; the cap on the factor is the knob: in the paper a lower one
    leaves fewer features active. It acts once the factor has reached it, so in a short training begin there, with
    `add_sparse_heads(logit_scale=)`. `l1`, and `activation="topk"` of `add_sparse_heads`, are ablations that the paper
    argues against.

    Started by `torchrun`, after `torch.distributed.init_process_group`, each process takes its share of every batch;
    the gradient is that of the whole batch, and process 0 writes. For heads alone process 0 embeds the pairs while the
    others wait; if that takes longer than the process group's timeout (half an hour with gloo, ten minutes with NCCL),
    call `embed_pairs` before and pass what it gives, or a longer `timeout` to `init_process_group`.

    Args:
        clip: from `add_sparse_heads`; it is not changed. To train from nothing, begin with the `HookedCLIP` of a model
            with fresh weights.
        images: pictures, as `image_batches` takes them; or `EmbeddedPairs` of the dense model.
        captions: for each picture a text, or several of which each epoch draws one; None with `EmbeddedPairs`.
        trained: `"heads"`: the towers stay as they are, and pictures are embedded once. `"all"`: towers and heads.
        n_epochs: times that all pairs are seen; the rest of an epoch that does not fill a batch is left out.
        batch_size: pairs in a step, over all processes; each is told apart from all others.
        lr: greatest learning rate, of AdamW; half a cosine to 0 after the warm-up.
        weight_decay: of matrices.
        warmup: share of the steps over which the rate rises.
        largest_logit_scale: cap on the factor itself, in [1, 100].
        l1: weight of the mean absolute sum of a code, un-normalised.
        clip_gradient: greatest norm of the gradient; None: as it comes.
        precision: of the forward pass; `"bfloat16"` or `"float16"` (with a scaled loss) for a GPU. Weights, loss and
            optimiser are in the dtype of the model, float32 or wider.
        n_accumulated: parts in which a process goes through its share, for memory; the gradient stays that of the whole
            batch, at the price of a second forward pass.
        output_dir: where state, checkpoints and model go, and with heads alone the embeddings of the pairs; the same
            call goes on from there. None: nothing is kept.
        checkpoints: shares of the training after which the weights are kept; the early ones show how concepts emerge.
        checkpoint_every: steps between two writes of the state. An interrupt or an error writes too, unless it came
            while the weights changed.
        stop_after: end early, after so many steps of the whole; the schedule stays that of the whole.
        preprocess: PIL picture to tensor; None: that of `clip`.
        n_workers: processes that read pictures ahead, with `trained="all"`.
        seed: of the order, the captions drawn and what is random in a tower.
        progress: draw a bar with loss, L0 of pictures and texts, and factor.

    Returns:
        `SparseTraining`.

    Warns:
        Where every code of a batch has become zero, of pictures or of texts: nothing is learnt from there on.

    Raises:
        InputError: a setting out of range, a model without heads, with weights below float32 that are to be trained,
            with a factor above the cap or, with NCCL, on another device than the current one, captions that do not fit,
            embeddings of another model, fewer pairs than in a batch, a batch that does not divide, a loss that is NaN,
            or an `output_dir` with another training; it says which.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.sparse_clip import add_sparse_heads
        >>> batch = cle.PlantedWorld(0).sample(64, seed=0)
        >>> sparse = add_sparse_heads(cle.planted_clip(), 256)
        >>> found = train_sparse_clip(sparse, cle.planted.normalise(batch.images), batch.captions, n_epochs=4,
        ...                           batch_size=32, lr=3e-3, progress=False)
        >>> len(found.history), bool(found.history.loss.iloc[-1] < found.history.loss.iloc[0])
        (8, True)

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075. Training heads alone is not from the paper.
    """
    if isinstance(checkpoints, str) or not isinstance(checkpoints, Iterable):
        raise InputError(f"checkpoints are shares of the training, got {checkpoints!r}")
    settings = TrainingSettings(
        trained, n_epochs, batch_size, lr, weight_decay, warmup, largest_logit_scale, l1, clip_gradient, precision,
        n_accumulated, tuple(checkpoints), checkpoint_every, n_workers, seed,
    )  # fmt: skip
    native, processes = headed(clip), Processes.now(clip.vision.cfg.device)
    check_dtypes(native, settings)
    factor = float(native.logit_scale.detach().exp())
    if factor > largest_logit_scale * (1 + 1e-6):
        cap = f"{largest_logit_scale:g}"
        raise InputError(f"the model begins with a factor of {factor:.4g} on the cosines, above largest_logit_scale = "
                         f"{cap}: make it with add_sparse_heads(..., logit_scale={cap}) or less")  # fmt: skip
    if stop_after is not None:
        checked_count(stop_after, "stop_after")
    shown = progress and processes.rank == 0
    processes.share(torch.arange(batch_size), n_accumulated)  # this and the next raise before anything is written
    if captions is not None:
        settings.n_steps(len(captions))
    begins = _begins(native, settings)
    folder, identity = None, {**settings.compared, **begins}
    if output_dir is not None:
        folder = TrainingFolder(output_dir, identity, whole=False)
    kept_at = None if folder is None else folder.embedded
    pairs = _pairs(clip, images, captions, settings, preprocess, kept_at, processes, shown)
    clip = _copy(clip, native, settings)
    native = headed(clip)
    data: TrainingData
    if isinstance(pairs, EmbeddedPairs):
        data = HeadData(pairs, native, clip.vision.cfg.device)
    else:
        batches = image_batches(images, preprocess=preprocess or clip.preprocess, batch_size=32)
        data = TowerData(clip, native, batches, pairs, n_workers, processes, shown)
    trainer = Trainer(native, data, settings, processes, clip.vision.cfg.device)
    if output_dir is not None:
        folder = TrainingFolder(output_dir, {**identity, "data_sha256": data.fingerprint})
    processes.wait()  # all have looked before one writes
    _go(clip, trainer, folder, settings, processes, stop_after, shown)
    history = pd.DataFrame(trainer.history, columns=list(COLUMNS)).astype({"step": int})
    kept = () if folder is None else tuple(
        SparseCheckpoint(step, step / trainer.n_steps, path) for step, path in folder.kept()
    )  # fmt: skip
    provenance = {"model": dense_clip(clip).model_name, **begins, "data_sha256": data.fingerprint,
                  "n_processes": processes.n, "versions": versions()}  # fmt: skip
    return SparseTraining(clip.eval(), history, kept, trainer.n_steps, tuple(data.skipped), asdict(settings),
                          provenance)  # fmt: skip


def _pairs(
    clip: HookedCLIP, images: Any, captions: Sequence[str | Sequence[str]] | None, settings: TrainingSettings,
    preprocess: Preprocess | None, kept_at: Path | None, processes: Processes, progress: bool,
) -> EmbeddedPairs | PairedCaptions:  # fmt: skip
    if isinstance(images, EmbeddedPairs):
        if captions is not None or settings.trained == "all":
            raise InputError("EmbeddedPairs have their captions, and train heads alone: pass captions=None and "
                             "trained='heads', or the pictures themselves")  # fmt: skip
        _check(clip, images)
        return images
    if captions is None:
        raise InputError("pictures need captions: a text, or several, for each")
    if settings.trained == "all":
        return PairedCaptions.of(captions)
    given = captions

    def embedded() -> EmbeddedPairs:
        if kept_at is not None:
            kept_at.parent.mkdir(parents=True, exist_ok=True)
        return embed_pairs(dense_clip(clip), images, given, preprocess=preprocess, checkpoint=kept_at,
                           progress=progress)  # fmt: skip

    return pairs_of_the_first(embedded, processes, clip.vision.cfg.device)


def _check(clip: HookedCLIP, pairs: EmbeddedPairs) -> None:
    dense = dense_clip(clip)
    assert dense.text is not None
    for name, tower, rows, sha256 in (("pictures", dense.vision, pairs.images, pairs.vision_sha256),
                                      ("captions", dense.text, pairs.texts, pairs.text_sha256)):  # fmt: skip
        if rows.shape[1] != tower.cfg.d_embed:
            raise InputError(f"embeddings of {name} have {rows.shape[1]} numbers, and those of {dense.model_name} "
                             f"{tower.cfg.d_embed}")  # fmt: skip
        if sha256 and sha256 != tower_sha256(tower):
            raise InputError(f"the embeddings of {name} are of another model than {dense.model_name}: embed them again")


def _copy(clip: HookedCLIP, native: HeadedCLIP, settings: TrainingSettings) -> HookedCLIP:
    """The model that is trained: its own heads, and its own towers where those are trained."""
    dense = dense_clip(clip)
    if settings.trained == "all":
        dense = HookedCLIP(copy.deepcopy(native.dense), preprocess=clip.preprocess, tokenizer=clip.tokenizer,
                           model_name=dense.model_name)  # fmt: skip
    heads = [copy.deepcopy(head) for head in (native.image_head, native.text_head)]
    assert isinstance(heads[0], SparseHead)
    assert isinstance(heads[1], SparseHead)
    return put_together(dense, heads[0], heads[1], float(native.logit_scale.detach()))


def _begins(native: HeadedCLIP, settings: TrainingSettings) -> dict[str, Any]:
    head, begins = native.image_head, module_sha256(trained_part(native, settings))
    return {"begins_sha256": begins, "d_code": head.out_features, "activation": head.activation, "k": head.k}


def _go(
    clip: HookedCLIP, trainer: Trainer, folder: TrainingFolder | None, settings: TrainingSettings, processes: Processes,
    stop_after: int | None, progress: bool,
) -> None:  # fmt: skip
    """All steps that are left, and what is written on the way."""
    last = trainer.n_steps if stop_after is None else min(stop_after, trainer.n_steps)
    if folder is not None and (state := folder.state()) is not None:
        trainer.load(state)
    if len(at := set(processes.gathered(trainer.done))) > 1:
        raise InputError(f"the processes read other states of this training, after {sorted(at)} steps: output_dir has "
                         "to be one folder that all of them see")  # fmt: skip
    if folder is None or processes.rank:
        trainer.run(max(last, trainer.done), lambda: None, progress=progress)
        processes.wait()
        return
    folder.begin()
    kept, towers = settings.kept(trainer.n_steps), settings.trained == "all"
    written = trainer.done

    def write() -> None:
        nonlocal written
        if trainer.whole and trainer.done > written:
            folder.write_state(trainer.state())
            written = trainer.done

    def keep() -> None:
        if trainer.done in kept and not folder.has_checkpoint(trainer.done):
            save_sparse_clip(clip, folder.checkpoint(trainer.done), towers=towers, training=said(trainer))

    def after_step() -> None:
        keep()
        if trainer.done % settings.checkpoint_every == 0:
            write()

    keep()  # an interrupt while it was written leaves the state of its step, and the steps to come begin after it
    try:
        trainer.run(max(last, trainer.done), after_step, progress=progress)
    finally:
        write()
    if trainer.done == trainer.n_steps and not folder.finished:
        save_sparse_clip(clip, folder.path, towers=towers, training=said(trainer))
    processes.wait()


def said(trainer: Trainer) -> dict[str, Any]:
    """What a folder says of its training: the last row of the history."""
    return dict(zip(COLUMNS, trainer.history[-1], strict=True)) | {"n_steps": trainer.n_steps}
