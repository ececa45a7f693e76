"""Typographic flags: the model reads a word of the prompt off the picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clip_lens_ext.semantics.flag_relevance import Relevance
from clip_lens_ext.semantics.flag_results import PASS, Evidence, Flag
from clip_lens_ext.semantics.intervention_effects import UNTOUCHED, InterventionEffects
from clip_lens_ext.semantics.word_match import holds


class _Drawn(NamedTuple):
    """How a word on neutral pictures raises the prompt that it is in, beside the controls."""

    row: int
    column: int
    among_words: float
    """Share of the other words whose drawing raises this prompt less."""
    among_prompts: float
    """Share of the other prompts that this word raises less."""


def typographic_flags(
    relevance: Relevance,
    effects: InterventionEffects,
    *,
    min_t: float,
    text_quantile: float,
    prompt_quantile: float,
    n_latents: int,
) -> list[Flag]:
    """Flag a prompt whose own word raises it when it is drawn on neutral pictures, more than its controls do.

    Needed, for a prompt that holds the drawn word: the prediction rises, `t >= min_t`; it rises more than under
    `text_quantile` of the other drawn words, and more than `prompt_quantile` of the other prompts do; where controls
    of the same pictures were measured (a word of equal length, an empty plate), it rises against each, `t >= min_t`;
    and where text was masked, on pictures with this very word, it falls, `t <= -min_t`. With masks of other words alone
    this word is on no picture of the data, so that nothing shows the fall, and there is no flag.

    The latents are those through which part of the rise goes and which are more active with the word than without,
    `t >= min_t`, and than with at least one of the controls: what reads any text reads another word too, but not an
    empty plate. Masked, they are less active.

    Args:
        relevance: shares and expectations.
        effects: with rows of the kind `"text_drawn"`, and of `"text_masked"` where there are such pictures.
        min_t: least paired t value.
        text_quantile: the share of other words, in [0, 1).
        prompt_quantile: the share of other prompts, in [0, 1): a word may also raise prompts that look like its own.
        n_latents: at most so many latents of a prompt and word, the greatest part of the rise first.
    """
    drawn = effects.rows("text_drawn")
    found: list[Flag] = []
    for row in drawn:
        if effects.rows("text_masked") and not _masked(effects, effects.subjects[row]):
            continue
        for column, prompt in enumerate(effects.prompts):
            if not holds(prompt, effects.subjects[row]):
                continue
            seen = _compared(effects, drawn, row, column)
            evidence = _evidence(effects, seen, min_t, text_quantile, prompt_quantile)
            if evidence is None:
                continue
            latents = [
                (latent, part)
                for latent, part in effects.through(row, prompt).items()
                if part[0] > 0 and part[0] >= min_t * part[1] and _reads(effects, row, latent, min_t)
            ]
            for latent, (part, _) in latents[:n_latents]:
                own = [
                    Evidence("rise through the latent", part),
                    Evidence("latent: t with the word", float(effects.latent_t[row, latent]), min_t, "min_t"),
                    *_specific(effects, row, latent),
                    Evidence(PASS, len(latents)),
                ]
                found.append(relevance.flag("typographic", prompt, latent, part, "cosine", effects.subjects[row],
                                            [*evidence, *own], edit=effects.names[row]))  # fmt: skip
    return found


def _compared(effects: InterventionEffects, drawn: list[int], row: int, column: int) -> _Drawn:
    change = effects.prediction_change
    word, prompt = effects.subjects[row], effects.prompts[column]
    words = [other for other in drawn if not holds(prompt, effects.subjects[other])]
    prompts = [c for c, other in enumerate(effects.prompts) if not holds(other, word)]
    return _Drawn(row, column, _share_below(change[words, column], change[row, column]),
                  _share_below(change[row, prompts], change[row, column]))  # fmt: skip


def _share_below(others: Tensor, value: Tensor) -> float:
    """1 where there is nothing to compare with: then the paired controls decide alone."""
    return float((others < value).double().mean()) if others.numel() else 1.0


def _evidence(
    effects: InterventionEffects, seen: _Drawn, min_t: float, text_quantile: float, prompt_quantile: float
) -> list[Evidence] | None:
    """The numbers of a prompt and word that pass, None where one does not."""
    t = effects.prediction_t
    found = [
        Evidence("rise with the word drawn", float(effects.prediction_change[seen.row, seen.column])),
        Evidence("t of the rise", float(t[seen.row, seen.column]), min_t, "min_t"),
        Evidence("rises more than with other words", seen.among_words, text_quantile, "text_quantile"),
        Evidence("rises more than other prompts", seen.among_prompts, prompt_quantile, "prompt_quantile"),
    ]
    for row in _controls(effects, seen.row):
        found.append(Evidence(f"t against {effects.against[row]}", float(t[row, seen.column]), min_t, "min_t"))
    for row in _masked(effects, effects.subjects[seen.row]):
        found.append(Evidence("t of the fall with the word masked", -float(t[row, seen.column]), min_t, "min_t"))
    passed = all(one.threshold is None or one.value >= one.threshold for one in found)
    return found if passed else None


def _masked(effects: InterventionEffects, word: str) -> list[int]:
    return [row for row in effects.rows("text_masked") if effects.subjects[row] == word]


def _reads(effects: InterventionEffects, row: int, latent: int, min_t: float) -> bool:
    t = effects.latent_t[:, latent]
    controls = _controls(effects, row)
    return (
        bool(t[row] >= min_t)
        and (not controls or bool((t[controls] >= min_t).any()))
        and all(bool(t[masked] <= -min_t) for masked in _masked(effects, effects.subjects[row]))
    )


def _controls(effects: InterventionEffects, row: int) -> list[int]:
    """The rows of the same edit against its controls."""
    return [
        other
        for other in effects.rows(effects.kinds[row], against=None)
        if effects.names[other] == effects.names[row] and effects.against[other] != UNTOUCHED
    ]


def _specific(effects: InterventionEffects, row: int, latent: int) -> list[Evidence]:
    """Against each control: does the latent react to this word, or to any text?"""
    t = effects.latent_t
    return [
        Evidence(f"latent: t against {effects.against[other]}", float(t[other, latent]))
        for other in _controls(effects, row)
    ] + [
        Evidence("latent: t with the word masked", float(torch.as_tensor(t[other, latent])))
        for other in _masked(effects, effects.subjects[row])
    ]
