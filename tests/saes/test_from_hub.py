"""SAEs from hub repositories: from the local cache without a network, or an error that says how to get them."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from oracles.checkpoints import clipscope, prisma, rows
from sae_lens import SAE

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes import formats, load_sae


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--some-org--saes"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    found = root / "snapshots" / ("0" * 40)
    found.mkdir(parents=True)
    return found


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_folder_and_a_file_of_a_repository(snapshot: Path, prefix: str) -> None:
    (snapshot / "vit-b-32").mkdir()
    written = prisma(snapshot / "vit-b-32")
    sae = load_sae(f"{prefix}some-org/saes/vit-b-32")
    torch.testing.assert_close(sae.encode(rows()).double(), written.forward(rows())[0], rtol=1e-5, atol=2e-6)
    clipscope(snapshot)
    assert load_sae(f"{prefix}some-org/saes/14_resid/1200013184.pt").cfg.metadata.format == "clipscope"


def test_a_whole_repository(snapshot: Path) -> None:
    prisma(snapshot)
    assert load_sae("some-org/saes").cfg.metadata.format == "prisma"


def test_what_is_not_there(snapshot: Path) -> None:
    (snapshot / "here").mkdir()
    (snapshot / "here" / "x.txt").write_text("")
    with pytest.raises(LoadError, match=r"has no 'gone'; folders that are here: here"):
        load_sae("some-org/saes/gone")
    with pytest.raises(LoadError, match=r"neither in the local cache .*\n.*hf download other-org/other"):
        load_sae("other-org/other/folder")
    with pytest.raises(LoadError, match="names no hub repository"):
        load_sae("hf-hub:one")
    with pytest.raises(LoadError, match="no such file or folder"):
        load_sae(snapshot / "nowhere")
    with pytest.raises(LoadError, match="no such file or folder"):
        load_sae("nowhere")


def test_each_convert_is_a_converter_of_from_pretrained(snapshot: Path) -> None:
    """As SAELens calls it: with the names of its own protocol, and a sparsity to come back."""
    (snapshot / "vit-b-32").mkdir()
    written = prisma(snapshot / "vit-b-32")
    sae = SAE.from_pretrained("some-org/saes", "vit-b-32", converter=formats["prisma"].convert)
    torch.testing.assert_close(sae.encode(rows()).double(), written.forward(rows())[0], rtol=1e-5, atol=2e-6)
    assert sae.cfg.metadata.hook_name == "blocks.9.hook_resid_post"
    whole = SAE.from_pretrained("some-org/saes", "vit-b-32", converter=formats["prisma"].convert, dtype="float64")
    assert whole.W_enc.dtype == torch.float64
    with pytest.raises(LoadError, match="has no 'gone'"):
        SAE.from_pretrained("some-org/saes", "gone", converter=formats["prisma"].convert)
    for given in ({}, {"path": snapshot, "repo_id": "some-org/saes"}):
        with pytest.raises(LoadError, match="takes a path, or a repo_id"):
            formats["prisma"].convert(**given)
