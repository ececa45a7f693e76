"""What `load_clip` makes of folders and hub repositories: the whole checkpoint with its preprocessing, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from oracles.models import EMBED_DIM, TEXT, VISION, inputs, randomise_
from oracles.zoo import BY_NAME, hf_clip, hf_siglip
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, RobertaConfig

from clip_lens_ext.errors import LoadError, UnsupportedModelError
from clip_lens_ext.sparse_clip import add_sparse_heads, load_sparse_clip, save_sparse_clip
from clip_lens_ext.towers import HookedTower, load_clip

OPEN_CLIP_CONFIG = {
    "model_cfg": {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": TEXT},
    "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear"},
}


def open_clip_folder(folder: Path) -> nn.Module:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    model = randomise_(CLIP(EMBED_DIM, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT))).eval()
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    return model


def hugging_face_folder(folder: Path, kind: str = "clip") -> Any:
    model = randomise_({"clip": hf_clip, "siglip": hf_siglip}[kind]()).eval()
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor.save_pretrained(folder)
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A hub cache on this disk; gives the snapshot folder of a repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def snapshot(repo: str) -> Path:
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("0" * 40)
        found = root / "snapshots" / ("0" * 40)
        found.mkdir(parents=True, exist_ok=True)
        return found

    return snapshot


def test_folder_of_open_clip(tmp_path: Path) -> None:
    native = open_clip_folder(tmp_path / "mine")
    clip = load_clip(tmp_path / "mine")
    assert clip.model_name == "mine"
    assert not clip.native.training
    x = inputs("vision")
    assert torch.equal(clip.vision(x), native.encode_image(x))
    assert clip.text is not None
    assert torch.equal(clip.text(inputs("text")), native.encode_text(inputs("text")))
    white = clip.pixels(Image.new("RGB", (60, 60), "white"))[0]
    expected = (1 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
    torch.testing.assert_close(white[:, 5, 5], expected)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_folder_of_hugging_face(tmp_path: Path, kind: str) -> None:
    native = hugging_face_folder(tmp_path / "mine", kind)
    clip = load_clip(str(tmp_path / "mine"))
    x, ids = BY_NAME["hf-clip-vision"].inputs(), BY_NAME["hf-clip-text"].inputs()
    assert torch.equal(clip.vision(x), native.get_image_features(pixel_values=x).pooler_output)
    assert clip.text is not None
    assert torch.equal(clip.text(ids), native.get_text_features(input_ids=ids).pooler_output)
    assert clip.logit_scale is clip.native.logit_scale
    picture = Image.linear_gradient("L").convert("RGB")
    own = CLIPImageProcessor.from_pretrained(tmp_path / "mine")
    assert torch.equal(clip.pixels(picture)[0], own(images=picture, return_tensors="pt")["pixel_values"][0])
    with pytest.raises(LoadError, match="the tokenizer of mine could not be made"):
        clip.tokenize(["a"])


def test_vision_tower_of_a_whole_checkpoint(tmp_path: Path) -> None:
    native = hugging_face_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {**config["vision_config"], "projection_dim": EMBED_DIM, "model_type": "clip_vision_model",
              "architectures": ["CLIPVisionModelWithProjection"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    clip = load_clip(tmp_path)
    assert clip.text is None
    assert isinstance(clip.native, CLIPVisionModelWithProjection)
    x = BY_NAME["hf-clip-vision"].inputs()
    assert torch.equal(clip.vision(x), native.get_image_features(pixel_values=x).pooler_output)


def edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


FAULTS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "missing": lambda weights: weights.pop(next(name for name in weights if "fc1.weight" in name or "c_fc.weight" in name)),  # type: ignore[dict-item, return-value]  # noqa: E501
    "unknown": lambda weights: weights.update(stray=torch.zeros(3)),
    "of another shape": lambda weights: weights.update({name: value[:-1].clone() for name, value in weights.items() if "position" in name}),  # noqa: E501
    "not a number": lambda weights: weights.update({name: value * torch.nan for name, value in weights.items() if value.dim() == 1}),  # noqa: E501
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("library", ["open_clip", "hugging_face"])
def test_weights_that_do_not_fit_their_config(tmp_path: Path, library: str, fault: str) -> None:
    """transformers would fill what is missing with random numbers, and open_clip only warns in some cases."""
    {"open_clip": open_clip_folder, "hugging_face": hugging_face_folder}[library](tmp_path)
    load_clip(tmp_path)
    weights = {"open_clip": "open_clip_model.safetensors", "hugging_face": "model.safetensors"}
    edit(tmp_path, weights[library], FAULTS[fault])
    with pytest.raises(LoadError, match=r"does not hold|NaN or infinite|could not be loaded"):
        load_clip(tmp_path)


@pytest.mark.parametrize("library", ["open_clip", "hugging_face"])
@pytest.mark.parametrize("fault", ["no weights", "broken config", "empty config", "truncated weights"])
def test_broken_folders(tmp_path: Path, library: str, fault: str) -> None:
    {"open_clip": open_clip_folder, "hugging_face": hugging_face_folder}[library](tmp_path)
    config, weights = {
        "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
        "hugging_face": ("config.json", "model.safetensors"),
    }[library]
    if fault == "no weights":
        (tmp_path / weights).unlink()
    elif fault == "truncated weights":
        (tmp_path / weights).write_bytes((tmp_path / weights).read_bytes()[:2000])
    else:
        (tmp_path / config).write_text("{" if fault == "broken config" else "{}")
    with pytest.raises((LoadError, UnsupportedModelError)) as error:
        load_clip(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"looked for open_clip_config\.json and config\.json, found nothing"):
        load_clip(tmp_path)
    RobertaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'roberta' model"):
        load_clip(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="does not say of which model"):
        load_clip(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
@pytest.mark.parametrize("library", ["open_clip", "hugging_face"])
def test_hub_repository_from_the_cache_without_a_network(cache: Any, library: str, prefix: str) -> None:
    make: Any = {"open_clip": open_clip_folder, "hugging_face": hugging_face_folder}[library]
    native = make(cache("some-org/some-clip"))
    clip = load_clip(f"{prefix}some-org/some-clip")
    assert clip.model_name == "some-org/some-clip"
    for one, other in zip(clip.native.state_dict().values(), native.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_hub_repository_with_the_configs_of_both(cache: Any) -> None:
    open_clip_folder(cache("some-org/both"))
    hugging_face_folder(cache("some-org/both"))
    assert isinstance(load_clip("hf-hub:some-org/both").native, CLIP)
    assert type(load_clip("some-org/both").native).__name__ == "CLIPModel"


def test_hub_repository_in_shards(cache: Any) -> None:
    model = randomise_(hf_clip()).eval()
    model.save_pretrained(cache("some-org/sharded"), max_shard_size="50KB")
    assert len(list(cache("some-org/sharded").glob("model-*.safetensors"))) > 1
    clip = load_clip("some-org/sharded")
    assert torch.equal(clip.native.state_dict()["logit_scale"], model.logit_scale)


def test_hub_repository_that_is_not_there(cache: Any) -> None:
    with pytest.raises(LoadError) as error:
        load_clip("some-org/gone")
    message = str(error.value)
    assert "config.json: not in the local cache, and the hub cannot be reached" in message
    assert "open_clip_config.json: not in the local cache" in message
    assert "hf download some-org/gone" in message
    shutil.copy(Path(__file__), cache("some-org/half") / "config.json")
    with pytest.raises(LoadError, match=r"model\.safetensors: not in the local cache"):
        load_clip("some-org/half")
    with pytest.raises(LoadError, match="did you mean 'ViT-B-32'"):
        load_clip("ViT-B-33/openai")


def test_live_models_of_hugging_face() -> None:
    model = hf_clip()
    clip = load_clip(model)
    assert clip.native is model
    assert clip.preprocess is None
    assert {id(parameter) for parameter in clip.parameters()} == {id(parameter) for parameter in model.parameters()}
    alone = load_clip(model.vision_model)
    assert alone.text is None
    with pytest.raises(UnsupportedModelError, match="two towers"):
        HookedTower(model)


def test_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    letters = [chr(97 + i) for i in range(26)]
    words = ["<s>", "</s>", "<unk>", *letters, *(f"{letter}</w>" for letter in letters)][:47]
    vocab = {word: i + 1 for i, word in enumerate(words)} | {"<|startoftext|>": 48, "<|endoftext|>": 49}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    clip = load_clip(tmp_path)
    ids = clip.tokenize(["ab", "abcdefghijklmnop"])
    assert ids.shape == (2, 9)
    assert ids.max() == 49, "a prompt that is too long still ends"
    assert clip.embed_texts(["ab"]).shape == (1, EMBED_DIM)


@pytest.mark.parametrize("kind", ["custom text", "coca"])
def test_live_models_of_open_clip_with_a_text_tower_of_its_own(kind: str) -> None:
    text = {**TEXT, "embed_cls": True, "output_tokens": True} if kind == "coca" else TEXT
    pooler = {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    vision = {**VISION, **pooler} if kind == "coca" else VISION
    decoder = {"context_length": 9, "vocab_size": 50, "width": EMBED_DIM, "heads": 4, "layers": 1}
    model: Any = (
        CoCa(EMBED_DIM, decoder, CLIPTextCfg(**text), CLIPVisionCfg(**vision))
        if kind == "coca"
        else CustomTextCLIP(EMBED_DIM, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    )
    randomise_(model).eval()
    clip = load_clip(model)
    x, ids = inputs("vision"), inputs("text")
    assert clip.text is not None
    assert torch.equal(F.normalize(clip.vision(x), dim=-1), model.encode_image(x, normalize=True))
    assert torch.equal(F.normalize(clip.text(ids), dim=-1), model.encode_text(ids, normalize=True))
    assert clip.preprocess is not None
    hooked = clip.text.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x * 0.5)])
    assert not torch.equal(hooked, clip.text(ids))


def test_a_sparse_clip_opens_alone_where_its_dense_model_is_in_a_repository(
    tmp_path: Path, cache: Callable[[str], Path]
) -> None:
    open_clip_folder(cache("some-org/some-clip"))
    open_clip_folder(tmp_path / "mine")
    x = inputs("vision")
    for name in ("hf-hub:some-org/some-clip", str(tmp_path / "mine")):
        sparse = add_sparse_heads(load_clip(name), 24, seed=3)
        save_sparse_clip(sparse, tmp_path / "sparse", towers=False)
        if name.startswith("hf-hub:"):
            again = load_clip(tmp_path / "sparse")
            assert again.model_name == sparse.model_name
            assert torch.equal(again.vision(x), sparse.vision(x))
        else:  # a folder is known by its name alone, and may be anywhere
            with pytest.raises(LoadError, match=r"the heads of a Sparse CLIP on .mine., which cannot be opened"):
                load_clip(tmp_path / "sparse")
            assert torch.equal(load_sparse_clip(tmp_path / "sparse", load_clip(name)).vision(x), sparse.vision(x))
