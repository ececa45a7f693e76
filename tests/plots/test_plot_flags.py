"""The figure of a flag shows the numbers of the results that it is drawn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_lens_ext.attribution import AttributionSummary
from clip_lens_ext.errors import InputError
from clip_lens_ext.plots import plot_flag
from clip_lens_ext.semantics import Evidence, Flag, InterventionEffects, ReferenceCrops

PROMPTS = ("a bow", "a duck")
D_SAE = 12


def summary() -> AttributionSummary:
    total = torch.arange(2 * D_SAE, dtype=torch.float64).reshape(2, D_SAE)
    ones = torch.ones(2, D_SAE, dtype=torch.int64)
    return AttributionSummary("m", total, ones, ones, torch.tensor([4, 4]), PROMPTS, 3, True, "cosine", "hook",
                              "vision", "all", "kept", (), {})  # fmt: skip


def effects() -> InterventionEffects:
    latent = torch.arange(2 * D_SAE, dtype=torch.float64).reshape(2, D_SAE)
    prediction = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.int64)
    return InterventionEffects(
        ("lay rays", "lay frame"), ("overlay", "overlay"), ("rays", "frame"), ("untouched", "untouched"), PROMPTS,
        torch.tensor([5, 5]), latent, latent + 2, latent * 0 + 2, latent * 0 + 0.1, prediction, prediction + 0.05,
        prediction * 0 + 0.05, prediction * 0 + 0.01, none, none, none, none.double(), none.double(), "hook", "all", {},
    )  # fmt: skip


def flag(latent: int = 1, kind: str = "artifact", subject: str = "frame") -> Flag:
    evidence = (Evidence("t of the rise", 5.0, 4.0, "min_t"), Evidence("clarity", 0.5))
    edit = f"lay {subject}" if kind == "artifact" and subject else ""
    return Flag(kind, "a bow", latent, None, 0.1, 0.0, 0.4, 0.06, "cosine", subject, evidence, edit)


def crops(n: int = 5) -> ReferenceCrops:
    pictures = torch.linspace(-2, 2, n * 3 * 6 * 6).reshape(n, 3, 6, 6)
    return ReferenceCrops(tuple(pictures), torch.zeros(n, 4), torch.arange(n))


def axes_of(figure: Figure) -> dict[str, Axes]:
    return {str(axes.get_label()): axes for axes in figure.axes if axes.get_label()}


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_everything_is_there(tmp_path: Path) -> None:
    pair = torch.rand(2, 3, 8, 8)
    figure = plot_flag(
        flag(), crops(), summary(), effects=effects(), pictures=(pair[0], pair[1]), path=tmp_path / "a.png"
    )
    found = axes_of(figure)
    assert set(found) == {"references", "shares", "prediction before and after", "latent before and after", "before",
                          "after"}  # fmt: skip
    heights = [bar.get_height() for bar in found["prediction before and after"].patches]
    assert heights == pytest.approx([0.3, 0.35])
    heights = [bar.get_height() for bar in found["latent before and after"].patches]
    assert heights == pytest.approx([13.0, 15.0])
    assert len(found["references"].images) == 5
    assert (tmp_path / "a.png").stat().st_size > 5000
    for said in ("artifact", "a bow", "latent 1", "no label", "frame", "at least 4 needed (min_t)", "clarity: 0.5"):
        assert said in words(figure)


def test_shares_are_the_greatest_and_the_flag_s_own() -> None:
    found = axes_of(plot_flag(flag(latent=1), crops(), summary()))["shares"]
    share = 100 * summary().share[0]
    expected = [*share.sort(descending=True).values[:7].tolist(), float(share[1])]
    assert [bar.get_width() for bar in found.patches] == pytest.approx(expected)
    own = axes_of(plot_flag(flag(latent=11), crops(), summary()))["shares"]
    assert [bar.get_width() for bar in own.patches] == pytest.approx(share.sort(descending=True).values[:8].tolist())


def test_only_what_an_edit_decided_shows_an_edit() -> None:
    for one in (flag(kind="polysemous"), flag(subject="")):
        assert set(axes_of(plot_flag(one, crops(), summary(), effects=effects()))) == {"references", "shares"}
    assert "nothing activates it" in words(plot_flag(flag(), crops(0), summary()))


def test_a_prompt_that_edits_alone_looked_at_has_no_shares() -> None:
    goose = replace(effects(), prompts=("a goose", "a duck"))
    found = axes_of(plot_flag(replace(flag(), prompt="a goose"), crops(), summary(), effects=goose))
    assert set(found) == {"references", "prediction before and after", "latent before and after"}


def test_a_compound_shows_the_shares_of_its_word() -> None:
    named = replace(summary(), labels=("a photo of a paper bow", "a photo of a bow"))
    one = replace(flag(kind="compound noun", subject="bow"), prompt="a photo of a paper bow")
    figure = plot_flag(one, crops(), named)
    own = 100 * named.share[1]
    expected = [*own.sort(descending=True).values[:7].tolist(), float(own[1])]
    assert [bar.get_width() for bar in axes_of(figure)["shares"].patches] == pytest.approx(expected)
    assert "Shares for “a photo of a bow”" in words(figure)
    assert "“bow” alone shows something else" in words(figure)


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="written as"):
        plot_flag(flag(), crops(), summary(), path=tmp_path / "a.txt")
    with pytest.raises(InputError, match="no edit 'lay film'"):
        plot_flag(flag(subject="film"), crops(), summary(), effects=effects())
    with pytest.raises(InputError, match="one shape"):
        plot_flag(flag(), crops(), summary(), pictures=(torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)))
