"""What goes silently wrong with SAE checkpoints of CLIP: each line a trap that must not be sprung."""

from __future__ import annotations

import copy
import gzip
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import checkpoints
from oracles.breakage import damage
from oracles.checkpoints import LAYOUTS, LEGACY, D, K, N, noise, rows
from safetensors.torch import load_file, save_file

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes import load_sae
from clip_lens_ext.saes.formats.unpickle import load_torch

HOOK = {"hook_name": "blocks.1.hook_resid_post"}


def test_saev_bias_is_subtracted_in_old_files_and_not_in_new_ones(tmp_path: Path) -> None:
    old = load_sae(checkpoints.saev(tmp_path, LEGACY, True).path, **HOOK)
    assert old.cfg.apply_b_dec_to_input
    assert "ambiguous" not in old.cfg.metadata
    between = {"schema": 1, "cls": "Relu", "cfg": {"d_model": D}}
    unsure = load_sae(checkpoints.saev(tmp_path, between, True).path, **HOOK)
    assert unsure.cfg.apply_b_dec_to_input
    assert unsure.cfg.metadata.ambiguous == ["subtract_b_dec"]
    told = load_sae(tmp_path / "sae.pt", subtract_b_dec=False, **HOOK)
    assert not told.cfg.apply_b_dec_to_input
    assert told.cfg.metadata.ambiguous is None, "a check would overrule what the user said"
    assert told.cfg.metadata.overrides["subtract_b_dec"] == {"file": True, "keyword": False}
    x = rows()
    assert not torch.allclose(told.encode(x), unsure.encode(x))


def test_saev_thresholds_that_cut_nothing_off_and_that_are_none(tmp_path: Path) -> None:
    header = {"schema": 5, "cfg": {"d_model": D, "activation": {"cls": "BatchTopK", "params": {"top_k": 3}}}}
    x = rows()
    for threshold in (0.0, -0.5):
        written = checkpoints.saev(tmp_path, header, False, threshold)
        sae = load_sae(written.path, **HOOK)
        torch.testing.assert_close(sae.encode(x).double(), written.forward(x)[0], rtol=1e-5, atol=2e-6)
        assert float(sae.threshold[0]) == threshold, "what the file says stays readable"
    with pytest.raises(LoadError, match="threshold"):
        load_sae(checkpoints.saev(tmp_path, header, False, float("nan")).path, **HOOK)


def test_input_statistics_that_no_file_has(tmp_path: Path) -> None:
    written = checkpoints.saev(tmp_path, LEGACY, True)
    mean, scale = noise(D, seed=31), 0.25
    sae = load_sae(written.path, input_stats=(mean, scale), **HOOK)
    x = rows()
    z, out = written.forward((x - mean) * scale)
    torch.testing.assert_close(sae.encode(x).double(), z, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(sae.decode(sae.encode(x)).double(), out / scale + mean.double(), rtol=1e-5, atol=1e-5)
    assert sae.cfg.metadata.input_stats == "keyword"
    with pytest.raises(LoadError, match="input scale is -1"):
        load_sae(written.path, input_stats=(mean, -1.0), **HOOK)
    with pytest.raises(LoadError, match="input mean"):
        load_sae(written.path, input_stats=(mean[:-1], 1.0), **HOOK)


def test_a_copy_has_statistics_of_its_own(tmp_path: Path) -> None:
    sae = load_sae(LAYOUTS["msae"](tmp_path).path)
    other, x = copy.deepcopy(sae), rows()
    expected = sae.decode(sae.encode(x))
    with torch.no_grad():
        other.input_mean += 1
    assert not torch.allclose(other.encode(x), sae.encode(x))
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected)


def test_raw_signs_matter_where_few_latents_are_positive(tmp_path: Path) -> None:
    """With fewer than k positive values the two TopKs differ, and only there."""
    sae = load_sae(LAYOUTS["clipscope"](tmp_path).path)
    assert (sae.encode(rows(200)) < 0).any()
    (tmp_path / "p").mkdir()
    other = load_sae(LAYOUTS["prisma topk"](tmp_path / "p").path)
    assert (other.encode(rows(200)) >= 0).all()


def test_batch_topk_never_looks_across_the_batch(tmp_path: Path) -> None:
    for index, layout in enumerate(("dictionary_learning BatchTopKSAE", "saev 5 BatchTopK", "overcomplete threshold")):
        (tmp_path / str(index)).mkdir()
        written = LAYOUTS[layout](tmp_path / str(index))
        sae, x = load_sae(written.path, **written.keywords), rows(9)
        torch.testing.assert_close(sae.encode(x)[:2], sae.encode(x[:2]))


def test_msae_that_was_renamed(tmp_path: Path) -> None:
    written = checkpoints.msae(tmp_path)
    moved = written.path.rename(tmp_path / "best.pth")
    with pytest.raises(LoadError, match=r"settings are in the file's name.*settings=\{"):
        load_sae(moved)
    sae = load_sae(moved, settings={"activation": "TopKReLU_3", "normalize": False, "soft_cap": 30.0})
    torch.testing.assert_close(sae.encode(rows()).double(), written.forward(rows())[0], rtol=1e-5, atol=2e-6)
    with pytest.raises(LoadError, match="lacks normalize, soft_cap"):
        load_sae(moved, settings={"activation": "ReLU"})
    with pytest.raises(LoadError, match="other samples of a batch"):
        load_sae(moved, settings={"activation": "BatchTopK_3", "normalize": False, "soft_cap": 0})


def test_prisma_s_json_counts_and_not_its_defaults(tmp_path: Path) -> None:
    sae = load_sae(LAYOUTS["prisma relu"](tmp_path).path)
    assert sae.cfg.normalize_activations == "none"
    assert sae.cfg.architecture() == "standard"


def test_weight_norm_of_the_decoder_is_over_its_columns(tmp_path: Path) -> None:
    sae = load_sae(checkpoints.attributing_clip(tmp_path).path, k=5, **HOOK)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    assert not sae.cfg.apply_b_dec_to_input
    assert not sae.b_dec.any()
    assumed = load_sae(tmp_path / "last.ckpt", k=2, **HOOK)
    assert "assumed" not in assumed.cfg.metadata
    with pytest.raises(LoadError, match=r"k must be an integer in 1\.\.11, not 64"):
        load_sae(tmp_path / "last.ckpt", **HOOK)


def test_what_no_file_says_is_asked_for(tmp_path: Path) -> None:
    path = LAYOUTS["overcomplete topk"](tmp_path).path
    with pytest.raises(LoadError, match=r"does not say what follows its encoder: pass k="):
        load_sae(path, **HOOK)
    with pytest.raises(LoadError, match="does not say at which hook"):
        load_sae(path, k=3)
    (tmp_path / "p").mkdir()
    with pytest.raises(LoadError, match="takes no settings="):
        load_sae(LAYOUTS["clipscope"](tmp_path / "p").path, settings={"k": 3})


def test_the_last_of_several_steps_is_taken(tmp_path: Path) -> None:
    written = LAYOUTS["sae-for-vlm BatchTopK"](tmp_path)
    assert load_sae(written.path).W_enc.any(), "ae_5.pt has zeros; ae_90.pt is later, though not by its letters"


class Spring:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


@pytest.mark.parametrize("how", ["torch", "old torch", "plain pickle", "gzip", "behind a header"])
def test_nothing_in_a_file_is_run(tmp_path: Path, how: str) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "sae.pt"
    found = {"cfg": Spring(sprung), "state_dict": checkpoints.weights()}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(found))
    else:
        torch.save(found, path, _use_new_zipfile_serialization=how != "old torch")
    if how == "gzip":
        raw, path = path.read_bytes(), tmp_path / "sae.pkl.gz"
        path.write_bytes(gzip.compress(raw))
    if how == "behind a header":
        path.write_bytes(b'{"schema": 2}\n' + path.read_bytes())
    for name in (None, "patchsae", "prisma", "saev", "dn_cbm"):
        with pytest.raises(LoadError):
            load_sae(path, format=name, **HOOK)
    assert not sprung.exists()
    with pytest.raises(LoadError, match=r"nothing of it was run|no torch file"):
        load_torch(path) if how != "behind a header" else load_torch(path, data=path.read_bytes()[14:])


@pytest.mark.parametrize("how", ["zip", "gzip"])
def test_a_file_that_expands_without_end(tmp_path: Path, how: str) -> None:
    path = tmp_path / ("bomb.pt" if how == "zip" else "bomb.pkl.gz")
    if how == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    else:
        path.write_bytes(gzip.compress(b"\0" * 50_000_000))
    with pytest.raises(LoadError, match=r"not read|no known SAE format"):
        load_sae(path, **HOOK)
    with pytest.raises(LoadError, match="it is not read"):
        load_torch(path)


def test_a_clip_model_that_is_called_an_sae(tmp_path: Path) -> None:
    model = {"visual.conv1.weight": noise(4, 3), "visual.proj": noise(3, 4), "logit_scale": torch.tensor(1.0)}
    torch.save({"state_dict": model}, tmp_path / "CLIP-SAE.pt")
    save_file(model, tmp_path / "CLIP-SAE.safetensors")
    for name in ("CLIP-SAE.pt", "CLIP-SAE.safetensors"):
        with pytest.raises(LoadError, match="a CLIP model, not an SAE"):
            load_sae(tmp_path / name, **HOOK)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    written = LAYOUTS["key map"](tmp_path)
    weights = load_file(written.path)
    save_file({**weights, "dec": (weights["dec"] * 10).to(torch.int32)}, written.path)
    with pytest.raises(LoadError, match=r"W_dec .*int32"):
        load_sae(written.path, **written.keywords)


def test_square_weights_have_no_direction(tmp_path: Path) -> None:
    path = tmp_path / "square.safetensors"
    save_file({"e": noise(4, 4, seed=1), "d": noise(4, 4, seed=2)}, path)
    wanted = {"W_enc": "e", "W_dec": "d", "activation": "relu", "subtract_b_dec": False}
    with pytest.raises(LoadError, match="say 'transposed'"):
        load_sae(path, format="key_map", settings=wanted, **HOOK)
    sae = load_sae(path, format="key_map", settings={**wanted, "transposed": True}, **HOOK)
    assert torch.equal(sae.W_enc, noise(4, 4, seed=1).T)
    with pytest.raises(LoadError, match="does not know activatoin"):
        load_sae(path, format="key_map", settings={**wanted, "activatoin": "relu"}, **HOOK)


CASES = 240  # for each of more than 40 layouts: over 10,000 in all


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_thousand_damaged_files(layout: str, tmp_path: Path) -> None:
    written = LAYOUTS[layout](tmp_path)
    whole = written.weights.read_bytes()
    keywords = {**written.keywords, "format": written.format}

    @settings(
        max_examples=CASES, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(
        kind=st.sampled_from(["flip", "cut", "insert", "swap", "another shape", "not a number", "extra"]),
        where=st.floats(0, 1, exclude_max=True), size=st.integers(1, 64), value=st.integers(0, 255),
    )  # fmt: skip
    def attempt(kind: str, where: float, size: int, value: int) -> None:
        at = int(where * len(whole))
        damaged = {
            "flip": whole[:at] + bytes([whole[at] ^ (value or 1)]) + whole[at + 1 :],
            "cut": whole[:at] + whole[at + size :],
            "insert": whole[:at] + bytes([value]) * size + whole[at:],
            "swap": whole[:at] + whole[at : at + size][::-1] + whole[at + size :],
        }.get(kind, whole)
        written.weights.write_bytes(damaged)
        if kind in ("another shape", "not a number", "extra"):
            damage(written.weights, kind)
        try:
            sae = load_sae(written.path, **keywords)
        except LoadError:
            return
        # What still loads has the shapes that it had, and numbers.
        assert kind not in ("another shape", "not a number")
        assert (sae.W_enc.shape, sae.W_dec.shape) == ((D, N), (N, D))
        assert torch.isfinite(sae.W_enc).all()
        assert torch.isfinite(sae.W_dec).all()
        assert getattr(sae.cfg, "k", K) <= N

    attempt()
    written.weights.write_bytes(whole)
    load_sae(written.path, **written.keywords)
