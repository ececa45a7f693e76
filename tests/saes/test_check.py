"""An SAE that fits is said to fit, and one that does not is told why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import checkpoints
from torch import Tensor
from torch.nn import functional as F

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.check import explained_variance
from clip_lens_ext.saes.clip_sae import ClipSAE, ClipSAEConfig
from clip_lens_ext.towers.positions import select_tokens

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, Tensor]:
    pixels = cle.planted.normalise(cle.PlantedWorld(0).sample(24, seed=8, split="test").images)
    return cle.planted_clip().vision, cle.planted_sae(), pixels


def test_an_sae_that_fits(world: Any) -> None:
    tower, sae, pixels = world
    found = cle.check_sae(tower, pixels, sae, progress=False)
    assert found.verdict == "fits"
    assert not found.causes
    assert found.n_images == 24
    # Held against plain formulas on all rows at once.
    rows = tower.run_to(pixels, HOOK).reshape(-1, 128).double()
    codes = sae.encode(rows.float())
    back = sae.decode(codes).double()
    explained = 1 - ((rows - back) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    assert found.quality.explained_variance == pytest.approx(float(explained.detach()), abs=1e-6)
    assert found.quality.l0 == pytest.approx(float((codes != 0).sum() / len(rows)))
    edited = tower.run_with_hooks(pixels, fwd_hooks=[(HOOK, lambda x, hook: back.float().reshape(x.shape))])
    assert found.embedding_cosine == pytest.approx(float(F.cosine_similarity(edited, tower(pixels)).mean()), abs=1e-5)
    assert found.embedding_cosine_with_error == pytest.approx(1, abs=1e-6)
    assert "fits: explained variance 0.9" in str(found)
    assert found.to_dict()["quality"]["n_rows"] == 24 * 65


def test_the_wrong_hook_is_named(world: Any) -> None:
    tower, sae, pixels = world
    found = cle.check_sae(tower, pixels, sae, hook_name="blocks.0.hook_resid_post", progress=False)
    assert found.verdict == "suspicious"
    assert found.causes[0].change == {"hook_name": HOOK}
    assert f"at {HOOK}: explained variance 0.9" in str(found)


@pytest.mark.parametrize(
    ("hook", "scope"), [("blocks.0.hook_resid_post", "all"), ("blocks.3.hook_resid_pre", "patches"),
                        ("blocks.1.hook_mlp_out", "all"), ("blocks.3.hook_attn_out", "cls")],
)  # fmt: skip
def test_other_blocks_and_tokens_are_measured_in_one_pass(world: Any, hook: str, scope: Any) -> None:
    tower, sae, pixels = world
    pixels = pixels[:6]
    runs: list[int] = []
    # Every reading is a cause: the SAE that is checked explains next to nothing.
    poor = copy.deepcopy(sae)
    with torch.no_grad():
        poor.b_dec += 20
    poor.cfg.apply_b_dec_to_input = False
    with tower.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(len(value)))]):
        cle.check_sae(tower, pixels, poor, hook_name=hook, token_scope=scope, batch_size=6, progress=False)
    # The one batch, its embeddings with and without the SAE where no tail starts at the hook, and all other readings.
    assert runs == [6] * (2 if hook in tower.split_names() else 5)
    seen: dict[str, float] = {}
    kind = hook.split(".")[-1]
    for layer in range(tower.cfg.n_layers):
        other = f"blocks.{layer}.{kind}"
        rows = select_tokens(tower.run_to(pixels, other), scope)
        seen[f"at {other}"] = explained_variance(sae, rows)
    for tokens in ("cls", "patches", "all"):
        seen[f"on {tokens} tokens"] = explained_variance(sae, select_tokens(tower.run_to(pixels, hook), tokens))
    own = explained_variance(sae, select_tokens(tower.run_to(pixels, hook), scope))
    found = cle.check_sae(tower, pixels, sae, hook_name=hook, token_scope=scope, progress=False)
    for cause in found.causes:
        if cause.what in seen:  # batches of other sizes: rounding in float32
            assert cause.explained_variance == pytest.approx(seen.pop(cause.what), abs=1e-4)
    if len(found.causes) < 5:
        assert all(value <= own + 0.1 + 1e-4 for value in seen.values())


def test_the_bar_comes_to_its_end(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tower, sae, pixels = world
    for hook, scope, total in ((HOOK, "all", 3 + 3 + 4), ("hook_pooled", "pooled", 4)):
        cle.check_sae(tower, pixels[:2], sae, hook_name=hook, token_scope=scope)  # type: ignore[arg-type]
        assert f"trying other readings: 100%|██████████| {total}/{total}" in capsys.readouterr().err


def test_the_wrong_tokens_are_named(world: Any) -> None:
    tower, _, pixels = world
    sae = cle.planted_sae("blocks.3.hook_resid_post")
    found = cle.check_sae(tower, pixels, sae, token_scope="patches", progress=False)
    assert found.verdict == "suspicious"
    assert {"token_scope": "cls"} in [cause.change for cause in found.causes]


def test_the_wrong_bias_convention_is_named(world: Any) -> None:
    tower, sae, pixels = world
    shifted = copy.deepcopy(sae)
    with torch.no_grad():
        # The same function, with a decoder bias far from what is subtracted: wrong once the convention is flipped.
        shifted.b_dec += 3 * torch.randn(128, generator=torch.Generator().manual_seed(0))
        shifted.b_enc += (shifted.b_dec - sae.b_dec) @ shifted.W_enc
        for_flip = copy.deepcopy(shifted)
    for_flip.cfg.apply_b_dec_to_input = False
    assert for_flip.cfg.apply_b_dec_to_input != sae.cfg.apply_b_dec_to_input
    found = cle.check_sae(tower, pixels, for_flip, progress=False)
    assert found.verdict == "suspicious"
    assert {"subtract_b_dec": True} in [cause.change for cause in found.causes]


def test_missing_input_statistics_are_named(world: Any) -> None:
    tower, sae, pixels = world
    rows = tower.run_to(pixels, HOOK).reshape(-1, 128)
    mean = rows.mean(0)
    scale = 128**0.5 / float((rows - mean).norm(dim=1).mean())
    scaled = ClipSAE(ClipSAEConfig(d_in=128, d_sae=1024, activation="topk", k=16, metadata=sae.cfg.metadata))
    with torch.no_grad():
        # What the planted SAE does, for inputs (x - mean) * scale.
        scaled.W_enc.copy_(sae.W_enc / scale)
        scaled.W_dec.copy_(sae.W_dec * scale)
        scaled.b_dec.copy_((sae.b_dec - mean) * scale)
        scaled.b_enc.copy_(sae.b_enc)
    found = cle.check_sae(tower, pixels, scaled.eval(), progress=False)
    assert found.verdict == "suspicious"
    assert found.causes[0].what == "inputs centred and scaled to unit variance"
    with torch.no_grad():
        scaled.input_mean.copy_(mean)
        scaled.input_scale.fill_(scale)
    assert cle.check_sae(tower, pixels, scaled, progress=False).verdict == "fits"


def test_an_sae_of_another_model(world: Any) -> None:
    tower, sae, pixels = world
    random = copy.deepcopy(sae)
    with torch.no_grad():
        random.W_enc.normal_(generator=torch.Generator().manual_seed(1))
        random.W_dec.normal_(generator=torch.Generator().manual_seed(2))
    found = cle.check_sae(tower, pixels, random, progress=False)
    assert found.verdict == "suspicious"
    assert found.quality.explained_variance < 0


def test_broken_pictures_are_named_and_few_are_read(world: Any, tmp_path: Path) -> None:
    from PIL import Image

    tower, sae, _ = world
    images = cle.PlantedWorld(0).sample(6, seed=8, split="test").images
    for index, picture in enumerate(images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    (tmp_path / "0.png").write_bytes(b"no picture")
    clip = cle.planted_clip()
    found = cle.check_sae(tower, tmp_path, sae, preprocess=clip.preprocess, progress=False)
    assert (found.n_images, found.skipped) == (5, ("0.png",))
    assert "skipped 1: 0.png" in str(found)
    few = cle.check_sae(tower, tmp_path, sae, preprocess=clip.preprocess, n_images=2, batch_size=4, progress=False)
    assert few.n_images == 2
    for name in range(1, 6):
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(InputError):
        cle.check_sae(tower, tmp_path, sae, preprocess=clip.preprocess, progress=False)


def test_an_open_convention_is_chosen_by_reconstruction(world: Any, tmp_path: Path) -> None:
    """A saev file of the ambiguous kind, with the weights of an SAE that subtracts nothing."""
    tower, sae, pixels = world
    w = {"W_enc": sae.W_enc.detach(), "W_dec": sae.W_dec.detach(), "b_dec": sae.b_dec.detach()}
    w["b_enc"] = (sae.b_enc - sae.b_dec @ sae.W_enc).detach()
    header = {"schema": 1, "cls": "TopK", "cfg": {"d_model": 128, "top_k": 16}}
    written = checkpoints.saev(tmp_path, header, True)
    buffer = checkpoints.io.BytesIO()
    torch.save(w, buffer)
    written.path.write_bytes(checkpoints.json.dumps(header).encode() + b"\n" + buffer.getvalue())
    place = {"hook_name": HOOK, "token_scope": "all"}
    assert cle.load_sae(written.path, **place).cfg.apply_b_dec_to_input
    chosen = cle.load_sae(written.path, check=(tower, pixels), **place)
    assert not chosen.cfg.apply_b_dec_to_input
    said = chosen.cfg.metadata.chosen_by_reconstruction
    assert said["subtract_b_dec"] is False
    assert said["explained_variance"] > said["otherwise"]
    assert chosen.cfg.metadata.check["verdict"] == "fits"


def test_loading_with_a_check_warns_where_it_does_not_fit(world: Any, tmp_path: Path) -> None:
    tower, sae, pixels = world
    sae.save_model(tmp_path)
    assert cle.load_sae(tmp_path, check=(tower, pixels)).cfg.metadata.check["verdict"] == "fits"
    with pytest.warns(UserWarning, match=r"suspicious: explained variance .*\n(.*\n)*.*at blocks\.2\.hook_resid_post"):
        cle.load_sae(tmp_path, hook_name="blocks.0.hook_resid_post", check=(tower, pixels))
