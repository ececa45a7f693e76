"""`load_clip`: weights come whole and finite from where they were asked for, or there is an error and no model."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from oracles.models import build_clip, build_text, build_vision, pictures, randomise_
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_lens_ext.errors import LoadError, UnsupportedModelError
from clip_lens_ext.towers import HookedCLIP, load_clip

NAME = "tiny-test-clip"
CONFIG = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16},
    # The real vocabulary, so that open_clip's own tokenizer is the right one.
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 12, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module", autouse=True)
def _config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("configs")
    configs, paths = dict(open_clip.factory._MODEL_CONFIGS), list(open_clip.factory._MODEL_CONFIG_PATHS)
    for name, extra in [(NAME, {}), (f"{NAME}-quickgelu", {"quick_gelu": True})]:
        (folder / f"{name}.json").write_text(json.dumps({**CONFIG, **extra}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(configs)
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths


@pytest.fixture(scope="module")
def native(_config: None) -> nn.Module:
    logging.disable(logging.WARNING)
    model = open_clip.create_model(NAME)
    logging.disable(logging.NOTSET)
    return randomise_(model, 3).eval()


@pytest.fixture
def weights(native: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in native.state_dict().items()}


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def write(weights: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


# -- what works


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("spelling", ["two arguments", "one name", "a Path"])
def test_weight_file(native: nn.Module, weights: dict[str, Tensor], tmp_path: Path, suffix: str, spelling: str) -> None:
    path = write(weights, tmp_path / f"weights{suffix}")
    arguments = {"two arguments": (NAME, str(path)), "one name": (f"{NAME}/{path}",), "a Path": (NAME, path)}[spelling]
    clip = load_clip(*arguments)
    assert not clip.native.training
    assert torch.equal(clip.embed_images(X), native.encode_image(X))
    ids = open_clip.get_tokenizer(NAME)(["a photo of a crane", "two"])
    assert ids.shape == (2, 9)
    assert torch.equal(clip.tokenize(["a photo of a crane", "two"]), ids)
    assert torch.equal(clip.embed_texts(["a photo of a crane", "two"]), native.encode_text(ids))
    assert torch.equal(clip.logit_scale, native.logit_scale)
    assert all(torch.equal(value, weights[key]) for key, value in clip.native.state_dict().items())
    assert clip.model_name == f"{NAME}/weights{suffix}"
    assert clip.vision.cfg.model_name == clip.text.cfg.model_name == clip.model_name


@pytest.mark.parametrize("wrapped", ["state_dict", "module."])
def test_training_checkpoints(native: nn.Module, weights: dict[str, Tensor], tmp_path: Path, wrapped: str) -> None:
    content: Any = (
        {"state_dict": weights, "epoch": 3}
        if wrapped == "state_dict"
        else {f"module.{key}": value for key, value in weights.items()}
    )
    torch.save(content, tmp_path / "epoch_3.pt")
    assert torch.equal(load_clip(NAME, tmp_path / "epoch_3.pt").embed_images(X), native.encode_image(X))


@pytest.mark.parametrize("prefix", ["", "visual."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_file_with_the_vision_tower_alone(native: nn.Module, tmp_path: Path, suffix: str, prefix: str) -> None:
    weights = {prefix + key: value for key, value in native.visual.state_dict().items()}
    clip = load_clip(NAME, write(weights, tmp_path / f"eyes{suffix}"))
    assert clip.text is None
    assert torch.equal(clip.embed_images(X), native.encode_image(X))
    assert len(list(clip.parameters())) == len(list(native.visual.parameters())), "no random text tower is kept"


def test_logit_scale_of_one_element(native: nn.Module, weights: dict[str, Tensor], tmp_path: Path) -> None:
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    clip = load_clip(NAME, write(weights, tmp_path / "w.safetensors"))
    assert clip.logit_scale.shape == ()
    assert clip.logit_scale == native.logit_scale


def test_preprocessing_of_a_loaded_model(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(weights, tmp_path / "w.safetensors")
    clip = load_clip(NAME, path)
    picture = Image.effect_noise((50, 41), 80).convert("RGB")
    expected = open_clip.image_transform(32, is_train=False)(picture)
    assert torch.equal(clip.preprocess(picture), expected)
    assert clip.embed_images(picture).shape == (1, 20)
    assert load_clip(NAME, path, preprocess=lambda picture: X[0]).preprocess(picture) is not None
    assert load_clip(NAME, path, tokenizer=lambda texts: torch.zeros(1, 9).long()).tokenize("a").sum() == 0


def test_dtype_and_device(native: nn.Module, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(weights, tmp_path / "w.safetensors")
    clip = load_clip(NAME, path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in clip.parameters()} == {torch.bfloat16}
    half = copy.deepcopy(native).to(torch.bfloat16)
    assert torch.equal(clip.embed_images(X.bfloat16()), half.encode_image(X.bfloat16()))


def test_live_model() -> None:
    model = build_clip().train()
    clip = load_clip(model)
    assert clip.native is model
    assert model.training, "a live model keeps its mode"
    assert torch.equal(clip.embed_images(pictures()), model.encode_image(pictures()))
    assert clip.tokenizer is None, "50 words are not OpenAI's vocabulary, and no tokenizer is guessed"
    assert clip.preprocess(Image.new("RGB", (90, 80))).shape == (3, 24, 32)
    assert load_clip(model, preprocess=len).preprocess is len
    assert load_clip(clip) is clip


def test_live_model_with_the_known_vocabulary(native: nn.Module) -> None:
    clip = load_clip(native)
    assert torch.equal(clip.tokenize("a crane"), open_clip.get_tokenizer(NAME)(["a crane"]))


def test_live_vision_tower() -> None:
    visual = build_vision()
    clip = load_clip(visual)
    assert clip.text is None
    assert torch.equal(clip.embed_images(pictures()), visual(pictures()))


def test_live_model_moves() -> None:
    model = build_clip()
    assert load_clip(model, dtype=torch.float64).vision.cfg.dtype == torch.float64
    assert model.visual.conv1.weight.dtype == torch.float64


def test_pickle_and_copy_of_a_loaded_model(weights: dict[str, Tensor], tmp_path: Path) -> None:
    clip = load_clip(NAME, write(weights, tmp_path / "w.safetensors"))
    for other in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        assert isinstance(other, HookedCLIP)
        assert torch.equal(other.embed_images(X), clip.embed_images(X))
        assert torch.equal(other.embed_texts("a crane"), clip.embed_texts("a crane"))
        assert other.vision.native is other.native.visual
        picture = Image.new("RGB", (40, 40), "red")
        assert torch.equal(other.preprocess(picture), clip.preprocess(picture))


# -- what does not: no model ever comes back


def drop(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__delitem__(key)


def change(key: str, edit: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({key: edit(weights[key])})


BLOCK = "visual.transformer.resblocks.1"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (drop(f"{BLOCK}.mlp.c_fc.bias"), rf"1 weights are missing \({BLOCK}.mlp.c_fc.bias\), 0 are unknown"),
    "missing scale": (drop("logit_scale"), r"1 weights are missing \(logit_scale\)"),
    "no text tower but for one": (drop("token_embedding.weight"), "token_embedding.weight"),
    "extra": (
        lambda weights: weights.update(extra=torch.zeros(2)),
        r"0 weights are missing \(none\), 1 are unknown \(extra\)",
    ),
    "mis-shaped": (
        change(f"{BLOCK}.mlp.c_fc.weight", lambda w: w[:, :-1]),
        r"c_fc.weight is \[192, 47\] instead of \[192, 48\]",
    ),
    "transposed": (change("visual.proj", lambda w: w.T), r"visual.proj is \[20, 48\] instead of \[48, 20\]"),
    "other positions": (
        change("visual.positional_embedding", lambda w: w[:-1]),
        r"is \[16, 48\] instead of \[17, 48\]",
    ),
    "not a number": (
        change(f"{BLOCK}.ln_1.bias", lambda w: w * torch.nan),
        rf"NaN or infinite weights: {BLOCK}.ln_1.bias",
    ),
    "infinite": (change("ln_final.weight", lambda w: w / 0), r"NaN or infinite weights: ln_final.weight"),
    "nothing": (lambda weights: weights.clear(), "no readable weight file|weights are missing"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit(weights: dict[str, Tensor], tmp_path: Path, fault: str, suffix: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(weights)
    with pytest.raises(LoadError, match=message):
        load_clip(NAME, write(weights, tmp_path / f"w{suffix}"))


@pytest.mark.parametrize("fault", ["missing", "mis-shaped", "not a number"])
def test_vision_weights_that_do_not_fit(weights: dict[str, Tensor], tmp_path: Path, fault: str) -> None:
    FAULTS[fault][0](weights)
    vision = {key: value for key, value in weights.items() if key.startswith("visual.")}
    with pytest.raises(LoadError, match=r"does not hold|NaN"):
        load_clip(NAME, write(vision, tmp_path / "w.safetensors"))


def test_weights_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="does not hold"):
        load_clip(NAME, write(build_text().state_dict(), tmp_path / "w.safetensors"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_file(weights: dict[str, Tensor], tmp_path: Path, suffix: str, kept: float) -> None:
    path = write(weights, tmp_path / f"w{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept) if kept >= 1 or kept == 0 else int(len(content) * kept)])
    with pytest.raises(LoadError, match="no readable weight file"):
        load_clip(NAME, path)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_file_that_is_something_else(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="no readable weight file"):
        load_clip(NAME, path)


class Trap:
    ran = False

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (spring, ())


def spring() -> dict:
    Trap.ran = True
    return {}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside the weights"])
def test_pickle_with_code_is_not_run(weights: dict[str, Tensor], tmp_path: Path, legacy: bool, where: str) -> None:
    path = tmp_path / "w.pt"
    content = Trap() if where == "alone" else {**weights, "trap": Trap()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(LoadError, match="no readable weight file"):
        load_clip(NAME, path)
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(LoadError, match="no readable weight file"):
        load_clip(NAME, path)
    assert not Trap.ran


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"state_dict": 3}, {"a": "b"}])
def test_file_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(LoadError):
        load_clip(NAME, tmp_path / "w.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no weight file at .*gone\.safetensors"):
        load_clip(NAME, tmp_path / "gone.safetensors")
    with pytest.raises(LoadError, match="it is a folder"):
        load_clip(NAME, tmp_path)


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(LoadError, match=r"no open_clip model is called 'ViT-B-33'; did you mean 'ViT-B-32'"):
        load_clip("ViT-B-33", "openai")
    with pytest.raises(LoadError, match="no open_clip model is called 'tiny-test-clp'; did you mean 'tiny-test-clip'"):
        load_clip("tiny-test-clp/w.safetensors")
    with pytest.raises(ValueError, match="no open_clip model"):
        load_clip("")


def test_unknown_tag_lists_near_ones() -> None:
    with pytest.raises(
        LoadError, match=r"no weights 'laion2b_s34b_b79' for ViT-B-32; did you mean 'laion2b_s34b_b79k'"
    ):
        load_clip("ViT-B-32", "laion2b_s34b_b79")
    with pytest.raises(LoadError, match=r"it has: none"):
        load_clip(NAME, "openai")


def test_name_without_weights_never_gives_random_ones() -> None:
    with pytest.raises(LoadError, match=r"which weights of ViT-B-32\?.*laion2b_s34b_b79k.*would be random"):
        load_clip("ViT-B-32")
    with pytest.raises(LoadError, match=r"none is published"):
        load_clip(NAME)


@pytest.mark.parametrize(
    ("name", "tag", "other"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
        ("ViT-L-14", "metaclip_400m", "ViT-L-14-quickgelu"),
        ("ViT-H-14", "dfn5b", "ViT-H-14-quickgelu"),
    ],
)
def test_wrong_activation_is_refused_before_anything_is_fetched(name: str, tag: str, other: str) -> None:
    for arguments in [(name, tag), (f"{name}/{tag}",)]:
        with pytest.raises(LoadError, match=f"trained with QuickGELU, and {name} has GELU.*Use '{other}'"):
            load_clip(*arguments)


def test_the_wrong_activation_names_a_model_that_exists() -> None:
    """For every published pair that is refused, what the message says to use can be used."""
    from clip_lens_ext.towers.from_open_clip import from_tag

    native = [
        name
        for name in open_clip.list_models()
        if "timm_model_name" not in open_clip.get_model_config(name)["vision_cfg"]
    ]
    refused = 0
    for name, tag in open_clip.list_pretrained():
        quick = bool(open_clip.get_model_config(name).get("quick_gelu", False))
        if name not in native or quick == bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)):
            continue
        if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]:
            continue  # no tower family reads these
        with pytest.raises(LoadError) as error:
            from_tag(name, tag)
        other = str(error.value).split("Use '")[1].rstrip("'")
        assert tag in open_clip.list_pretrained_tags_by_model(other), (name, tag, other)
        refused += 1
    assert refused >= 10


def test_the_activation_that_nobody_built() -> None:
    from clip_lens_ext.towers.from_open_clip import check_activation

    # Published with QuickGELU in its config and no word in its tag: the config is the truth.
    check_activation("roberta-ViT-B-32", "laion2b_s12b_b32k", {})
    with pytest.raises(LoadError, match=r"no 'ViT-bigG-14-CLIPA-quickgelu': .*force_quick_gelu=True"):
        check_activation("ViT-bigG-14-CLIPA", "some_tag", {"quick_gelu": True})


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip only warns in some of these cases, and goes on with random weights."""
    published = {"some_tag": {"hf_hub": "nobody/nothing/", "quick_gelu": False}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, published)
    for path in ("", str(tmp_path / "gone.bin")):
        monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, path=path, **kwargs: path)
        with pytest.raises(LoadError, match=f"the weights of {NAME}/some_tag could not be loaded"):
            load_clip(NAME, "some_tag")


def test_live_model_with_weights() -> None:
    with pytest.raises(LoadError, match="has its weights already"):
        load_clip(build_clip(), "openai")


def test_live_model_of_another_kind() -> None:
    with pytest.raises(UnsupportedModelError):
        load_clip(nn.Linear(2, 2))


def test_loading_leaves_logging_as_it_was(weights: dict[str, Tensor], tmp_path: Path) -> None:
    before = logging.root.manager.disable
    load_clip(NAME, write(weights, tmp_path / "w.safetensors"))
    assert logging.root.manager.disable == before


def test_loaded_file_is_read_only(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(weights, tmp_path / "w.safetensors")
    clip = load_clip(NAME, path)
    with torch.no_grad():
        clip.native.visual.proj.add_(1)
    assert torch.equal(load_file(path)["visual.proj"], weights["visual.proj"])
