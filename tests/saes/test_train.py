"""train_sae: what comes back, what was measured, what was held out, and that resuming and repeating are exact."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clip_lens_ext.data import image_batches
from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.saes.activations import ActivationRows
from clip_lens_ext.saes.load import load_sae
from clip_lens_ext.saes.quality import Reconstruction
from clip_lens_ext.saes.run_folder import RunFolder
from clip_lens_ext.saes.shuffled_rows import ShuffledRows, split_samples
from clip_lens_ext.saes.train import train_sae, train_saes
from clip_lens_ext.saes.trainer import layer_norm
from clip_lens_ext.towers.tower import HookedTower

HOOK = "blocks.0.hook_resid_post"
SMALL: dict[str, Any] = {
    "hook_name": HOOK,
    "d_sae": 24,
    "k": 3,
    "n_training_tokens": 40 * 16,
    "batch_size": 16,
    "image_batch_size": 3,
    "progress": False,
}


def make_tower() -> HookedTower:
    torch.manual_seed(0)
    native = open_clip.transformer.VisionTransformer(8, 4, 16, 2, 2, mlp_ratio=2.0, output_dim=12).eval()
    return HookedTower(native, model_name="tiny")


def pictures(n: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tower() -> HookedTower:
    return make_tower()


@pytest.fixture(autouse=True)
def poor_quality_is_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the SAE at .* explains")
        yield


def same_weights(a: Any, b: Any) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- what comes back


@pytest.fixture(scope="module")
def structured() -> tuple[HookedTower, Tensor]:
    """A tower, and pictures that are sums of few of 30 fixed patterns: something that an SAE can find."""
    generator = torch.Generator().manual_seed(3)
    weights = (torch.rand(400, 30, generator=generator) < 0.1) * torch.rand(400, 30, generator=generator)
    patterns = torch.randn(30, 3, 8, 8, generator=generator)
    return make_tower(), torch.einsum("np,pchw->nchw", weights, patterns)


@pytest.mark.parametrize(
    ("architecture", "exported"),
    [("topk", "topk"), ("batchtopk", "jumprelu"), ("matryoshka", "jumprelu"), ("jumprelu",) * 2],
)
def test_an_sae_learns_and_its_measures_are_those_of_its_held_out_images(
    structured: tuple[HookedTower, Tensor], architecture: str, exported: str
) -> None:
    tower, images = structured
    sae = train_sae(
        tower, images, hook_name=HOOK, d_sae=96, architecture=architecture, k=6, lr=3e-3, held_out=0.2,
        n_training_tokens=400 * 128, batch_size=128, progress=False,
    )  # fmt: skip
    metadata = sae.cfg.metadata
    assert sae.cfg.architecture() == exported
    assert not sae.training
    assert sae.cfg.normalize_activations == "none"

    train, held = split_samples(400, 0.2, seed=0)
    x = tower.run_to(images[held], HOOK).flatten(0, 1)
    with torch.no_grad():
        codes = sae.encode(x)
        x_hat = sae(x)
    rows, hats = x.double().numpy(), x_hat.double().numpy()
    explained = 1 - ((rows - hats) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    cosine = np.mean([r @ h / np.linalg.norm(r) / np.linalg.norm(h) for r, h in zip(rows, hats, strict=True)])
    assert metadata.explained_variance == pytest.approx(explained, abs=1e-6)
    assert metadata.cosine == pytest.approx(cosine, abs=1e-6)
    assert metadata.l0 == pytest.approx((codes != 0).sum(1).double().mean().item())
    assert metadata.dead_latents == pytest.approx((codes == 0).all(0).double().mean().item())
    assert (metadata.n_held_out_images, metadata.n_training_images) == (80, 320) == (len(held), len(train))

    assert explained > 0.6
    if architecture == "topk":
        assert ((codes != 0).sum(1) <= 6).all()
        assert metadata.l0 == pytest.approx(6, abs=0.01)
    else:
        assert 3 < metadata.l0 < 16


def test_metadata_say_what_it_is(tower: HookedTower) -> None:
    metadata = train_sae(tower, pictures(), seed=5, **SMALL).cfg.metadata
    expected = {
        "model_name": "tiny",
        "tower": "vision",
        "hook_name": HOOK,
        "token_scope": "all",
        "format": "sae_lens",
        "n_training_images": 18,
        "n_held_out_images": 2,
        "n_skipped_images": 0,
        "n_training_tokens": 640,
        "seed": 5,
        "training_architecture": "topk",
    }
    assert {name: metadata[name] for name in expected} == expected
    batches = image_batches(pictures())
    list(batches)
    assert metadata.data_fingerprint == batches.fingerprint
    assert metadata.versions["torch"] == importlib.metadata.version("torch")
    json.dumps(metadata.to_dict(), allow_nan=False)


def test_it_is_saved_and_loaded_as_it_was_measured(tower: HookedTower, tmp_path: Path) -> None:
    for architecture in ("topk", "batchtopk", "jumprelu"):
        sae = train_sae(tower, pictures(), architecture=architecture, **SMALL)
        sae.save_model(tmp_path / architecture)
        loaded = load_sae(tmp_path / architecture)
        assert same_weights(loaded, sae)
        assert loaded.cfg.metadata.to_dict() == sae.cfg.metadata.to_dict()
        assert loaded.cfg.to_dict() == sae.cfg.to_dict()


def test_codes_times_decoder_rows_are_the_reconstruction(tower: HookedTower) -> None:
    for architecture in ("topk", "batchtopk", "jumprelu"):
        sae = train_sae(tower, pictures(), architecture=architecture, **SMALL)
        x = tower.run_to(pictures(), HOOK)
        torch.testing.assert_close(sae.encode(x) @ sae.W_dec + sae.b_dec, sae(x))


def test_folding_the_input_scale_changes_nothing(tower: HookedTower) -> None:
    """With a learning rate that moves nothing, what is left is the start: the mean as bias, in unscaled units."""
    train, _ = split_samples(20, 0.1, seed=0)
    mean = tower.run_to(pictures()[train], HOOK).flatten(0, 1).mean(0)
    for normalize in ("expected_average_only_in", "none"):
        sae = train_sae(tower, pictures(), normalize_activations=normalize, lr=1e-12, **SMALL)
        torch.testing.assert_close(sae.b_dec.detach(), mean, rtol=1e-4, atol=1e-5)


# --- the split


def test_the_split_is_a_partition_that_the_seed_alone_decides() -> None:
    for n, share, at_least, n_held in [
        (10, 0.1, 1, 1),
        (10, 0.01, 1, 1),
        (10, 0.01, 2, 2),
        (2, 0.5, 1, 1),
        (99, 0.3, 1, 30),
    ]:
        train, held = split_samples(n, share, seed=1, at_least=at_least)
        assert sorted(train + held) == list(range(n))
        assert len(held) == n_held
        assert (train, held) == split_samples(n, share, seed=1, at_least=at_least)
    assert split_samples(99, 0.3, seed=1) != split_samples(99, 0.3, seed=2)
    for n, at_least in [(1, 1), (2, 2), (0, 1)]:
        with pytest.raises(InputError, match="too few"):
            split_samples(n, 0.5, seed=0, at_least=at_least)


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_held_out_images_leave_no_trace_in_the_weights(tower: HookedTower, memory_limit: int) -> None:
    train, held = split_samples(20, 0.1, seed=0)
    images = pictures()
    original = train_sae(tower, images, memory_limit=memory_limit, **SMALL)
    others = images.clone()
    others[held] = 50 * pictures(seed=9)[held]
    assert same_weights(original, train_sae(tower, others, memory_limit=memory_limit, **SMALL))
    others[train[0]] *= 1.1
    assert not same_weights(original, train_sae(tower, others, memory_limit=memory_limit, **SMALL))


@pytest.mark.parametrize(("scope", "n_held"), [("cls", 2), ("patches", 1), ("all", 1)])
def test_a_scope_of_one_token_holds_out_two_images(tower: HookedTower, scope: Any, n_held: int) -> None:
    metadata = train_sae(tower, pictures(8), token_scope=scope, **{**SMALL, "n_training_tokens": 32}).cfg.metadata
    assert (metadata.token_scope, metadata.n_held_out_images) == (scope, n_held)
    assert metadata.explained_variance is not None


def test_the_pooled_and_the_embedding_hook(tower: HookedTower) -> None:
    for hook, width in (("hook_pooled", 16), ("hook_embedding", 12)):
        sae = train_sae(tower, pictures(), **{**SMALL, "hook_name": hook})
        assert (sae.cfg.d_in, sae.cfg.metadata.token_scope) == (width, "pooled")


def test_a_text_tower_trains_on_its_end_of_text_tokens() -> None:
    torch.manual_seed(0)
    native = open_clip.model.CLIP(
        embed_dim=12,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 64, "layers": 1},
        text_cfg={"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    ).eval()
    tower = HookedTower(native, model_name="tiny")
    ids = torch.randint(1, 49, (20, 6))
    ids[torch.arange(20), torch.randint(1, 6, (20,))] = 49
    sae = train_sae(tower, ids, token_scope="eot", **SMALL)
    assert (sae.cfg.metadata.tower, sae.cfg.metadata.token_scope) == ("text", "eot")
    rows = ActivationRows(
        tower, image_batches(ids), hook_names=[HOOK], token_scope="eot", memory_limit=1 << 20, progress=False
    )
    expected = tower.run_to(ids, HOOK)[torch.arange(20), ids.argmax(1)]
    torch.testing.assert_close(rows.take(range(20))[HOOK][:, 0], expected)


# --- repeating and resuming


def test_the_seed_decides_and_the_global_generator_is_left_alone(tower: HookedTower) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = train_sae(tower, pictures(), seed=1, **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    assert same_weights(first, train_sae(tower, pictures(), seed=1, **SMALL))
    assert not same_weights(first, train_sae(tower, pictures(), seed=2, **SMALL))


class Killed(BaseException):
    """The process is gone; nothing may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    whole = ShuffledRows.batch

    def batch(self: ShuffledRows, at: int) -> dict[str, Tensor]:
        if at == number:
            raise Killed
        return whole(self, at)

    monkeypatch.setattr(ShuffledRows, "batch", batch)


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_a_killed_run_resumes_to_the_same_bits(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, memory_limit: int
) -> None:
    """Also with every schedule in play: warm-up, decay, dead latents, the sparsity coefficient."""
    extra: dict[str, Any] = {"jumprelu": {"l0_warm_up_steps": 25}, "batchtopk": {"topk_threshold_lr": 0.1}}
    arguments = {
        **SMALL,
        "architecture": architecture,
        "memory_limit": memory_limit,
        "sae_kwargs": extra.get(architecture),
        "dead_feature_window": 3,
        "buffer_images": 5,
        "lr": 0.01,
    }
    expected = train_sae(tower, pictures(), **arguments)
    for number in (9, 26, 39):  # before, amid and after several checkpoints
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                train_sae(tower, pictures(), output_dir=tmp_path, checkpoint_every=6, **arguments)
        checkpoints = [path.name for path in tmp_path.glob("checkpoint*")]
        assert checkpoints == [f"checkpoint-{number // 6 * 6}"]
        assert not (tmp_path / "cfg.json").exists()
        (tmp_path / ".train_sae-part-x").mkdir()  # as a kill amid a checkpoint leaves it
    (tmp_path / "checkpoint-1").mkdir()  # as a kill leaves it before an older checkpoint is removed
    with monkeypatch.context() as patch:
        kill_at(patch, 35)  # a step that is behind it is not taken again
        sae = train_sae(tower, pictures(), output_dir=tmp_path, checkpoint_every=6, **arguments)
    assert same_weights(sae, expected)
    assert sae.cfg.metadata.to_dict() == expected.cfg.metadata.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cfg.json", "sae_weights.safetensors", "training_settings.json",
    ]  # fmt: skip


def test_a_finished_run_is_loaded_and_not_trained_again(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    kill_at(monkeypatch, 0)
    with caplog.at_level("INFO"):
        again = train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    assert same_weights(first, again)
    assert again.cfg.metadata.to_dict() == first.cfg.metadata.to_dict()
    assert "finished" in caplog.text
    assert same_weights(first, load_sae(tmp_path))


def test_other_settings_in_the_same_folder_are_named(tower: HookedTower, tmp_path: Path) -> None:
    train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"lr": 0.5}, "lr was 0.001 and is now 0.5"),
        ({"d_sae": 30, "seed": 3}, "d_sae was 24 and is now 30; seed was 0 and is now 3"),
        ({"sae_kwargs": {"aux_loss_coefficient": 0.5}}, "sae_kwargs was"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            train_sae(tower, pictures(), output_dir=tmp_path, **{**SMALL, **change})
    with pytest.raises(InputError, match="data_fingerprint was"):
        train_sae(tower, pictures(seed=1), output_dir=tmp_path, **SMALL)
    other = make_tower()
    with torch.no_grad():
        next(other.native.parameters()).add_(1e-3)
    with pytest.raises(InputError, match="tower_sha256 was"):
        train_sae(other, pictures(), output_dir=tmp_path, **SMALL)


def test_an_sae_of_somebody_else_is_not_overwritten(tower: HookedTower, tmp_path: Path) -> None:
    train_sae(tower, pictures(), **SMALL).save_model(tmp_path)
    with pytest.raises(InputError, match="did not make"):
        train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        train_sae(tower, pictures(), output_dir=tmp_path / "file", **SMALL)


# --- the surroundings


def test_silence(tower: HookedTower, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train_sae(tower, pictures(), output_dir=tmp_path, **SMALL)
    assert capsys.readouterr() == ("", "")
    train_sae(tower, pictures(), **{**SMALL, "progress": True})
    shown = capsys.readouterr()
    assert shown.out == ""
    for bar in (f"activations at {HOOK}: 100%", "training the SAE: 100%", "measuring the SAE: 100%"):
        assert bar in shown.err


def state(tower: HookedTower) -> tuple[dict[str, Tensor], list[bool], list[int], list[bool]]:
    return (
        {name: weight.clone() for name, weight in tower.state_dict().items()},
        [module.training for module in tower.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tower.modules()],
        [parameter.requires_grad for parameter in tower.parameters()],
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_tower_and_the_grad_mode_are_as_before(
    tower: HookedTower, monkeypatch: pytest.MonkeyPatch, fails: bool, around: Callable[[], Any]
) -> None:
    tower.native.ln_post.train()  # a mode that is not the same everywhere comes back as it was
    weights, *rest = state(tower)
    if fails:
        kill_at(monkeypatch, 3)
    with around():
        images = pictures()
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if fails:
            with pytest.raises(Killed):
                train_sae(tower, images, **SMALL)
        else:
            train_sae(tower, images, **SMALL)
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    after, *rest_after = state(tower)
    assert rest_after == rest
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_a_low_precision_tower_gives_a_float32_sae(tower: HookedTower) -> None:
    tower.native.to(torch.bfloat16)
    assert train_sae(tower, pictures(), **SMALL).W_dec.dtype == torch.float32
    tower.native.double()
    assert train_sae(tower, pictures().double(), **SMALL).W_dec.dtype == torch.float64


def test_poor_quality_is_one_warning(tower: HookedTower) -> None:
    with pytest.warns(UserWarning, match="the SAE at blocks.0.hook_resid_post explains") as caught:
        train_sae(tower, pictures(), lr=1e-12, **SMALL)
    assert [entry.filename for entry in caught if "explains" in str(entry.message)] == [__file__]


class Broken(Dataset):
    """Pictures of which some do not open, or from the second pass on do not."""

    def __init__(self, bad: set[int], later: set[int] | None = None) -> None:
        self.bad, self.later, self.n_read = bad, later or set(), 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        self.n_read += 1
        if index in self.bad or (index in self.later and self.n_read > 20):
            raise OSError("image file is truncated")
        return pictures()[index]


def test_what_cannot_be_read_is_left_out_counted_and_named(tower: HookedTower) -> None:
    with pytest.warns(UserWarning, match=r"2 samples could not be read .*\(3: image file is truncated; 17:") as caught:
        sae = train_sae(tower, Broken({3, 17}), **SMALL)
    assert [entry.filename for entry in caught if "could not be read" in str(entry.message)] == [__file__]
    assert (sae.cfg.metadata.n_skipped_images, sae.cfg.metadata.n_training_images) == (2, 16)
    good = [index for index in range(20) if index not in (3, 17)]
    assert same_weights(sae, train_sae(tower, pictures()[good], **SMALL))


def test_data_that_changes_under_way_is_an_error(tower: HookedTower) -> None:
    with pytest.raises(InputError, match="the data changed: '5' could be read before"):
        train_sae(tower, Broken(set(), {5}), memory_limit=0, held_out=0.01, **SMALL)


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_folders_data_sets_and_loaders_train_the_same_sae(
    tower: HookedTower, tmp_path: Path, memory_limit: int
) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    for index, pixels in enumerate(pictures(12)):
        array = (pixels.permute(1, 2, 0).clamp(-1, 1) * 127 + 127).numpy().astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{index:02}.png")
    (tmp_path / "99.png").write_bytes(b"junk")
    with pytest.warns(UserWarning, match=r"99\.png"):
        first = train_sae(tower, tmp_path, preprocess=preprocess, memory_limit=memory_limit, **SMALL)
    paths = sorted(tmp_path.glob("*.png"))[:12]
    tensors = torch.stack([preprocess(Image.open(path)) for path in paths])
    for data in (tensors, TensorDataset(tensors), DataLoader(TensorDataset(tensors, tensors), batch_size=5)):
        assert same_weights(first, train_sae(tower, data, memory_limit=memory_limit, **SMALL))


# --- several hooks, and a cache

HOOKS = ["blocks.1.hook_resid_post", HOOK]
SEVERAL = {name: value for name, value in SMALL.items() if name != "hook_name"}


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize("architecture", ["topk", "matryoshka", "jumprelu"])
def test_saes_that_are_trained_together_are_each_alone_to_the_bit(
    tower: HookedTower, architecture: str, memory_limit: int
) -> None:
    more = {"architecture": architecture, "memory_limit": memory_limit, "seed": 3, "buffer_images": 5}
    together = train_saes(tower, pictures(), hook_names=HOOKS, **SEVERAL, **more)
    assert list(together) == HOOKS
    for name, sae in together.items():
        alone = train_sae(tower, pictures(), **{**SMALL, **more, "hook_name": name})
        assert same_weights(sae, alone)
        assert sae.cfg.metadata.to_dict() == alone.cfg.metadata.to_dict()


def test_several_runs_that_are_killed_between_two_checkpoints_resume_to_the_same_bits(
    tower: HookedTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_saes(tower, pictures(), hook_names=HOOKS, **SEVERAL)
    whole, calls = RunFolder.checkpoint, 0

    def checkpoint(self: RunFolder, trainer: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the second checkpoint of the second run: the first is six steps ahead
            raise Killed
        whole(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "checkpoint", checkpoint)
        with pytest.raises(Killed):
            train_saes(tower, pictures(), hook_names=HOOKS, output_dir=tmp_path, checkpoint_every=6, **SEVERAL)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/checkpoint*"))
    assert found == [f"{HOOK}/checkpoint-6", f"{HOOKS[0]}/checkpoint-12"]
    resumed = train_saes(tower, pictures(), hook_names=HOOKS, output_dir=tmp_path, checkpoint_every=6, **SEVERAL)
    assert all(same_weights(resumed[name], expected[name]) for name in HOOKS)
    # One of them is finished: it is loaded, and only the new one is trained.
    embed = "hook_full_embed"
    three = train_saes(tower, pictures(), hook_names=[HOOK, embed], output_dir=tmp_path, **SEVERAL)
    assert same_weights(three[HOOK], expected[HOOK])
    assert same_weights(three[embed], train_sae(tower, pictures(), **{**SMALL, "hook_name": embed}))
    assert all((tmp_path / name / "cfg.json").is_file() for name in [*HOOKS, embed])


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_a_cache_on_disk_changes_nothing_but_the_work(tower: HookedTower, tmp_path: Path, memory_limit: int) -> None:
    more: dict[str, Any] = {"memory_limit": memory_limit, "buffer_images": 5}
    expected = train_sae(tower, pictures(), **SMALL, **more)
    assert same_weights(expected, train_sae(tower, pictures(), cache_dir=tmp_path, **SMALL, **more))
    runs: list[int] = []
    with tower.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(len(value)))]):
        sae = train_sae(tower, pictures(), cache_dir=tmp_path, **SMALL, **more)
    assert same_weights(expected, sae)
    assert runs == [3]  # the first batch, for its shape
    with torch.no_grad():
        tower.native.conv1.weight.add_(1.0)
    with pytest.raises(InputError, match="other activations: tower_sha256 was"):
        train_sae(tower, pictures(), cache_dir=tmp_path, **SMALL, **more)


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_layer_norm_of_the_inputs_stays_with_the_sae(
    structured: tuple[HookedTower, Tensor], tmp_path: Path, architecture: str
) -> None:
    tower, images = make_tower(), structured[1]
    with torch.no_grad():
        tower.native.ln_pre.weight.mul_(20)  # rows that are far from normalised
    sae = train_sae(
        tower, images, hook_name=HOOK, d_sae=96, k=6, lr=3e-3, n_training_tokens=400 * 128, batch_size=128,
        normalize_activations="layer_norm", architecture=architecture, output_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert sae.cfg.normalize_activations == "layer_norm"
    assert sae.cfg.metadata.explained_variance > 0.6
    x = tower.run_to(images[:4], HOOK)
    with torch.no_grad():
        # SAELens' layer norm: centred, over the sample standard deviation. Codes do not see shift and scale.
        torch.testing.assert_close(sae.encode(3 * x + 1), sae.encode(x), atol=1e-3, rtol=1e-3)
        assert layer_norm(x).equal(sae.run_time_activation_norm_fn_in(x))
        assert load_sae(tmp_path)(x).equal(sae(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_names": []}, "at least one"),
        ({"hook_names": [HOOK, HOOK]}, "must be different hooks"),
        ({"hook_names": [HOOK], "archtecture": "topk"}, "no keyword 'archtecture'; did you mean 'architecture'"),
        ({"hook_names": [HOOK], "hook_name": HOOK}, "no keyword 'hook_name'"),
        ({"hook_names": [HOOK, "hook_pooled"]}, "train them in two calls"),
    ],
)
def test_several_hooks_that_make_no_sense(tower: HookedTower, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_saes(tower, pictures(), **{**SEVERAL, **change})


# --- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topkk"}, "unknown SAE architecture 'topkk'.*did you mean 'topk'"),
        ({"d_sae": 0}, "d_sae must be a positive integer"),
        ({"d_sae": -4}, "d_sae must be a positive integer"),
        ({"d_sae": 8.0}, "d_sae must be a positive integer"),
        ({"k": 25}, "k must be at most d_sae = 24"),
        ({"k": 0}, "k must be a positive integer"),
        ({"k": True}, "k must be a positive integer"),
        ({"n_training_tokens": 0}, "n_training_tokens must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"image_batch_size": 0}, "image_batch_size must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"dead_feature_window": 0}, "dead_feature_window must be"),
        ({"memory_limit": -1}, "memory_limit must be"),
        ({"held_out": 0}, "held_out must lie between"),
        ({"held_out": 1.0}, "held_out must lie between"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"token_scope": "some"}, "token_scope must be one of"),
        ({"normalize_activations": "l2"}, "normalize_activations must be one of"),
        ({"sae_kwargs": {"matryoshka_widths": [8, 4]}, "architecture": "matryoshka"}, "SAELens refuses this"),
        ({"sae_kwargs": {"l0_coeficient": 1.0}, "architecture": "jumprelu"}, "did you mean 'l0_coefficient'"),
        ({"sae_kwargs": {"d_in": 1}}, "'d_in' is no field"),
        ({"token_scope": "patches", "hook_name": "hook_pooled"}, "use 'pooled'"),
        ({"token_scope": "pooled"}, "without a token axis"),
        ({"token_scope": "eot"}, "end-of-text"),
        ({"hook_name": "blocks.0.attn.hook_pattern"}, r"gives \[3, 2, 5, 5\]"),
        ({"held_out": 0.99}, "too few"),
        ({"lr": 1e30, "normalize_activations": "none"}, "the loss at blocks.0.hook_resid_post is"),
    ],
)
def test_settings_that_make_no_sense(tower: HookedTower, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_sae(tower, pictures(), **{**SMALL, **change})


def test_an_unknown_hook_names_the_near_ones(tower: HookedTower) -> None:
    with pytest.raises(HookNameError, match=r"did you mean 'blocks.0.hook_resid_post'"):
        train_sae(tower, pictures(), **{**SMALL, "hook_name": "blocks.0.hook_resid_pots"})


def test_too_few_images(tower: HookedTower) -> None:
    with pytest.raises(InputError, match="1 readable images are too few"):
        train_sae(tower, pictures(1), **SMALL)
    with pytest.raises(InputError, match="2 readable images are too few"):
        train_sae(tower, pictures(2), token_scope="cls", **SMALL)


def test_an_activation_that_is_nan_names_its_image(tower: HookedTower) -> None:
    images = pictures()
    images[7] = 1e30  # finite pixels whose LayerNorm overflows
    with pytest.raises(InputError, match=r"image '7' at blocks.0.hook_resid_post is NaN"):
        train_sae(tower, images, **SMALL)


def test_activations_that_are_all_zero(tower: HookedTower) -> None:
    with torch.no_grad():
        tower.native.proj.zero_()
    with pytest.raises(InputError, match="every activation at hook_embedding is zero"):
        train_sae(tower, pictures(), **{**SMALL, "hook_name": "hook_embedding"})


# --- the accumulator


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 1000), st.sampled_from([1.0, 1e4]))
def test_reconstruction_in_any_split_and_order_is_that_of_all_rows(sizes: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes) + 2
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64) + offset
    x_hat = x + 0.3 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    codes = torch.rand(n, 6, generator=generator) * (torch.rand(n, 6, generator=generator) < 0.2)
    order = torch.randperm(n, generator=generator)
    shards = []
    for ids in order.split([*sizes, 2]):
        shards.append(Reconstruction(6))
        half = len(ids) // 2
        shards[-1].update(x[ids[:half]], x_hat[ids[:half]], codes[ids[:half]])
        shards[-1].update(x[ids[half:]], x_hat[ids[half:]], codes[ids[half:]])
    merged = shards[0]
    for shard in shards[1:]:
        assert merged.merge(shard) is merged
    quality = merged.result()
    rows, hats, z = x.numpy(), x_hat.numpy(), codes.numpy()
    assert quality.n_rows == n
    assert quality.explained_variance == pytest.approx(
        1 - ((rows - hats) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum(), rel=1e-6
    )
    assert quality.cosine == pytest.approx(
        sum(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(rows, hats, strict=True)) / n
    )
    assert quality.l0 == pytest.approx(sum(sum(value != 0 for value in row) for row in z) / n)
    assert quality.dead_latents == pytest.approx(sum(not column.any() for column in z.T) / 6)


def test_reconstruction_refuses_what_does_not_fit() -> None:
    seen = Reconstruction(4)
    with pytest.raises(InputError, match="no rows"):
        seen.result()
    with pytest.raises(InputError, match=r"\[row 4\]"):
        seen.update(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"\[row d\]"):
        seen.update(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="cannot merge"):
        seen.merge(Reconstruction(5))
    seen.update(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 4))
    assert np.isnan(seen.result().explained_variance)
