"""How `benchmarks.flags` compares flags with the key of a planted world: what is a hit, what the rates divide by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import flags as benchmark
from clip_lens_ext import Flags, PlantedWorld
from clip_lens_ext.semantics import Flag

WORLD = PlantedWorld(0)
KEY = benchmark.planted(WORLD)


def test_auroc_counts_pairs() -> None:
    value = torch.randint(0, 6, (30, 2), generator=torch.Generator().manual_seed(1)).double()
    shown = torch.arange(30) % 3 == 0
    for column, found in zip(value.T.tolist(), benchmark.auroc(value, shown).tolist(), strict=True):
        pairs = [(a > b) + 0.5 * (a == b) for i, a in enumerate(column) if shown[i]
                 for j, b in enumerate(column) if not shown[j]]  # fmt: skip
        assert found == pytest.approx(sum(pairs) / len(pairs))


RIGHT, WRONG = [{"right_subject": True}], [{"right_subject": False}]


def entry(**changes: Any) -> dict[str, Any]:
    known = {"hits": ["a", "b"], "flagged": {"a": RIGHT, "b": RIGHT, "c": RIGHT, "d": WRONG, "x": RIGHT},
             "planted": ["a", "b", "c", "d"], "learned": ["a", "c"], "findable": ["a"], "all_things": ["a"],
             "model": dict.fromkeys("abcd", 0.8), "best_latent": dict.fromkeys("abcd", 0.7)}  # fmt: skip
    return known | changes


def test_rates_divide_by_what_was_flagged_and_by_what_is_there() -> None:
    # Of five flagged prompts a, b and c are planted with that subject; flagged latents are about it for a and b.
    assert benchmark.rates(entry()) == pytest.approx((3 / 5, 2 / 5, 2 / 4, 1 / 2, 1))
    nothing = benchmark.rates(entry(hits=[], flagged={}, findable=[]))
    assert nothing[2:4] == (0, 0)
    assert [math.isnan(nothing[place]) for place in (0, 1, 4)] == [True] * 3


def test_the_section_says_what_was_missed_and_over_how_many_seeds() -> None:
    empty = entry(hits=[], flagged={}, all_things=[])
    text = benchmark.section({7: dict.fromkeys(benchmark.KINDS, entry()), 8: dict.fromkeys(benchmark.KINDS, empty)})
    line = next(line for line in text.splitlines() if line.startswith("| artifact | 7 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:7] == ["0.60", "0.40", "0.50", "0.50", "1.00"]
    assert cells[7:] == ["b (0.80), d (0.80)", "c (0.70)", "c, d", "c, d, x"]
    mean = next(line for line in text.splitlines() if line.startswith("| **artifact** | mean |"))
    assert "**0.60** of 1" in mean  # nothing was flagged on the other seed, which has no precision
    assert "**0.25**" in mean
    assert "1 of 2 hits have flagged latents of both" in text


def flag(kind: str, name: str, latent: int, subject: str = "") -> Flag:
    return Flag(kind, benchmark.TEMPLATE.format(name), latent, None, 0.1, 0.0, 0.5, 0.2, "cosine", subject, ())


def test_a_hit_needs_the_prompt_the_subject_and_a_latent_that_is_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    areas = {f"{kind} {what}": torch.tensor([0.9, 0.5]) for kind, of_kind in KEY.items()
             for things in of_kind.values() for what in things}  # fmt: skip
    word = next(iter(KEY["polysemous"]))
    first, second = KEY["polysemous"][word]
    areas[f"polysemous {second}"] = torch.tensor([0.5, 0.6])
    monkeypatch.setattr(benchmark, "auroc_of", lambda trained: areas)
    model = {kind: dict.fromkeys(of_kind, 0.9) for kind, of_kind in KEY.items()}
    model["typographic"] = dict.fromkeys(KEY["typographic"], 0.6)
    monkeypatch.setattr(benchmark, "learned", lambda trained: model)
    artifact, (overlay,) = next(iter(KEY["artifact"].items()))
    compound = WORLD.key.compounds[0]
    plain = next(entry.name for entry in WORLD.classes if not any(entry.name in of_kind for of_kind in KEY.values()))
    others = [part for part in compound.phrase.split() if part != compound.part_word]

    def scored(*given: Flag) -> Any:
        flags = Flags(given, tuple(one.prompt for one in given), {}, {}, {}, {})
        return benchmark.scored(benchmark.Trained(WORLD, None, None), flags)  # type: ignore[arg-type]

    found = scored(flag("artifact", artifact, 0, overlay), flag("artifact", plain, 0, overlay))["artifact"]
    assert (found["hits"], set(found["flagged"])) == ([artifact], {artifact, plain})
    assert scored(flag("artifact", artifact, 0, "another"))["artifact"]["hits"] == []
    assert scored(flag("artifact", artifact, 1, overlay))["artifact"]["hits"] == []
    assert scored(flag("compound noun", compound.phrase, 0, compound.part_word))["compound noun"]["hits"]
    assert not scored(flag("compound noun", compound.phrase, 0, others[0]))["compound noun"]["hits"]
    found = scored(flag("polysemous", word, 0), flag("polysemous", word, 1))["polysemous"]
    assert (found["hits"], found["all_things"]) == ([word], [])  # the second object has no latent of its own
    assert word not in found["findable"]
    assert word in found["learned"]
    found = scored()["typographic"]
    assert found["learned"] == found["findable"] == []
    assert found["planted"] == sorted(KEY["typographic"])
    assert first != second
