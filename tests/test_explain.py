"""`explain_images`: its numbers are those of the public methods, and its heat maps lie the right way round."""

import json

import pytest
import torch
from open_clip.model import CLIP
from oracles.models import build_clip
from PIL import Image
from sae_lens import TopKSAE, TopKSAEConfig

import clip_lens_ext as cle
from clip_lens_ext.attribution.ranks import spearman
from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.explain import explain_images
from clip_lens_ext.planted import normalise
from clip_lens_ext.semantics import collect_references


@pytest.fixture(scope="module")
def clip():
    return cle.planted_clip()


@pytest.fixture(scope="module")
def sae():
    return cle.planted_sae()


@pytest.fixture(scope="module")
def batch():
    return cle.PlantedWorld(0).sample(3, seed=5, split="test")


@pytest.fixture(scope="module")
def pixels(batch):
    return normalise(batch.images)


@pytest.fixture(scope="module")
def prompts():
    return [cle.PlantedWorld(0).prompts()[label] for label in (0, 20)]


@pytest.fixture(scope="module")
def explanation(clip, sae, pixels, prompts):
    return explain_images(clip, pixels, sae, prompts, k=3, reference_images=pixels, n_references=2, progress=False)


def explain(clip, images, sae, prompts, **settings):
    return explain_images(clip, images, sae, prompts, progress=False, **settings)


def test_the_numbers_are_those_of_the_methods(clip, sae, pixels, prompts, explanation):
    target = cle.text_target(clip, prompts)
    site = cle.open_site(clip.vision, pixels, sae)
    results = {"attribution": cle.attribution_patching(clip.vision, site, sae, target),
               "exact": cle.exact_ablation(clip.vision, site, sae, target),
               "logit_lens": cle.logit_lens(clip.vision, site, sae, target)}
    assert [(d.image, d.prompt) for d in explanation.decisions] == [(str(i), p) for i in range(3) for p in prompts]
    for number, decision in enumerate(explanation.decisions):
        sample, index = divmod(number, 2)
        own = results["exact"].sample == sample
        assert torch.equal(decision.latent, results["exact"].latent[own])
        torch.testing.assert_close(decision.activation, results["exact"].activation[own], rtol=1e-4, atol=1e-4)
        for name, result in results.items():
            torch.testing.assert_close(getattr(decision, name), result.value[own][:, index], rtol=1e-3, atol=2e-6)
        assert decision.prediction == pytest.approx(float(results["exact"].prediction[sample, index]), abs=1e-5)
        for by in ("attribution", "logit_lens"):
            assert decision.agreement[by] == spearman(getattr(decision, by), decision.exact)


def test_the_table_is_in_points_and_ranked(explanation):
    decision = explanation.decisions[1]
    frame = explanation.to_frame()
    own = frame[(frame["image"] == decision.image) & (frame["prompt"] == decision.prompt)]
    assert own["rank"].tolist() == list(range(1, len(decision.latent) + 1))
    assert own["attribution"].is_monotonic_decreasing
    place = {int(latent): index for index, latent in enumerate(decision.latent)}
    for row in own.itertuples():
        at = place[row.latent]
        assert row.attribution == pytest.approx(100 * float(decision.attribution[at]))
        assert row.exact_ablation == pytest.approx(100 * float(decision.exact[at]))
        assert row.logit_lens == pytest.approx(float(decision.logit_lens[at]))
        assert row.logit_lens_rank == 1 + int((decision.logit_lens > decision.logit_lens[at]).sum())
    assert (explanation.scale, explanation.points) == (100, "cosine points")


def test_top_latents_have_heat_maps_and_references(clip, sae, pixels, explanation):
    codes = cle.encode(clip.vision, pixels, sae)
    dense = codes.dense()
    for number, decision in enumerate(explanation.decisions):
        shown = {int(decision.latent[i]) for by in ("attribution", "logit_lens") for i in decision.top(3, by)}
        assert set(decision.heat) == set(decision.off_grid) == shown
        for latent in shown:
            tokens = dense[number // 2, :, latent]
            torch.testing.assert_close(decision.heat[latent].flatten(), tokens[1:], rtol=1e-4, atol=1e-4)
            assert decision.off_grid[latent] == pytest.approx(float(tokens[0]), abs=1e-4)
            assert len(explanation.references.of(latent).sample) > 0  # the picture itself activates it
    assert set(explanation.reference_pictures) <= {0, 1, 2}


@pytest.fixture(scope="module")
def small():
    """A tiny CLIP of pictures 24 x 32 in 3 x 4 patches, and an SAE whose latents are all active somewhere."""
    clip = cle.load_clip(build_clip())
    target = cle.direction_target(torch.eye(20)[:2], labels=["first", "second"])
    return clip, dense_sae("hook_full_embed", "all"), target


def dense_sae(hook: str, scope: str, d_in: int = 48) -> TopKSAE:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=30, k=30))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.token_scope = hook, scope
    return sae


def test_heat_maps_lie_on_the_picture(small):
    clip, sae, target = small
    plain = torch.zeros(1, 3, 24, 32)
    lit = plain.clone()
    lit[:, :, 16:24, 8:16] = 2.0  # the patch in row 2, column 1
    dark, bright = (explain(clip, x, sae, target, k=30, choose=[0]).decisions[0].heat for x in (plain, lit))
    changed = torch.stack([(bright[i] - dark[i]).abs() for i in set(dark) & set(bright)]).sum(dim=0)
    assert changed.shape == (3, 4)
    assert changed.nonzero().tolist() == [[2, 1]]


def test_pictures_are_shown_as_the_model_sees_them(clip, sae, batch, pixels, explanation):
    for number, decision in enumerate(explanation.decisions):
        assert torch.equal(decision.picture, batch.images[number // 2])
    for sample, picture in explanation.reference_pictures.items():
        assert torch.equal(picture, batch.images[sample])


def test_another_preprocessing_is_undone_too(small):
    clip, sae, target = small  # open_clip's own mean and spread
    photo = Image.effect_mandelbrot((32, 24), (-2, -1, 1, 1), 20).convert("RGB")
    found = explain(clip, [photo], sae, target).decisions[0].picture
    expected = torch.tensor(list(photo.tobytes()), dtype=torch.uint8).reshape(24, 32, 3).permute(2, 0, 1)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_without_preprocessing_it_says_so(small):
    clip, sae, target = small
    bare = cle.HookedCLIP(clip.native)
    found = explain(bare, torch.linspace(-3, 5, 3 * 24 * 32).reshape(1, 3, 24, 32), sae, target)
    assert (int(found.decisions[0].picture.min()), int(found.decisions[0].picture.max())) == (0, 255)
    assert any("stretched" in note for note in found.notes)


def test_which_prompts(clip, sae, pixels, prompts):
    cosine = clip.similarity(pixels, prompts)
    best = explain(clip, pixels, sae, prompts, k=1, choose="best")
    assert [d.prompt for d in best.decisions] == [prompts[i] for i in cosine.argmax(dim=1).tolist()]
    given = explain(clip, pixels, sae, prompts, k=1, choose=[1, 0, 1], names=["x", "y", "z"])
    expected = [("x", prompts[1]), ("y", prompts[0]), ("z", prompts[1])]
    assert [(d.image, d.prompt) for d in given.decisions] == expected


def test_names_and_choices_follow_the_data_past_a_broken_picture(clip, sae, batch, prompts, tmp_path):
    for index, name in enumerate(("a", "b", "c")):
        Image.fromarray(batch.images[index].permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    found = explain(clip, tmp_path, sae, prompts, k=1, choose=[0, 0, 1], names=["A", "B", "C"])
    assert [(d.image, d.prompt) for d in found.decisions] == [("A", prompts[0]), ("C", prompts[1])]
    assert [skip.name for skip in found.skipped] == ["b.png"]


def test_references_that_were_collected_before(clip, sae, pixels, prompts, explanation):
    before = collect_references(clip.vision, pixels, sae, k=2, progress=False)
    found = explain(clip, pixels, sae, prompts, k=3, references=before, reference_images=pixels, n_references=2)
    assert found.references is before
    assert found.reference_pictures.keys() == explanation.reference_pictures.keys()
    without = explain(clip, pixels, sae, prompts, k=3, references=before)
    assert without.reference_pictures == {}
    assert any("no reference images" in note for note in without.notes)


def test_reference_pictures_past_a_broken_file(clip, sae, batch, pixels, prompts, tmp_path):
    for index, picture in enumerate(batch.images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{index + 1}.png")
    (tmp_path / "0.png").write_bytes(b"broken")
    found = explain(clip, pixels, sae, prompts[0], k=3, reference_images=tmp_path)
    assert set(found.reference_pictures) == {0, 1, 2}
    for sample, picture in found.reference_pictures.items():
        assert torch.equal(picture, batch.images[sample])
    assert [skip.name for skip in found.references.skipped] == ["0.png"]


def test_large_reference_pictures_are_made_small():
    vision = {"image_size": (128, 256), "patch_size": 64, "layers": 2, "width": 48, "head_width": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = cle.load_clip(CLIP(20, vision, {"layers": 1, "width": 32, "heads": 2, "vocab_size": 9}).eval())
    grey = Image.new("RGB", (256, 128), (90, 90, 90))
    target = cle.direction_target(torch.eye(20)[:1])
    found = explain(clip, [grey], dense_sae("hook_full_embed", "all"), target, reference_images=[grey])
    assert found.reference_pictures[0].shape == (3, 56, 112)
    assert found.reference_pictures[0].unique().tolist() == [90]
    assert found.decisions[0].picture.shape == (3, 128, 256)


@pytest.mark.parametrize(("hook", "scope", "d_in"), [
    ("blocks.1.hook_resid_post", "cls", 48), ("hook_pooled", "pooled", 48), ("hook_embedding", "pooled", 20),
])
def test_an_sae_without_patches_has_no_heat_maps_and_says_why(small, hook, scope, d_in):
    clip, _, target = small
    picture = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    found = explain(clip, picture, dense_sae(hook, scope, d_in), target, reference_images=picture)
    assert all(decision.heat == {} for decision in found.decisions)
    assert any(note.startswith("no heat maps: the SAE reads the ") for note in found.notes)
    assert found.reference_pictures
    lens = found.decisions[0].logit_lens
    assert bool(lens.isnan().all()) == (scope == "pooled")
    assert any("no Logit Lens" in note for note in found.notes) == (scope == "pooled")
    if scope == "pooled":
        assert len(found.decisions[0].top(5, "logit_lens")) == 0
        assert found.to_frame()["logit_lens_rank"].eq(0).all()
        decision = json.loads(json.dumps(found.to_dict(), allow_nan=False))["decisions"][0]
        assert decision["rank_correlation"]["logit_lens"] is None
        assert decision["latents"][0]["logit_lens"] is None


def test_an_inner_product_is_not_in_points(small):
    clip, sae, target = small
    picture = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    plain = cle.direction_target(3 * target.vectors, cosine=False)
    found = explain(clip, picture, sae, plain, k=2)
    assert (found.unit, found.scale, found.points) == ("inner product", 1, "inner product")
    embedding = clip.vision(picture).detach()
    assert [d.prediction for d in found.decisions] == pytest.approx((3 * embedding[0, :2]).tolist(), rel=1e-5)
    greatest = max(float(decision.attribution.max()) for decision in found.decisions)
    assert found.to_frame()["attribution"].max() == pytest.approx(greatest)
    assert found.to_dict()["sign"] == "positive where the latent raises the inner product"


def test_the_error_term_and_the_site_are_recorded(clip, sae, pixels, prompts, explanation):
    dropped = explain(clip, pixels[:1], sae, prompts[0], error_term="dropped")
    assert (explanation.error_term, dropped.error_term) == ("kept", "dropped")
    assert dropped.decisions[0].prediction != explanation.decisions[0].prediction
    assert (explanation.model, explanation.hook_name, explanation.token_scope) == (
        clip.model_name, sae.cfg.metadata.hook_name, "all")
    assert (explanation.grid, explanation.first_patch, explanation.n_tokens) == ((8, 8), 1, 65)
    assert explanation.provenance["sae_sha256"] == sae.cfg.metadata.sha256
    assert len(explanation.provenance["data_fingerprint"]) == 64


def test_it_is_plain_json(explanation):
    found = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert len(found["decisions"]) == 6
    first = found["decisions"][0]["latents"][0]
    assert first["attribution"] == pytest.approx(100 * float(explanation.decisions[0].attribution.max()))
    assert found["sign"] == "positive where the latent raises the cosine"


@pytest.mark.parametrize(("settings", "message"), [
    ({"k": 0}, "must be at least 1"),
    ({"n_references": 0}, "must be at least 1"),
    ({"choose": "worst"}, "'all', 'best' or the number"),
    ({"choose": [0]}, "for each of the 3 pictures"),
    ({"choose": [0, 1, 2]}, r"a number in 0\.\.1"),
    ({"names": ["one"]}, "1 names for 3 pictures"),
    ({"error_term": "lost"}, "error_term is"),
    ({"token_scope": "pooled"}, "picture '0': token scope 'pooled'"),
])
def test_wrong_arguments(clip, sae, pixels, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        explain(clip, pixels, sae, prompts, **settings)


def test_wrong_inputs(clip, sae, pixels, prompts):
    with pytest.raises(InputError, match="a prompt is empty"):
        explain(clip, pixels, sae, " ")
    with pytest.raises(HookNameError, match=r"did you mean|near|blocks\.2\.hook_resid_post"):
        explain(clip, pixels, sae, prompts, hook_name="blocks.2.hook_resid_pots")
    with pytest.raises(InputError, match="NaN"):
        explain(clip, pixels * torch.nan, sae, prompts)
    with pytest.raises(InputError, match=r"^the SAE reads vectors of 64"):
        explain(clip, pixels, dense_sae("blocks.2.hook_resid_post", "all", 64), prompts)
