"""The picture and the table of a decision: what is on them, and that nothing global is touched."""

import dataclasses
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.explain import explain_images
from clip_lens_ext.planted import normalise
from clip_lens_ext.plots import explanation_legend, explanation_table, plot_explanation
from clip_lens_ext.plots.page import BLUE, ORANGE, signed


@pytest.fixture(scope="module")
def explanation():
    pixels = normalise(cle.PlantedWorld(0).sample(6, seed=7, split="test").images)
    prompts = ["a photo of a crane", "a photo of a heart"]
    return explain_images(
        cle.planted_clip(), pixels[:1], cle.planted_sae(), prompts, k=3, reference_images=pixels, n_references=5,
        names=["picture $1$ of a test"], progress=False,
    )


@pytest.fixture(scope="module")
def figure(explanation):
    return plot_explanation(explanation)


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def axes_of(figure) -> dict[str, mpl.axes.Axes]:
    return {axes.get_label(): axes for axes in figure.axes if axes.get_label()}


def latents(explanation, by) -> list[int]:
    decision = explanation.decisions[0]
    return decision.latent[decision.top(3, by)].tolist()


def test_both_rankings_have_a_card_for_every_top_latent(explanation, figure):
    expected = {"image", "scatter attribution", "scatter logit_lens"}
    for by in ("attribution", "logit_lens"):
        for latent in latents(explanation, by):
            expected |= {f"{by} {part} {latent}" for part in ("bars", "heat", "references")}
    assert set(axes_of(figure)) == expected
    titles = [text for text in words(figure) if text.startswith("latent ")]
    assert titles == [f"latent {i}" for by in ("attribution", "logit_lens") for i in latents(explanation, by)]


def test_it_says_model_sae_prompt_error_term_sign_and_units(explanation, figure):
    text = " ".join(" ".join(words(figure)).split())
    decision = explanation.decisions[0]
    for said in (f"Why {decision.prediction:+.3f} for \u201ca photo of a crane\u201d?", "model planted-0",
                 "at blocks.2.hook_resid_post, all 65 tokens", "error term kept", "positive = raises the cosine",
                 "cosine points (100 \u00d7 cosine)", "picture $1$ of a test",
                 explanation.provenance["sae_sha256"][:12],
                 f"{len(decision.latent)} latents active", "the images of 6 that activate the latent most"):
        assert said in text
    assert not any(text.get_parse_math() for text in figure.texts)  # a dollar in a name is a dollar


def test_the_bars_are_attribution_and_exact_ablation_on_one_scale(explanation, figure):
    decision, spans = explanation.decisions[0], set()
    for by in ("attribution", "logit_lens"):
        for place in decision.top(3, by).tolist():
            axes = axes_of(figure)[f"{by} bars {int(decision.latent[place])}"]
            widths = [bar.get_width() for bar in axes.patches]
            values = [float(decision.attribution[place]), float(decision.exact[place])]
            assert widths == pytest.approx([100 * value for value in values])
            spans.add(axes.get_xlim())
    assert len(spans) == 1
    values = [text.get_text() for text in figure.texts if text.get_color() == BLUE and text.get_weight() == "bold"]
    assert signed(100 * float(decision.attribution.max()), 2) in values


def test_heat_maps_and_frames_are_where_the_latent_fires(explanation, figure):
    decision = explanation.decisions[0]
    for latent in latents(explanation, "attribution"):
        images = axes_of(figure)[f"attribution heat {latent}"].images
        heat = decision.heat[latent].numpy()
        if heat.max() > 0:
            assert np.allclose(np.asarray(images[1].get_array()), heat / heat.max(), atol=1e-6)
            assert images[1].get_extent() == [0, 48, 48, 0]
        else:
            assert len(images) == 1
            assert "fires on CLS alone" in axes_of(figure)[f"attribution heat {latent}"].texts[0].get_text()
        references = explanation.references.of(latent)
        strip = axes_of(figure)[f"attribution references {latent}"]
        assert len(strip.images) == len(references.sample)
        on_patches = [(i, position) for i, position in enumerate(references.position.tolist()) if position > 0]
        frames = [frame.get_xy() for frame in strip.patches][::2]  # a white and a coloured line each
        for (place, position), (left, top) in zip(on_patches, frames, strict=True):
            side = strip.images[place].get_extent()
            row, column = divmod(position - 1, 8)
            assert left == pytest.approx(side[0] + column / 8 * (side[1] - side[0]))
            assert top == pytest.approx(side[3] + row / 8 * (side[2] - side[3]))


def test_the_scatters_hold_every_active_latent(explanation, figure):
    decision = explanation.decisions[0]
    for by, scale, colour in (("attribution", 100, BLUE), ("logit_lens", 1, ORANGE)):
        axes = axes_of(figure)[f"scatter {by}"]
        every, top = (np.asarray(dots.get_offsets()) for dots in axes.collections)
        assert np.allclose(every[:, 0], 100 * decision.exact.double().numpy())
        assert np.allclose(every[:, 1], scale * getattr(decision, by).double().numpy())
        assert len(top) == 3
        numbers = [text.get_text() for text in axes.texts]
        assert numbers == [str(int(latent)) for latent in decision.latent[decision.top(3, "exact")]]
        assert f"rank corr. {decision.agreement[by]:+.2f}" in axes.get_title()
        assert axes.title.get_color() == colour


def test_the_picture_has_pixels(explanation, figure, tmp_path):
    plot_explanation(explanation, tmp_path / "a.png", decision=1)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1000
    assert pixels.std() > 20
    shown = axes_of(figure)["image"].images[0].get_array()
    assert np.array_equal(np.asarray(shown), explanation.decisions[0].picture.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("long", [False, True])
def test_nothing_lies_outside_of_the_page_or_over_its_neighbour(explanation, figure, long):
    if long:
        decision = dataclasses.replace(explanation.decisions[0], image="/w" * 150 + "/photo.jpg", prompt="W m " * 90)
        figure = plot_explanation(dataclasses.replace(explanation, decisions=(decision,)))
        assert any(text.get_text().endswith("/photo.jpg") for text in figure.texts)
    figure.canvas.draw()
    page = figure.bbox
    for text in figure.texts:
        box = text.get_window_extent()
        assert box.x0 >= page.x0 - 1, text
        assert box.x1 <= page.x1 + 1, text
        assert box.y0 >= page.y0 - 1, text
    cards = min(text.get_window_extent().x0 for text in figure.texts if text.get_text().startswith("latent "))
    side = [text.get_window_extent() for text in figure.texts if text.get_position()[1] < 0.85]  # below the header
    assert all(box.x1 < cards for box in side if box.x0 < cards)
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.texts if text.get_text()]
    overlaps = [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[i + 1 :]
                if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 2]
    assert overlaps == []


def test_it_leaves_matplotlib_as_it_was(explanation):
    with mpl.rc_context({"font.size": 7.25, "axes.grid": True}):
        before = dict(mpl.rcParams), mpl.get_backend()
        plot_explanation(explanation)
        assert (dict(mpl.rcParams), mpl.get_backend()) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_other_formats(explanation, tmp_path, suffix):
    plot_explanation(explanation, tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 10_000


def test_without_heat_maps_lens_and_references():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from sae_lens import TopKSAE, TopKSAEConfig

        sae = TopKSAE(TopKSAEConfig(d_in=128, d_sae=64, k=8))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.token_scope = "hook_pooled", "pooled"
    pixels = normalise(cle.PlantedWorld(0).sample(1, seed=7, split="test").images)
    found = explain_images(cle.planted_clip(), pixels, sae, "a photo of a crane", k=7, progress=False)
    figure = plot_explanation(found)
    labels = set(axes_of(figure))
    assert "scatter logit_lens" not in labels
    assert sum(label.startswith("attribution bars") for label in labels) == 7
    assert not any(kind in label for label in labels for kind in ("heat", "references"))
    text = "\n".join(words(figure))
    assert "No Logit Lens" in text
    assert "no heat maps: the SAE reads the pooled vector" in text
    assert "no reference images" in text
    table = explanation_table(found)
    assert "by the Logit Lens" not in table
    assert table.splitlines()[4].split()[4] == "-"


def test_wrong_arguments(explanation, tmp_path):
    with pytest.raises(InputError, match="there are 2 decisions, number 2 is none of them"):
        plot_explanation(explanation, decision=2)
    with pytest.raises(InputError, match=r"not so '.*a\.gif'"):
        plot_explanation(explanation, tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_the_numbers_of_the_decision(explanation):
    decision = explanation.decisions[1]
    lines = explanation_table(explanation, decision=1).splitlines()
    assert lines[0] == 'picture $1$ of a test   "a photo of a heart"'
    assert lines[1] == f"  cosine {decision.prediction:+.4f}, {len(decision.latent)} of 1,024 latents active"
    blocks = {"attribution": lines[4:7], "logit_lens": lines[9:12]}
    assert (lines[2], lines[7]) == ("  by attribution patching", "  by the Logit Lens")
    for by, rows in blocks.items():
        for row, place in zip(rows, decision.top(3, by).tolist(), strict=True):
            latent, activation, attribution, exact, lens, rank, lens_rank = row.split()
            assert int(latent) == int(decision.latent[place])
            assert activation == f"{float(decision.activation[place]):.3f}"
            assert attribution == signed(100 * float(decision.attribution[place]), 3)
            assert exact == signed(100 * float(decision.exact[place]), 3)
            assert lens == signed(float(decision.logit_lens[place]), 4)
            assert int(rank) == 1 + int((decision.attribution > decision.attribution[place]).sum())
            assert int(lens_rank) == 1 + int((decision.logit_lens > decision.logit_lens[place]).sum())
    best = decision.exact.argmax()
    exact = signed(100 * float(decision.exact[best]), 3)
    assert f"exact ablations: latent {int(decision.latent[best])} {exact}," in lines[-2]
    agreement = decision.agreement
    assert lines[-1].endswith(f"attribution {agreement['attribution']:+.2f}, Logit Lens {agreement['logit_lens']:+.2f}")
    assert len({len(line) for line in lines[3:7] + lines[8:12]}) == 1  # aligned
    assert len(lines) == 14
    assert all(line.isascii() for line in lines)


def test_the_legend_says_units_sign_and_site(explanation):
    legend = explanation_legend(explanation)
    for said in ("cosine points (100 x cosine); positive = the latent raises the cosine", "summed over the 65 tokens",
                 "model planted-0, SAE at blocks.2.hook_resid_post on all tokens, error term kept"):
        assert said in legend
    assert legend.isascii()
