"""Latents that matter for a prompt and should not, sorted by what is wrong with them."""

from __future__ import annotations

import math

from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import versions
from clip_lens_ext.semantics.flag_artifact import artifact_flags, edit_kinds, unaligned_flags
from clip_lens_ext.semantics.flag_relevance import Attributions, Relevance
from clip_lens_ext.semantics.flag_results import KINDS, Evidence, Flag, Flags, plain
from clip_lens_ext.semantics.flag_senses import (
    BEST,
    CONTROL,
    MIXED,
    NEAREST,
    auroc_of_names,
    compound_flags,
    other_sense_flags,
    polysemous_flags,
)
from clip_lens_ext.semantics.flag_typographic import typographic_flags
from clip_lens_ext.semantics.intervention_effects import InterventionEffects
from clip_lens_ext.semantics.labels import Alignment
from clip_lens_ext.semantics.prompts import Target
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings
from clip_lens_ext.semantics.references import References
from clip_lens_ext.semantics.sense_results import PictureSenses
from clip_lens_ext.semantics.word_senses import WordSenses


def flag_components(
    attributions: Attributions,
    alignment: Alignment,
    references: References,
    *,
    target: Target,
    senses: PictureSenses | None = None,
    word_senses: WordSenses | None = None,
    interventions: InterventionEffects | None = None,
    embeddings: ReferenceEmbeddings | None = None,
    min_share: float | None = None,
    min_gap: float | None = None,
    min_bimodality: float | None = None,
    min_separation: float | None = None,
    min_purity: float | None = None,
    min_word_cosine: float | None = None,
    min_auroc: float | None = None,
    min_margin: float | None = None,
    min_clarity: float | None = None,
    max_alignment: float | None = None,
    share_quantile: float = 0.98,
    gap_quantile: float = 0.5,
    text_quantile: float = 0.9,
    prompt_quantile: float = 0.8,
    mixed_quantile: float = 0.05,
    control_quantile: float = 0.95,
    min_t: float = 4.0,
    min_deviations: float = 5.0,
    min_rise: float | None = None,
    n_latents: int = 3,
    seed: int = 0,
) -> Flags:
    """Flag latents that matter for a prompt though the prompt gives no reason for it, by kind and with evidence.

    A latent **matters** for a prompt where its share of the attributions is high. It is **expected** by
    `e = max(0, cos(m_j, t) - cos(m_j, t_empty))`, with `m_j` the mean embedding of its references, and **unexpected**
    where its rank by share exceeds its rank by `e`. The judge of `e` may have the model's own faults, so where an edit
    or a group of pictures shows the fault, that decides, and `e` is told. What matters and is unexpected and has no
    such evidence is of the kind `"unexplained"`: nothing is dropped in silence.

    | kind | decided by | needs |
    | --- | --- | --- |
    | `"typographic"` | the prompt's word, drawn and masked | `interventions` of `"text_drawn"` and `"text_masked"` |
    | `"artifact"` | an edit that leaves alone what the prompt names; without edits, clarity and no aligned label | \
`interventions` of any other kind, or `embeddings` |
    | `"compound noun"` | a word of the prompt that alone retrieves other pictures | `senses` |
    | `"polysemous"` | two groups of the prompt's pictures, or another sense | `senses`, or `word_senses` |

    A prompt and latent get one kind, the first of this order: an edit is stronger evidence than a group, and a clear
    latent without a label is a suspicion, weaker than both. A prompt that an edit flags gets no polysemous flag, for
    its pictures are in two groups by what the edit is about.

    Args:
        attributions: over a data set, as `aggregate_attributions` gives them: of each prompt over the pictures that it
            retrieves, and of each single word of a compound likewise.
        alignment: labels, by a score that is a cosine.
        references: the references that the alignment is of.
        target: the prompts of the attributions, embedded by the judge of the alignment: `text_target(judge, prompts)`.
        senses: from `find_picture_senses`.
        word_senses: from `find_word_senses`, by the same judge.
        interventions: from `measure_interventions`.
        embeddings: of the references, by the same judge.
        min_share: from where a latent matters; None: `share_quantile` of all active latents of all prompts.
        min_gap: from where it is unexpected, as difference of ranks in [-1, 1]; None: `gap_quantile` of the gaps of
            the same latents with shuffled prompts. One prompt alone has no such control, and needs it.
        min_bimodality: of the pictures of a prompt that are two groups; None: `mixed_quantile` of prompts mixed.
        min_separation, min_purity: of the split of a compound's pictures from its word's; None: from prompts alone and
            mixed.
        min_word_cosine: of a word of a compound with its pictures; None: the least that a name has.
        min_auroc: of a latent, for the pictures of a group or of a word; None: `mixed_quantile` of the best of each
            name's latents for its pictures.
        min_margin: of another sense over the shown one; None: `control_quantile` of all active latents.
        min_clarity, max_alignment: of a clear latent without a label; None: `control_quantile` of random references.
        share_quantile, gap_quantile, text_quantile, prompt_quantile, mixed_quantile, control_quantile: of the
            controls, in [0, 1]; `text_quantile` is that of other drawn words, `prompt_quantile` that of other prompts
            under a drawn word.
        min_t: least absolute paired t value of a change.
        min_deviations: how many robust standard deviations an edit needs, of the same edits with shuffled prompts.
        min_rise: how much more than the median prompt an edit has to raise its own, instead of that control.
        n_latents: at most so many latents for each prompt, kind and subject (for each group of a polysemous one).
        seed: of random references.

    Returns:
        `Flags`, with every threshold and where it comes from, and in `settings["without_control"]` the kinds of edits
        that were too few to be each other's controls, for which no flag was looked for.

    Raises:
        InputError: results that do not belong together, of other judges too; a score that is no cosine; or one prompt
            without `min_gap`.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(60, seed=3, split="test").images)
        >>> target = cle.text_target(clip, ["a photo of a tulip", "a photo of a duck"])
        >>> attributions = cle.aggregate_attributions(clip.vision, pixels, sae, target, progress=False)
        >>> references = cle.collect_references(clip.vision, pixels, sae, k=5, progress=False)
        >>> words = cle.Vocabulary.from_terms(["tulip", "duck", "sand"])
        >>> alignment = cle.align(references, words, clip, images=pixels, progress=False)
        >>> flags = flag_components(attributions, alignment, references, target=target)
        >>> len(flags.of("unexplained")) == len(flags) > 0
        True

    References:
        Dreyer et al., arXiv 2505.20229, report the kinds and examples. How they compute expected relevance, which
        thresholds they use and how they assign kinds is not published: every rule here is a candidate.
    """
    relevance = Relevance(
        attributions, alignment, target, min_share=min_share, min_gap=min_gap, share_quantile=share_quantile,
        gap_quantile=gap_quantile,
    )  # fmt: skip
    _check(alignment, references, senses, interventions, embeddings, n_latents)
    _check_numbers(
        {"share_quantile": share_quantile, "gap_quantile": gap_quantile, "text_quantile": text_quantile,
         "prompt_quantile": prompt_quantile, "mixed_quantile": mixed_quantile, "control_quantile": control_quantile},
        {"min_share": min_share, "min_gap": min_gap, "min_bimodality": min_bimodality, "min_separation": min_separation,
         "min_purity": min_purity, "min_word_cosine": min_word_cosine, "min_auroc": min_auroc, "min_margin": min_margin,
         "min_clarity": min_clarity, "max_alignment": max_alignment, "min_t": min_t, "min_deviations": min_deviations,
         "min_rise": min_rise},
    )  # fmt: skip
    found: list[Flag] = []
    if interventions is not None:
        found += typographic_flags(relevance, interventions, min_t=min_t, text_quantile=text_quantile,
                                   prompt_quantile=prompt_quantile, n_latents=n_latents)  # fmt: skip
        found += artifact_flags(relevance, interventions, references, embeddings, min_t=min_t,
                                min_deviations=min_deviations, min_rise=min_rise, n_latents=n_latents)  # fmt: skip
    by_edit, two, suspected = {flag.prompt for flag in found}, [], []
    if embeddings is not None and (interventions is None or not edit_kinds(interventions)):
        suspected = unaligned_flags(relevance, references, embeddings, min_clarity=min_clarity, seed=seed,
                                    max_alignment=max_alignment, control_quantile=control_quantile)  # fmt: skip
    if word_senses is not None:
        two += other_sense_flags(relevance, word_senses, min_margin=min_margin, control_quantile=control_quantile,
                                 n_latents=n_latents)  # fmt: skip
    if senses is not None:
        relevance.set("bimodality", min_bimodality, lambda: senses.bimodality_threshold(mixed_quantile),
                      f"quantile {mixed_quantile:g} of two prompts mixed")  # fmt: skip
        relevance.set("word_cosine", min_word_cosine, lambda: senses.cosine_threshold, NEAREST)
        relevance.set("auroc", min_auroc, lambda: auroc_of_names(relevance, senses, mixed_quantile),
                      f"quantile {mixed_quantile:g} {BEST}")  # fmt: skip
        relevance.set("separation", min_separation, lambda: senses.threshold, CONTROL)
        relevance.set("purity", min_purity, lambda: senses.purity_threshold, MIXED)
        found += compound_flags(relevance, senses, n_latents=n_latents)
        two = [*polysemous_flags(relevance, senses, n_latents=n_latents), *two]
    found += [flag for flag in two if flag.prompt not in by_edit]
    first: dict[tuple[str, int], Flag] = {}
    for flag in (*sorted(found, key=lambda flag: (KINDS.index(flag.kind), -flag.strength)), *suspected):
        first.setdefault((flag.prompt, flag.latent), flag)
    found = [*first.values(), *_unexplained(relevance, senses, set(first))]
    more = () if senses is None else senses.prompts
    looked_at = tuple(dict.fromkeys((*relevance.prompts, *more, *(interventions.prompts if interventions else ()))))
    order = {prompt: place for place, prompt in enumerate(looked_at)}
    found.sort(
        key=lambda flag: (KINDS.index(flag.kind), order.get(flag.prompt, len(order)), -flag.strength, flag.latent)
    )
    settings = {"share_quantile": share_quantile, "gap_quantile": gap_quantile, "text_quantile": text_quantile,
                "prompt_quantile": prompt_quantile, "mixed_quantile": mixed_quantile,
                "control_quantile": control_quantile, "min_t": min_t, "min_deviations": min_deviations,
                "min_rise": min_rise, "without_control": relevance.without_control,
                "n_latents": n_latents, "seed": seed, "scorer": alignment.scorer, "judge": alignment.judge,
                "hook_name": alignment.hook_name}  # fmt: skip
    provenance = {"attributions": dict(attributions.provenance), "alignment": alignment.provenance,
                  "versions": versions()}  # fmt: skip
    return Flags(tuple(found), looked_at, relevance.thresholds, relevance.sources, plain(settings), plain(provenance))


def _unexplained(relevance: Relevance, senses: PictureSenses | None, known: set[tuple[str, int]]) -> list[Flag]:
    """What matters and is unexpected, and has no other flag; single words of compounds are not looked at themselves."""
    own = None if senses is None else set(senses.prompts[: len(senses.names)])
    least, source = relevance.thresholds["gap"], relevance.sources["gap"]
    found = []
    for row, latent in (relevance.matters & (relevance.gap >= least)).nonzero().tolist():
        prompt = relevance.prompts[row]
        if (prompt, latent) in known or (own is not None and prompt not in own):
            continue
        gap = float(relevance.gap[row, latent])
        found.append(relevance.flag("unexplained", prompt, latent, gap, "difference of ranks", "",
                                    [Evidence("rank gap", gap, least, source)]))  # fmt: skip
    return found


def _check_numbers(quantiles: dict[str, float], thresholds: dict[str, float | None]) -> None:
    for name, value in quantiles.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is a quantile, in [0, 1]; got {value!r}")
    for name, threshold in thresholds.items():
        if threshold is not None and math.isnan(threshold):
            raise InputError(f"{name} is NaN, which nothing passes: pass a number, or None for the control")


def _check(
    alignment: Alignment,
    references: References,
    senses: PictureSenses | None,
    interventions: InterventionEffects | None,
    embeddings: ReferenceEmbeddings | None,
    n_latents: int,
) -> None:
    if n_latents < 1:
        raise InputError(f"n_latents must be at least 1, got {n_latents}")
    widths = {"the alignment": alignment.d_sae, "the references": references.d_sae}
    hashes = {"the alignment": alignment.provenance.get("sae_sha256"),
              "the references": references.provenance.get("sae_sha256")}  # fmt: skip
    if senses is not None:
        widths["senses"], hashes["senses"] = senses.latent_t.shape[1], senses.provenance.get("sae_sha256")
    if interventions is not None:
        widths["interventions"] = interventions.latent_change.shape[1]
        hashes["interventions"] = interventions.provenance.get("sae_sha256")
    if embeddings is not None:
        if embeddings.judge != alignment.judge:
            raise InputError(f"the references were embedded by {embeddings.judge!r}, and the judge of the alignment is "
                             f"{alignment.judge!r}: both have to be one model")  # fmt: skip
        widths["embeddings"], hashes["embeddings"] = embeddings.d_sae, embeddings.provenance.get("sae_sha256")
    if len(set(widths.values())) > 1:
        raise InputError(f"the results are of SAEs of different width: {widths}")
    if len({one for one in hashes.values() if one is not None}) > 1:
        raise InputError(f"the results are of different SAEs: {hashes}")
