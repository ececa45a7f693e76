"""What a tower cannot take is refused at the door, with what was expected, what was found and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPVisionCfg
from open_clip.transformer import PatchDropout, TextTransformer, VisionTransformer
from oracles.models import TEXT, VISION, build_clip, build_text, build_vision, pictures, prompts
from torch import nn

from clip_lens_ext.errors import ClipLensError, InputError, UnsupportedModelError
from clip_lens_ext.towers import HookedCLIP, HookedTower

X, IDS = pictures(3), prompts(3)


def replaced(tensor: torch.Tensor, value: float, *index: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 32, 24), r"\[batch 3 24 32\].*got \[2, 3, 32, 24\]: clip.preprocess resizes"),
        (torch.zeros(2, 3, 224, 224), r"got \[2, 3, 224, 224\]"),
        (torch.zeros(2, 1, 24, 32), r"got \[2, 1, 24, 32\].*three channels"),
        (torch.zeros(2, 24, 32, 3), r"got \[2, 24, 32, 3\]"),
        (X[0], r"one picture \[3, 24, 32\]: add a batch axis, x\[None\]"),
        (torch.zeros(24, 32), r"got \[24, 32\]"),
        (torch.zeros(0, 3, 24, 32), "empty batch"),
        (torch.zeros(2, 3, 24, 32, dtype=torch.uint8), "got torch.uint8: use clip.preprocess"),
        (X.double(), r"got torch.float64: use x.to\(torch.float32\)"),
        (X.to("meta"), r"on meta, the tower is on cpu: use x.to\('cpu'\)"),
        (replaced(X, torch.nan, 1, 2, 3, 4), "NaN or infinite pixels in sample 1$"),
        (replaced(X, torch.inf, 2, 0, 0, 0), "in sample 2$"),
        (replaced(replaced(X, torch.inf, 2, 0, 0, 0), -torch.inf, 0, 0, 0, 0), "in sample 0 and 1 more"),
        ([[0.0]], r"got list: use clip.preprocess"),
        (None, "got NoneType"),
        ("picture.jpg", "got str"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "run_to", "run_with_cache"])
def test_pictures(x: Any, message: str, call: str) -> None:
    tower = HookedTower(build_vision())
    with pytest.raises(InputError, match=message):
        {"forward": tower, "run_to": lambda x: tower.run_to(x, "hook_pooled"), "run_with_cache": tower.run_with_cache}[
            call
        ](x)


def test_large_finite_pixels_are_no_infinity() -> None:
    """The sum over a picture may overflow where no pixel is infinite."""
    x = torch.full((1, 3, 24, 32), 3e36)
    assert x.flatten(1).sum() == torch.inf
    HookedTower(build_vision())._check_input(x)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (replaced(IDS, 50, 1, 2), r"in \[0, 50\), got 0 to 50: were they made by another model's tokenizer"),
        (replaced(IDS, -1, 1, 2), r"in \[0, 50\), got -1 to 49"),
        (IDS[:, :8], r"\[batch 9\], got \[3, 8\]: use clip.tokenize"),
        (torch.zeros(2, 77, dtype=torch.int64), r"got \[2, 77\]"),
        (IDS[0], r"got \[9\]"),
        (IDS[:0], r"got \[0, 9\]"),
        (IDS.float(), "integer type, got torch.float32"),
        (IDS.bool(), "integer type, got torch.bool"),
        (IDS.to("meta"), r"on meta, the tower is on cpu: use x.to\('cpu'\)"),
        (["a photo"], "got list: use clip.tokenize"),
    ],
)
@pytest.mark.parametrize("variant", ["flattened", "module"])
def test_token_ids(ids: Any, message: str, variant: str) -> None:
    with pytest.raises(InputError, match=message):
        HookedTower(build_text(variant))(ids)


def test_int32_ids_are_ids() -> None:
    model = build_text()
    assert torch.equal(HookedTower(model)(IDS.int()), model.encode_text(IDS))


def test_patch_dropout_needs_evaluation_mode() -> None:
    model = VisionTransformer(
        **{k: v for k, v in VISION.items() if k != "head_width"}, heads=3, output_dim=20, patch_dropout=0.5
    )
    assert isinstance(model.patch_dropout, PatchDropout)
    tower = HookedTower(model.train())
    with pytest.raises(InputError, match=r"patch dropout.*tower.eval\(\)"):
        tower(X)
    assert torch.equal(tower.eval()(X), model.eval()(X))


class Unknown(nn.Module):
    pass


def text_transformer(**settings: Any) -> TextTransformer:
    return TextTransformer(**{**TEXT, "output_dim": 20, **settings})


def vision_transformer(**settings: Any) -> nn.Module:
    return CLIP(20, CLIPVisionCfg(**{**VISION, **settings}), dict(TEXT)).visual


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Unknown, "no tower family reads a .*Unknown"),
        (lambda: nn.Linear(2, 2), "no tower family reads a torch.*Linear"),
        (lambda: vision_transformer(pool_type="none"), "pool_type 'none'"),
        (lambda: vision_transformer(qk_norm=True), "block 0 of the vision tower is a CustomResidualAttentionBlock"),
        (lambda: text_transformer(pool_type="none"), "pool_type 'none'"),
        (lambda: text_transformer(scale_heads=True), "block 0 of the text tower"),
    ],
)
def test_models_that_are_not_read(make: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        HookedTower(make())


def test_errors_are_the_builtins_that_a_caller_expects() -> None:
    tower = HookedTower(build_vision())
    with pytest.raises(ValueError, match="empty batch"):
        tower(X[:0])
    with pytest.raises(ClipLensError):
        tower(X[:0])
    with pytest.raises(TypeError):
        HookedTower(Unknown())


# -- HookedCLIP


@pytest.fixture
def clip() -> HookedCLIP:
    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.stack([prompts(1, seed=len(text))[0] for text in texts])

    return HookedCLIP(
        build_clip(), tokenizer=tokenize, preprocess=lambda picture: X[picture.width % 3], model_name="tiny"
    )


def test_similarity_is_the_cosine_without_the_logit_scale(clip: HookedCLIP) -> None:
    texts = ["a", "bird", "on a roof", "far away"]
    image, _, scale = clip.native(X, clip.tokenize(texts))[:3]
    text = clip.native.encode_text(clip.tokenize(texts), normalize=True)
    expected = torch.empty(3, 4)
    for i in range(3):
        for j in range(4):
            expected[i, j] = (image[i] * text[j]).sum()
    assert torch.allclose(clip.similarity(X, texts), expected, atol=1e-6)  # cosines: float32's rounding
    assert torch.allclose(clip(X, texts), expected, atol=1e-6)
    assert clip.logit_scale is clip.native.logit_scale
    assert scale == clip.logit_scale.exp()


def test_embeddings_are_the_native_ones(clip: HookedCLIP) -> None:
    assert torch.equal(clip.embed_images(X), clip.native.encode_image(X))
    assert torch.equal(clip.embed_images(X, normalize=True), clip.native.encode_image(X, normalize=True))
    assert torch.equal(
        clip.embed_texts("bird", normalize=True), clip.native.encode_text(clip.tokenize(["bird"]), normalize=True)
    )
    assert clip.embed_texts("").shape == (1, 20)


def test_pictures_as_pil_images(clip: HookedCLIP) -> None:
    from PIL import Image

    images = [Image.new("RGB", (width, 5)) for width in (4, 3)]
    assert torch.equal(clip.pixels(images), X[[1, 0]])
    assert torch.equal(clip.embed_images(images[0]), clip.embed_images(X[1:2]))
    with pytest.raises(InputError, match="no picture given"):
        clip.pixels([])
    with pytest.raises(InputError, match="preprocess="):
        HookedCLIP(build_clip()).pixels(images)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no text given"), (["a", 3], "must be strings, got int"), (["a", None], "must be strings, got NoneType")],
)
def test_texts(clip: HookedCLIP, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip.tokenize(texts)


def test_vision_tower_alone() -> None:
    clip = HookedCLIP(build_vision(), model_name="eyes")
    assert clip.text is None
    assert torch.equal(clip.embed_images(X), clip.native(X))
    with pytest.raises(InputError, match=r"eyes is a vision tower alone.*direction_target"):
        clip.embed_texts("a")
    with pytest.raises(InputError, match="no logit scale"):
        _ = clip.logit_scale
    with pytest.raises(InputError, match="tokenizer="):
        HookedCLIP(build_clip()).tokenize("a")
    with pytest.raises(UnsupportedModelError, match="no vision tower"):
        HookedCLIP(build_text("module"))


def test_moving_the_whole(clip: HookedCLIP) -> None:
    clip.to(torch.float64)
    assert clip.vision.cfg.dtype == clip.text.cfg.dtype == torch.float64
    assert clip.native.attn_mask.dtype == torch.float64
    assert clip.embed_images(X.double()).dtype == torch.float64
    assert clip.eval().native.training is False
    assert clip.train().vision.native.training is True
