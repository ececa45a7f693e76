"""The pictures of spectra show the numbers of their results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.plots import plot_overlap, plot_pruning, plot_spectrum

D = 10


def moments(seed: int, tower: str = "vision") -> cle.Covariance:
    rows = torch.randn(400, D, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -3, D)
    found = cle.StreamingCovariance(D)
    found.update(rows)
    return found.result()


def test_eigenvalues_and_where_noise_begins(tmp_path: Path) -> None:
    image, text = moments(0), moments(1)
    splits = [cle.split_noise(image, text, rule="pooled", cut=k) for k in (3, 7)]
    figure = plot_spectrum(splits, image, text, tmp_path / "x.png")
    axes = {one.get_label(): one for one in figure.axes}
    lines = {line.get_label(): line for line in axes["spectrum"].lines}
    for name, source in (("image", image), ("text", text)):
        values = np.linalg.eigvalsh(source.covariance.numpy())[::-1]
        np.testing.assert_allclose(lines[name].get_ydata(), values, rtol=1e-9)
    for split in splits:
        line = next(line for label, line in lines.items() if label.endswith(f"{split.rank} noise"))
        assert list(line.get_xdata()) == [D - split.rank + 0.5] * 2
    signal, noise = axes["image against text"].collections
    assert (len(signal.get_offsets()), len(noise.get_offsets())) == (D - 3, 3)
    vectors = np.linalg.eigh(((image.covariance + text.covariance) / 2).numpy())[1]
    expected = {(round(float(v @ image.covariance.numpy() @ v), 12), round(float(v @ text.covariance.numpy() @ v), 12))
                for v in vectors.T[:3]}  # fmt: skip
    assert {(round(float(x), 12), round(float(y), 12)) for x, y in noise.get_offsets()} == expected
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000


def test_one_tower_has_one_panel_and_zero_is_left_out() -> None:
    few = cle.StreamingCovariance(D)
    few.update(torch.randn(5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with pytest.warns(UserWarning, match="do not fill"):
        split = cle.split_noise(few, cut=2)
    figure = plot_spectrum(split, few.result())
    assert [axes.get_label() for axes in figure.axes] == ["spectrum"]
    assert len(figure.axes[0].lines[0].get_ydata()) == 4  # five rows vary in four directions
    with pytest.raises(InputError, match="one space"):
        plot_spectrum(split, moments(0), cle.Covariance(torch.zeros(3), torch.eye(3), 5))
    with pytest.raises(InputError, match="one space"):
        plot_spectrum([], moments(0))
    with pytest.raises(InputError, match="a picture is written as"):
        plot_spectrum(split, few.result(), path="x.txt")


def test_the_overlap_with_its_floor_and_ceiling() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = {name: torch.randn(60, D, generator=generator) for name in ("a", "b", "c")}
    found = cle.subgroup_overlap(cle.split_subgroups(groups, rule="pooled", cut=4, n_bootstrap=3, progress=False))
    axes = plot_overlap(found).axes[0]
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), found.overlap.numpy())
    words = {text.get_position(): text.get_text() for text in axes.texts}
    assert words[(1, 0)] == f"{found.overlap[0, 1]:.2f}\n({found.by_chance[0, 1]:.2f}, {found.split_half[0, 1]:.2f})"
    assert words[(2, 2)] == "1.00"


@pytest.mark.parametrize("ranks", [(2,), (2, 5, 8)])
def test_scores_and_their_intervals(ranks: tuple[int, ...]) -> None:
    rows = torch.randn(120, D, generator=torch.Generator().manual_seed(0))
    labels = (rows[:, 0] > 0).long()
    splits = [cle.split_noise(rows, cut=k) for k in ranks]
    data = cle.EvaluationData(rows, labels=labels)
    found = cle.evaluate_pruning(None, splits, data, n_random=2, n_bootstrap=20, progress=False)
    figure = plot_pruning(found)
    assert [axes.get_label() for axes in figure.axes] == list(found.measures)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(found.pruned)
    for k, axes in enumerate(figure.axes):
        if len(ranks) > 1:
            for j, line in enumerate(axes.lines):
                np.testing.assert_allclose(line.get_xdata(), ranks)
                np.testing.assert_allclose(line.get_ydata(), found.score[:, j, k])
        else:
            bars, points = axes.lines[::2], axes.lines[1::2]
            for j, (bar, point) in enumerate(zip(bars, points, strict=True)):
                np.testing.assert_allclose(bar.get_ydata(), found.interval[0, j, k])
                np.testing.assert_allclose(point.get_ydata(), found.score[0, j, k])
