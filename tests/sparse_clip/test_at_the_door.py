"""Bad input of Sparse CLIP is refused with a clear error at the door, and nothing is left out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

import clip_lens_ext as cle
from clip_lens_ext.cli import main
from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.semantics import collect_references, embed_references
from clip_lens_ext.sparse_clip import (
    EmbeddedPairs,
    SteeringData,
    add_sparse_heads,
    additive_attribution,
    beside_dense,
    embed_pairs,
    features_of,
    name_concepts,
    steer,
    steering_effect,
    train_sparse_clip,
)
from clip_lens_ext.sparse_clip.caption_steering import named_classes
from clip_lens_ext.sparse_clip.contrastive import contrastive_step
from clip_lens_ext.sparse_clip.metrics import StreamingActivity

WORDS = cle.Vocabulary.from_terms(["heart", "kite", "duck"])


@pytest.fixture(scope="module")
def pairs() -> tuple[Tensor, list[str]]:
    batch = PlantedWorld(0).sample(12, seed=5, split="test")
    return normalise(batch.images), batch.captions


def test_a_loader_that_shuffles_is_refused_where_position_counts(
    planted_sparse: cle.HookedCLIP, pairs: tuple[Tensor, list[str]]
) -> None:
    pictures, captions = pairs
    rows = list(pictures)
    ordered = DataLoader(rows, batch_size=4)
    dense = cle.planted_clip()
    for loader in (DataLoader(rows, batch_size=4, shuffle=True),
                   DataLoader(rows, batch_size=4, sampler=SubsetRandomSampler(range(12)))):  # fmt: skip
        with pytest.raises(InputError, match="another order each time, and captions go with"):
            embed_pairs(dense, loader, captions, progress=False)
        with pytest.raises(InputError, match="another order each time, and the judge"):
            name_concepts(planted_sparse, WORDS, loader, progress=False)
        with pytest.raises(InputError, match="another order each time, and labels"):
            beside_dense(planted_sparse, cle.EvaluationData(loader, captions=captions), progress=False)
        with pytest.raises(InputError, match="another order each time, and labels"):
            SteeringData.from_clip(planted_sparse, loader, [0] * 12, ["heart", "kite"], k=1, progress=False)
    references = collect_references(dense.vision, pictures, cle.planted_sae(), k=2, progress=False)
    with pytest.raises(InputError, match="another order each time, and references"):
        embed_references(references, DataLoader(rows, shuffle=True), dense, progress=False)
    found = embed_pairs(dense, ordered, captions, progress=False)
    assert torch.equal(found.images, embed_pairs(dense, pictures, captions, progress=False).images)


def test_a_stream_with_fewer_pictures_than_captions(
    planted_sparse: cle.HookedCLIP, pairs: tuple[Tensor, list[str]]
) -> None:
    pictures, captions = pairs

    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield from pictures[:8]

    with pytest.raises(InputError, match="8 pictures, and captions of 12"):
        embed_pairs(cle.planted_clip(), Stream(), captions, progress=False)
    with pytest.raises(InputError, match="8 pictures, and 12 labels or captions"):
        beside_dense(planted_sparse, cle.EvaluationData(Stream(), captions=captions), progress=False)


def test_a_caption_that_the_tokenizer_refuses_is_said_before_pictures_are_read(
    pairs: tuple[Tensor, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="zebra"):
        embed_pairs(cle.planted_clip(), pairs[0], ["a zebra"] * 12, checkpoint=tmp_path / "pass", progress=False)
    assert not (tmp_path / "pass").exists()


def test_pictures_that_attribution_leaves_out_are_named(planted_sparse: cle.HookedCLIP, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (48, 48), (80 * number, 10, 10)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")

    def preprocess(picture: Image.Image) -> Tensor:
        return normalise(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])[0]

    with pytest.warns(UserWarning, match=r"1 pictures could not be read and are left out \(broken\.png"):
        found = additive_attribution(planted_sparse, tmp_path, ["a heart"], preprocess=preprocess)
    assert found.n_sample == 3
    assert [name for name, _ in found.provenance["skipped"]] == ["broken.png"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_bootstrap": 0}, "n_bootstrap is a whole number"),
        ({"confidence": 95}, "confidence"),
        ({"seed": -1}, "seed is a whole number"),
    ],
)
def test_intervals_are_checked_before_anything_is_embedded(
    planted_sparse: cle.HookedCLIP, pairs: tuple[Tensor, list[str]], wrong: dict[str, Any], message: str
) -> None:
    def never(picture: Any) -> Any:
        raise AssertionError("a picture was read")

    data = cle.EvaluationData([Image.new("RGB", (9, 9))] * 12, captions=pairs[1], preprocess=never)
    with pytest.raises(InputError, match=message):
        beside_dense(planted_sparse, data, progress=False, **wrong)


def test_results_say_where_they_come_from(planted_sparse: cle.HookedCLIP, pairs: tuple[Tensor, list[str]]) -> None:
    data = cle.EvaluationData(pairs[0], captions=pairs[1])
    found = beside_dense(planted_sparse, data, n_bootstrap=7, seed=3, progress=False)
    assert (found.n_bootstrap, found.seed) == (7, 3)
    assert found.provenance["model_sha256"] != found.provenance["dense_sha256"]
    assert found.provenance["data_fingerprint"]
    start = add_sparse_heads(cle.planted_clip(), 64)
    one, other = (
        train_sparse_clip(start, *pairs, batch_size=4, n_epochs=1, seed=seed, progress=False) for seed in (1, 2)
    )
    assert (one.settings["seed"], one.settings["batch_size"], other.settings["seed"]) == (1, 4, 2)
    assert one.provenance == other.provenance
    assert one.provenance["n_processes"] == 1
    shorter = train_sparse_clip(start, pairs[0][:8], pairs[1][:8], batch_size=4, n_epochs=1, progress=False)
    assert shorter.provenance["data_sha256"] != one.provenance["data_sha256"]
    assert shorter.provenance["begins_sha256"] == one.provenance["begins_sha256"]


def test_settings_that_are_no_numbers(planted_sparse: cle.HookedCLIP, pairs: tuple[Tensor, list[str]]) -> None:
    start = add_sparse_heads(cle.planted_clip(), 64)
    for wrong, message in [
        ({"stop_after": 1.5}, "stop_after is a whole number"), ({"checkpoints": 0.5}, "checkpoints are shares"),
        ({"n_epochs": "2"}, "n_epochs is a number"), ({"l1": None}, "l1 is a number"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            train_sparse_clip(start, *pairs, batch_size=4, progress=False, **wrong)
    with pytest.raises(InputError, match="images are a tensor"):
        EmbeddedPairs.from_vectors(np.eye(3), torch.eye(3))  # type: ignore[arg-type]
    for threshold in (float("nan"), -1.0, float("inf")):
        with pytest.raises(InputError, match="threshold"):
            StreamingActivity(3, threshold=threshold)
    with pytest.raises(InputError, match="labels are whole numbers"):
        SteeringData.from_clip(planted_sparse, pairs[0], ["a"] * 12, ["heart", "kite"], k=1,  # type: ignore[list-item]
                               progress=False)  # fmt: skip
    data = SteeringData.from_clip(planted_sparse, pairs[0], [0, 1] * 6, ["heart", "kite"], k=1, progress=False)
    with pytest.raises(InputError, match="seed is a whole number"):
        steering_effect(data, strengths=[1.0], seed=-1, progress=False)


def test_strengths_of_every_kind_of_number() -> None:
    codes = torch.tensor([[1.0, 0.0, 0.5]])
    for strength in (2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor([2.0])):
        assert steer(codes, boost=[1], strength=strength).tolist() == [[1.0, 2.0, 0.5]]  # type: ignore[arg-type]
    for strength, message in (([1.0, 2.0], "one strength, and here are 2"), ("2", "above zero"), (True, "above zero")):
        with pytest.raises(InputError, match=message):
            steer(codes, boost=[1], strength=strength)  # type: ignore[arg-type]


def test_a_vocabulary_is_counted_batch_by_batch(
    planted_sparse: cle.HookedCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for word in PlantedWorld(0).vocabulary if word.isalpha()]
    with torch.no_grad():
        expected = (planted_sparse.embed_texts(words) > 0).double().mean(dim=0)
    from clip_lens_ext.sparse_clip import steering

    monkeypatch.setattr(steering._share_of, "__defaults__", (7,))  # words in a batch
    found = features_of(planted_sparse, ["heart", "kite"], k=3, among=words)
    torch.testing.assert_close(found.share, expected[found.features], rtol=1e-12, atol=0)


def test_names_with_points_are_found() -> None:
    assert named_classes("a photo of a St. Bernard.", ["St. Bernard", "kite"]) == {"St. Bernard"}
    assert named_classes("a photo of a st bernard", ["St. Bernard", "kite"]) == {"St. Bernard"}


def test_the_loss_of_a_float64_model_is_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.rand(5, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    found = contrastive_step(lambda part: (image[part], text[part]), [torch.arange(5)], scale)
    logits = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-14)  # float32 misses it by some 1e-8


def test_the_command_line_refuses_a_width_of_zero_and_a_device_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-sparse", "--out", str(tmp_path / "a"), "--n-images", "40", "--d-code", "0"]) == 2
    assert "d_code" in capsys.readouterr().err
    for command in (["name", "--out", str(tmp_path / "b")], ["train-sparse", "--out", str(tmp_path / "c")],
                    ["check-sae"], ["spectrum", "--out", str(tmp_path / "d")]):  # fmt: skip
        assert main([*command, "--device", "nowhere"]) == 2
        assert "--device nowhere cannot be used here" in capsys.readouterr().err
