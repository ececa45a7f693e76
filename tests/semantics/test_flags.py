"""Flags: every rule passes on its evidence and fails without any one piece of it, on results that are made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import flags as oracle

from clip_lens_ext.attribution import AttributionSummary, Target
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.semantics import (
    Alignment,
    Flags,
    InterventionEffects,
    LatentActivity,
    PictureSenses,
    ReferenceEmbeddings,
    References,
    WordSenses,
    flag_components,
)
from clip_lens_ext.semantics.flag_artifact import _best_scores
from clip_lens_ext.semantics.flag_relevance import Relevance

D_SAE, WIDTH = 20, 6
NAMES = ("crane", "duck", "paper stool", "gear")
TEXTS = (*NAMES, "paper", "stool")
PROMPTS = tuple(f"a photo of a {text}" for text in TEXTS)
TERMS = ("crane", "duck", "stool", "gear", "sand", "paper")
HASH = {"sae_sha256": "0" * 64}
LOW = {"min_share": 0.1, "min_gap": 0.5}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(value, dim=-1)


def attributions(total: torch.Tensor) -> AttributionSummary:
    active = (total != 0).long()
    return AttributionSummary(
        "attribution_patching", total, active, active, torch.full((len(total),), 5), PROMPTS, 3, True, "cosine", "hook",
        "vision", "all", "kept", (), dict(HASH),
    )  # fmt: skip


def alignment() -> Alignment:
    directions, terms = unit(random(D_SAE, WIDTH, seed=1)), unit(random(len(TERMS), WIDTH, seed=2))
    baseline = 0.1 * random(D_SAE, seed=3)
    # Latent 19 has no references, and so no label.
    directions[19], baseline[19] = torch.nan, torch.nan
    score = directions @ terms.T - baseline[:, None]
    best = score.nan_to_num(-9).sort(dim=1, descending=True)
    term = best.indices[:, :2].clone()
    term[19] = -1
    return Alignment(
        "empty_prompt", "difference of cosines", term, best.values[:, :2].masked_fill(term < 0, torch.nan),
        torch.full((D_SAE,), 4), TERMS, "judge", "v", "hook", "all", {}, dict(HASH), directions, baseline, terms,
    )  # fmt: skip


def references() -> References:
    position = torch.tensor([[7, 7, 7, 3]] * D_SAE)
    zeros = torch.zeros(D_SAE, dtype=torch.int64)
    return References(
        torch.arange(4).expand(D_SAE, 4), torch.ones(D_SAE, 4), position, 4, tuple("abcd"), torch.arange(4), "hook",
        "all", (), None, dict(HASH), LatentActivity(zeros, zeros.double(), zeros.double(), zeros.double(), 4),
    )  # fmt: skip


def effects(**changes: Any) -> InterventionEffects:
    """A drawn and masked word that raises its prompt through latent 2, and a background that raises "duck" by 4."""
    rows = [
        ("draw gear", "text_drawn", "gear", "untouched"), ("draw gear", "text_drawn", "gear", "another word"),
        ("draw duck", "text_drawn", "duck", "untouched"), ("draw crane", "text_drawn", "crane", "untouched"),
        ("mask gear", "text_masked", "gear", "untouched"),
        ("sand", "background", "sand", "untouched"), ("dots", "background", "dots", "untouched"),
    ]  # fmt: skip
    names, kinds, subjects, against = zip(*rows, strict=True)
    change = torch.tensor([
        [0.00, 0.01, 0.02, 0.30], [0.00, 0.00, 0.00, 0.20], [0.01, 0.00, 0.02, 0.10], [0.00, 0.05, 0.00, 0.05],
        [0.00, 0.00, 0.00, -0.2], [0.00, 0.08, 0.002, 0.001], [0.00, 0.01, 0.001, 0.002],
    ], dtype=torch.float64)  # fmt: skip
    latent = torch.zeros(len(rows), D_SAE, dtype=torch.float64)
    latent[0, 2], latent[1, 2], latent[4, 2], latent[5, 4] = 1.0, 0.5, -1.0, 1.0
    fields: dict[str, Any] = {
        "names": names, "kinds": kinds, "subjects": subjects, "against": against, "prompts": PROMPTS[:4],
        "n_pairs": torch.full((len(rows),), 9), "latent_before": latent * 0, "latent_after": latent,
        "latent_change": latent, "latent_error": torch.full_like(latent, 0.01), "prediction_before": change * 0,
        "prediction_after": change, "prediction_change": change, "prediction_error": torch.full_like(change, 0.005),
        "through_row": torch.tensor([0, 0, 5]), "through_prompt": torch.tensor([3, 3, 1]),
        "through_latent": torch.tensor([2, 3, 4]), "through_change": torch.tensor([0.1, -0.05, 0.06]),
        "through_error": torch.tensor([0.01, 0.01, 0.01]), "hook_name": "hook", "token_scope": "all",
        "provenance": dict(HASH),
    }  # fmt: skip
    return InterventionEffects(**(fields | changes))


def edited(
    row: int, column: int, value: float, what: str = "prediction_change", **changes: Any
) -> InterventionEffects:
    tensor = getattr(effects(), what).clone()
    tensor[row, column] = value
    return effects(**{what: tensor}, **changes)


def cosines(*of_text: float) -> torch.Tensor:
    """Of eight pictures each, around a value for each text."""
    return torch.tensor(of_text)[:, None] + torch.tensor([0.03, 0.02, 0.01, 0, 0, -0.01, -0.02, -0.03])


def senses(**changes: Any) -> PictureSenses:
    """Two groups for "crane", told apart by latents 5 and 6; "stool" alone shows something else than "paper stool"."""
    n = 8
    latent_t = torch.zeros(len(TEXTS), D_SAE, dtype=torch.float64)
    latent_t[0, 5], latent_t[0, 6], latent_t[1, 5] = -9.0, 9.0, 9.0
    part_t = torch.zeros(2, D_SAE, dtype=torch.float64)
    part_t[:, 7] = 9.0
    # What matters for a prompt tells its pictures from all others; latent 8, which matters for all, tells none.
    areas = torch.full((len(TEXTS), D_SAE), 0.5)
    areas[0, 5], areas[0, 6], areas[5, 7], areas[1:4, 8] = 0.9, 0.95, 0.95, 0.8
    vectors = unit(random(len(TEXTS), WIDTH, seed=4))
    directions = alignment().directions
    assert directions is not None
    vectors[TEXTS.index("stool")] = vectors[TEXTS.index("paper")] = directions[7]  # latent 7 fits the words
    fields: dict[str, Any] = {
        "names": NAMES, "texts": TEXTS, "prompts": PROMPTS, "sample": torch.arange(n).expand(len(TEXTS), n),
        "cosine": cosines(0.7, 0.6, 0.8, 0.7, 0.3, 0.7),
        "group": torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]).expand(len(TEXTS), n),
        "separation": torch.tensor([0.4, 0.1, 0.1, 0.1, 0.1, 0.1]), "latent_t": latent_t,
        "bimodality": torch.tensor([0.9, 0.7, 0.7, 0.7, 0.7, 0.7]), "mixed_bimodality": torch.tensor([0.8, 0.9, 1.0]),
        "group_auroc": areas[:, None].expand(-1, 2, -1), "text_auroc": areas,
        "chance_t": torch.full((len(TEXTS),), 4.0), "mixed_separation": torch.tensor([0.4, 0.5, 0.4]),
        "mixed_purity": torch.tensor([1.0, 0.9, 0.8]), "part_of": torch.tensor([2, 2]), "part_words": TEXTS[4:],
        "part_separation": torch.tensor([0.1, 0.4]), "part_purity": torch.tensor([0.5, 1.0]), "part_latent_t": part_t,
        "part_chance_t": torch.full((2,), 4.0), "vectors": vectors, "hook_name": "hook", "token_scope": "all",
        "seed": 0, "provenance": dict(HASH),
    }  # fmt: skip
    return PictureSenses(**(fields | changes))


def total() -> torch.Tensor:
    """Latents 5 and 6 matter for the crane, 7 for the stool, 8 for everything; nothing else does."""
    found = torch.full((len(PROMPTS), D_SAE), 0.01, dtype=torch.float64)
    found[0, 5], found[0, 6], found[5, 7], found[:, 8], found[:, 0] = 1.0, 0.8, 1.0, 1.0, 0.0
    return found


def target() -> Target:
    return Target(senses().vectors, PROMPTS)


def flagged(**given: Any) -> Flags:
    settings = {**LOW, "target": target(), **given}
    return flag_components(attributions(total()), alignment(), references(), **settings)


def test_typographic() -> None:
    (flag,) = flagged(interventions=effects()).of("typographic")
    assert (flag.prompt, flag.latent, flag.subject) == ("a photo of a gear", 2, "gear")
    assert flag.strength == flag.number("rise through the latent") == pytest.approx(0.1)
    assert flag.number("t of the rise") == pytest.approx(60)
    assert flag.number("t against another word") == pytest.approx(40)
    assert flag.number("t of the fall with the word masked") == pytest.approx(40)
    assert flag.number("latent: t against another word") == pytest.approx(50)


@pytest.mark.parametrize(
    "broken",
    [
        edited(0, 3, 0.01),  # the prompt hardly rises
        edited(1, 3, 0.01),  # another word does the same
        edited(2, 3, 0.35),  # a word of another prompt raises it more
        edited(0, 1, 0.35),  # another prompt rises more
        edited(4, 3, 0.0),  # masking does nothing
        edited(0, 2, 0.0, "latent_change"),  # the latent does not see the word
        edited(4, 2, 0.0, "latent_change"),  # the latent does not miss it
        edited(1, 2, -1.0, "latent_change"),  # the control does the same to the latent: it reacts to the plate
        effects(through_change=torch.tensor([0.01, -0.05, 0.06])),  # nothing goes through it, for certain
        effects(subjects=("ge", *effects().subjects[1:])),  # a part of a word is no word
    ],
)
def test_typographic_needs_every_piece(broken: InterventionEffects) -> None:
    assert flagged(interventions=broken).of("typographic") == ()


def test_a_word_that_no_masked_picture_has_gets_no_flag_unless_nothing_was_masked() -> None:
    names, kinds, subjects = (list(getattr(effects(), name)) for name in ("names", "kinds", "subjects"))
    names[4], subjects[4] = "mask duck", "duck"
    assert flagged(interventions=effects(names=names, subjects=subjects)).of("typographic") == ()
    kinds[4] = "background"
    (flag,) = flagged(interventions=effects(names=names, subjects=subjects, kinds=kinds)).of("typographic")
    assert (flag.subject, [one.name for one in flag.evidence if "masked" in one.name]) == ("gear", [])


def test_words_are_found_whatever_stands_around_them() -> None:
    prompts = ("a photo of a crane.", "a photo of a Duck.", "a photo of a paper stool.", "A photo of a GEAR.")
    given = effects(prompts=prompts)
    assert [flag.prompt for flag in flagged(interventions=given).of("typographic")] == [prompts[3]]
    assert flagged(interventions=given).about(prompts[3])  # looked at by the edits alone


def test_words_and_prompts_have_a_quantile_each() -> None:
    another_prompt, another_word = edited(0, 1, 0.35), edited(2, 3, 0.35)
    for given, name, share in ((another_prompt, "prompt_quantile", 2 / 3), (another_word, "text_quantile", 0.5)):
        settings: dict[str, Any] = {"prompt_quantile": 0.0, "text_quantile": 0.0}
        assert flagged(interventions=given, **{**settings, name: share}).of("typographic")
        assert not flagged(interventions=given, **{**settings, name: share + 0.01}).of("typographic")


def test_artifact() -> None:
    (flag,) = flagged(interventions=effects()).of("artifact")
    assert (flag.prompt, flag.latent, flag.subject) == ("a photo of a duck", 4, "sand")
    # Medians of the two rows are 0.0015 (sand: 0.001, 0.002 around it, of which torch takes the lower one) and 0.001.
    assert flag.number("rise beyond other prompts") == pytest.approx(0.079)
    assert flag.number("references at one position") == 0.75
    assert flag.edit == "sand"
    # Five times 1.4826 times the median distance from their median, of the eight changes less their row's median.
    rows = [[-0.001, 0.079, 0.001, 0.0], [-0.001, 0.009, 0.0, 0.001]]
    values = sorted(value for row in rows for value in row)
    middle = values[3]
    spread = sorted(abs(value - middle) for value in values)[3]
    threshold = next(one.threshold for one in flag.evidence if one.name == "rise beyond other prompts")
    assert threshold == pytest.approx(5 * 1.4826 * spread, abs=1e-9)


def test_a_prompt_that_names_the_edit_is_no_artifact_of_it() -> None:
    (flag,) = flagged(interventions=effects()).of("artifact")
    assert (flag.prompt, flag.subject) == ("a photo of a duck", "sand")
    subjects = list(effects().subjects)
    subjects[5] = "duck"
    assert flagged(interventions=effects(subjects=subjects), min_rise=0.01).of("artifact") == ()
    # Were "gear" raised more by this edit, which names it, the duck would still be what it raises without naming it.
    subjects[5] = "gear"
    (flag,) = flagged(interventions=edited(5, 3, 0.2, subjects=subjects), min_rise=0.01).of("artifact")
    assert (flag.prompt, flag.subject) == ("a photo of a duck", "gear")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text_quantile": 90}, "text_quantile is a quantile"), ({"prompt_quantile": -3}, "prompt_quantile"),
        ({"mixed_quantile": 7}, "mixed_quantile"), ({"control_quantile": float("nan")}, "control_quantile"),
        ({"min_t": float("nan")}, "min_t is NaN"), ({"min_auroc": float("nan")}, "min_auroc is NaN"),
    ],
)  # fmt: skip
def test_thresholds_that_are_none(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        flagged(senses=senses(), **wrong)


def test_an_sae_of_one_token_says_nothing_of_the_place() -> None:
    flags = flag_components(attributions(total()), alignment(), replace(references(), token_scope="cls"),
                            target=target(), interventions=effects(), **LOW)  # fmt: skip
    assert math.isnan(flags.of("artifact")[0].number("references at one position"))


@pytest.mark.parametrize(
    "broken",
    [
        edited(5, 1, 0.004),  # no further above the median than others
        edited(5, 0, 0.09),  # another prompt rises more
        edited(6, 1, 0.09),  # another background raises it more; that one has no latent that was measured
        edited(5, 1, 0.03, "prediction_error"),  # it may be chance
        effects(through_error=torch.tensor([0.01, 0.01, 0.03])),
        edited(5, 4, -1.0, "latent_change"),  # the latent falls: it was about what the edit took away
    ],
)
def test_artifact_needs_every_piece(broken: InterventionEffects) -> None:
    assert flagged(interventions=broken).of("artifact") == ()


def test_polysemous() -> None:
    flags = flagged(senses=senses()).of("polysemous")
    assert [(flag.prompt, flag.latent, flag.number("group")) for flag in flags] == [
        ("a photo of a crane", 5, 0), ("a photo of a crane", 6, 1)
    ]  # fmt: skip
    assert flags[0].number("share of the pictures in its group") == 0.625
    assert flags[0].share == pytest.approx(1 / (2.8 + 16 * 0.01))


@pytest.mark.parametrize(
    "broken",
    [
        {"bimodality": torch.full((6,), 0.7)},  # no two groups
        {"chance_t": torch.full((6,), 10.0)},  # random groups differ as much
        {"mixed_bimodality": torch.tensor([0.95])},  # two prompts differ far more
        {"group_auroc": torch.full((6, 2, D_SAE), 0.6)},  # active on the group, and on many other pictures
    ],
)
def test_polysemous_needs_every_piece(broken: dict[str, torch.Tensor]) -> None:
    assert flagged(senses=senses(**broken)).of("polysemous") == ()


def test_polysemous_latents_have_to_matter() -> None:
    assert flagged(senses=senses(), min_share=0.9).of("polysemous") == ()


def test_a_flag_says_how_many_latents_passed() -> None:
    latent_t = senses().latent_t.clone()
    latent_t[0, 6] = -8.0  # now both tell the first group
    both = {"senses": senses(latent_t=latent_t)}
    values = effects().latent_after.clone()
    values[:, 3] = values[:, 2]  # reads the word as latent 2 does
    edits = effects(latent_after=values, latent_change=values, through_change=torch.tensor([0.1, 0.05, 0.06]))
    for kind, given in (("polysemous", both), ("typographic", {"interventions": edits})):
        for n_latents, n_flags in ((1, 1), (3, 2)):
            found = flagged(**given, n_latents=n_latents).of(kind)  # type: ignore[arg-type]
            assert len(found) == n_flags
            assert {flag.number("latents that pass") for flag in found} == {2}


def test_too_few_pictures_tell_no_groups() -> None:
    unknown = torch.full((6,), float("nan"))
    few = senses(bimodality=unknown, mixed_bimodality=unknown[:3])
    assert few.bimodality_threshold() == float("inf")
    assert not few.to_frame().two_groups.any()
    assert flagged(senses=few).of("polysemous") == flagged(senses=senses(bimodality=unknown)).of("polysemous") == ()
    part = senses(mixed_bimodality=torch.tensor([float("nan"), 0.8, 0.8]))
    assert part.bimodality_threshold() == pytest.approx(0.8)


def test_the_latent_that_tells_a_group_best_comes_first() -> None:
    latent_t = senses().latent_t.clone()
    latent_t[0, 6] = -8.0  # 5 and 6 both tell the first group: 5 has the greater share and t, 6 the greater area
    (flag,) = flagged(senses=senses(latent_t=latent_t), n_latents=1).of("polysemous")
    assert (flag.latent, flag.number("latent: AUROC of its group")) == (6, pytest.approx(0.95))
    part_t, values = senses().part_latent_t.clone(), total()
    part_t[1, 9], values[5, 9] = 20.0, 2.0
    for area, first in ((0.97, 9), (0.9, 7)):
        areas = senses().text_auroc.clone()
        areas[5, 9] = area
        flags = flag_components(attributions(values), alignment(), references(), target=target(), n_latents=1,
                                senses=senses(part_latent_t=part_t, text_auroc=areas), **LOW)  # fmt: skip
        assert [flag.latent for flag in flags.of("compound noun")] == [first]


def test_an_edit_is_stronger_evidence_than_two_groups() -> None:
    two = senses(bimodality=torch.tensor([0.9, 0.9, 0.7, 0.7, 0.7, 0.7]),
                 group_auroc=torch.full((6, 2, D_SAE), 0.9))  # fmt: skip
    values = total()
    values[1, 5] = 1.0
    both = flag_components(attributions(values), alignment(), references(), target=target(), senses=two,
                           interventions=effects(), **LOW)  # fmt: skip
    assert {flag.prompt for flag in both.of("polysemous")} == {"a photo of a crane"}
    alone = flag_components(attributions(values), alignment(), references(), target=target(), senses=two, **LOW)
    assert {flag.prompt for flag in alone.of("polysemous")} == {"a photo of a crane", "a photo of a duck"}


def test_compound() -> None:
    (flag,) = flagged(senses=senses()).of("compound noun")
    assert (flag.prompt, flag.latent, flag.subject) == ("a photo of a paper stool", 7, "stool")
    assert flag.number("the word is the head") == 1
    assert flag.share == pytest.approx(
        0.01 / (1.0 + 18 * 0.01)
    )  # what it does for the prompt itself is next to nothing


@pytest.mark.parametrize(
    "broken",
    [
        {"part_separation": torch.tensor([0.1, 0.1])},
        {"part_purity": torch.tensor([0.5, 0.5])},
        {"part_latent_t": torch.zeros(2, D_SAE).double()},
        {"part_chance_t": torch.full((2,), 10.0)},  # random halves differ as much
        {"cosine": cosines(0.7, 0.6, 0.8, 0.7, 0.3, 0.59)},  # the word names nothing
    ],
)
def test_compound_needs_every_piece(broken: dict[str, torch.Tensor]) -> None:
    assert flagged(senses=senses(**broken)).of("compound noun") == ()


def test_a_compound_s_latent_tells_the_word_s_pictures_from_all_others() -> None:
    areas = senses().text_auroc.clone()
    areas[5, 7] = 0.7  # below what the best latents do for the names
    assert flagged(senses=senses(text_auroc=areas)).of("compound noun") == ()
    assert flagged(senses=senses(text_auroc=areas), min_auroc=0.7).of("compound noun") != ()


def test_whether_a_compound_s_latent_fits_its_word_better_is_told() -> None:
    same = replace(target(), vectors=unit(random(1, WIDTH, seed=4)).expand(6, -1))
    (flag,) = flagged(senses=senses(), target=same).of("compound noun")
    assert flag.number("score for the word less that for the prompt") == pytest.approx(0, abs=1e-15)
    # Vectors of the model are not those of another judge: the target alone says what fits.
    other = senses(vectors=unit(random(1, 3, seed=4)).expand(6, -1))
    (flag,) = flagged(senses=other).of("compound noun")
    score = alignment().score_vectors(target().vectors)[7]
    better = float(score[TEXTS.index("stool")] - score[TEXTS.index("paper stool")])
    assert flag.number("score for the word less that for the prompt") == pytest.approx(better)


def test_the_controls_of_groups_by_hand() -> None:
    thresholds = flagged(senses=senses(), mixed_quantile=0.5).thresholds
    assert thresholds["bimodality"] == pytest.approx(0.9)  # of 0.8, 0.9, 1.0
    assert thresholds["word_cosine"] == pytest.approx(0.6)  # of 0.7, 0.6, 0.8, 0.7: words are not asked
    # The best latents that matter: 0.95 (latent 6) for the crane, 0.8 (latent 8) for the three others.
    assert thresholds["auroc"] == pytest.approx(0.8)
    assert flagged(senses=senses(), mixed_quantile=1.0).thresholds["auroc"] == pytest.approx(0.95)
    least = flagged(senses=senses(), min_share=5.0).thresholds["auroc"]
    assert least == 1.0  # nothing matters, so nothing is a control


def test_too_few_edits_are_no_control() -> None:
    one_each = effects(kinds=(*effects().kinds[:5], "background", "crop"))
    none = effects(prediction_change=torch.zeros(7, 4).double())
    for given, kinds in ((one_each, ["background", "crop"]), (none, ["background"])):
        with pytest.warns(UserWarning, match="are no control"):
            flags = flagged(interventions=given)
        assert flags.of("artifact") == ()
        assert flags.settings["without_control"] == kinds
    flags = flagged(interventions=one_each, min_rise=0.05)
    (flag,) = flags.of("artifact")
    assert (flag.latent, flag.edit, flags.settings["without_control"]) == (4, "sand", [])
    assert {one.source for one in flag.evidence if one.name == "rise beyond other prompts"} == {"the caller"}
    assert flagged(interventions=one_each, min_rise=0.09).of("artifact") == ()


def test_other_sense_of_a_word() -> None:
    directions = alignment().directions
    assert directions is not None
    found = WordSenses(PROMPTS[:1] * 2, ("crane",) * 2, ("crane.n.01", "crane.n.02"), ("bird", "machine"),
                       directions[[5, 6]].clone(), "judge")  # fmt: skip
    values = total()
    values[:, 8] = 0.01
    flags = flag_components(attributions(values), alignment(), references(), target=target(), word_senses=found,
                            control_quantile=0.5, **LOW)  # fmt: skip
    (flag,) = flags.of("polysemous")
    assert (flag.latent, flag.subject) == (6, "crane.n.02, not crane.n.01")
    expected = 1 - float(directions[6] @ directions[5])
    assert flag.strength == pytest.approx(expected)
    none = flag_components(attributions(values), alignment(), references(), target=target(), word_senses=found,
                           min_margin=expected + 1e-9, **LOW)  # fmt: skip
    assert none.of("polysemous") == ()
    with pytest.raises(InputError, match="one model"):
        flagged(word_senses=replace(found, judge="other"))


def test_what_has_no_rule_is_unexplained() -> None:
    flags = flagged(senses=senses())
    assert {flag.latent for flag in flags.of("unexplained")} <= {5, 6, 7, 8}
    prompts = {flag.prompt for flag in flags.of("unexplained")}
    assert prompts <= set(PROMPTS[:4])  # single words of a compound are not looked at themselves
    pairs = [(flag.prompt, flag.latent) for flag in flags.flags]
    assert len(set(pairs)) == len(pairs)
    assert all(flag.unexpectedness >= 0.5 and flag.share >= 0.1 for flag in flags.of("unexplained"))


def test_shares_gaps_and_expectations_by_their_formulas() -> None:
    values = total() + 0.3 * random(len(PROMPTS), D_SAE, seed=9)
    values[:, 0] = 0.0
    summary, labels = attributions(values), alignment()
    flags = flag_components(summary, labels, references(), target=target(), min_share=0.0, min_gap=-1.0)
    alive = list(range(1, D_SAE))
    vectors = target().vectors
    assert labels.directions is not None
    assert labels.baseline is not None
    checked = 0
    for flag in flags.flags:
        row = PROMPTS.index(flag.prompt)
        cosine = labels.directions[:, None] @ vectors[row] - labels.baseline[:, None]
        expected = [max(0.0, float(value)) if value == value else 0.0 for value in cosine[:, 0]]
        share = [float(value) / float(values[row].clamp(min=0).sum()) for value in values[row]]
        assert flag.expected == pytest.approx(expected[flag.latent], abs=1e-12)
        assert flag.share == pytest.approx(share[flag.latent], rel=1e-12)
        gap = oracle.rank([share[j] for j in alive], share[flag.latent]) - oracle.rank(
            [expected[j] for j in alive], expected[flag.latent]
        )
        assert flag.unexpectedness == pytest.approx(gap, abs=1e-12)
        checked += 1
    assert checked > 30


def test_thresholds_from_controls() -> None:
    values = total() + 0.3 * random(len(PROMPTS), D_SAE, seed=9)
    values[:, 0] = 0.0
    flags = flag_components(attributions(values), alignment(), references(), target=target(), share_quantile=0.9)
    shares = values / values.clamp(min=0).sum(dim=1, keepdim=True)
    assert flags.thresholds["share"] == pytest.approx(float(shares[:, 1:].flatten().quantile(0.9)))
    assert flags.sources["share"].startswith("quantile 0.9")
    labels, vectors = alignment(), target().vectors
    assert labels.directions is not None
    assert labels.baseline is not None
    expected = (labels.directions @ vectors.T - labels.baseline[:, None]).nan_to_num(0).clamp(min=0).T
    gaps = []
    for row in range(len(PROMPTS)):
        own = [float(value) for value in shares[row, 1:]]
        for other in range(len(PROMPTS)):
            wanted = [float(value) for value in expected[other, 1:]]
            for j in range(D_SAE - 1):
                if other != row and own[j] >= flags.thresholds["share"]:
                    gaps.append(oracle.rank(own, own[j]) - oracle.rank(wanted, wanted[j]))
    assert flags.thresholds["gap"] == pytest.approx(float(torch.tensor(gaps).double().quantile(0.5)))
    named = flag_components(attributions(values), alignment(), references(), target=target(), min_share=0.3)
    assert (named.thresholds["share"], named.sources["share"]) == (0.3, "the caller")
    assert all(flag.share >= 0.3 for flag in named.flags)


def test_one_prompt_has_no_control_of_the_gap() -> None:
    every = attributions(total())
    cut = {name: getattr(every, name)[:1] for name in ("total", "n_top", "n_active", "n_images", "labels")}
    one = replace(every, **cut)
    own = replace(target(), vectors=target().vectors[:1], labels=PROMPTS[:1])
    with pytest.raises(InputError, match="or min_gap="):
        flag_components(one, alignment(), references(), target=own)
    assert flag_components(one, alignment(), references(), target=own, min_gap=0.0).thresholds["gap"] == 0
    assert len(flag_components(attributions(total()), alignment(), references(), target=target(), min_share=2.0)) == 0


def test_every_flag_says_what_it_means() -> None:
    flags = flagged(senses=senses(), interventions=effects())
    meaning = {flag.kind: flag.meaning for flag in flags.flags}
    assert "“stool” alone shows something else than “a photo of a paper stool”: latent 7" in meaning["compound noun"]
    assert "46.1% of what speaks for the word, and 0.8% of what speaks for the prompt." in meaning["compound noun"]
    assert "The word “gear”, drawn on a picture, raises “a photo of a gear”: latent 2" in meaning["typographic"]
    assert "The edit “sand” raises “a photo of a duck”, which does not name it: latent 4" in meaning["artifact"]
    assert "retrieves are two groups" in meaning["polysemous"]
    assert meaning["unexplained"].startswith("Not explained: ")
    assert flags.to_frame().meaning.tolist() == [flag.meaning for flag in flags.flags]


def test_without_edits_clarity_and_labels_decide() -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(80, WIDTH, generator=generator, dtype=torch.float64)
    row = torch.randint(0, 80, (D_SAE, 4), generator=generator)
    row[5] = torch.arange(4)
    vectors[:4] = vectors[0] + 0.01 * vectors[:4]  # latent 5 shows one thing
    embeddings = ReferenceEmbeddings(vectors, torch.arange(80), row, torch.ones(D_SAE, 4), torch.zeros(D_SAE), "judge",
                                     "hook", "all", dict(HASH))  # fmt: skip
    open_ = {**LOW, "min_gap": -1.0, "embeddings": embeddings}
    (flag,) = flagged(**open_, max_alignment=9.0).of("artifact")
    assert flag.latent == 5
    assert flag.number("clarity") > 0.9
    assert flagged(**open_, max_alignment=-9.0).of("artifact") == ()
    assert flagged(**open_, max_alignment=9.0, min_clarity=1.1).of("artifact") == ()
    assert flag.edit == ""
    assert flag.number("references at one position") == 0.75
    assert flagged(**open_, max_alignment=9.0, interventions=effects()).of("artifact")[0].latent == 4
    # A suspicion is weaker than two groups, and takes none of them away.
    groups = flagged(**open_, max_alignment=9.0, senses=senses())
    assert [flag.latent for flag in groups.of("polysemous")] == [5, 6]
    with pytest.raises(InputError, match="both have to be one model"):
        flagged(**{**open_, "embeddings": replace(embeddings, judge="other")})
    assert flagged(**open_).thresholds == flagged(**open_).thresholds
    assert flagged(**open_).thresholds["clarity"] != flagged(**open_, seed=1).thresholds["clarity"]


def test_the_control_of_labels_knows_the_empty_prompt() -> None:
    labels, empty = alignment(), unit(random(1, WIDTH, seed=8))[0]
    assert labels.directions is not None
    assert labels.term_vectors is not None
    known = replace(labels, baseline=labels.directions @ empty)
    sets = random(30, 4, WIDTH, seed=9)
    best = []
    for one in sets:
        middle = unit(one.mean(dim=0))
        best.append(max(float(middle @ term) for term in labels.term_vectors) - float(middle @ empty))
    relevance = Relevance(attributions(total()), known, target(), min_share=0.1, min_gap=0.5, share_quantile=0.9,
                          gap_quantile=0.5)  # fmt: skip
    assert _best_scores(relevance, sets, 0.5) == pytest.approx(float(torch.tensor(best).double().quantile(0.5)))


def test_table_and_file(tmp_path: Path) -> None:
    flags = flagged(senses=senses(), interventions=effects())
    frame = flags.to_frame()
    assert len(frame) == len(flags)
    sentence = frame[frame.kind == "polysemous"].evidence.iloc[0]
    assert "bimodality of the pictures 0.9 (at least 0.81, from quantile 0.05 of two prompts mixed)" in sentence
    flags.save(tmp_path / "flags.safetensors")
    found = Flags.load(tmp_path / "flags.safetensors")
    assert [str(flag) for flag in found.flags] == [str(flag) for flag in flags.flags]
    assert (found.thresholds, found.settings, found.prompts) == (flags.thresholds, flags.settings, flags.prompts)
    assert found.about("a photo of a gear") == flags.about("a photo of a gear")
    with pytest.raises(LoadError, match=r"Flags\.save"):
        Flags.load(tmp_path / "none")
    with pytest.raises(InputError, match="no kind"):
        flags.of("compound")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no flag was looked for"):
        flags.about("a gear")
    with pytest.raises(InputError, match="no evidence"):
        flags.flags[0].number("nothing")


def test_results_that_do_not_belong_together() -> None:
    summary = attributions(total())
    with pytest.raises(InputError, match="pass the prompts that"):
        flag_components(summary, alignment(), references(), target=replace(target(), labels=PROMPTS[::-1]))
    with pytest.raises(InputError, match="two SAEs"):
        flag_components(replace(summary, provenance={"sae_sha256": "1"}), alignment(), references(), target=target())
    with pytest.raises(InputError, match="different SAEs"):
        flagged(senses=senses(provenance={"sae_sha256": "1"}))
    with pytest.raises(InputError, match="different width"):
        flagged(senses=senses(latent_t=torch.zeros(6, 3)))
    with pytest.raises(InputError, match="no cosine"):
        flag_components(summary, replace(alignment(), directions=None), references(), target=target())
    with pytest.raises(InputError, match="quantiles"):
        flagged(share_quantile=1.5)
    with pytest.raises(InputError, match="n_latents"):
        flagged(n_latents=0)
