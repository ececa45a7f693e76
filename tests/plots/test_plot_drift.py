"""Pictures of drift and of concepts: every axes is there, and shows the numbers of the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.plots import plot_concepts, plot_drift
from clip_lens_ext.sparse_clip import ConceptDrift, ConceptNames, add_sparse_heads, concept_drift, name_concepts

WORDS = cle.Vocabulary.from_terms(["crown", "gear", "heart", "tulip"])


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return normalise(PlantedWorld(0).sample(24, seed=0, split="test").images)


@pytest.fixture(scope="module")
def names(pixels: Tensor) -> list[ConceptNames]:
    """Of untrained heads: names that have nothing to do with each other."""
    dense = cle.planted_clip()
    return [
        name_concepts(add_sparse_heads(dense, 48, seed=seed), WORDS, pixels, k_images=5, progress=False)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def drift(names: list[ConceptNames]) -> ConceptDrift:
    return concept_drift(list(zip(("1%", "10%", "100%"), names, strict=True)), max_overlap=0.3)


def axes_of(figure: Figure, label: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_label() == label)


def test_drift(drift: ConceptDrift, tmp_path: Path) -> None:
    figure = plot_drift(drift, tmp_path / "drift.png")
    stability = axes_of(figure, "stability")
    drawn = {line.get_label(): line.get_ydata() for line in stability.get_lines()}
    np.testing.assert_allclose(drawn["pictures"], drift.image_stability.nanmean(dim=1))
    np.testing.assert_allclose(drawn["words of other features"], drift.word_control.nanmean(dim=1))
    assert drawn["pictures"][-1] == drawn["words"][-1] == 1
    modality = axes_of(figure, "modality")
    assert [stairs.get_label() for stairs in modality.patches] == list(drift.labels)
    for stairs, score in zip(modality.patches, drift.modality, strict=True):
        shares = stairs.get_data().values  # type: ignore[attr-defined]
        assert shares.sum() == pytest.approx(1)
        assert shares[-1] == pytest.approx(float((score[score.isfinite()] >= 0.95).double().mean()))
    density = axes_of(figure, "density").get_lines()[0].get_ydata()
    np.testing.assert_allclose(density, [float(row[row > 0].median()) for row in drift.density])
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes_of(figure, "events").containers}
    counts = drift.counts()
    assert counts["switch"].sum() > 0
    for kind in ("birth", "switch", "merge"):
        assert bars[f"{kind} ({counts[kind].sum()})"] == counts[kind].iloc[1:].tolist()
    with Image.open(tmp_path / "drift.png") as picture:
        assert picture.width > 1000
    with pytest.raises(InputError, match="a picture is written as"):
        plot_drift(drift, tmp_path / "drift.txt")


def test_concepts(names: list[ConceptNames], pixels: Tensor, tmp_path: Path) -> None:
    features = names[0].top(2, by="lift")
    figure = plot_concepts(names[0], pixels, tmp_path / "page.png", features=features, n_images=3)
    for feature in features:
        concept = names[0].of(feature)
        widths = [bar.get_width() for bar in axes_of(figure, f"words {feature}").patches]
        assert widths == pytest.approx([word.activation for word in concept.words])
        scores = [bar.get_width() for bar in axes_of(figure, f"scores {feature}").patches]
        assert scores == pytest.approx([concept.agreement, concept.control])
        shown = axes_of(figure, f"pictures {feature}").get_images()
        assert len(shown) == min(3, len(concept.images))
        best = pixels[int(names[0].images.sample[feature, 0])].permute(1, 2, 0)
        drawn = torch.as_tensor(np.asarray(shown[0].get_array()), dtype=torch.float32)
        assert float(torch.corrcoef(torch.stack([best.flatten(), drawn.flatten()]))[0, 1]) > 0.999
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width > 800


def test_concepts_of_other_pictures(names: list[ConceptNames], pixels: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the pictures that were named"):
        plot_concepts(names[0], pixels[:2])
    with pytest.raises(InputError, match="n_images is at least 1"):
        plot_concepts(names[0], pixels, n_images=0)
    with pytest.raises(InputError, match="no feature to show"):
        plot_concepts(names[0], pixels, features=[])
    with pytest.raises(InputError, match="a picture is written as"):
        plot_concepts(names[0], pixels, tmp_path / "page.gif")
    for number in range(24):
        Image.new("RGB", (60, 50), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    with pytest.raises(InputError, match="is not where it was"):
        plot_concepts(names[0], tmp_path)
