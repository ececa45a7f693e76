"""`clip-lens train-sparse`: on the planted world, on files, gone on with, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clip_lens_ext as cle
from clip_lens_ext.cli import main
from clip_lens_ext.cli_sparse import read_pairs
from clip_lens_ext.errors import InputError

QUICK = ["--n-images", "60", "--batch-size", "25", "--epochs", "2", "--d-code", "64", "--no-progress"]


def test_it_trains_measures_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "sparse")
    assert main(["train-sparse", "--out", out, *QUICK, "--cap", "20"]) == 0
    said = capsys.readouterr().out
    for part in (
        "Sparse CLIP on planted-0: 64 features, 4 steps on 54 pairs", "last step", "on 5 pairs that were held out",
        "image to text R@1", "sparse   dense", "of the training",
    ):  # fmt: skip
        assert part in said, part
    clip = cle.load_sparse_clip(out, cle.planted_clip())
    assert clip.vision.cfg.d_embed == 64
    assert float(clip.logit_scale.detach().exp()) <= 20.001
    assert "the cap of 20 was not reached" in said
    state = (tmp_path / "sparse" / "training_state.pt").stat().st_mtime_ns
    assert main(["train-sparse", "--out", out, *QUICK, "--cap", "20"]) == 0
    assert capsys.readouterr().out == said
    assert (tmp_path / "sparse" / "training_state.pt").stat().st_mtime_ns == state
    assert main(["train-sparse", "--out", out, *QUICK, "--cap", "30"]) == 2
    assert "largest_logit_scale was 20.0 and is now 30.0" in capsys.readouterr().err


def test_a_cap_that_was_reached_is_not_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-sparse", "--out", str(tmp_path / "sparse"), *QUICK, "--cap", "10"]) == 0
    said = capsys.readouterr().out
    assert "not reached" not in said


def test_pairs_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for number in (1, 2):
        (tmp_path / f"x/{number}.png").touch()
    (tmp_path / "pairs.csv").write_text('caption,image,more\n"a cat, a dog",x/1.png,0\nb,x/2.png,1\nc,x/1.png,2\n')
    paths, captions = read_pairs(tmp_path / "pairs.csv")
    assert paths == [tmp_path / "x/1.png", tmp_path / "x/2.png"]
    assert captions == [["a cat, a dog", "c"], ["b"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,text\na,b\n", "no column caption"),
        ("image,caption\na,\n", "line 2 .* lacks"),
        ("image,caption\n", "no rows"),
        ("image,caption\nnone.png,a\n", r"line 2 .* there is no file .*none\.png"),
        ("", "no column image and no caption"),
        ("image,caption\n\xff,b\n", "cannot be read as CSV"),
    ],
)
def test_a_file_that_is_no_list_of_pairs(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path / "pairs.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B-32/none"], "go together"),
        (["pairs.csv"], "go together"),
        (["--held-out", "1"], "held-out"),
        (["--n-images", "3"], "8 or more"),
        (["--k", "5"], "goes with activation"),
        (["--cap", "0.5"], "caps the factor"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-sparse", "--out", str(tmp_path / "new"), *QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_files_train_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    batch = cle.PlantedWorld(0).sample(30, seed=0)
    rows = ["image,caption"]
    for number, (picture, caption) in enumerate(zip(batch.images, batch.captions, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{caption}")
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    monkeypatch.setattr(cle, "load_clip", lambda model, device: cle.planted_clip(device))  # no weights are fetched
    out = tmp_path / "out"
    told = [
        "--model",
        "any",
        "--out",
        str(out),
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--d-code",
        "32",
        "--train",
        "all",
    ]
    assert main(["train-sparse", str(tmp_path / "pairs.csv"), *told, "--no-progress"]) == 0
    assert "1 pictures skipped" in capsys.readouterr().out
    dense = cle.planted_clip().vision.native.state_dict()
    found = cle.load_sparse_clip(out, cle.planted_clip())
    assert any(not torch.equal(value, dense[name]) for name, value in found.native.dense.visual.state_dict().items())
