"""sparsify: `<hookpoint>/cfg.json` beside `sae.safetensors`.

`z = relu(topk((x - b_dec) E + b))`, `x_hat = z W_dec + b_dec`. A transcoder subtracts nothing from its input, and may
add `x W_skip^T` to its output; the files do not say of which hook that is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import probe, read, read_json
from clip_lens_ext.saes.formats.record import Record, need, only, translate
from clip_lens_ext.saes.formats.transcoder import TranscoderRecord, translate_transcoder

_NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def _file(path: Path) -> Path:
    return path / "sae.safetensors" if path.is_dir() else path


def matches(path: Path) -> bool:
    """Whether `path` is `sae.safetensors` with the library's tensors, or the folder that has it."""
    found = probe(_file(path))
    return found is not None and found.path.name == "sae.safetensors" and found.has(*_NAMES)


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`."""
    path = _file(Path(path))
    tensors, _ = read(path)
    config = read_json(path.parent / "cfg.json")
    if config.get("activation", "topk") != "topk":
        raise LoadError(f"{str(path)!r}: activation {config['activation']!r} of sparsify is not read; topk is")
    enc, b_enc, dec, b_dec = need(tensors, path, *_NAMES)
    transcoder = bool(config.get("transcode")) or "W_skip" in tensors
    only(tensors, path, *_NAMES, *(["W_skip"] if transcoder else []))
    metadata: dict[str, Any] = {}
    layer = re.search(r"(?:layers|blocks|resblocks)\.(\d+)$", path.parent.name)
    if layer:
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    if transcoder:
        if config.get("k") is None and (cfg_overrides or {}).get("k") is None:
            raise LoadError(f"{str(path)!r} does not say how many latents its TopK keeps: pass k=")
        found = TranscoderRecord(enc.T, dec, b_enc, b_dec, None, tensors.get("W_skip"), config.get("k"))
        return translate_transcoder(found, path, format="sparsify", device=device, cfg_overrides=cfg_overrides)
    record = Record(enc.T, dec, b_enc, b_dec, "topk", config.get("k"), subtract_b_dec=True, metadata=metadata)
    return translate(record, path, format="sparsify", device=device, cfg_overrides=cfg_overrides)
