"""Every layout on disk gives the latents and the reconstruction of its family's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.checkpoints import LAYOUTS, D, N, rows
from sae_lens import SAE

from benchmarks.sae_formats import section
from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes import formats, load_sae
from clip_lens_ext.saes.decoder import check_decoder, decoder_rows, output_scale

# Two matrix products in float32 against float64, on numbers of order one.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_and_reconstruction_are_the_family_s_own(layout: str, tmp_path: Path) -> None:
    written = LAYOUTS[layout](tmp_path)
    sae = load_sae(written.path, **written.keywords)
    x = rows()
    latents, reconstruction = written.forward(x)
    found = sae.encode(x)
    assert found.shape == (len(x), N)
    torch.testing.assert_close(found.double(), latents, **TOLERANCE)
    assert ((found != 0) == (latents != 0)).all(), "another set of latents is active"
    assert 0 < int((latents != 0).sum()) < latents.numel(), "nothing or everything is active: that tests nothing"
    found = sae.encode(x)  # an SAE that normalises decodes with the scale of the last encode
    torch.testing.assert_close(sae.decode(found).double(), reconstruction, **TOLERANCE)
    metadata = sae.cfg.metadata
    assert metadata.format in (written.format, "sae_for_vlm")
    assert len(metadata.sha256) == 64
    for name, value in written.metadata.items():
        assert metadata[name] == value, name
    assert not sae.training
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (D, N)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_float64_they_agree_to_a_millionth(layout: str, tmp_path: Path) -> None:
    """What is left is what a family's arithmetic on its weights rounds in float32: decoder rows of unit length."""
    written = LAYOUTS[layout](tmp_path)
    sae = load_sae(written.path, dtype=torch.float64, **written.keywords)
    x = rows().double()
    latents, reconstruction = written.forward(rows())
    torch.testing.assert_close(sae.encode(x), latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(sae.decode(sae.encode(x)), reconstruction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_detected_by_its_content_and_by_the_file_alone(layout: str, tmp_path: Path) -> None:
    written = LAYOUTS[layout](tmp_path)
    expected = None if written.format == "key_map" else written.format
    for path in {written.path, written.weights}:
        assert formats.detect(path) == expected, path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attribution_reads_the_decoder_that_decode_uses(layout: str, tmp_path: Path) -> None:
    written = LAYOUTS[layout](tmp_path)
    sae = load_sae(written.path, **written.keywords)
    x = rows(1)
    check_decoder(sae, x, torch.arange(N))
    latents = sae.encode(x)
    base = sae.decode(latents)
    one = int(latents[0].abs().argmax())
    less = sae.encode(x).clone()
    less[0, one] = 0
    added = output_scale(sae, x)[0] * latents[0, one] * decoder_rows(sae, torch.tensor([one]))[0]
    torch.testing.assert_close((base - sae.decode(less))[0], added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("key map")])
def test_each_convert_is_a_converter_of_sae_lens(layout: str, tmp_path: Path) -> None:
    written = LAYOUTS[layout](tmp_path)
    own = {name: value for name, value in written.keywords.items() if name in ("k", "settings")}

    def converter(path: Any, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None) -> Any:
        return formats[written.format].convert(path, device, {**(cfg_overrides or {}), **own} or None)

    x = rows()
    sae = SAE.load_from_disk(str(written.path), converter=converter if own else formats[written.format].convert)
    torch.testing.assert_close(sae.encode(x).double(), written.forward(x)[0], **TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_in_sae_lens_layout_it_is_the_same(layout: str, tmp_path: Path) -> None:
    written = LAYOUTS[layout](tmp_path)
    sae = load_sae(written.path, **written.keywords)
    x = rows()
    expected = sae.decode(sae.encode(x))
    sae.save_model(tmp_path / "saved")
    again = load_sae(tmp_path / "saved")
    assert torch.equal(again.decode(again.encode(x)), expected)
    assert again.cfg.metadata.hook_name == sae.cfg.metadata.hook_name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["truncated", "not a number", "another shape", "extra"])
def test_broken_files_are_errors(layout: str, fault: str, tmp_path: Path) -> None:
    from oracles.breakage import damage

    written = LAYOUTS[layout](tmp_path)
    if written.format == "key_map" and fault == "extra":
        return  # it says which tensors to take
    load_sae(written.path, **written.keywords)
    damage(written.weights, fault)
    with pytest.raises(LoadError) as error:
        load_sae(written.path, **{**written.keywords, "format": written.format})
    assert written.weights.name in str(error.value)


def test_the_page_of_formats_is_of_this_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sae_formats.md").read_text(encoding="utf-8")
    assert section() in page, "run python -m benchmarks.sae_formats"


def test_every_format_has_a_layout_that_is_tested(tmp_path: Path) -> None:
    tested = set()
    for index, layout in enumerate(LAYOUTS.values()):
        (tmp_path / str(index)).mkdir()
        tested.add(layout(tmp_path / str(index)).format)
    assert tested == set(formats) - {"sae_lens"}
