"""The result of `compare`: every method's attributions, what deletion and ablation say of them, and that in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from clip_lens_ext.attribution.faithfulness_result import Difference, Faithfulness
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.shards import check_mergeable

LENS = "logit_lens"
_ENDS = ("exact_ablation", "random")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side on one set of samples.

    Attributes:
        attributions: by name, in the order in which they were asked for, exact ablation and random among them.
        scores: what gives a score of every latent, active or not, instead of an attribution: `[target d_sae]` by name.
        faithfulness: curves, areas, rank correlations and overlaps of all of them.
        notes: methods that were left out, and why.
    """

    attributions: Mapping[str, Attribution]
    scores: Mapping[str, Tensor]
    faithfulness: Faithfulness
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> str | None:
        """The signed method of the greatest mean rank correlation with exact ablation; None where none has one."""
        means = self.faithfulness.mean("rank_correlation")
        known = {
            name: float(mean)
            for name, mean in zip(self.faithfulness.methods, means, strict=True)
            if name not in (*_ENDS, *self.faithfulness.unsigned) and mean == mean
        }
        return max(known, key=known.__getitem__) if known else None

    def to_frame(self) -> pd.DataFrame:
        """One row per method, as `Faithfulness.to_frame`."""
        return self.faithfulness.to_frame()

    def summary(self) -> str:
        """What the numbers mean: which method predicts exact ablation best, and where the Logit Lens stands."""
        found, best = self.faithfulness, self.best
        n_sample, n_target = found.n_sample, len(found.labels)
        over = f"Over {_count(n_sample, 'sample')} and {_count(n_target, 'target')}"
        compared, active = int(found.n_compared.sum()), int(found.n_active.sum())
        part = "all" if compared == active else f"{compared} of the"
        over += f", ranked over {part} {active} active latents"
        if best is None:
            return f"{over}, no method has a rank correlation with exact ablation: its values are all equal."
        frame = found.to_frame().set_index("method")
        words = [f"{over}, {best} predicts exact ablation best: mean rank correlation {self._rank(best, frame)}."]
        ends = ", ".join(f"{name} order {frame.deletion_area[name]:.4f}" for name in _ENDS if name in frame.index)
        words.append(
            f"Deletion in its order leaves a mean {found.unit} of {frame.deletion_area[best]:.4f} ({ends}; lower is "
            f"better), insertion one of {frame.insertion_area[best]:.4f} (higher is better)."
        )
        if LENS not in frame.index:
            words.append("The Logit Lens is not among the methods.")
        elif best != LENS:
            words.append(f"The Logit Lens has {self._rank(LENS, frame)}: {self._against_lens(best)}.")
        if found.unsigned:
            words.append(f"Without a sign, and so ranked against its magnitude: {', '.join(found.unsigned)}.")
        if n_sample == 1:
            words.append("One sample gives no interval: compare on more before you believe the order.")
        return " ".join([*words, *(f"Left out: {note}." for note in self.notes)])

    def _rank(self, method: str, frame: pd.DataFrame) -> str:
        low, high = frame.rank_correlation_low[method], frame.rank_correlation_high[method]
        interval = "" if low != low else f" ({_percent(self.faithfulness)} interval {low:.3f} to {high:.3f})"
        return f"{frame.rank_correlation[method]:.3f}{interval}"

    def _against_lens(self, best: str) -> str:
        gap: Difference = self.faithfulness.difference(best, LENS)
        if gap.value != gap.value:
            return "on no sample do both have a rank correlation"
        if gap.low != gap.low:
            return f"{gap.value:.3f} lower"
        interval = f"{gap.low:.3f} to {gap.high:.3f}"
        if gap.low > 0:
            return f"{gap.value:.3f} lower on the same samples ({interval})"
        return f"the difference of {gap.value:.3f} on the same samples ({interval}) could be chance"

    def to_markdown(self) -> str:
        """The summary, and a table with one row per method, the best first; intervals in brackets."""
        columns = ("rank_correlation", "overlap", "deletion_area", "insertion_area")
        found = self.faithfulness
        heads = ["method", "rank correlation", f"overlap of the top {found.k}", "deletion area", "insertion area"]
        lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        frame = self.to_frame().sort_values("rank_correlation", ascending=False, kind="stable")
        for row in frame.to_dict("records"):
            cells = [_cell(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in columns]
            lines.append("| " + " | ".join([str(row["method"]), *cells]) + " |")
        return "\n".join([self.summary(), "", *lines])

    def __repr__(self) -> str:
        found = self.faithfulness
        methods = ", ".join(found.methods)
        return f"Comparison({methods}; {found.hook_name}, error term {found.error_term})\n{self.summary()}"

    def merge(self, other: Comparison) -> Comparison:
        """Both on all their samples, those of `other` after one's own.

        Raises:
            InputError: the two differ in more than their samples; it names in what.
        """
        mine, theirs = ({"methods": [*one.attributions], "scores": [*one.scores]} for one in (self, other))
        check_mergeable("comparisons", mine, theirs)
        same = {name: torch.equal(scores, other.scores[name].to(scores.device)) for name, scores in self.scores.items()}
        check_mergeable("comparisons", dict.fromkeys(same, True), same)
        attributions = {name: result.merge(other.attributions[name]) for name, result in self.attributions.items()}
        return replace(self, attributions=attributions, faithfulness=self.faithfulness.merge(other.faithfulness))


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _percent(found: Faithfulness) -> str:
    return f"{100 * found.confidence:g}%"


def _cell(value: float, low: float, high: float) -> str:
    if value != value:
        return "not defined"
    return f"{value:.4f}" if low != low else f"{value:.4f} ({low:.4f} to {high:.4f})"
