"""Hashes of weights: the same wherever and in whatever order they are, another one for anything else."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.saes import build_sae
from torch import Tensor, nn

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError
from clip_lens_ext.provenance import module_sha256, tensors_sha256
from clip_lens_ext.result_files import read_parts, write_parts
from clip_lens_ext.saes.identity import sae_sha256
from clip_lens_ext.saes.run_folder import RunFolder
from clip_lens_ext.towers.identity import tower_sha256


def by_hand(tensors: dict[str, Tensor], about: str = "") -> str:
    """The text, then name, dtype, shape and bytes of each tensor in the order of the names."""
    content = about.encode()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        content += f"{name} {value.dtype} {list(value.shape)}".encode()
        content += bytes(value.reshape(-1).view(torch.uint8).tolist())
    return hashlib.sha256(content).hexdigest()


TENSORS: dict[str, Any] = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.0, -2.5]).bfloat16(),
    "none": torch.zeros(0, 3),
    "number": torch.tensor(7),
    "flag": torch.tensor([True, False]),
}


def test_named_tensors() -> None:
    found = tensors_sha256(TENSORS)
    assert found == by_hand(TENSORS)
    assert tensors_sha256(TENSORS, about="k=2") == by_hand(TENSORS, "k=2") != found
    assert found == tensors_sha256(dict(reversed(TENSORS.items())))
    assert found == tensors_sha256({**TENSORS, "a": TENSORS["a"].T.contiguous().T})  # strides do not count
    changed = [
        {**TENSORS, "a": TENSORS["a"].reshape(3, 2)}, {**TENSORS, "a": TENSORS["a"].double()},
        {**TENSORS, "b": TENSORS["b"].half()}, {**TENSORS, "a": -TENSORS["a"]}, {**TENSORS, "extra": 4},
        {"z" if name == "a" else name: value for name, value in TENSORS.items()}, {"a": TENSORS["a"]},
    ]  # fmt: skip
    assert len({found, *map(tensors_sha256, changed)}) == len(changed) + 1


def test_a_module() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).bfloat16()
    found = module_sha256(layer)
    assert found == by_hand(dict(layer.state_dict())) == module_sha256(copy.deepcopy(layer))
    assert module_sha256(layer, about={"k": 2, "of": None}) == by_hand(
        dict(layer.state_dict()), json.dumps({"k": 2, "of": None})
    )
    with torch.no_grad():
        layer[0].weight[1, 2] += 1
    assert module_sha256(layer) != found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_module_elsewhere() -> None:
    layer = nn.Linear(3, 2).bfloat16()
    assert module_sha256(copy.deepcopy(layer).cuda()) == module_sha256(layer)


def test_what_is_no_weight_counts() -> None:
    """Two SAEs with the same weights and another `k`, two towers with another activation function: other codes."""
    one, other = (build_sae("topk", 48, "blocks.0.hook_resid_post", "cls") for _ in range(2))
    assert sae_sha256(one) == sae_sha256(other)
    one.cfg.metadata.colour = "red"
    assert sae_sha256(one) == sae_sha256(other)
    other.cfg.k += 1
    assert sae_sha256(one) != sae_sha256(other)
    vision = cle.planted_clip().vision
    found = tower_sha256(vision)
    assert found == tower_sha256(cle.planted_clip().vision) != tower_sha256(cle.planted_clip().text)
    with torch.no_grad():
        vision.native.conv1.weight[0, 0, 0, 0] += 1
        assert tower_sha256(vision) != found
        vision.native.conv1.weight[0, 0, 0, 0] -= 1


# -- what was kept under the hashes of earlier versions


def test_term_embeddings_are_found_under_the_name_that_they_had() -> None:
    """They hashed the configuration without the device, and the weights by name, as it is done now."""
    clip = cle.planted_clip()
    cfg = {name: value for name, value in clip.text.cfg.to_dict().items() if name != "device"}
    before = by_hand(dict(clip.text.native.state_dict()), json.dumps(cfg, sort_keys=True, default=str))
    assert tower_sha256(clip.text) == before
    assert cle.Vocabulary.from_terms(["crane"]).embed(clip, progress=False).model_hash == before


def test_a_run_folder_with_another_hash_is_refused(tmp_path: Path) -> None:
    """Training hashed the weights alone, in the order of the module: such a folder is named, never used."""
    tower = cle.planted_clip().vision
    digest = hashlib.sha256()
    for name, weight in tower.native.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() != tower_sha256(tower)
    RunFolder(tmp_path, {"tower_sha256": digest.hexdigest()}).begin()
    with pytest.raises(InputError, match=r"tower_sha256 was '\w+' and is now '\w+'; choose another"):
        RunFolder(tmp_path, {"tower_sha256": tower_sha256(tower)})


def test_a_checkpoint_of_a_pass_with_another_hash_is_refused(tmp_path: Path) -> None:
    """Passes noted 16 digits, of the weights alone, under other names."""
    clip, sae = cle.planted_clip(), cle.planted_sae()
    pixels = torch.zeros(2, 3, 48, 48)
    path = tmp_path / "c"
    cle.collect_references(clip.vision, pixels, sae, checkpoint=path, progress=False)
    tensors, fields, texts = read_parts(path, "pass")
    del fields["settings"]["model_sha256"], fields["settings"]["sae_sha256"]
    fields["settings"] |= {"model_weights": "0" * 16, "sae_weights": "1" * 16}
    write_parts(path, "pass", tensors, fields, texts)
    with pytest.raises(InputError, match=r"model_sha256 was None and is now .* sae_weights was '1{16}' .*delete it"):
        cle.collect_references(clip.vision, pixels, sae, checkpoint=path, progress=False)
