"""Polysemous and compound flags: what a word names, beside what the prompt's pictures show."""

from __future__ import annotations

import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics.flag_relevance import Relevance
from clip_lens_ext.semantics.flag_results import PASS, WORD_SHARE, Evidence, Flag
from clip_lens_ext.semantics.sense_results import PictureSenses
from clip_lens_ext.semantics.word_senses import WordSenses

CONTROL = "the harmonic mean of the medians of one prompt and of two mixed"
NEAREST = "the least of the names' medians"
BEST = "of the best latent of each name"


def auroc_of_names(relevance: Relevance, senses: PictureSenses, quantile: float) -> float:
    """From where a latent is about some pictures: a low quantile, over the names, of the best that a latent does.

    For each name, of the latents that matter for it, the greatest AUROC between its pictures and all others.
    """
    rows = {place: relevance.number(prompt) for place, prompt in enumerate(senses.prompts[: len(senses.names)])}
    best = [senses.text_auroc[place, relevance.matters[row]].max() for place, row in rows.items()
            if row is not None and bool(relevance.matters[row].any())]  # fmt: skip
    return float(torch.stack(best).double().quantile(quantile)) if best else 1.0
CHANCE = "the greatest of any latent between random groups"
MIXED = "half-way between chance and two prompts mixed"


def polysemous_flags(relevance: Relevance, senses: PictureSenses, *, n_latents: int) -> list[Flag]:
    """Flag a prompt whose pictures are two groups that differ as the pictures of two prompts do.

    Needed of the prompt: `bimodality >= ` the threshold. Needed of the latent: it matters for the prompt, is active on
    one group rather than the other, more than any latent is between random groups of the same sizes, and tells the
    group from all other pictures, as some latent does for a name.

    Args:
        relevance: shares and expectations.
        senses: the groups and their controls.
        n_latents: at most so many latents of each group, those first that tell it best.
    """
    found: list[Flag] = []
    threshold, source = relevance.thresholds["bimodality"], relevance.sources["bimodality"]
    least, least_source = relevance.thresholds["auroc"], relevance.sources["auroc"]
    for place, name in enumerate(senses.names):
        prompt, two = senses.prompts[place], float(senses.bimodality[place])
        row = relevance.number(prompt)
        if row is None or not two >= threshold:  # NaN: too few pictures to tell
            continue
        for group in (0, 1):
            sided = senses.latent_t[place] * (1 if group else -1)
            area = senses.group_auroc[place, group]
            own = relevance.matters[row] & (sided >= senses.chance_t[place]) & (area >= least)
            latents = own.nonzero().flatten()
            n_passing = len(latents)
            latents = latents[area[latents].argsort(descending=True, stable=True)][:n_latents]
            share_of_group = float((senses.group[place] == group).double().mean())
            chance = float(senses.chance_t[place])
            for latent in latents.tolist():
                evidence = [
                    Evidence("bimodality of the pictures", two, threshold, source),
                    Evidence("latent: t between the groups", float(sided[latent]), chance, CHANCE),
                    Evidence("latent: AUROC of its group", float(area[latent]), least, least_source),
                    Evidence("share of the pictures in its group", share_of_group),
                    Evidence("group", group),
                    Evidence(PASS, n_passing),
                ]
                found.append(relevance.flag("polysemous", prompt, latent, two, "share of the spread", name, evidence))
    return found


def compound_flags(relevance: Relevance, senses: PictureSenses, *, n_latents: int) -> list[Flag]:
    """Flag a prompt of several words of which one alone names something else than the prompt's pictures show.

    Needed of a word: it names something, for its pictures are as near to it as those of some name are; the pictures
    that it retrieves alone and those of the prompt are two groups, `separation >= ` the threshold, and the split gives
    them back, `purity >= ` its threshold. Needed of the latent: it matters for the word alone, is active on the word's
    pictures rather than on the prompt's, and tells them from all other pictures, as some latent does for a name. What
    it does for the prompt itself is told by its share there.

    Args:
        relevance: shares and expectations; the prompt and the word's own have to be among the prompts.
        senses: the parts and their controls.
        n_latents: at most so many latents, those first that tell the word's pictures best.
    """
    found: list[Flag] = []
    threshold, source = relevance.thresholds["separation"], relevance.sources["separation"]
    least_pure, pure_source = relevance.thresholds["purity"], relevance.sources["purity"]
    least, least_source = relevance.thresholds["auroc"], relevance.sources["auroc"]
    least_near, near_source = relevance.thresholds["word_cosine"], relevance.sources["word_cosine"]
    for part, (whole, word) in enumerate(zip(senses.part_of.tolist(), senses.part_words, strict=True)):
        separation, pure = float(senses.part_separation[part]), float(senses.part_purity[part])
        place = senses.texts.index(word)
        row, of_whole = relevance.number(senses.prompts[place]), relevance.number(senses.prompts[whole])
        near = float(senses.cosine[place].median())
        if row is None or of_whole is None or separation < threshold or pure < least_pure or near < least_near:
            continue
        t, chance = senses.part_latent_t[part], float(senses.part_chance_t[part])
        better = relevance.score[row] - relevance.score[of_whole]
        area = senses.text_auroc[place]
        own = relevance.matters[row] & (t >= chance) & (area >= least)
        latents = own.nonzero().flatten()
        n_passing = len(latents)
        latents = latents[area[latents].argsort(descending=True, stable=True)][:n_latents]
        words = senses.names[whole].split()
        for latent in latents.tolist():
            evidence = [
                Evidence("separation from the word's own pictures", separation, threshold, source),
                Evidence("purity of the split", pure, least_pure, pure_source),
                Evidence("cosine of the word's pictures", near, least_near, near_source),
                Evidence(WORD_SHARE, float(relevance.share[row, latent]), relevance.thresholds["share"],
                         relevance.sources["share"]),
                Evidence("score for the word less that for the prompt", float(better[latent])),
                Evidence("latent: t between the pictures", float(t[latent]), chance, CHANCE),
                Evidence("latent: AUROC of the word's pictures", float(area[latent]), least, least_source),
                Evidence("the word is the head", float(word == words[-1])),
                Evidence(PASS, n_passing),
            ]  # fmt: skip
            found.append(relevance.flag("compound noun", senses.prompts[whole], latent, separation,
                                        "share of the spread", word, evidence))  # fmt: skip
    return found


def other_sense_flags(
    relevance: Relevance, senses: WordSenses, *, min_margin: float | None, control_quantile: float, n_latents: int
) -> list[Flag]:
    """Flag latents that fit another sense of a word of the prompt than the one that its latents show.

    The sense that is shown is the one with the greatest score of the latents that matter, weighted by their shares. A
    latent that matters and fits another sense better is flagged where its margin, the score of that sense less that of
    the shown one, is at least a quantile of the margins of all active latents.

    Args:
        relevance: shares and expectations.
        senses: by the judge of the alignment.
        min_margin: threshold of the caller; None: `control_quantile` of all active latents.
        control_quantile: of the control.
        n_latents: at most so many latents of a prompt and word, greatest margin first.
    """
    if senses.judge != relevance.alignment.judge:
        raise InputError(
            f"the senses were embedded by {senses.judge!r}, and the judge of the alignment is "
            f"{relevance.alignment.judge!r}: both have to be one model"
        )
    words = dict.fromkeys(zip(senses.prompts, senses.words, strict=True))
    found: list[Flag] = []
    for prompt, word in words:
        row = relevance.number(prompt)
        if row is None or not bool(relevance.matters[row].any()):
            continue
        own = [i for i, pair in enumerate(zip(senses.prompts, senses.words, strict=True)) if pair == (prompt, word)]
        score = relevance.alignment.score_vectors(senses.vectors[own]).double().nan_to_num(0)
        matters = relevance.matters[row]
        shown = int((relevance.share[row, matters, None] * score[matters]).sum(dim=0).argmax())
        best = score.max(dim=1)
        margin = best.values - score[:, shown]
        alive = margin[relevance.alive[row]]
        least = float(alive.quantile(control_quantile)) if min_margin is None else min_margin
        source = f"quantile {control_quantile:g} of all active latents" if min_margin is None else "the caller"
        latents = (matters & (best.indices != shown) & (margin >= least)).nonzero().flatten()
        for latent in latents[margin[latents].argsort(descending=True, stable=True)][:n_latents].tolist():
            evidence = [
                Evidence("margin of the other sense", float(margin[latent]), least, source),
                Evidence("score for the other sense", float(best.values[latent])),
                Evidence("score for the shown sense", float(score[latent, shown])),
                Evidence(PASS, len(latents)),
            ]
            subject = f"{senses.senses[own[int(best.indices[latent])]]}, not {senses.senses[own[shown]]}"
            found.append(relevance.flag("polysemous", prompt, latent, float(margin[latent]), "difference of cosines",
                                        subject, evidence))  # fmt: skip
    return found
