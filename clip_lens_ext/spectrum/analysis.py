"""The whole question at one hook: spectra, every rule's split, whether subsets agree, and what pruning does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import Tensor

from clip_lens_ext.data import Skipped, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.spectrum.collect import collect_covariance
from clip_lens_ext.spectrum.covariance import StreamingCovariance
from clip_lens_ext.spectrum.covariance_result import Covariance
from clip_lens_ext.spectrum.cuts import CUTS, Cut
from clip_lens_ext.spectrum.embedded import Embedded, embed
from clip_lens_ext.spectrum.evaluation import evaluate_pruning
from clip_lens_ext.spectrum.evaluation_data import EvaluationData
from clip_lens_ext.spectrum.evaluation_result import PruningEvaluation
from clip_lens_ext.spectrum.invariance import split_subgroups, subgroup_overlap
from clip_lens_ext.spectrum.invariance_result import SubgroupOverlap
from clip_lens_ext.spectrum.noise import split_noise
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pruning import EMBEDDING
from clip_lens_ext.spectrum.rules import RULES
from clip_lens_ext.spectrum.sources import Rows
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.positions import TokenScope

_MOST_GROUPS, _FEWEST_ROWS = 8, 4


@dataclass(frozen=True, eq=False)
class SpectrumAnalysis:
    """Spectra of one place in a model, and what each rule makes of them.

    Attributes:
        image, text: covariances of the training pictures and their captions; `text` is None for one tower alone.
        splits: of each rule, in the order asked for.
        not_split: rules that could not be applied, and why.
        cuts: of the pooled covariance by every named cut that says something about it.
        overlap: between subsets, of the pooled rule's noise with the rank of the first split, or None.
        no_overlap: why not, or "".
        evaluation: of pruning each split of another rank, or None.
        skipped: pictures that could not be read.
    """

    image: Covariance
    text: Covariance | None
    splits: tuple[NoiseSplit, ...]
    not_split: dict[str, str]
    cuts: tuple[NoiseSplit, ...]
    overlap: SubgroupOverlap | None
    no_overlap: str
    evaluation: PruningEvaluation | None
    skipped: tuple[Skipped, ...]

    def to_frame(self) -> pd.DataFrame:
        """A row for each split: its rank, and what chance alone would share."""
        return pd.DataFrame([
            {
                "rule": split.rule, "cut": split.cut, "rank": split.rank, "d": split.d, "n_image": split.n[0],
                "n_text": split.n[1] if len(split.n) > 1 else None, "space_dimensions": split.space_dimensions,
                "n_by_chance": split.n_by_chance, "overlap": split.overlap,
                "overlap_by_chance": split.overlap_by_chance,
            }
            for split in self.splits
        ])  # fmt: skip

    def summary(self) -> str:
        """Every split, the subsets and the verdict, in words; a warning is said once."""
        said = dict.fromkeys(sentence for split in self.splits for sentence in split.warnings)
        lines = [split.summary().removesuffix(" ".join(("", *split.warnings))) for split in self.splits]
        lines += [f"No split by {rule!r}: {why}" for rule, why in self.not_split.items()]
        if self.overlap is not None:
            frame = self.overlap.to_frame()
            lines.append(
                f"Noise of {len(self.overlap.names)} subsets: overlap {frame.overlap.min():.3f} to "
                f"{frame.overlap.max():.3f}, by chance {frame.by_chance.mean():.3f}, of two halves of one subset "
                f"{frame.split_half.mean():.3f}."
            )
        elif self.no_overlap:
            lines.append(f"No overlap of subsets: {self.no_overlap}.")
        lines += [f"Note: {sentence}" for sentence in said]
        return "\n".join([*lines, *([self.evaluation.summary()] if self.evaluation is not None else [])])


def analyse_spectrum(
    clip: HookedCLIP,
    data: EvaluationData,
    *,
    hook_name: str = EMBEDDING,
    token_scope: TokenScope | None = None,
    rules: Sequence[str] | None = None,
    cut: str | int | Cut | None = None,
    ranks: Sequence[int] | None = None,
    control: EvaluationData | None = None,
    n_bootstrap: int = 200,
    evaluate: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> SpectrumAnalysis:
    """Split the training pictures' space by each rule, compare subsets, and prune on the test pictures.

    Args:
        clip: the model.
        data: pictures with labels or captions. Splits are made of its training half, pruning is tried on its test.
        hook_name: the embedding, of pictures and captions; or a hook of the vision tower's residual stream.
        token_scope: whose tokens are rows, at a residual stream; None: all.
        rules: names of `RULES`; None: all that the data allow.
        cut: of every rule; None: each rule's own.
        ranks: numbers of dimensions to prune, by the first rule; None: those that the rules and the cut say.
        control: pictures, and captions, that mean nothing, for `"generalised"`; see `shuffled_pixels`.
        n_bootstrap: draws for every interval.
        evaluate: whether to prune and measure; at a residual stream that runs the tower again for each control.
        seed: of the draws and the random controls.
        progress: draw bars.

    Returns:
        `SpectrumAnalysis`. Subsets are the classes of `data`, where they are 2 to 8 of four training pictures or more.

    Raises:
        InputError: what `EvaluationData` and `split_noise` raise, where no rule gives a split.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, batch = cle.planted_clip(), cle.PlantedWorld(0).sample(60, seed=5, split="test")
        >>> data = cle.EvaluationData(cle.planted.normalise(batch.images), captions=batch.captions)
        >>> found = cle.analyse_spectrum(clip, data, rules=["pooled"], cut=16, n_bootstrap=10, progress=False)
        >>> found.splits[0].rank, found.evaluation.pruned[:2]
        (16, ('none', 'noise'))
    """
    names = tuple(RULES) if rules is None else (rules,) if isinstance(rules, str) else tuple(rules)
    if hook_name == EMBEDDING:
        space = _of_embedding(clip, data, control, progress)
    else:
        space = _of_stream(clip, data, hook_name, token_scope, control, progress)
    splits, not_split = _splits(space, names, [cut] * len(names), all_rules=rules is None, progress=progress)
    overlap = None
    if not space.no_groups:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few rows; each split's warnings say it
            groups = split_subgroups(
                space.groups, rule="pooled", cut=splits[0].rank or None, n_bootstrap=n_bootstrap, seed=seed,
                progress=progress,
            )  # fmt: skip
        overlap = subgroup_overlap(groups)
    evaluation = None
    if evaluate:
        trial = splits
        if ranks is not None:
            trial, _ = _splits(space, names[:1] * len(ranks), list(ranks), all_rules=False, progress=progress)
        distinct = {split.rank: split for split in reversed(trial) if 0 < split.rank < split.d}
        if distinct:
            evaluation = evaluate_pruning(
                clip, list(distinct.values()), data, covariance=space.image, n_bootstrap=n_bootstrap, seed=seed,
                progress=progress,
            )  # fmt: skip
    return SpectrumAnalysis(
        space.image,
        space.text,
        splits,
        not_split,
        _cuts(space, progress),
        overlap,
        space.no_groups,
        evaluation,
        space.skipped,
    )


@dataclass(frozen=True, eq=False)
class _Space:
    """What there is at one place: the arguments of `split_noise`, and the subsets."""

    image: Covariance
    text: Covariance | None
    rows: tuple[Tensor, ...]
    paired: tuple[Tensor, ...]
    control: Any
    groups: dict[str, Tensor]
    no_groups: str
    skipped: tuple[Skipped, ...]


def _of_embedding(clip: HookedCLIP, data: EvaluationData, control: EvaluationData | None, progress: bool) -> _Space:
    embedded = embed(clip, data, bar="embeddings" if progress else None)
    mean_nothing = None if control is None else embed(clip, control, bar="control" if progress else None)
    own = embedded.training_pairs()
    paired: tuple[Tensor, ...] = ()
    rows: tuple[Tensor, ...] = (embedded.images[~embedded.test],)
    if embedded.texts is not None:
        rows = (*rows, embedded.texts[own[:, 1].unique()])
        paired = (embedded.images[own[:, 0]], embedded.texts[own[:, 1]])
    found: Any = None
    if mean_nothing is not None:
        found = (mean_nothing.images,)
        if len(rows) > 1:
            if mean_nothing.texts is None:
                raise InputError("control has no captions: the rule compares both modalities with theirs")
            found = (*found, mean_nothing.texts)
    groups, why = _groups(embedded, data)
    image, text = (
        _moments(part, clip, tower) for part, tower in zip((*rows, None)[:2], ("vision", "text"), strict=True)
    )
    assert image is not None  # there are always pictures
    return _Space(image, text, rows, paired, found, groups, why, embedded.skipped)


def _moments(rows: Tensor | None, clip: HookedCLIP, tower: str) -> Covariance | None:
    if rows is None:
        return None
    moments = StreamingCovariance(rows.shape[1])
    moments.update(rows)
    return replace(
        moments.result(), hook_name=EMBEDDING, token_scope="pooled", tower=tower, unit_length=True,
        provenance={"model": clip.model_name},
    )  # fmt: skip


def _groups(embedded: Embedded, data: EvaluationData) -> tuple[dict[str, Tensor], str]:
    """The training pictures of each class, where classes are few and large enough to be split by themselves."""
    if embedded.labels is None:
        return {}, "the pictures have no labels"
    labels, rows = embedded.labels[~embedded.test], embedded.images[~embedded.test]
    names = labels.unique().tolist()
    called = data.classes if data.classes is not None and not isinstance(data.classes, Tensor) else None
    groups = {str(number if called is None else called[number]): rows[labels == number] for number in names}
    fewest = min(len(group) for group in groups.values())
    if not 2 <= len(names) <= _MOST_GROUPS:
        return {}, f"{len(names)} classes, and subsets are compared where there are 2 to {_MOST_GROUPS}"
    if fewest < _FEWEST_ROWS:
        return {}, f"a class has {fewest} training pictures, and {_FEWEST_ROWS} are needed"
    return groups, ""


def _of_stream(
    clip: HookedCLIP, data: EvaluationData, hook_name: str, token_scope: TokenScope | None,
    control: EvaluationData | None, progress: bool,
) -> _Space:  # fmt: skip
    def moments(of: EvaluationData, indexes: list[int] | None) -> tuple[Covariance, tuple[Skipped, ...]]:
        pictures = image_batches(of.images, preprocess=of.preprocess, batch_size=of.batch_size)
        if indexes is not None:
            pictures = pictures.select(indexes)
        found = collect_covariance(clip.vision, pictures, hook_name, token_scope=token_scope, progress=progress)
        return next(iter(found)), found.skipped

    image, skipped = moments(data, (~data.test).nonzero().flatten().tolist())
    found = None if control is None else moments(control, None)[0]
    why = "rows of a residual stream are not kept; split_subgroups compares subsets of rows of your own"
    return _Space(image, None, (), (), found, {}, why, skipped)


def _splits(
    space: _Space, names: tuple[str, ...], cuts: Sequence[str | int | Cut | None], *, all_rules: bool, progress: bool
) -> tuple[tuple[NoiseSplit, ...], dict[str, str]]:
    """The split of each rule with its cut; of all rules those that the data allow."""
    splits: list[NoiseSplit] = []
    not_split: dict[str, str] = {}
    for name, cut in zip(names, cuts, strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # they are in the split, and in the summary once
                splits.append(_split(space, name, cut, progress))
        except InputError as error:
            if not all_rules:
                raise
            not_split[name] = str(error)
    if not splits:
        raise InputError(f"no rule gives a split: {'; '.join(f'{name}: {why}' for name, why in not_split.items())}")
    return tuple(splits), not_split


def _cuts(space: _Space, progress: bool) -> tuple[NoiseSplit, ...]:
    """The pooled covariance by every cut; one that needs rows, or more of them, is left out."""
    found = []
    for name in CUTS:
        with warnings.catch_warnings(), suppress(InputError):
            warnings.simplefilter("ignore", UserWarning)
            found.append(_split(space, "pooled", name, progress))
    return tuple(found)


def _split(space: _Space, rule: str, cut: str | int | Cut | None, progress: bool) -> NoiseSplit:
    rows: tuple[Rows, ...] = tuple(part for part in (space.image, space.text) if part is not None)
    if rule == "cross_covariance":
        rows = space.paired or rows
    elif cut == "permutation":  # moments cannot be permuted
        rows = space.rows or rows
    found = split_noise(*rows, rule=rule, cut=cut, control=space.control, progress=progress)
    return replace(found, hook_name=space.image.hook_name, token_scope=space.image.token_scope)
