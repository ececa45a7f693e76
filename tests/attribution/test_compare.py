"""`compare` gives what its parts give, names what it left out, and says in words what the numbers say."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from oracles.sites import make
from torch import Tensor

from clip_lens_ext.attribution import (
    METHODS,
    Attribution,
    Comparison,
    activation_energy,
    attribution_patching,
    compare,
    direction_target,
    exact_ablation,
    faithfulness,
    frozen_layer_norm,
    gradient_dropping,
    integrated_gradients,
    logit_lens,
    logit_lens_scores,
    open_site,
    random_attribution,
)
from clip_lens_ext.attribution.methods import find_method
from clip_lens_ext.errors import InputError
from clip_lens_ext.towers import HookedTower

PATCHES = ("vision", "plain", "blocks.0.hook_resid_post", "patches", 48)
ALL = ("vision", "plain", "blocks.0.hook_resid_post", "all", 48)  # where every method has something to say
POOLED = ("vision", "plain", "hook_pooled", "pooled", 48)
QUICK: dict[str, Any] = {"n_steps": 4, "k": 3, "n_bootstrap": 40, "progress": False}


def parts(site: Any = PATCHES, batch: int = 3) -> tuple[HookedTower, Tensor, Any, Any]:
    model, x, sae, directions = make(site, batch=batch)
    return HookedTower(model, model_name="tiny"), x, sae, direction_target(directions)


def test_every_method_of_the_registry_can_be_called_alike() -> None:
    tower, x, sae, target = parts(ALL)
    site = open_site(tower, x, sae)
    for name in METHODS:
        found = find_method(name)(tower, site, sae, target)
        if isinstance(found, Attribution):
            assert found.method == name
        else:
            assert found.shape == (3, 37)
    assert torch.equal(METHODS["logit_lens_of_all_latents"](tower, site, sae, target),
                       logit_lens_scores(tower, sae, target))  # fmt: skip
    with pytest.raises(InputError, match=r"no method 'logitlens'; there are .*did you mean 'logit_lens'"):
        find_method("logitlens")


def test_it_is_what_its_parts_are() -> None:
    tower, x, sae, target = parts(ALL)
    found = compare(tower, x, sae, target, seed=5, **QUICK)
    assert found.faithfulness.methods == tuple(METHODS) == (
        "attribution_patching", "integrated_gradients", "gradient_dropping", "frozen_layer_norm",
        "activation_x_logit_lens", "activation_x_logit_lens_frozen_norm", "activation_x_logit_lens_embedding",
        "logit_lens", "logit_lens_frozen_norm", "logit_lens_embedding", "logit_lens_of_all_latents",
        "activation_energy", "exact_ablation", "random",
    )  # fmt: skip
    assert found.faithfulness.unsigned == ("gradient_dropping",)
    assert set(METHODS) == {*found.attributions, *found.scores}
    assert [*found.scores] == ["logit_lens_of_all_latents"]
    by_hand = {
        "attribution_patching": attribution_patching(tower, x, sae, target),
        "integrated_gradients": integrated_gradients(tower, x, sae, target, n_steps=32),
        "gradient_dropping": gradient_dropping(tower, x, sae, target),
        "frozen_layer_norm": frozen_layer_norm(tower, x, sae, target),
        "activation_x_logit_lens": logit_lens(tower, x, sae, target, times_activation=True),
        **{
            f"activation_x_logit_lens_{variant}": logit_lens(
                tower, x, sae, target, variant=variant, times_activation=True
            )
            for variant in ("frozen_norm", "embedding")
        },
        "logit_lens": logit_lens(tower, x, sae, target),
        **{f"logit_lens_{variant}": logit_lens(tower, x, sae, target, variant=variant)
           for variant in ("frozen_norm", "embedding")},
        "logit_lens_of_all_latents": logit_lens_scores(tower, sae, target),
        "activation_energy": activation_energy(tower, x, sae, target),
        "exact_ablation": exact_ablation(tower, x, sae, target),
        "random": random_attribution(tower, x, sae, target, seed=5),
    }
    for name, result in found.attributions.items():
        assert torch.equal(result.value, by_hand[name].value), name
    expected = faithfulness(tower, x, sae, target, by_hand, seed=5, **QUICK)
    for name in ("deletion", "insertion", "rank_correlation", "overlap"):
        assert torch.equal(getattr(found.faithfulness, name), getattr(expected, name)), name
    assert found.notes == ()
    assert found.to_frame().equals(expected.to_frame())


@pytest.mark.parametrize("kept", [True, False])
def test_the_site_and_its_settings_reach_every_method(kept: bool) -> None:
    tower, x, sae, target = parts()
    error_term: Any = "kept" if kept else "dropped"
    found = compare(tower, x, sae, target, error_term=error_term, token_scope="all", batch_size=7, **QUICK)
    assert {(one.error_term, one.token_scope) for one in found.attributions.values()} == {(error_term, "all")}
    assert (found.faithfulness.error_term, found.faithfulness.token_scope) == (error_term, "all")


def test_methods_by_name_by_function_and_by_mapping() -> None:
    tower, x, sae, target = parts()
    ends = ("exact_ablation", "random")
    by_name = compare(tower, x, sae, target, methods=["logit_lens", "attribution_patching"], **QUICK)
    assert by_name.faithfulness.methods == ("logit_lens", "attribution_patching", *ends)
    assert compare(tower, x, sae, target, methods="logit_lens", **QUICK).faithfulness.methods == ("logit_lens", *ends)
    by_function = compare(tower, x, sae, target, methods=[attribution_patching, "logit_lens"], **QUICK)
    assert by_function.faithfulness.methods == ("attribution_patching", "logit_lens", *ends)
    own = {"mine": attribution_patching, "lens": partial(logit_lens, times_activation=True)}
    found = compare(tower, x, sae, target, methods=own, **QUICK)
    assert found.faithfulness.methods == ("mine", "lens", *ends)
    assert torch.equal(found.attributions["lens"].value, logit_lens(tower, x, sae, target, times_activation=True).value)
    first = compare(tower, x, sae, target, methods=["exact_ablation", "random", "logit_lens"], **QUICK)
    assert first.faithfulness.methods == (*ends, "logit_lens")
    for methods, message in (
        (["attribution_patchin"], "did you mean 'attribution_patching'"),
        (["logit_lens", logit_lens], "logit_lens is asked for twice"),
        ([partial(logit_lens)], "has no name"),
    ):
        with pytest.raises(InputError, match=message):
            compare(tower, x, sae, target, methods=methods, **QUICK)  # type: ignore[arg-type]


def test_an_exact_ablation_of_a_part() -> None:
    tower, x, sae, target = parts()
    exact = exact_ablation(tower, x, sae, target)
    keep = torch.arange(len(exact)) % 2 == 0
    part = replace(exact, sample=exact.sample[keep], latent=exact.latent[keep], value=exact.value[keep],
                   activation=exact.activation[keep])  # fmt: skip
    found = compare(tower, x, sae, target, exact=part, methods=["attribution_patching"], **QUICK)
    assert found.attributions["exact_ablation"] is part
    assert int(found.faithfulness.n_compared.sum()) == len(part)
    assert f"ranked over {len(part)} of the {len(exact)} active latents" in found.summary()


def test_what_cannot_be_had_at_a_hook_is_named() -> None:
    tower, x, sae, target = parts(POOLED)
    found = compare(tower, x, sae, target, **QUICK)
    assert found.faithfulness.methods == (
        "attribution_patching", "integrated_gradients", "activation_energy", "exact_ablation", "random",
    )  # fmt: skip
    left_out = [name for name in METHODS if "lens" in name or name in ("gradient_dropping", "frozen_layer_norm")]
    assert [note.split(" ")[0] for note in found.notes] == left_out
    assert "no LayerNorm comes after hook_pooled" in found.summary()
    with pytest.warns(UserWarning, match="^frozen_layer_norm: no LayerNorm comes after"):
        asked = compare(tower, x, sae, target, methods=["frozen_layer_norm"], **QUICK)  # asked for, it stays
    assert asked.faithfulness.methods[0] == "frozen_layer_norm"
    assert "hook_pooled gives none" in found.summary()
    assert "The Logit Lens is not among the methods" in found.summary()
    with pytest.raises(InputError, match="logit_lens: the Logit Lens reads residual-stream vectors"):
        compare(tower, x, sae, target, methods=["logit_lens"], **QUICK)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_the_words_say_what_the_numbers_say() -> None:
    tower, x, sae, target = parts(batch=5)
    methods = ["attribution_patching", "logit_lens", "activation_energy"]
    found = compare(tower, x, sae, target, methods=methods, **QUICK)
    frame = found.to_frame().set_index("method")
    others = frame.drop(["exact_ablation", "random"])
    best = others.rank_correlation.idxmax()
    assert found.best == best == "attribution_patching"
    words = found.summary()
    assert words.startswith("Over 5 samples and 3 targets, ranked over all ")
    assert f"{best} predicts exact ablation best" in words
    row, lens = frame.loc[best], frame.loc["logit_lens"]
    gap = found.faithfulness.difference(best, "logit_lens")
    expected = [
        row.rank_correlation, row.rank_correlation_low, row.rank_correlation_high, row.deletion_area,
        frame.deletion_area["exact_ablation"], frame.deletion_area["random"], row.insertion_area,
        lens.rank_correlation, lens.rank_correlation_low, lens.rank_correlation_high, *gap,
    ]  # fmt: skip
    assert numbers(words) == pytest.approx(expected, abs=5e-4)
    assert "(95% interval" in words
    assert repr(found).endswith(words)
    page = found.to_markdown()
    assert page.startswith(words)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines()[4:]]
    assert rows == frame.sort_values("rank_correlation", ascending=False, kind="stable").index.tolist()
    cells = next(line for line in page.splitlines() if line.startswith(f"| {best} |")).split("|")
    assert numbers(cells[2]) == pytest.approx(
        [row.rank_correlation, row.rank_correlation_low, row.rank_correlation_high], abs=5e-5
    )


def with_ranks(found: Comparison, **ranks: list[float]) -> Comparison:
    table = found.faithfulness.rank_correlation.clone()
    for method, values in ranks.items():
        table[found.faithfulness.methods.index(method)] = torch.tensor(values, dtype=table.dtype)[:, None]
    return replace(found, faithfulness=replace(found.faithfulness, rank_correlation=table))


def test_the_words_for_every_outcome() -> None:
    tower, x, sae, target = parts()
    found = compare(tower, x, sae, target, methods=["attribution_patching", "logit_lens"], **QUICK)
    clear = with_ranks(found, attribution_patching=[0.9, 0.8, 0.95], logit_lens=[0.1, 0.2, 0.0])
    assert "0.783 lower on the same samples" in clear.summary()
    chance = with_ranks(found, attribution_patching=[0.9, 0.1, 0.5], logit_lens=[0.1, 0.8, 0.55])
    gap = chance.faithfulness.difference("attribution_patching", "logit_lens")
    assert gap.low < 0 < gap.value == pytest.approx(0.05 / 3)
    interval = f"({gap.low:.3f} to {gap.high:.3f})"
    assert f"the difference of 0.017 on the same samples {interval} could be chance" in chance.summary()
    lens = with_ranks(found, attribution_patching=[0.1, 0.1, 0.5], logit_lens=[0.4, 0.8, 0.55])
    assert lens.best == "logit_lens"
    assert "logit_lens predicts exact ablation best" in lens.summary()
    assert "The Logit Lens" not in lens.summary()
    nan = float("nan")
    apart = with_ranks(found, attribution_patching=[0.1, nan, 0.5], logit_lens=[nan, 0.1, nan])
    assert "on no sample do both have a rank correlation" in apart.summary()
    none = with_ranks(found, attribution_patching=[nan] * 3, logit_lens=[nan] * 3)
    assert none.best is None
    assert "no method has a rank correlation" in none.summary()
    assert "| attribution_patching | not defined |" in none.to_markdown()
    one = compare(tower, x[:1], sae, target, methods=["attribution_patching", "logit_lens"], **QUICK)
    assert "Over 1 sample and 3 targets" in one.summary()
    assert "One sample gives no interval" in one.summary()
    assert "nan" not in one.to_markdown()


def test_a_method_without_a_sign_is_never_the_best() -> None:
    tower, x, sae, target = parts()

    def size(*args: Any) -> Attribution:
        exact = exact_ablation(*args)
        return replace(exact, method="size", value=exact.value.abs(), settings={"signed": False})

    found = compare(tower, x, sae, target, methods=[size, logit_lens], **QUICK)
    assert found.faithfulness.mean("rank_correlation")[0] == 1
    assert found.best == "logit_lens"
    assert "Without a sign, and so ranked against its magnitude: size." in found.summary()


def test_merge() -> None:
    tower, x, sae, target = parts(batch=4)
    whole = compare(tower, x, sae, target, **QUICK)
    first, second = (compare(tower, part, sae, target, **QUICK) for part in x.split([1, 3]))
    merged = first.merge(second)
    assert torch.allclose(merged.faithfulness.overlap, whole.faithfulness.overlap, equal_nan=True)
    # The curves of the random order too: in float64, and other batches round differently.
    assert torch.allclose(merged.faithfulness.deletion, whole.faithfulness.deletion, rtol=0, atol=1e-12)
    for name in ("attribution_patching", "exact_ablation", "random"):
        assert torch.allclose(merged.attributions[name].dense(), whole.attributions[name].dense(), rtol=0, atol=1e-12)
    assert merged.faithfulness.n_sample == 4
    fewer = compare(tower, x, sae, target, methods=["logit_lens"], **QUICK)
    with pytest.raises(InputError, match="differ in methods"):
        first.merge(fewer)
    changed = {name: scores + 1 for name, scores in second.scores.items()}
    with pytest.raises(InputError, match="differ in logit_lens_of_all_latents"):
        first.merge(replace(second, scores=changed))
