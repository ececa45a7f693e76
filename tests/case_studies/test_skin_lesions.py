"""The skin-lesion case study: the generator, what is measured, a user's folder, and the whole at small size."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import REVERSED, SAME
from folder import read_folder
from folder_study import ALL
from generated import Settings, Study, lesion_clip, run_study, versions
from heads import ABLATED, CLASSIFIER, PROMPTS, RANDOM, agreeing
from latents import activations, embed_without, matched_sets
from lesions import SHORTCUTS, SIGNS, LesionWorld
from measures import Measured, accuracy, auroc, fit_classifier
from PIL import Image
from report import change, standing, study_section
from study import draw_generated, main, run_on_folder

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.planted import WordTokenizer, normalise
from clip_lens_ext.planted.model import CONTEXT_LENGTH, ClipConfig

NONE = dict.fromkeys(SHORTCUTS, False)
WORLD = LesionWorld(0)


# The generator


def test_a_batch_is_a_function_of_world_split_and_seed() -> None:
    first, again = (WORLD.sample(6, seed=3, split="test") for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert first.captions == again.captions
    for other in (
        WORLD.sample(6, seed=4, split="test"),
        WORLD.sample(6, seed=3, split="train"),
        LesionWorld(1).sample(6, seed=3, split="test"),
    ):
        assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_shortcut_changes_its_own_pixels_and_nothing_else(name: str) -> None:
    without = WORLD.sample(30, seed=5, split="test", present=NONE)
    shown = WORLD.sample(30, seed=5, split="test", present={**NONE, name: True})
    for field in ("labels", "signs", "separation", "hair"):
        assert torch.equal(getattr(without, field), getattr(shown, field))
    assert shown.shortcuts[:, SHORTCUTS.index(name)].all()
    assert shown.shortcuts.sum() == 30
    changed = (without.images != shown.images).any(dim=1)
    share = changed.flatten(1).float().mean(dim=1)
    # A ruler has at least its line of 48 pixels (2% of the picture), a patch a part of a disc, a vignette four corners.
    assert share.min() > 0.01
    assert share.max() < 0.45
    assert not changed[:, 20:28, 20:28].any(), "the middle, where the lesion is, stays as it was"


def test_two_shortcuts_do_not_move_each_other() -> None:
    ruler, both = (
        WORLD.sample(12, seed=6, split="test", present={**NONE, "ruler": True, "vignette": on}).images
        for on in (False, True)
    )
    # In a circle within the vignette, of three quarters of the half side, the rulers are the same.
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    inside = torch.from_numpy(np.hypot(x, y) < 0.75)
    assert torch.equal(ruler[:, :, inside], both[:, :, inside])


def test_agreement_is_the_share_of_pictures_on_which_a_shortcut_goes_with_the_diagnosis() -> None:
    batch = WORLD.sample(400, seed=7, split="train", agreement={"ruler": 0.9})
    ruler, patch = batch.shortcuts[:, 0], batch.shortcuts[:, 1]
    # Of 400 pictures: four standard deviations are 0.06 at 0.9 and 0.08 at 0.2.
    assert abs((ruler == batch.labels.bool()).float().mean() - 0.9) < 0.06
    for label in (0, 1):
        assert abs(patch[batch.labels == label].float().mean() - 0.2) < 0.12
    total = WORLD.sample(50, seed=8, split="train", agreement={"vignette": 1.0})
    assert torch.equal(total.shortcuts[:, 2], total.labels.bool())


def test_signs_are_higher_for_melanomas_and_grow_apart_with_the_separation() -> None:
    batch = WORLD.sample(300, seed=9, split="train")
    melanoma, clear = batch.labels == 1, batch.separation > 0.3
    for sign in range(len(SIGNS)):
        gap = [
            batch.signs[melanoma & chosen, sign].mean() - batch.signs[~melanoma & chosen, sign].mean()
            for chosen in (clear, ~clear)
        ]
        assert gap[0] > gap[1] > 0


def test_signs_are_on_the_pictures() -> None:
    batch = WORLD.sample(200, seed=9, split="test", present=NONE)
    brightness = batch.images.float().mean(dim=1)
    skin = brightness[:, :4].flatten(1).median(dim=1).values
    area = (brightness < skin[:, None, None] - 40).flatten(1).float().mean(dim=1)
    assert np.corrcoef(area, batch.signs[:, SIGNS.index("diameter")])[0, 1] > 0.4
    # Within the smallest lesion red less blue is one number on brown, and others on blue and red.
    inner = batch.images[~batch.hair][:, :, 20:28, 20:28].float()
    varied = (inner[:, 0] - inner[:, 2]).flatten(1).std(dim=1)
    assert np.corrcoef(varied, batch.signs[~batch.hair, SIGNS.index("colours")])[0, 1] > 0.3


def test_captions_name_the_diagnosis_and_only_what_is_there() -> None:
    tokenizer = WordTokenizer(WORLD.vocabulary, CONTEXT_LENGTH)
    batch = LesionWorld(0, mention=1.0).sample(300, seed=10)
    tokenizer(batch.captions)  # every caption has its words and fits the context
    for caption, label, shown, hair in zip(batch.captions, batch.labels, batch.shortcuts, batch.hair, strict=True):
        assert (("melanoma" in caption) or ("malignant" in caption)) == bool(label)
        assert ("hair" in caption) <= bool(hair)
        for word, there in zip(("ruler", "patch", "corners"), shown, strict=True):
            assert (word in caption) <= bool(there)
    assert any("ruler" in caption for caption in batch.captions)
    assert not any("ruler" in caption for caption in LesionWorld(0, mention=0.0).sample(300, seed=10).captions)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"present": {"rulers": True}}, "did you mean 'ruler'"),
        ({"agreement": {"ruler": 1.5}}, "0..1"),
        ({"split": "tests"}, "splits are"),
    ],
)
def test_the_generator_refuses_what_it_does_not_know(asked: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        WORLD.sample(2, **{"seed": 0, **asked})


# What is measured


def test_logistic_regression_is_at_the_minimum_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    data, labels = rng.normal(size=(60, 4)), rng.integers(0, 2, 60)
    found = fit_classifier(data, labels, strength=3.0)
    sign = 2 * labels - 1

    def loss(weight: np.ndarray, bias: float) -> float:
        return float(3.0 * np.log1p(np.exp(-sign * (data @ weight + bias))).sum() + weight @ weight / 2)

    at = loss(found.weight, found.bias)
    for step in (1e-3, -1e-3):
        assert loss(found.weight, found.bias + step) > at
        for axis in np.eye(4):
            assert loss(found.weight + step * axis, found.bias) > at
    with pytest.raises(InputError, match="two classes"):
        fit_classifier(data, np.ones(60, np.int64))


def test_accuracy_is_that_of_a_loop_over_pictures_and_pairs() -> None:
    rng = np.random.default_rng(1)
    labels, scores = rng.integers(0, 2, 50), rng.normal(size=50).round(1)  # rounded: there are ties
    hits = [np.mean([(scores[i] > 0) == label for i in np.flatnonzero(labels == label)]) for label in (0, 1)]
    pairs = [(scores[i], scores[j]) for i in np.flatnonzero(labels == 1) for j in np.flatnonzero(labels == 0)]
    area = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    found = accuracy(scores, labels)
    assert found.balanced.value == pytest.approx(np.mean(hits))
    assert found.auroc.value == pytest.approx(area)
    assert auroc(scores, labels) == pytest.approx(area)
    low, high = found.auroc.interval
    assert low < area < high
    # Two scores on the same pictures see the same draws: the difference with itself has no width.
    assert (found - accuracy(scores, labels)).auroc.interval == (0.0, 0.0)


def test_verdicts_follow_the_interval() -> None:
    assert change(Measured(0.1, np.array([0.05, 0.2]))).startswith("rises by 10.0")
    assert change(Measured(-0.1, np.array([-0.2, -0.05]))).startswith("falls by 10.0")
    assert "beyond chance" in change(Measured(0.1, np.array([-0.05, 0.2])))
    assert standing(Measured(-0.1, np.array([-0.2, -0.05])), "the prompts").startswith("below the prompts")
    assert standing(Measured(-0.1, np.array([-0.2, 0.05])), "the prompts").startswith("not to be told")


def test_agreeing_pictures_nest() -> None:
    rng = np.random.default_rng(2)
    labels, draws = rng.integers(0, 2, 500), rng.random(500)
    less, more = (agreeing(labels, share, draws) == labels for share in (0.7, 0.9))
    assert (less <= more).all()
    assert abs(more.mean() - 0.9) < 0.05
    assert (agreeing(labels, 1.0, draws) == labels).all()


def test_controls_are_of_like_activation_and_no_suspects() -> None:
    active = np.abs(np.random.default_rng(3).normal(size=(40, 30))).astype(np.float32) * np.arange(30)
    for control in matched_sets(active, [12, 20], n_sets=10, nearest=4):
        assert len(set(control)) == 2
        assert not {12, 20, 0} & set(control)  # latent 0 is never active
        for drawn, suspect in zip(control, (12, 20), strict=True):
            assert 0.6 < active[:, drawn].mean() / active[:, suspect].mean() < 1.6
    with pytest.raises(InputError, match="too few"):
        matched_sets(active[:, :3], [1, 2], n_sets=1)


def test_embeddings_without_latents_are_those_of_an_edited_pass() -> None:
    clip, sae = cle.planted_clip(), cle.planted_sae("blocks.3.hook_resid_post")
    pixels = normalise(cle.PlantedWorld(0).sample(3, seed=0, split="test").images)
    codes = cle.encode(clip.vision, pixels, sae)
    latent = int(codes.latent[0])
    found = embed_without(clip, pixels, sae, [[], [latent]], progress=False)
    target = cle.direction_target(torch.eye(clip.vision.cfg.d_embed)[:4])
    exact = cle.exact_ablation(clip.vision, pixels, sae, target, latents=[latent], progress=False).dense()[..., latent]
    # The loss of a cosine with each of four axes; float32 passes.
    assert np.allclose((found[0] - found[1])[:, :4], exact.numpy(), atol=1e-5)
    assert np.allclose(found[0], clip.embed_images(pixels, normalize=True).detach().numpy(), atol=1e-6)
    assert np.array_equal(activations(clip, pixels, sae), codes.dense().amax(dim=1).numpy())
    assert clip.vision.acts_to_saes == {}


# A user's folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty pictures of cranes and gears; a damaged file, a missing one, one of a third class."""
    world = cle.PlantedWorld(0)
    lines = ["file,label,stamp,age"]
    for label in ("crane", "gear"):
        batch = world.sample(20, seed=31, split="test", classes=[label])
        for number, pixels in enumerate(batch.images):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{label}{number}.png")
            lines.append(f"{label}{number},{label},{number % 2},fifty")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG and then nothing")
    lines += ["damaged.png,crane,0,fifty", "missing.png,gear,1,fifty", "crane1.png,hat,1,fifty"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def test_a_folder_leaves_out_what_cannot_be_read_and_names_it(photos: Path) -> None:
    found = read_folder(photos, photos / "labels.csv", ["crane", "gear"], annotations=["stamp"], progress=False)
    assert len(found) == 40
    assert found.labels.sum() == 20
    assert found.annotations["stamp"].sum() == 20
    assert [line.split(":")[0] for line in found.skipped] == ["damaged.png", "missing.png", "crane1.png"]
    train, test = found.split(seed=1)
    assert sorted([*train.files, *test.files]) == sorted(found.files)
    assert train.labels.sum() == test.labels.sum() == 10


@pytest.mark.parametrize(
    ("table", "asked", "words"),
    [
        ("file,label\ncrane0,crane", {}, "both 'crane' and 'gear'"),
        ("file,label\nnothing,crane\nmissing,gear", {}, "2 of 2 left out"),
        ("file,lable\ncrane0,crane", {}, "did you mean 'lable'"),
        ("file,label\n", {}, "no rows"),
        ("", {}, "cannot read the table"),
        ("file,label\ncrane0,crane\ncrane0,gear", {}, "more than once"),
        ("file,label,ruler\ncrane0,crane,yes\ngear0,gear,perhaps", {"annotations": ["ruler"]}, "perhaps"),
        ("file,label\ncrane0,crane\ngear0,gear", {"annotations": ["ruler"]}, "no column 'ruler'"),
    ],
)
def test_a_folder_says_what_is_wrong(photos: Path, table: str, asked: dict, words: str) -> None:
    (photos / "other.csv").write_text(table)
    with pytest.raises(InputError, match=words):
        read_folder(photos, photos / "other.csv", ["crane", "gear"], progress=False, **asked)


def test_names_of_the_archives(photos: Path) -> None:
    """Without suffix, in subfolders that the table does not name, with spaces, and none that is a pattern."""
    kept = sorted(path.name for path in photos.glob("[cg]*.png"))
    labels = [name.rstrip("0123456789.png") for name in kept]
    for part, name in enumerate(kept):
        target = photos / f"part_{part % 2}" / name
        target.parent.mkdir(exist_ok=True)
        (photos / name).rename(target)
    stems = [Path(name).stem for name in kept]
    spaced = [f"{stem} , {label} " for stem, label in zip(stems, labels, strict=True)]
    (photos / "stems.csv").write_text("\n".join(["file,label ", *spaced]))
    found = read_folder(photos, photos / "stems.csv", ["crane", "gear"], progress=False)
    assert sorted(path.name for path in found.files) == sorted(kept)
    assert found.skipped == ()
    whole = "\n".join(["file,label", *(f"{name},{label}" for name, label in zip(kept, labels, strict=True))])
    (photos / "odd.csv").write_text(whole + "\n**,crane\n[a]*,gear\n")
    found = read_folder(photos, photos / "odd.csv", ["crane", "gear"], progress=False)
    assert [line.split(":")[0] for line in found.skipped] == ["**", "[a]*"]
    (photos / "twice.csv").write_text(whole + f"\n{stems[0]},gear\n")
    with pytest.raises(InputError, match=r"are one picture, .*: a picture has one label"):
        read_folder(photos, photos / "twice.csv", ["crane", "gear"], progress=False)
    other = photos / "part_2" / kept[0]
    other.parent.mkdir()
    other.write_bytes((photos / "part_0" / kept[0]).read_bytes())
    found = read_folder(photos, photos / "stems.csv", ["crane", "gear"], progress=False)
    assert len(found.skipped) == 1
    assert "several files are called so (part_0/" in found.skipped[0]


def test_a_folder_and_a_table_must_be_there(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no folder"):
        read_folder(photos / "nowhere", photos / "labels.csv", ["crane", "gear"])
    with pytest.raises(InputError, match="no table"):
        read_folder(photos, photos / "nowhere.csv", ["crane", "gear"])
    (photos / "few.csv").write_text("file,label\ncrane0,crane\ngear0,gear")
    with pytest.raises(InputError, match="needs 4 pictures"):
        read_folder(photos, photos / "few.csv", ["crane", "gear"], progress=False).split()
    assert main(["--folder", str(photos)]) == 2
    assert "--labels" in capsys.readouterr().err


def test_the_study_of_a_folder(photos: Path) -> None:
    pictures = read_folder(photos, photos / "labels.csv", ["crane", "gear"], annotations=["stamp"], progress=False)
    asked = argparse.Namespace(
        out=photos / "out", seed=0, sae=None, hook=None, d_sae=64, k=4, sae_tokens=4000, quiet=True
    )
    prompts = ["a photo of a crane", "a photo of a gear"]
    found = run_on_folder(cle.planted_clip(), pictures, prompts, asked)
    assert found.accuracy[ALL][CLASSIFIER].balanced.value > 0.8
    assert found.accuracy[ALL][PROMPTS].balanced.value > 0.8
    assert found.agreement["stamp"] < 0.7
    assert {"without stamp", "stamp against the diagnosis"} < set(found.accuracy)
    report = (photos / "out" / "report.md").read_text()
    assert "damaged.png" in report
    assert "nan" not in report
    for latent, files in found.references.items():
        assert files, f"suspect {latent} is active on the training half"
    for name in ("accuracy.png", "suspects.png"):
        with Image.open(photos / "out" / name) as picture:
            assert picture.width > 500


# The whole, small

SMALL = Settings(
    n_steps=150, n_sae_pictures=500, d_sae=64, k=8, n_sae_tokens=40_000, n_train=300, n_test=300, n_explained=100,
    n_random=2, shortcuts=("vignette",), agreements=(0.5, 0.95), hook_name="blocks.1.hook_resid_post",
    model=ClipConfig(embed_dim=32, patch_size=12, vision_layers=2, vision_width=64, text_layers=1, text_width=32),
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    out = tmp_path_factory.mktemp("lesions")
    return run_study(SMALL, out, control=False, progress=False), out


def test_a_classifier_falls_with_the_shortcut_further_than_the_prompts(small: tuple[Study, Path]) -> None:
    falls = {}
    for agreement in (0.5, 0.95):
        by = small[0].cell("vignette", agreement).accuracy
        falls[agreement] = {head: (by[SAME][head] - by[REVERSED][head]).balanced for head in (CLASSIFIER, PROMPTS)}
    # A CLIP of 150 steps has prompts that fall too, but never as far as a classifier that was shown the shortcut.
    assert falls[0.95][CLASSIFIER].interval[0] > 0.5
    assert (falls[0.95][CLASSIFIER] - falls[0.95][PROMPTS]).interval[0] > 0
    assert (falls[0.95][CLASSIFIER] - falls[0.5][CLASSIFIER]).interval[0] > 0


def test_suspects_carry_the_shortcut_and_matter_more_than_random_latents(small: tuple[Study, Path]) -> None:
    cell = small[0].cell("vignette", 0.95)
    assert set(cell.suspects.latents) & set(cell.keyed)
    assert max(abs(one.value - 0.5) for one in cell.key) >= 0.3
    reversed_ = cell.accuracy[REVERSED]
    assert (reversed_[ABLATED] - reversed_[RANDOM]).auroc.interval[0] > 0


def test_the_report_and_figures(small: tuple[Study, Path], tmp_path: Path) -> None:
    study, _ = small
    text = study_section(study, "command", "machine")
    value = study.cell("vignette", 0.95).accuracy[REVERSED][CLASSIFIER].balanced
    assert f"{value.value:.2f} ({value.interval[0]:.2f} to {value.interval[1]:.2f})" in text
    assert "nan" not in text
    draw_generated(study, tmp_path, n_pictures=3)
    for name in ("examples.png", "accuracy.png", "suspects.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500


def test_models_are_made_once_and_those_of_other_settings_are_others(small: tuple[Study, Path]) -> None:
    study, out = small
    clip, folder = lesion_clip(WORLD, SMALL, out, progress=False)  # read, not trained again
    pixels = normalise(versions(WORLD, "ruler", 2, "test")[0][0])
    assert torch.equal(clip.vision(pixels), study.clip.vision(pixels))
    others = [path.name for path in out.iterdir()]
    assert others == [folder.name]
    assert LesionWorld(1).fingerprint not in folder.name
    # A file in the wrong place is refused, and never taken for the model that was asked for.
    wrong = out / folder.name.replace("-150-", "-151-")
    folder.rename(wrong)
    try:
        with pytest.raises(LoadError, match="delete it"):
            lesion_clip(WORLD, Settings(n_steps=151, model=SMALL.model), out, progress=False)
    finally:
        wrong.rename(folder)
