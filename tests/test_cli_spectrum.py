"""`clip-lens spectrum` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import clip_lens_ext as cle
from clip_lens_ext import cli

FEW = ["--n-bootstrap", "10", "--no-progress"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes of the planted world in two subfolders, one of them cut off, and their captions."""
    folder = tmp_path_factory.mktemp("photos")
    captions = {}
    for name in ("crown", "gear"):
        (folder / name).mkdir()
        batch = cle.PlantedWorld(0).sample(12, seed=3, split="test", classes=[name])
        for number, (pixels, caption) in enumerate(zip(batch.images, batch.captions, strict=True)):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name / f"{number:02}.png")
            captions[f"{name}/{number:02}.png"] = [caption]
    whole = (folder / "gear" / "03.png").read_bytes()
    (folder / "gear" / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def test_the_planted_world(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["spectrum", "--n-images", "300", "--rule", "pooled", "--ranks", "20", "60", "--out", str(out), *FEW]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("hook_embedding: 128 dimensions, ")
    assert "20 of 128 dimensions pruned: share that is right, on test images alone" in printed
    assert "60 of 128 dimensions pruned, linear probe: " in printed
    frame = pd.read_csv(out / "pruning.csv")
    assert set(frame.of_rank) == {20, 60}
    shown = frame[(frame.pruned == "none") & (frame.measure == "kNN")].score.iloc[0]
    line = next(line for line in printed.splitlines() if line.startswith("  kNN "))
    assert line.split()[1] == f"{shown:.3f}"
    split = cle.NoiseSplit.load(out / "split-pooled-marchenko_pastur.safetensors")
    assert f"  pooled            marchenko_pastur          {split.rank:>6}" in printed
    for name in ("spectrum.png", "cuts.png", "pruning.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 800


def test_a_folder_with_classes_captions_and_a_broken_picture(
    photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cle, "load_clip", lambda name, device: cle.planted_clip(device))  # a model without a network
    out = tmp_path / "out"
    code = cli.main([
        "spectrum", str(photos), "--captions", str(photos / "captions.json"), "--model", "planted", "--rule", "pooled",
        "--cut", "10", "--out", str(out), *FEW,
    ])  # fmt: skip
    printed, err = capsys.readouterr()
    assert code == 0, err
    assert "1 images skipped (" in err
    assert "gear/03.png" in err
    assert "image to text R@1" in printed
    assert "zero-shot top-1" in printed
    assert "noise of 2 subsets: overlap 0." in printed
    assert (out / "overlap.png").exists()
    (row,) = pd.read_csv(out / "overlap.csv").to_dict("records")
    assert (row["first"], row["second"]) == ("crown", "gear")
    with pytest.warns(UserWarning, match="could not be read"):
        cli.main(["spectrum", str(photos), "--rule", "pooled", "--cut", "10", "--out", str(out), *FEW])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B-32/openai"], "--model needs FOLDER"),
        (["nowhere"], "no such folder: 'nowhere'"),
        (["photos/crown"], "no subfolders that are classes"),
        (["loose"], "subfolders and 1 images beside them (one.png, ...)"),
        (["photos", "--captions", "none.json"], "none.json is no JSON file of captions"),
        (["photos", "--captions", "list.json"], "has to be a JSON object"),
        (["photos", "--captions", "few.json"], "few.json has no caption of 23 images: crown/01.png"),
        (["--n-images", "0"], "--n-images takes a positive number"),
        (["--n-images", "60", "--rule", "poled"], "poled"),
        (["--n-images", "60", "--cut", "kne"], "kne"),
        (["--n-images", "60", "--hook", "blocks.2.hook_resid_pots"], "did you mean"),
        (["--out", "list.json"], "is a file: name a folder"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "few.json").write_text(json.dumps({"crown/00.png": "a crown"}))
    (tmp_path / "loose" / "a").mkdir(parents=True)
    for place in ("loose/one.png", "loose/a/two.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    assert cli.main(["spectrum", *arguments, *FEW]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("clip-lens: ")]) == 1
    assert "Traceback" not in err
