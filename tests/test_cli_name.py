"""`clip-lens name` from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

import clip_lens_ext as cle
from clip_lens_ext import cli
from clip_lens_ext.sparse_clip import ConceptNames, add_sparse_heads

WORDS = ["crown", "gear", "heart", "tulip", "bow"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, one of them broken, and a vocabulary beside it."""
    root = tmp_path_factory.mktemp("root")
    (root / "photos").mkdir()
    for number, pixels in enumerate(cle.PlantedWorld(0).sample(12, seed=3, split="test").images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / "photos" / f"{number:02}.png")
    (root / "photos" / "05.png").write_bytes(b"no picture")
    clip = add_sparse_heads(cle.planted_clip(), 64, seed=7)
    cle.save_sparse_clip(clip, root / "model", towers=False)
    (root / "words.txt").write_text("\n".join(WORDS))
    (root / "captions.txt").write_text("a photo of a gear\na photo of a gear\n\na photo of a heart\n")
    return root


def test_a_folder(photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = cli.main([
        "name", str(photos / "photos"), "--model", str(photos / "model"), "--vocabulary", str(photos / "words.txt"),
        "--texts", str(photos / "captions.txt"), "--words", "3", "--pictures", "4", "--top", "5", "--by", "agreement",
        "--out", str(out), "--no-progress",
    ])  # fmt: skip
    printed, err = capsys.readouterr()
    assert code == 0, err
    assert "1 images skipped (05.png: " in err
    found = ConceptNames.load(out / "concepts.safetensors")
    assert (found.k_words, found.k_images, found.n_texts, found.images.n_samples) == (3, 4, 3, 11)
    top = found.top(5, by="agreement")
    lines = printed.splitlines()
    first = lines.index("features of greatest agreement that have words and pictures") + 2
    for line, feature in zip(lines[first : first + 5], top, strict=True):
        concept = found.of(feature)
        assert line.split()[:3] == [str(feature), f"{concept.agreement:+.3f}", f"{concept.control:+.3f}"]
        assert line.endswith(", ".join(word.name for word in concept.words))
    frame = pd.read_csv(out / "concepts.csv")
    assert frame.agreement.tolist() == pytest.approx(found.agreement.tolist(), nan_ok=True)
    told = json.loads((out / "concepts.json").read_text(), parse_constant=pytest.fail)
    assert [one["name"] for one in told["features"]] == list(found.names)
    assert told["skipped"][0]["name"] == "05.png"
    with Image.open(out / "concepts.png") as picture:
        assert picture.width > 800
    with torch.no_grad():
        codes = add_sparse_heads(cle.planted_clip(), 64, seed=7).embed_texts(WORDS)
    assert found.names[top[0]] == WORDS[int(codes[:, top[0]].argmax())]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--top": "0"}, "--top takes a positive number"),
        ({"--vocabulary": "nothing.txt"}, "cannot read terms"),
        ({"--texts": "nothing.txt"}, "cannot read texts"),
        ({"images": "nothing"}, "no such folder of images"),
        ({"--vocabulary": ""}, "--model needs FOLDER and --vocabulary FILE"),
        ({"--model": "nothing"}, "nothing holds no Sparse CLIP"),
        ({"--model": "", "--dense": "nothing"}, "--dense is the model under the heads of --model"),
    ],
)
def test_wrong_input(
    changed: dict[str, str], message: str, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = {"images": str(photos / "photos"), "--model": str(photos / "model"),
             "--vocabulary": str(photos / "words.txt"), "--out": str(tmp_path / "out"), **changed}  # fmt: skip
    flags = [part for name, value in given.items() if name != "images" for part in (name, value)]
    assert cli.main(["name", given["images"], *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_dense_model_of_a_folder(
    photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the heads has the last part of a folder's name alone, which opens nothing."""
    plain, dense = cle.planted_clip(), tmp_path / "dense"
    named = cle.HookedCLIP(plain.native, preprocess=plain.preprocess, tokenizer=plain.tokenizer, model_name="dense")
    opened: list[str] = []

    def load(model: str, **settings: Any) -> cle.HookedCLIP:
        opened.append(model)
        return named

    monkeypatch.setattr(cle, "load_clip", load)  # its tokenizer is of no family that a folder may have
    cle.save_sparse_clip(add_sparse_heads(named, 64, seed=7), tmp_path / "model", towers=False)
    told = ["name", str(photos / "photos"), "--model", str(tmp_path / "model"), "--vocabulary",
            str(photos / "words.txt"), "--out", str(tmp_path / "out"), "--no-progress"]  # fmt: skip
    assert cli.main(told) == 2
    said = capsys.readouterr().err
    assert "'dense' under the heads" in said
    assert "--dense NAME/TAG or --dense FOLDER" in said
    assert not (tmp_path / "out").exists()
    assert cli.main([*told, "--dense", str(dense)]) == 0
    assert opened == [str(dense)]
    assert len(ConceptNames.load(tmp_path / "out" / "concepts.safetensors")) == 64


def test_out_is_a_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = str(photos / "words.txt"), str(photos / "model")
    assert cli.main(["name", str(photos / "photos"), "--model", model, "--vocabulary", out, "--out", out]) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_planted_one_needs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["name", "--out", str(tmp_path), "--no-progress", "--top", "3", "--by", "lift"]) == 0
    said = capsys.readouterr().out
    assert "1024 features" in said
    found = ConceptNames.load(tmp_path / "concepts.safetensors")
    assert found.mean_agreement > 3 * abs(found.mean_control)
    assert found.text_source == "texts"
