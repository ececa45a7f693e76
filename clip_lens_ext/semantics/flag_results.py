"""The result of `flag_components`: flags, each with the evidence that decided it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.result_files import not_written, read_parts, write_parts

Kind = Literal["typographic", "artifact", "compound noun", "polysemous", "unexplained"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORD_SHARE = "share for the word alone"
PASS = "latents that pass"  # of which n_latents are flagged; the others are not dropped without a word


@dataclass(frozen=True)
class Evidence:
    """One named number behind a flag, and the threshold that it passed.

    Attributes:
        name: what was measured.
        value: what was found.
        threshold: what it had to reach; None for a number that decided nothing, and is there to be read.
        source: where the threshold comes from: a control, or the caller.
    """

    name: str
    value: float
    threshold: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Flag:
    """A latent through which a prompt can be decided by what the prompt does not mean; `meaning` says how.

    Attributes:
        kind: one of `KINDS`.
        prompt: the prompt.
        latent: the latent.
        label: its label; None where it has none.
        share: its share of all that speaks for the prompt; NaN where the attributions have no such prompt.
        expected: expected relevance, `max(0, cos(m_j, t) - cos(m_j, t_empty))`.
        unexpectedness: rank of the share less rank of the expected relevance among the active latents, in [-1, 1].
        strength: of the evidence, greater is stronger; comparable within one kind and unit alone.
        strength_unit: what it is measured in.
        subject: the word, overlay or background that it is about; empty where there is none.
        evidence: the numbers.
        edit: name of the intervention that decided it; empty where none did.
    """

    kind: str
    prompt: str
    latent: int
    label: str | None
    share: float
    expected: float
    unexpectedness: float
    strength: float
    strength_unit: str
    subject: str
    evidence: tuple[Evidence, ...]
    edit: str = ""

    @property
    def meaning(self) -> str:
        """What the flag says, in a sentence."""
        label = "without a label" if self.label is None else f"labelled \u201c{self.label}\u201d"
        latent, prompt = f"latent {self.latent}, {label},", f"\u201c{self.prompt}\u201d"
        share = "" if math.isnan(self.share) else f" and is {self.share:.1%} of what speaks for it"
        known = {one.name: one.value for one in self.evidence}
        if self.kind == "typographic":
            said = f"The word \u201c{self.subject}\u201d, drawn on a picture, raises {prompt}: {latent} reads it"
        elif self.kind == "artifact" and self.edit:
            said = f"The edit \u201c{self.edit}\u201d raises {prompt}, which does not name it: {latent} carries it"
        elif self.kind == "artifact":
            said = f"A suspicion: {latent} matters for {prompt}, is clear, and has no label that fits"
        elif self.kind == "compound noun":
            own = known.get(WORD_SHARE, math.nan)
            word = f"\u201c{self.subject}\u201d"
            said = f"{word} alone shows something else than {prompt}: {latent} is {own:.1%} of what speaks for the word"
            share = "" if math.isnan(self.share) else f", and {self.share:.1%} of what speaks for the prompt"
        elif self.kind == "polysemous" and "group" in known:
            said = f"The pictures that {prompt} retrieves are two groups: {latent} speaks for one of them"
        elif self.kind == "polysemous":
            said = f"A word of {prompt} has another sense: {latent} fits {self.subject}"
        else:
            said = f"Not explained: {latent} matters for {prompt} more than its references let one expect"
        return f"{said}{share}."

    def number(self, name: str) -> float:
        """The value of one piece of evidence.

        Raises:
            InputError: this flag has none of that name.
        """
        for one in self.evidence:
            if one.name == name:
                return one.value
        known = [one.name for one in self.evidence]
        raise InputError(f"this flag has no evidence {name!r}{near(name, known)}; it has {', '.join(known)}")


@dataclass(frozen=True, eq=False)
class Flags:
    """All flags, the strongest of a prompt and kind first.

    Attributes:
        flags: the flags, sorted by kind, prompt and strength.
        prompts: what was looked at.
        thresholds: every threshold that was used, whether the caller named it or a control gave it.
        sources: by the same names, where each comes from.
        settings: everything else that the result depends on.
        provenance: model, SAE hash, data fingerprints, versions.
    """

    flags: tuple[Flag, ...]
    prompts: tuple[str, ...]
    thresholds: dict[str, float]
    sources: dict[str, str]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.flags)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.of(kind))} {kind}" for kind in KINDS)
        return f"Flags({len(self)} for {len(self.prompts)} prompts: {counts})"

    def of(self, kind: Kind) -> tuple[Flag, ...]:
        """The flags of one kind.

        Raises:
            InputError: no such kind.
        """
        if kind not in KINDS:
            raise InputError(f"no kind {kind!r}{near(str(kind), KINDS)}; there are {', '.join(KINDS)}")
        return tuple(flag for flag in self.flags if flag.kind == kind)

    def about(self, prompt: str) -> tuple[Flag, ...]:
        """The flags of one prompt.

        Raises:
            InputError: this prompt was not looked at.
        """
        if prompt not in self.prompts:
            raise InputError(f"no flag was looked for with the prompt {prompt!r}{near(prompt, self.prompts)}")
        return tuple(flag for flag in self.flags if flag.prompt == prompt)

    def to_frame(self) -> pd.DataFrame:
        """One row for each flag; `meaning` says what it is, `evidence` has names, values and thresholds."""
        columns = ["kind", "prompt", "latent", "label", "meaning", "share", "expected", "unexpectedness", "strength",
                   "strength_unit", "subject", "edit", "evidence"]  # fmt: skip
        rows = [{**{name: getattr(flag, name) for name in columns[:-1]}, "evidence": said(flag)} for flag in self.flags]
        return pd.DataFrame(rows, columns=columns)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file of JSON."""
        texts = {"flags": [asdict(flag) for flag in self.flags], "prompts": self.prompts}
        fields = {name: getattr(self, name) for name in ("thresholds", "sources", "settings", "provenance")}
        write_parts(path, "Flags", {"n_flags": torch.tensor([len(self)])}, fields, texts)

    @classmethod
    def load(cls, path: str | Path) -> Flags:
        """Read a file that `save` wrote.

        Raises:
            LoadError: no such file, a damaged one, or one that holds something else.
        """
        tensors, fields, texts = read_parts(path, "Flags")
        try:
            flags = tuple(_flag(entry) for entry in texts["flags"])
            if int(tensors["n_flags"]) != len(flags):
                raise not_written(path, "Flags", "its parts do not fit together")
            return cls(flags, tuple(texts["prompts"]), **fields)
        except (KeyError, TypeError) as error:
            raise not_written(path, "Flags", error) from error


def said(flag: Flag) -> str:
    """The evidence of a flag in one line.

    Example:
        >>> said(Flag("artifact", "a bow", 3, None, 0.1, 0.0, 0.5, 0.06, "cosine", "frame",
        ...           (Evidence("rise", 0.061, 0.02, "other edits"), Evidence("clarity", 0.4))))
        'rise 0.061 (at least 0.02, from other edits); clarity 0.4'
    """
    return "; ".join(
        f"{one.name} {one.value:.3g}"
        + ("" if one.threshold is None else f" ({at_least(one)}, from {one.source})")
        for one in flag.evidence
    )


def at_least(evidence: Evidence) -> str:
    """The threshold in words."""
    return "above 0" if evidence.threshold == 0 else f"at least {evidence.threshold:.3g}"


def _flag(entry: dict[str, Any]) -> Flag:
    return Flag(**{**entry, "evidence": tuple(Evidence(**one) for one in entry["evidence"])})


def plain(value: Any) -> Any:
    """A value as JSON gives it back, so that what is saved and loaded is what was there."""
    return json.loads(json.dumps(value))
