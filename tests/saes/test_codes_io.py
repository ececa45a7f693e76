"""Sparse codes come back from every form as they were, and their size is that of what is active."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.saes import SparseCodes


def make(n_sample: int, n_token: int, d_sae: int, share: float, seed: int = 0) -> SparseCodes:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n_sample, n_token, d_sae, generator=generator)
    dense = dense * (torch.rand(dense.shape, generator=generator) < share)
    position = torch.arange(n_token).flip(0).expand(n_sample, -1)
    return SparseCodes.from_dense(dense, position=position, hook_name="blocks.3.hook_resid_post", token_scope="patches")


def same(one: SparseCodes, other: SparseCodes) -> None:
    for name in ("sample", "token", "latent", "value", "position"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    for name in ("n_sample", "n_token", "d_sae", "hook_name", "token_scope"):
        assert getattr(one, name) == getattr(other, name), name


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 30), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 99))
def test_csr_is_the_dense_matrix(n_sample: int, n_token: int, d_sae: int, share: float, seed: int) -> None:
    codes = make(n_sample, n_token, d_sae, share, seed)
    csr = codes.csr()
    assert torch.equal(csr.to_dense(), codes.dense().flatten(0, 1))
    fields = {"position": codes.position, "hook_name": codes.hook_name, "token_scope": codes.token_scope}
    same(SparseCodes.from_csr(csr, n_token=n_token, **fields), codes)


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_saved_and_loaded(suffix: str, share: float, tmp_path: Path) -> None:
    codes = make(3, 4, 50, share)
    codes.save(tmp_path / f"codes{suffix}")
    same(SparseCodes.load(tmp_path / f"codes{suffix}"), codes)


def test_half_precision_stays_in_safetensors(tmp_path: Path) -> None:
    codes = make(2, 3, 9, 0.5)
    half = SparseCodes.from_dense(codes.dense().bfloat16())
    half.save(tmp_path / "codes.safetensors")
    same(SparseCodes.load(tmp_path / "codes.safetensors"), half)


def test_size_on_disk_is_proportional_to_l0(tmp_path: Path) -> None:
    sizes = []
    for share in (0.02, 0.04, 0.08):
        codes = make(20, 10, 1000, share)
        codes.save(tmp_path / "codes.safetensors")
        sizes.append(((tmp_path / "codes.safetensors").stat().st_size - 8 * 200 - 4 * 200, len(codes)))
    for size, entries in sizes:
        assert size == pytest.approx(8 * entries, rel=0.05)


def test_what_is_no_codes(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no sparse codes at"):
        SparseCodes.load(tmp_path / "gone.safetensors")
    for name, message in (
        ("broken.safetensors", r"no file of SparseCodes\.save: SafetensorError"),
        ("broken.parquet", "truncated or holds no sparse codes"),
    ):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(LoadError, match=message):
            SparseCodes.load(tmp_path / name)
    with pytest.raises(InputError, match=r"\.safetensors or \.parquet"):
        make(1, 1, 2, 1.0).save(tmp_path / "codes.npz")
    with pytest.raises(InputError, match="no whole number of samples"):
        SparseCodes.from_csr(make(3, 1, 4, 1.0).csr(), n_token=2)
