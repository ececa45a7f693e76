"""Does the model do as well without its noise? Zero-shot, retrieval, kNN and a linear probe, beside every control."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.data import image_batches
from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.provenance import versions
from clip_lens_ext.spectrum.collect import collect_covariance
from clip_lens_ext.spectrum.controls import projector_basis, random_bases, variance_basis
from clip_lens_ext.spectrum.covariance import StreamingCovariance
from clip_lens_ext.spectrum.covariance_result import Covariance
from clip_lens_ext.spectrum.embedded import Embedded, embed, is_of_embedding
from clip_lens_ext.spectrum.evaluation_data import EvaluationData
from clip_lens_ext.spectrum.evaluation_result import LOWEST, NOISE, NONE, PROJECTOR, RANDOM, TOP, PruningEvaluation
from clip_lens_ext.spectrum.measures import hits, unseen_classes
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pruning import check_split
from clip_lens_ext.spectrum.sources import Rows
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.positions import TokenScope

_Hits = dict[str, Tensor]


def evaluate_pruning(
    clip: HookedCLIP | None,
    split: NoiseSplit | Sequence[NoiseSplit],
    data: EvaluationData,
    *,
    covariance: Rows | None = None,
    n_random: int = 5,
    n_neighbors: int = 5,
    probe_c: float = 10.0,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> PruningEvaluation:
    """Scores with the noise pruned, beside nothing pruned and beside controls of as many dimensions.

    The controls are `n_random` random subspaces, the directions of greatest variance, those of lowest variance (of one
    modality alone: pruning them is harmless almost by construction), and those that the weights of the projections
    scale most unevenly. A split of the embedding prunes embeddings that are made once; a split of the residual stream
    runs the tower again for each row of the table.

    Args:
        clip: the model; None where `data` are embeddings and the split is one of the embedding.
        split: what is noise; several, of distinct rank at one hook, give a curve over the rank.
        data: pictures with classes or captions; see `EvaluationData`.
        covariance: rows, or a covariance, that greatest and lowest variance are of; None: of the training pictures of
            `data`, at the hook of the split. Pass what the split itself was made of where that is more.
        n_random: random subspaces; 0: none.
        n_neighbors: of kNN.
        probe_c: inverse strength of the linear probe's L2 penalty, on embeddings of unit length.
        n_bootstrap: draws of the samples.
        confidence: of the intervals.
        seed: of the draws and the random subspaces.
        progress: draw bars.

    Returns:
        `PruningEvaluation`: `.verdict()` says in words what the intervals say.

    Raises:
        InputError: a split that leaves nothing or prunes nothing, splits of different hooks or of one rank twice, or
            what `EvaluationData`, `prune` and `collect_covariance` raise.

    Warns:
        UserWarning: pictures could not be read; their names are in `.skipped`.

    Example:
        >>> import clip_lens_ext as cle
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(120) % 3
        >>> rows = torch.randn(120, 8, generator=generator)
        >>> rows[:, :3] += 4 * torch.eye(3)[labels]                        # the classes are in the first three axes
        >>> split = cle.split_noise(rows * torch.tensor([1.0] * 4 + [0.1] * 4), cut=4)
        >>> found = evaluate_pruning(None, split, cle.EvaluationData(rows, labels=labels), n_random=2, progress=False)
        >>> found.measures, found.pruned
        (('kNN', 'linear probe'), ('none', 'noise', 'random', 'top variance', 'lowest variance'))
        >>> found.score.shape, float(found.score[0, 1, 0]) > 0.9, list(found.left_out)
        (torch.Size([1, 5, 2]), True, ['projector weights'])
    """
    splits = _checked(split)
    for name, value, least in (
        ("n_random", n_random, 0),
        ("n_neighbors", n_neighbors, 1),
        ("n_bootstrap", n_bootstrap, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is an integer, {least} or more; got {value!r}")
    if not 0 < confidence < 1 or probe_c <= 0:
        raise InputError(f"confidence is in (0, 1) and probe_c above 0; got {confidence} and {probe_c}")
    plain = embed(clip, data, bar="embeddings" if progress else None)
    if plain.skipped:
        warnings.warn(f"{len(plain.skipped)} pictures could not be read and are left out", stacklevel=2)
    trial = _Trial(clip, data, plain, splits[0], {"n_neighbors": n_neighbors, "probe_c": probe_c})
    bases, left_out = trial.control_bases(covariance, n_random, seed)
    unseen = unseen_classes(plain)
    if unseen:
        left_out["kNN and linear probe"] = f"{len(unseen)} classes of the test have no training picture"
    names = (NONE, NOISE, *dict.fromkeys(name for name, _ in bases))
    total = 1 + len(splits) * (1 + len(bases))
    with tqdm(total=total, desc="prunings", unit="pruning", disable=not progress, delay=3) as bar:
        none = trial.hits(None)
        if not none:
            raise InputError("nothing can be measured: pass classes with the labels, captions, or training pictures "
                             "of each class")  # fmt: skip
        bar.update()
        rows = []  # of each split, of each name, the hits of one or several subspaces
        for one in splits:
            found: dict[str, list[_Hits]] = {NONE: [none]}
            for name, basis in ((NOISE, one.basis), *((name, basis[:, : one.rank]) for name, basis in bases)):
                found.setdefault(name, []).append(trial.hits(replace(one, basis=basis)))
                bar.update()
            rows.append([found[name] for name in names])
    tables = _tables(rows, n_bootstrap, seed, confidence)
    draws = [of_rank[names.index(RANDOM)] if n_random else [] for of_rank in rows]
    return PruningEvaluation(
        measures=tuple(none), pruned=names, ranks=tuple(one.rank for one in splits), **tables,
        draws=torch.stack([_means(of_rank, tuple(none)) for of_rank in draws]),
        n=tuple(len(values) for values in none.values()), d=splits[0].d, left_out=left_out,
        skipped=tuple(skip.name for skip in plain.skipped), n_bootstrap=n_bootstrap, confidence=confidence, seed=seed,
        settings={"rules": [one.rule for one in splits], "cuts": [one.cut for one in splits],
                  "hook_name": splits[0].hook_name, "token_scope": splits[0].token_scope, "tower": splits[0].tower,
                  "test_share": data.test_share, "n_test": int(plain.test.sum()), "n_train": int((~plain.test).sum()),
                  **trial.settings},
        provenance={"model": None if clip is None else clip.model_name, "data_fingerprint": plain.fingerprint,
                    "versions": versions()},
    )  # fmt: skip


def _checked(split: NoiseSplit | Sequence[NoiseSplit]) -> tuple[NoiseSplit, ...]:
    splits = (split,) if isinstance(split, NoiseSplit) else tuple(split)
    if not splits:
        raise InputError("no split: pass one from split_noise, or several of distinct rank")
    for one in splits:
        check_split(one)
        if one.rank == 0:
            raise InputError("no direction is noise by this split: there is nothing to prune")
    if len({(one.d, one.hook_name, one.token_scope, one.tower) for one in splits}) > 1:
        raise InputError("the splits are of different hooks, tokens, towers or widths: evaluate each by itself")
    splits = tuple(sorted(splits, key=lambda one: one.rank))
    if len({one.rank for one in splits}) < len(splits):
        raise InputError(f"two splits of one rank: {[one.rank for one in splits]}; a curve needs one for each rank")
    return splits


@dataclass(frozen=True, eq=False)
class _Trial:
    """One model on one set of data, with whatever is pruned."""

    clip: HookedCLIP | None
    data: EvaluationData
    plain: Embedded
    like: NoiseSplit
    settings: dict[str, Any]

    def hits(self, split: NoiseSplit | None) -> _Hits:
        """The hits of every measure, with a split pruned."""
        if split is None:
            embedded = self.plain
        elif is_of_embedding(split):
            embedded = self.plain.without(split)
        else:
            embedded = embed(self.clip, self.data, split=split)
        return hits(embedded, **self.settings)

    def control_bases(
        self, covariance: Rows | None, n_random: int, seed: int
    ) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
        """Ordered bases whose first columns are the controls, by name; and which there are none of, and why."""
        d = self.like.d
        found = [(RANDOM, basis) for basis in random_bases(d, n_random, seed=seed)]
        left_out = {} if n_random else {RANDOM: "n_random is 0"}
        moments = self._covariance(covariance)
        if moments.d != d:
            raise InputError(f"covariance is of {moments.d} dimensions, and the split of {d}")
        eigenvectors = variance_basis(moments.covariance)
        found += [(TOP, eigenvectors), (LOWEST, eigenvectors.flip(1))]
        if self.clip is None:
            left_out[PROJECTOR] = "there is no model to read weights from"
        elif not is_of_embedding(self.like):
            left_out[PROJECTOR] = f"the projections write to the embedding, and {self.like.hook_name} is before them"
        else:
            try:
                found.append((PROJECTOR, projector_basis(self.clip)))
            except UnsupportedModelError as error:
                left_out[PROJECTOR] = str(error)
        return found, left_out

    def _covariance(self, given: Rows | None) -> Covariance:
        if isinstance(given, Covariance):
            return given
        if isinstance(given, StreamingCovariance):
            return given.result()
        if given is not None:
            moments = StreamingCovariance(given.shape[-1])
            moments.update(given)
            return moments.result()
        if is_of_embedding(self.like):
            if self.plain.images.shape[1] != self.like.d:
                raise InputError(
                    f"the split is of {self.like.d} dimensions, the embeddings have {self.plain.images.shape[1]}"
                )
            moments = StreamingCovariance(self.like.d)
            moments.update(self.plain.images[~self.plain.test])
            return moments.result()
        return self._of_stream()

    def _of_stream(self) -> Covariance:
        """The covariance of the training pictures, or of their captions, where the split is."""
        if self.clip is None or self.like.tower is None or self.like.hook_name is None:
            raise InputError("a split of the residual stream needs the model, and to know its tower: make it of what "
                             "collect_covariance gives")  # fmt: skip
        if self.like.tower == "text":
            raise InputError("greatest and lowest variance of a text tower's stream: pass covariance=, of what the "
                             "split was made of")  # fmt: skip
        pictures = image_batches(self.data.images, preprocess=self.data.preprocess, batch_size=self.data.batch_size)
        training = pictures.select((~self.data.test).nonzero().flatten().tolist())
        scope = cast("TokenScope | None", self.like.token_scope)
        found = collect_covariance(self.clip.vision, training, self.like.hook_name, token_scope=scope, progress=False)
        return next(iter(found))


def _tables(rows: list[list[list[_Hits]]], n_bootstrap: int, seed: int, confidence: float) -> dict[str, Tensor]:
    """Scores, differences and intervals of `rows[rank][pruned][subspace]`, where the second pruned is the noise.

    A difference is taken sample by sample.
    """
    shape = (len(rows), len(rows[0]))
    found: dict[str, list[Tensor]] = {name: [] for name in ("score", "interval", "difference", "difference_interval")}
    for measure in rows[0][0][0]:
        values = torch.stack([
            torch.stack([torch.stack([one[measure] for one in subspaces]).mean(dim=0) for subspaces in of_rank])
            for of_rank in rows
        ])  # fmt: skip  # [rank pruned sample]
        for name, table in (("score", values), ("difference", values[:, 1:2] - values)):
            ends = bootstrap_intervals(table.flatten(0, 1), n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)
            found[name].append(table.mean(dim=-1))
            found["interval" if name == "score" else "difference_interval"].append(ends.unflatten(0, shape))
    return {name: torch.stack(parts, dim=2) for name, parts in found.items()}


def _means(draws: list[_Hits], measures: tuple[str, ...]) -> Tensor:
    """Score of each draw, `[draw measure]`."""
    found = [[float(draw[measure].mean()) for measure in measures] for draw in draws]
    return torch.tensor(found, dtype=torch.float64).reshape(len(draws), len(measures))
