"""Transcoders: loaded to the same function as their family's, encoded with, and refused where an SAE is needed."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from oracles.breakage import damage
from oracles.checkpoints import rows
from oracles.transcoders import TRANSCODERS, prisma_transcoder

from clip_lens_ext.attribution import direction_target, open_site
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.saes import check_sae, encode, load_sae
from clip_lens_ext.saes.clip_transcoder import ClipTranscoder, ClipTranscoderConfig
from clip_lens_ext.towers import HookedTower

# As for SAEs (test_formats.py): the oracle is in float64, the weights and sums of the family are in float32.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.mark.parametrize("layout", TRANSCODERS)
def test_latents_and_output_are_those_of_its_family(layout: str, tmp_path: Path) -> None:
    written = TRANSCODERS[layout](tmp_path)
    sae = load_sae(written.path, **written.keywords)
    x = rows()
    z, y = written.forward(x)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x).double(), z, **TOLERANCE)
        torch.testing.assert_close(sae(x).double(), y, **TOLERANCE)
        assert torch.equal(sae(x), sae(x))  # nothing is left over from one input to the next
    for name, value in (written.metadata or {}).items():
        assert sae.cfg.metadata[name] == value
    assert sae.cfg.metadata.format == written.format
    sae.save_model(tmp_path / "saved")
    again = load_sae(tmp_path / "saved")
    assert torch.equal(again(x), sae(x))
    assert isinstance(again, ClipTranscoder)


@pytest.mark.parametrize("layout", TRANSCODERS)
@pytest.mark.parametrize("fault", ["truncated", "not a number", "another shape", "extra"])
def test_broken_files_are_errors(layout: str, fault: str, tmp_path: Path) -> None:
    written = TRANSCODERS[layout](tmp_path)
    damage(written.weights, fault)
    with pytest.raises(LoadError) as error:
        load_sae(written.path, **{**written.keywords, "format": written.format})
    assert written.weights.name in str(error.value)


def test_keywords_of_saes_are_refused(tmp_path: Path) -> None:
    prisma_transcoder(tmp_path)
    for keyword in ({"subtract_b_dec": False}, {"input_stats": (None, 2.0)}, {"settings": {"a": 1}}):
        with pytest.raises(LoadError, match=f"is a transcoder, and {next(iter(keyword))}= is for SAEs"):
            load_sae(tmp_path, **keyword)
    with pytest.raises(LoadError, match=r"k must be an integer in 1\.\."):
        load_sae(tmp_path, k=10_000)


def test_it_encodes_and_is_not_spliced() -> None:
    torch.manual_seed(0)
    native = open_clip.transformer.VisionTransformer(8, 4, 16, 2, 2, mlp_ratio=2.0, output_dim=12).eval()
    tower, x = HookedTower(native, model_name="tiny"), torch.randn(2, 3, 8, 8)
    hook = "blocks.0.hook_resid_mid"
    sae = ClipTranscoder(ClipTranscoderConfig(d_in=16, d_out=16, d_sae=24)).eval()
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = hook, "blocks.0.hook_mlp_out"
    codes = encode(tower, x, sae)
    torch.testing.assert_close(codes.dense(), sae.encode(tower.run_to(x, hook)))
    message = f"a transcoder from {hook} to blocks.0.hook_mlp_out"
    with pytest.raises(InputError, match=message):
        tower.add_sae(sae)
    with pytest.raises(InputError, match=message):
        open_site(tower, x, sae)
    with pytest.raises(InputError, match=message):
        check_sae(tower, x, sae, progress=False)
    assert direction_target(torch.ones(1, 12))(tower(x)).shape == (2, 1)  # the tower is as it was
    assert not tower.acts_to_saes
