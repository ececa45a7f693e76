"""Artifact flags: something that the prompt does not name, a watermark or a background, raises its prediction."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from clip_lens_ext.semantics.clarity import clarity
from clip_lens_ext.semantics.flag_relevance import Relevance
from clip_lens_ext.semantics.flag_results import PASS, Evidence, Flag
from clip_lens_ext.semantics.intervention_effects import InterventionEffects
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings
from clip_lens_ext.semantics.references import References
from clip_lens_ext.semantics.word_match import holds

TEXT_KINDS = ("text_drawn", "text_masked")
N_CONTROLS = 8
_MAD = 1.4826  # of a normal distribution: its standard deviation over its median absolute deviation


def edit_kinds(effects: InterventionEffects) -> tuple[str, ...]:
    """The kinds of edits that are not about text, in their order."""
    return tuple(dict.fromkeys(kind for kind in effects.kinds if kind not in TEXT_KINDS))


def centred(change: Tensor) -> Tensor:
    """Changes `[row prompt]` less the median of their row: what an edit does to a prompt beyond what it does to any."""
    return change - change.median(dim=1, keepdim=True).values


def artifact_flags(
    relevance: Relevance,
    effects: InterventionEffects,
    references: References,
    embeddings: ReferenceEmbeddings | None,
    *,
    min_t: float,
    min_deviations: float,
    min_rise: float | None,
    n_latents: int,
) -> list[Flag]:
    """Flag a prompt that an edit raises though the edit leaves alone what the prompt names.

    For the edits of one kind, `r = change - median over the prompts`; a prompt that names an edit is neither flagged
    for it, nor a rival, nor a control. Needed of a prompt and edit: the prediction rises, `t >= min_t`; no other prompt
    is raised more by this edit, and this prompt is raised more by no other edit of the kind; and `r` is at least
    `min_deviations` robust standard deviations of all `r` of the kind, which are the controls: the same edits with
    shuffled prompts. A kind with fewer than `N_CONTROLS` of them, edits times prompts, or with no spread in them, has
    no control: it gives no flag, and a warning, unless `min_rise` is given. The latents are those through which the
    rise goes and which are more active with the edit than without, `t >= min_t`.

    Args:
        relevance: shares and expectations.
        effects: with edits of pictures of other things, by kind.
        references: for the dependence on position.
        embeddings: for the clarity; None: not told.
        min_t: least paired t value.
        min_deviations: how far above the controls.
        min_rise: least `r`, instead of the controls.
        n_latents: at most so many latents, the greatest part of the rise first.
    """
    clear = None if embeddings is None else clarity(embeddings).value
    placed = at_one_position(references)
    found: list[Flag] = []
    for kind in edit_kinds(effects):
        rows = effects.rows(kind)
        excess = centred(effects.prediction_change[rows])
        named = torch.tensor([[holds(prompt, effects.subjects[row]) for prompt in effects.prompts] for row in rows])
        controls, excess = excess[~named], excess.masked_fill(named, -torch.inf)
        least, source = min_rise, "the caller"
        if least is None:
            spread = float((controls - controls.median()).abs().median()) if len(controls) else 0.0
            least = min_deviations * _MAD * spread
            source = f"{min_deviations:g} robust deviations of this kind's edits with shuffled prompts"
            if len(controls) < N_CONTROLS or least == 0:
                warnings.warn(
                    f"no flag is looked for with the edits of the kind {kind!r}: {len(rows)} of them and "
                    f"{excess.shape[1]} prompts are no control. Measure more edits of this kind or more prompts, or "
                    "pass min_rise=", stacklevel=3,
                )  # fmt: skip
                relevance.without_control.append(kind)
                continue
        for place, row in enumerate(rows):
            column = int(excess[place].argmax())
            if bool(named[place, column]) or int(excess[:, column].argmax()) != place:
                continue
            prompt = effects.prompts[column]
            evidence = [
                Evidence("rise with the edit", float(effects.prediction_change[row, column])),
                Evidence("rise beyond other prompts", float(excess[place, column]), least, source),
                Evidence("t of the rise", float(effects.prediction_t[row, column]), min_t, "min_t"),
            ]
            if any(one.threshold is not None and one.value < one.threshold for one in evidence):
                continue
            latents = [
                (latent, part)
                for latent, part in effects.through(row, prompt).items()
                if part[0] > 0
                and part[0] >= min_t * part[1]
                # A new background also takes the old one away: those latents fall, and are not about the edit.
                and float(effects.latent_t[row, latent]) >= min_t
            ]
            for latent, (part, _) in latents[:n_latents]:
                own = [
                    Evidence("rise through the latent", part),
                    Evidence("latent: t with the edit", float(effects.latent_t[row, latent]), min_t, "min_t"),
                    Evidence("references at one position", float(placed[latent])),
                ]
                own.append(Evidence(PASS, len(latents)))
                if clear is not None:
                    own.append(Evidence("clarity", float(clear[latent])))
                found.append(relevance.flag("artifact", prompt, latent, part, "cosine", effects.subjects[row],
                                            [*evidence, *own], edit=effects.names[row]))  # fmt: skip
    return found


def at_one_position(references: References) -> Tensor:
    """Share of each latent's references that reach their greatest activation at its most frequent token, `[d_sae]`.

    Near 1 for a border or a watermark, which are always at one place; NaN for a latent without positions, and for an
    SAE that reads one token of each picture, which says nothing of the place.
    """
    found = torch.full((references.d_sae,), torch.nan, dtype=torch.float64)
    if references.token_scope not in ("all", "patches"):
        return found
    for latent, row in enumerate(references.position):
        known = row[row >= 0]
        if len(known):
            found[latent] = float(known.unique(return_counts=True)[1].max()) / len(known)
    return found


def unaligned_flags(
    relevance: Relevance,
    references: References,
    embeddings: ReferenceEmbeddings,
    *,
    min_clarity: float | None,
    max_alignment: float | None,
    control_quantile: float,
    seed: int,
) -> list[Flag]:
    """Without edits: latents that matter, are unexpected and clear, and have no label that fits.

    The controls are sets of random references: a latent is clear whose clarity, and has no aligned label whose best
    score, is above, and not above, this quantile of theirs. A suspicion: what merely goes together is told by an edit.

    Args:
        relevance: shares and expectations.
        references: for the dependence on position.
        embeddings: of the references.
        min_clarity, max_alignment: thresholds of the caller; None: from controls.
        control_quantile: of the controls.
        seed: of the random sets.
    """
    alignment = relevance.alignment
    clear = clarity(embeddings).value
    random = random_sets(embeddings, seed=seed)
    relevance.set("clarity", min_clarity, lambda: float(clarity(random).value.quantile(control_quantile)),
                  f"quantile {control_quantile:g} of random references")  # fmt: skip
    relevance.set("alignment", max_alignment, lambda: _best_scores(relevance, random, control_quantile),
                  f"quantile {control_quantile:g} of random references")  # fmt: skip
    found, placed = [], at_one_position(references)
    for row, latent in (relevance.matters & (relevance.gap >= relevance.thresholds["gap"])).nonzero().tolist():
        score = float(alignment.alignment[latent])
        if not float(clear[latent]) >= relevance.thresholds["clarity"] or score > relevance.thresholds["alignment"]:
            continue
        evidence = [
            Evidence("clarity", float(clear[latent]), relevance.thresholds["clarity"], relevance.sources["clarity"]),
            Evidence("less the label's score", -score, -relevance.thresholds["alignment"],
                     relevance.sources["alignment"]),
            Evidence("references at one position", float(placed[latent])),
        ]  # fmt: skip
        strength = float(relevance.share[row, latent])
        found.append(relevance.flag("artifact", relevance.prompts[row], latent, strength, "share", "", evidence))
    return found


def random_sets(embeddings: ReferenceEmbeddings, *, n: int = 200, seed: int) -> Tensor:
    """Sets of as many random references as a latent has at most, `[set k d_embed]`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([
        torch.randperm(len(embeddings.vectors), generator=generator)[: embeddings.k] for _ in range(n)
    ])  # fmt: skip
    return embeddings.vectors[rows]


def _best_scores(relevance: Relevance, random: Tensor, quantile: float) -> float:
    alignment = relevance.alignment
    assert alignment.term_vectors is not None  # Relevance has asked for scores of prompts
    assert alignment.baseline is not None
    assert alignment.directions is not None
    defined = alignment.baseline.isfinite()
    # The baseline of a latent is its cosine with the empty prompt, so the latents together say where that points.
    empty = torch.linalg.lstsq(
        alignment.directions[defined].double(), alignment.baseline[defined].double()[:, None], driver="gelsd"
    ).solution[:, 0]
    mean = torch.nn.functional.normalize(random.double().mean(dim=1), dim=1)
    best = (mean @ alignment.term_vectors.double().T).amax(dim=1) - mean @ empty
    return float(best.quantile(quantile))
