"""An SAE that is saved comes back as it was; whatever is wrong with a file is said before an SAE is made of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.saes.formats import formats, register_format
from clip_lens_ext.saes.formats.registry import FormatRegistry
from clip_lens_ext.saes.load import load_sae

HOOK = "blocks.2.hook_resid_post"
X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1))


def randomise(sae: SAE[Any]) -> SAE[Any]:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise.abs() if name == "threshold" else noise
    return sae.eval()


def make(architecture: str = "topk", **metadata: Any) -> SAE[Any]:
    known: dict[str, Any] = {"d_in": 6, "d_sae": 11, "metadata": SAEMetadata(hook_name=HOOK, **metadata)}
    kinds: dict[str, Any] = {
        "topk": lambda: TopKSAE(TopKSAEConfig(k=3, **known)),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**known)),
        "standard": lambda: StandardSAE(StandardSAEConfig(**known)),
        "gated": lambda: GatedSAE(GatedSAEConfig(**known)),
        "layer_norm": lambda: StandardSAE(StandardSAEConfig(normalize_activations="layer_norm", **known)),
        "scaled": lambda: TopKSAE(TopKSAEConfig(k=3, rescale_acts_by_decoder_norm=True, **known)),
    }
    return randomise(kinds[architecture]())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_model(tmp_path / "sae")
    return tmp_path / "sae"


def edit(folder: Path, remove: tuple[str, ...] = (), **fields: Any) -> None:
    cfg = {**json.loads((folder / "cfg.json").read_text()), **fields}
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if key not in remove}))


def edit_weights(folder: Path, remove: str | None = None, **weights: torch.Tensor) -> None:
    state = {**load_file(folder / "sae_weights.safetensors"), **weights}
    save_file({k: v for k, v in state.items() if k != remove}, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated", "layer_norm", "scaled"])
@pytest.mark.parametrize("entry", ["", "cfg.json", "sae_weights.safetensors"])
def test_every_architecture_comes_back_as_it_was(tmp_path: Path, architecture: str, entry: str) -> None:
    sae = make(architecture)
    sae.save_model(tmp_path)
    loaded = load_sae(tmp_path / entry)
    assert type(loaded) is type(sae)
    assert not loaded.training
    torch.testing.assert_close(loaded.encode(X), sae.encode(X))
    torch.testing.assert_close(loaded(X), sae(X))
    if architecture != "scaled":
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in sae.state_dict().items())


def test_codes_times_decoder_rows_are_the_reconstruction_even_if_codes_were_scaled(tmp_path: Path) -> None:
    sae = make("scaled")
    sae.save_model(tmp_path)
    loaded = load_sae(tmp_path)
    torch.testing.assert_close(loaded.encode(X) @ loaded.W_dec + loaded.b_dec, sae(X))


def test_metadata_say_where_it_belongs(folder: Path) -> None:
    edit(folder, metadata={**make().cfg.metadata.to_dict(), "model_name": "ViT-B-32", "note": "mine"})
    metadata = load_sae(folder, tower="vision").cfg.metadata
    expected = {"model_name": "ViT-B-32", "hook_name": HOOK, "tower": "vision", "token_scope": "all", "note": "mine"}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata.format == "sae_lens"
    assert metadata.sha256 == hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()
    assert "overrides" not in metadata


def test_keywords_fill_in_and_win_and_say_so(folder: Path) -> None:
    edit(folder, metadata={**make().cfg.metadata.to_dict(), "token_scope": "all"})
    keywords: dict[str, Any] = {"hook_name": "blocks.0.hook_resid_pre", "token_scope": "cls", "k": 2}
    sae = load_sae(folder, model_name="ViT-B-16", tower="text", **keywords)
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.token_scope) == ("blocks.0.hook_resid_pre", "cls")
    assert (metadata.model_name, metadata.tower) == ("ViT-B-16", "text")
    assert metadata.overrides == {
        "hook_name": {"file": HOOK, "keyword": "blocks.0.hook_resid_pre"},
        "token_scope": {"file": "all", "keyword": "cls"},
        "k": {"file": 3, "keyword": 2},
    }
    assert (sae.encode(X) != 0).sum(-1).max() == 2


def test_what_was_loaded_can_be_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    sae = load_sae(folder, hook_name="hook_pooled", tower="text")
    sae.save_model(tmp_path / "again")
    assert load_sae(tmp_path / "again").cfg.metadata.to_dict() == sae.cfg.metadata.to_dict()


@pytest.mark.parametrize(("hook", "scope"), [("hook_pooled", "pooled"), ("hook_embedding", "pooled"), (HOOK, "all")])
def test_the_scope_that_goes_without_saying(folder: Path, hook: str, scope: str) -> None:
    assert load_sae(folder, hook_name=hook).cfg.metadata.token_scope == scope


def test_dtype(folder: Path) -> None:
    assert load_sae(folder).W_enc.dtype == torch.float32
    sae = load_sae(folder, dtype=torch.float64)
    assert sae.W_enc.dtype == sae.dtype == torch.float64
    assert sae.encode(X.double()).dtype == torch.float64


def test_each_format_is_a_converter_of_sae_lens(folder: Path) -> None:
    sae = SAE.load_from_disk(folder, converter=formats["sae_lens"].convert)
    assert torch.equal(sae.encode(X), load_sae(folder).encode(X))
    assert sae.cfg.metadata.sha256 == load_sae(folder).cfg.metadata.sha256


def test_a_file_of_version_5_keeps_its_meaning(folder: Path) -> None:
    edit(folder, remove=("metadata", "k"), hook_name=HOOK, activation_fn_str="topk", activation_fn_kwargs={"k": 2},
         architecture="standard", model_name="old")  # fmt: skip
    sae = load_sae(folder)
    assert sae.cfg.architecture() == "topk"
    assert sae.cfg.k == 2
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name) == (HOOK, "old")


def test_the_export_of_batchtopk_loads_as_jumprelu(tmp_path: Path) -> None:
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=6, d_sae=11, k=2))
    sae.topk_threshold.fill_(0.25)
    sae.save_inference_model(tmp_path / "exported")
    loaded = load_sae(tmp_path / "exported", hook_name=HOOK)
    assert loaded.cfg.architecture() == "jumprelu"
    assert torch.equal(loaded.threshold, torch.full((11,), 0.25))
    sae.save_model(tmp_path / "training")
    with pytest.raises(LoadError, match="save_inference_model"):
        load_sae(tmp_path / "training", hook_name=HOOK)


def test_missing_things_say_what_was_found(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no such file or folder.*did you mean 'sae'"):
        load_sae(tmp_path / "sea")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="holds nothing; the formats are sae_lens"):
        load_sae(tmp_path / "empty")
    with pytest.raises(LoadError, match="holds empty/, sae/"):
        load_sae(tmp_path)
    (folder / "sae_weights.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(LoadError, match=r"holds cfg.json, weights.safetensors"):
        load_sae(folder)
    with pytest.raises(LoadError, match="no weights file"):
        load_sae(folder, format="sae_lens")


def test_an_unknown_format_names_the_near_ones(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"'saelens'.*did you mean 'sae_lens'"):
        load_sae(folder, format="saelens")


def test_broken_files(folder: Path) -> None:
    weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
    whole, fields = weights.read_bytes(), cfg.read_text()
    for damage in (whole[:-10], whole[:20], b"", b"\x80\x04pickle" * 9):
        weights.write_bytes(damage)
        with pytest.raises(LoadError, match="truncated or no safetensors"):
            load_sae(folder)
    weights.write_bytes(whole)
    for damage_text, message in [(fields[:-5], "not valid JSON"), ("[1]", "holds a list"), ("", "not valid JSON")]:
        cfg.write_text(damage_text)
        with pytest.raises(LoadError, match=message):
            load_sae(folder)
    cfg.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="cannot read"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "topkk"}, "unknown SAE architecture 'topkk'.*did you mean 'topk'"),
        ({"architecture": None}, "unknown SAE architecture"),
        ({"d_sae": 12}, r"is \[.*11.*\], but a topk SAE with d_in 6 and d_sae 12 needs"),
        ({"d_in": 7}, r"is \[.*6.*\], but a topk SAE with d_in 7 .* needs"),
        ({"d_in": 0}, "d_in must be a positive integer"),
        ({"d_sae": "11"}, "d_sae must be a positive integer"),
        ({"k": None}, "pass k="),
        ({"k": 12}, r"k must be an integer in 1\.\.11, not 12"),
        ({"architecture": "jumprelu"}, "lack threshold"),
        ({"architecture": "gated"}, "lack b_gate, b_mag, r_mag and hold also b_enc"),
        ({"normalize_activations": "expected_average_only_in"}, "scaled by a statistic"),
        ({"normalize_activations": "sometimes"}, "SAELens refuses"),
        ({"dtype": "float31"}, "float31"),
        ({"metadata": [1]}, "metadata"),
    ],
)
def test_a_configuration_that_does_not_fit(folder: Path, fields: dict[str, Any], message: str) -> None:
    edit(folder, **fields)
    with pytest.raises(LoadError, match=message):
        load_sae(folder)


def test_topk_without_k_is_asked_for_it(folder: Path) -> None:
    edit(folder, remove=("k",))
    with pytest.raises(LoadError, match="pass k="):
        load_sae(folder)
    assert load_sae(folder, k=5).cfg.k == 5


@pytest.mark.parametrize("k", [0, -1, 12, 2.0, True, "3"])
def test_k_must_be_a_count_of_latents(folder: Path, k: Any) -> None:
    with pytest.raises(LoadError, match="k must be"):
        load_sae(folder, k=k)


def test_k_is_for_topk_alone(tmp_path: Path) -> None:
    make("jumprelu").save_model(tmp_path)
    with pytest.raises(LoadError, match="k= is for TopK SAEs"):
        load_sae(tmp_path, k=2)


def test_weights_that_are_not_those_of_the_configuration(folder: Path) -> None:
    edit_weights(folder, threshold=torch.zeros(11))
    with pytest.raises(LoadError, match="hold also threshold"):
        load_sae(folder)
    edit_weights(folder, remove="threshold")
    load_sae(folder)
    edit_weights(folder, remove="W_dec")
    with pytest.raises(LoadError, match="lack W_dec"):
        load_sae(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    edit_weights(folder, b_enc=torch.full((11,), value))
    with pytest.raises(LoadError, match=r"b_enc in .* holds 11 NaN or infinite"):
        load_sae(folder)


def test_an_infinite_threshold_switches_a_latent_off(tmp_path: Path) -> None:
    sae = make("jumprelu")
    sae.threshold.data[4] = float("inf")
    sae.save_model(tmp_path)
    assert (load_sae(tmp_path).encode(X)[..., 4] == 0).all()


@pytest.mark.parametrize("key", ["visual.proj", "vision_model.embeddings.weight", "transformer.resblocks.0.ln_1.bias"])
def test_a_clip_model_is_not_an_sae(folder: Path, tmp_path: Path, key: str) -> None:
    state = {key: torch.zeros(2)}
    save_file(state, folder / "sae_weights.safetensors")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    for source in (folder, folder / "cfg.json", tmp_path / "open_clip_model.safetensors", tmp_path):
        with pytest.raises(LoadError, match="CLIP model, not an SAE"):
            load_sae(source)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "opened",))  # type: ignore[return-value]

    torch.save({"W_enc": Trap()}, tmp_path / "sae.pt")
    with pytest.raises(LoadError, match="nothing of it was run"):
        load_sae(tmp_path / "sae.pt")
    assert not (tmp_path / "opened").exists()


def test_the_hook_must_be_said_by_someone(folder: Path) -> None:
    edit(folder, metadata={"sae_lens_version": "6.0.0"})
    with pytest.raises(LoadError, match="pass hook_name="):
        load_sae(folder)
    assert load_sae(folder, hook_name=HOOK).cfg.metadata.hook_name == HOOK


@pytest.mark.parametrize(
    "keywords",
    [
        {"tower": "audio"},
        {"token_scope": "some"},
        {"token_scope": "pooled"},
        {"hook_name": "hook_embedding", "token_scope": "patches"},
    ],
)
def test_keywords_that_make_no_sense(folder: Path, keywords: dict[str, str]) -> None:
    with pytest.raises(LoadError, match=r"must be one of|token axis"):
        load_sae(folder, **keywords)


def test_a_format_is_checked_when_it_registers() -> None:
    def matches(path: Path) -> bool:
        return True

    def convert(path: Path, device: str, cfg_overrides: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {}

    registry = FormatRegistry()
    registry.register("good", SimpleNamespace(matches=matches, convert=convert))
    assert registry.detect(Path("x")) == "good"
    bad = [
        ("good", SimpleNamespace(matches=matches, convert=convert), "registered already"),
        ("a b", SimpleNamespace(matches=matches, convert=convert), "needs a name"),
        ("none", SimpleNamespace(matches=matches), r"no function convert\(\)"),
        ("text", SimpleNamespace(matches="yes", convert=convert), r"no function matches\(\)"),
        ("short", SimpleNamespace(matches=matches, convert=lambda path: ({}, {})), r"convert\(\) .* must take"),
        (
            "other",
            SimpleNamespace(matches=matches, convert=lambda path, device, more: ({}, {})),
            r"must take \(path, device",
        ),
        ("long", SimpleNamespace(matches=lambda path, more: True, convert=convert), r"matches\(\) .* must take"),
    ]
    for name, family, message in bad:
        with pytest.raises(InputError, match=message):
            registry.register(name, family)
    registry.register("twin", SimpleNamespace(matches=matches, convert=convert))
    with pytest.raises(LoadError, match="good, twin: pass format="):
        registry.detect(Path("x"))
    with pytest.raises(InputError, match="registered already"):
        register_format("sae_lens", SimpleNamespace(matches=matches, convert=convert))
