"""Training: by its formula, in parts, in half precision; and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.sparse_training import CODE, QUICK, N, by_the_formula, data, dense, same, sparse, weights
from PIL import Image
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip import EmbeddedPairs, add_sparse_heads, embed_pairs, train_sparse_clip, trainer


@pytest.mark.parametrize(("l1", "warmup", "n_warmup"), [(0.0, 0.05, 0), (0.01, 0.35, 3)])
def test_heads_by_the_formula(l1: float, warmup: float, n_warmup: int) -> None:
    clip = sparse(logit_scale=15.9)
    pairs = embed_pairs(dense(), *data(), progress=False)
    found = train_sparse_clip(clip, pairs, **QUICK, l1=l1, warmup=warmup)
    image, text, log_scale, losses = by_the_formula(clip, pairs, 16.0, 1e-2, 9, l1, n_warmup)
    native: Any = found.clip.native
    # float32 against float64 over nine steps of Adam, which divides by gradients that may be tiny.
    torch.testing.assert_close(native.image_head.weight.double(), image, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(native.text_head.weight.double(), text, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(native.logit_scale.double(), log_scale, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.history.loss, losses, rtol=1e-4)
    assert found.finished
    assert found.history.step.tolist() == list(range(1, 10))


def test_the_cap_holds_and_what_came_in_stays() -> None:
    clip = sparse(logit_scale=5.0)
    before = {name: value.clone() for name, value in clip.native.state_dict().items()}
    found = train_sparse_clip(clip, *data(), **{**QUICK, "n_epochs": 40, "largest_logit_scale": 5.2})
    assert found.history.logit_scale.max() == pytest.approx(5.2, rel=1e-6)
    assert (found.history.logit_scale > 5.199).sum() > 10  # it wanted to go above, and did not
    for name, value in clip.native.state_dict().items():
        assert torch.equal(value, before[name]), name
    changed = {name for name, value in weights(found).items() if not torch.equal(value, before[name])}
    assert changed == {"image_head.weight", "text_head.weight", "logit_scale"}
    assert not found.clip.native.training


@pytest.mark.parametrize("trained", ["heads", "all"])
def test_parts_of_a_batch_are_the_batch(trained: Any) -> None:
    one, parts = (
        train_sparse_clip(sparse(), *data(), **QUICK, trained=trained, n_accumulated=n) for n in (1, 4)
    )  # fmt: skip
    same(one, parts, rtol=2e-3, atol=2e-4)  # sums in another order, through Adam


@pytest.mark.parametrize(("precision", "factor"), [("float32", 1.0), ("bfloat16", 1.0), ("float16", 2.0**16)])
def test_the_loss_is_scaled_for_float16(precision: Any, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes into the loss from behind is the scale; a step of infinite gradients is left out, and halves it."""
    real, factors = trainer.contrastive_step, []

    def recorded(*args: Any, backward: Any, **kwargs: Any) -> Any:
        def watched(loss: Tensor) -> None:
            factors.append(0.0)

            def seen(gradient: Tensor) -> Tensor:
                factors[-1] = float(gradient)
                return gradient * math.inf if len(factors) == infinite else gradient

            loss.register_hook(seen)
            backward(loss)

        return real(*args, backward=watched, **kwargs)

    monkeypatch.setattr(trainer, "contrastive_step", recorded)
    infinite = 0
    train_sparse_clip(sparse(), *data(), **QUICK, precision=precision, stop_after=3)
    assert factors == [factor] * 3
    if precision != "float16":
        return
    infinite, before = 2, []
    for last in (1, 2, 3):
        factors.clear()
        before.append(weights(train_sparse_clip(sparse(), *data(), **QUICK, precision=precision, stop_after=last)))
    assert factors == [factor, factor, factor / 2]
    assert all(torch.equal(value, before[1][name]) for name, value in before[0].items())
    assert not torch.equal(before[1]["image_head.weight"], before[2]["image_head.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("trained", "precision"), [("heads", "float32"), ("all", "float16")])
def test_half_weights_are_not_trained(dtype: str, trained: Any, precision: Any, tmp_path: Path) -> None:
    half = sparse().to(dtype=getattr(torch, dtype))
    asked = {"float32": dtype, "float16": "float16"}[precision]
    with pytest.raises(InputError, match=f"is {dtype}, .* load the model in float32 and pass precision='{asked}'"):
        train_sparse_clip(half, *data(), **QUICK, trained=trained, precision=precision, output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("trained", ["heads", "all"])
def test_half_precision_is_near(precision: Any, trained: Any) -> None:
    one, other = (
        train_sparse_clip(sparse(), *data(), **QUICK, trained=trained, precision=p) for p in ("float32", precision)
    )
    assert (one.history.loss != other.history.loss).any()
    # bfloat16 keeps 8 bits, and the cosines, which are near 1 in an untrained model, are times 14.
    np.testing.assert_allclose(one.history.loss[:3], other.history.loss[:3], rtol=0.05)


def test_ablations_are_sparser() -> None:
    settings = {**QUICK, "n_epochs": 20}
    plain = train_sparse_clip(sparse(), *data(), **settings).history.iloc[-1]
    penalised = train_sparse_clip(sparse(), *data(), **settings, l1=0.003).history.iloc[-1]
    top = train_sparse_clip(sparse(activation="topk", k=5), *data(), **settings).history.iloc[-1]
    assert 0 < penalised.l0_image < plain.l0_image
    assert 0 < penalised.l0_text < plain.l0_text
    assert max(top.l0_image, top.l0_text) <= 5 < min(plain.l0_image, plain.l0_text)


def test_a_training_that_dies_says_so() -> None:
    with pytest.warns(UserWarning, match="every code of .* is zero: nothing is learnt any more") as said:
        dead = train_sparse_clip(sparse(), *data(), **{**QUICK, "lr": 3e-2, "n_epochs": 20}, l1=1.0)
    assert len(said) == 1
    assert dead.history.iloc[-1].l0_image == dead.history.iloc[-1].l0_text == 0
    assert dead.history.loss.iloc[-1] == pytest.approx(math.log(8))
    first = int((dead.history[["l0_image", "l0_text"]] == 0).any(axis=1).idxmax()) + 1
    assert str(said[0].message).startswith(f"step {first}: ")
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_sparse_clip(sparse(), *data(), **QUICK, l1=0.01)


def files(folder: Path, broken: tuple[int, ...] = ()) -> list[Path]:
    rows = np.random.default_rng(0).integers(0, 255, (N, 24, 32, 3), dtype=np.uint8)
    paths = [folder / f"{number:02}.png" for number in range(N)]
    for number, (path, row) in enumerate(zip(paths, rows, strict=True)):
        Image.fromarray(row).save(path)
        if number in broken:
            path.write_bytes(b"no picture")
    return paths


def preprocess(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("trained", "n_workers"), [("heads", 0), ("all", 0), ("all", 2)])
def test_broken_pictures_are_left_out_with_their_captions(trained: Any, n_workers: int, tmp_path: Path) -> None:
    paths, captions = files(tmp_path, broken=(3, 9)), data()[1]
    settings = {**QUICK, "trained": trained, "n_workers": n_workers}
    found = train_sparse_clip(sparse(), paths, captions, preprocess=preprocess, **settings)
    assert [Path(skip.name).name for skip in found.skipped] == ["03.png", "09.png"]
    good = [number for number in range(N) if number not in (3, 9)]
    alone = train_sparse_clip(sparse(), [paths[i] for i in good], [captions[i] for i in good], preprocess=preprocess,
                              **settings)  # fmt: skip
    same(found, alone)
    assert alone.skipped == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": "towers"}, "trained is one of heads, all"), ({"precision": "half"}, "precision is one of"),
        ({"batch_size": 1}, "batch_size is an integer, 2"),
        ({"batch_size": 64}, "a batch of 64 pairs, and there are 26"),
        ({"n_accumulated": 3}, "does not divide"), ({"lr": 0.0}, "lr is a number above 0"),
        ({"lr": math.nan}, "lr is a number above 0"), ({"n_epochs": 0}, "n_epochs"), ({"warmup": 1.0}, "warmup"),
        ({"l1": -1.0}, "l1"), ({"largest_logit_scale": 4.6}, "begins with a factor of 14.29"),
        ({"largest_logit_scale": 0.5}, "not its logarithm"), ({"largest_logit_scale": 101.0}, "not its logarithm"),
        ({"checkpoints": (0.5, 0.1)}, "ascending shares"), ({"checkpoints": (0.0, 0.1)}, "ascending shares"),
        ({"seed": -1}, "seed"), ({"stop_after": 0}, "stop_after"), ({"clip_gradient": 0.0}, "clip_gradient"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train_sparse_clip(sparse(), *data(), **{**QUICK, **settings}, output_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_is_refused() -> None:
    images, captions = data()
    with pytest.raises(InputError, match="has no sparse heads"):
        train_sparse_clip(dense(), images, captions, **QUICK)
    for trained in ("heads", "all"):
        with pytest.raises(InputError, match="26 pictures, and captions of 25"):
            train_sparse_clip(sparse(), images, captions[:25], **QUICK, trained=trained)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pictures need captions"):
        train_sparse_clip(sparse(), images, **QUICK)
    with pytest.raises(InputError, match="picture 2 has no caption"):
        train_sparse_clip(sparse(), images, [*captions[:2], [], *captions[3:]], **QUICK)
    pairs = embed_pairs(dense(), images, captions, progress=False)
    with pytest.raises(InputError, match="train heads alone"):
        train_sparse_clip(sparse(), pairs, **QUICK, trained="all")
    with pytest.raises(InputError, match="are of another model"):
        train_sparse_clip(add_sparse_heads(dense(seed=1), CODE), pairs, **QUICK)
    with pytest.raises(InputError, match="have 19 numbers"):
        train_sparse_clip(sparse(), EmbeddedPairs.from_vectors(torch.randn(30, 19), torch.randn(30, 20)), **QUICK)
    with pytest.raises(InputError, match="NaN or infinite"):
        train_sparse_clip(sparse(), pairs, **{**QUICK, "lr": 1e30, "clip_gradient": None})


def test_embedded_pairs_are_those_of_the_towers(tmp_path: Path) -> None:
    images, captions = data()
    clip = dense()
    found = embed_pairs(clip, images, captions, batch_size=4, checkpoint=tmp_path / "rows", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(found.images, clip.vision(images), rtol=1e-5, atol=1e-5)
        for picture, own in enumerate(captions):
            said = found.entries[found.first[picture] : found.first[picture + 1]].tolist()
            assert [found.captions[number] for number in said] == own
            torch.testing.assert_close(found.texts[said], clip.embed_texts(own), rtol=1e-5, atol=1e-5)
    again = embed_pairs(clip, images, captions, batch_size=4, checkpoint=tmp_path / "rows", progress=False)
    assert again.sha256() == found.sha256()
    found.save(tmp_path / "pairs.safetensors")
    assert EmbeddedPairs.load(tmp_path / "pairs.safetensors").sha256() == found.sha256()
    with pytest.raises(InputError, match=r"other settings|of a pass"):
        embed_pairs(dense(seed=1), images, captions, batch_size=4, checkpoint=tmp_path / "rows", progress=False)


def test_a_planted_sparse_clip_is_sparse_and_still_knows_its_classes() -> None:
    world, clip = cle.PlantedWorld(0), cle.planted_clip()
    batch, test = world.sample(800, seed=0), world.sample(300, seed=1, split="test")
    start = add_sparse_heads(clip, 512, logit_scale=10.0)
    found = train_sparse_clip(start, cle.planted.normalise(batch.images), batch.captions, batch_size=200, n_epochs=25,
                              lr=3e-3, largest_logit_scale=30.0, progress=False)  # fmt: skip
    pictures, prompts = cle.planted.normalise(test.images), world.prompts()
    with torch.no_grad():
        accuracy = {
            name: float((model.similarity(pictures, prompts).argmax(1) == test.labels).float().mean())
            for name, model in (("dense", clip), ("untrained", start), ("sparse", found.clip))
        }
        l0 = float((found.clip.embed_images(pictures) > 0).float().sum(1).mean())
    assert accuracy["sparse"] > accuracy["dense"] - 0.15, accuracy
    assert accuracy["sparse"] > accuracy["untrained"] + 0.2, accuracy
    assert l0 < 0.4 * 512
    first, last = found.history.iloc[0], found.history.iloc[-1]
    assert last.l0_image < 0.8 * first.l0_image
