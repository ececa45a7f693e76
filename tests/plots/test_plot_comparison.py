"""The picture of a comparison: its curves, bands and bars are the numbers of the result."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib.collections import PolyCollection

import clip_lens_ext as cle
from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import normalise
from clip_lens_ext.plots import plot_comparison

METHODS = ["attribution_patching", "activation_x_logit_lens", "logit_lens"]
NAMES = ["attribution patching", "activation \u00d7 logit lens", "logit lens", "exact ablation", "random"]


def comparison(n: int = 3, **settings: Any) -> cle.Comparison:
    clip, world = cle.planted_clip(), cle.PlantedWorld(0)
    pixels = normalise(world.sample(n, seed=7, split="test").images)
    target = cle.text_target(clip, world.prompts()[:2])
    return cle.compare(clip.vision, pixels, cle.planted_sae("blocks.3.hook_resid_post"), target, methods=METHODS,
                       n_steps=5, n_bootstrap=50, progress=False, **settings)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> cle.Comparison:
    return comparison()


def axes_of(figure: Any) -> dict[str, mpl.axes.Axes]:
    return {axes.get_label(): axes for axes in figure.axes if axes.get_label()}


@pytest.mark.parametrize("name", ["deletion", "insertion"])
def test_curves_and_bands(found: cle.Comparison, name: str) -> None:
    axes = axes_of(plot_comparison(found))[name]
    curves = 100 * getattr(found.faithfulness, name).double()
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == NAMES
    for row, line in enumerate(lines):
        assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
        assert line.get_ydata().tolist() == pytest.approx(curves[row].mean(dim=(0, 1)).tolist())
    bands = [patch for patch in axes.collections if isinstance(patch, PolyCollection)]
    assert len(bands) == 5
    for row, band in enumerate(bands):
        by_step = curves[row].mean(dim=1).T[:, :, None]
        expected = bootstrap_intervals(by_step, n_bootstrap=50, seed=0, confidence=0.95)
        corners = band.get_paths()[0].vertices
        for step in range(6):
            heights = {round(y, 9) for x, y in corners.tolist() if x == step}
            assert heights == {round(end, 9) for end in expected[step].tolist()}
    assert "cosine points" in axes.get_ylabel()
    assert ("lower is better" if name == "deletion" else "higher is better") in axes.get_title("left")


def test_bars(found: cle.Comparison) -> None:
    axes = axes_of(plot_comparison(found.faithfulness))["rank correlation"]
    means = dict(zip(NAMES, found.faithfulness.mean("rank_correlation").tolist(), strict=True))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == sorted(NAMES, key=lambda name: means[name])
    bars = [patch for patch in axes.patches if patch.get_width() != 0]
    assert [bar.get_width() for bar in bars] == pytest.approx([means[label] for label in labels])
    shown = [text.get_text() for text in axes.texts]
    ends = dict(zip(NAMES, found.faithfulness.interval("rank_correlation").tolist(), strict=True))
    expected = [f"{means[name]:+.3f}  ({ends[name][0]:+.3f} to {ends[name][1]:+.3f})" for name in labels]
    assert shown == expected
    whiskers = {line.get_ydata()[0]: list(line.get_xdata()) for line in axes.get_lines()[:5]}
    for place, label in enumerate(labels):
        assert whiskers[place] == pytest.approx(ends[label])


def test_a_single_sample_has_no_bands() -> None:
    figure = plot_comparison(comparison(1))
    axes = axes_of(figure)
    assert not axes["deletion"].collections
    assert all("to" not in text.get_text() for text in axes["rank correlation"].texts)
    assert any("no interval for one sample" in text.get_text() for text in figure.texts)


def test_a_method_without_ranks_says_so(found: cle.Comparison) -> None:
    table = found.faithfulness.rank_correlation.clone()
    table[1] = torch.nan
    figure = plot_comparison(dataclasses.replace(found.faithfulness, rank_correlation=table))
    axes = axes_of(figure)["rank correlation"]
    assert axes.get_yticklabels()[0].get_text() == NAMES[1]
    assert axes.texts[0].get_text() == "not defined: its values are all equal"


def test_words_and_units(found: cle.Comparison) -> None:
    words = " ".join(text.get_text() for text in plot_comparison(found).texts)
    for part in ("blocks.3.hook_resid_post", "cls tokens", "error term kept", "3 samples", "2 targets", "95%"):
        assert part in words
    assert "a title" in [text.get_text() for text in plot_comparison(found, title="a title").texts]
    logits = dataclasses.replace(found.faithfulness, unit="inner product", labels=("$x$ y",))
    figure = plot_comparison(logits)
    assert axes_of(figure)["deletion"].get_ylabel() == "prediction, inner product"
    assert axes_of(figure)["deletion"].get_lines()[0].get_ydata()[0] == pytest.approx(
        float(found.faithfulness.deletion[0, ..., 0].mean())
    )


def test_files_and_pyplot(found: cle.Comparison, tmp_path: Any) -> None:
    for suffix in ("png", "svg", "pdf"):
        plot_comparison(found, tmp_path / f"c.{suffix}")
        assert (tmp_path / f"c.{suffix}").stat().st_size > 5000
    with pytest.raises(InputError, match=r"not so .*c\.txt"):
        plot_comparison(found, tmp_path / "c.txt")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
