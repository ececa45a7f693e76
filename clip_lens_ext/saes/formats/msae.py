"""MSAE: a `.pth` whose settings are in its name alone, on image embeddings.

`u = (x - mean_center) scaling_factor`, normalised where the name says so; `z = act((u - pre_bias) E + latent_bias)`,
with a soft cap; `x_hat = z D + pre_bias`, and back. The name:
`{n_latents}_{n_inputs}_{activation[_k]}[_RW|_UW]_{tied}_{normalize}_{soft_cap}_{dataset}.pth`. A file that was renamed
needs `settings=`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lens_ext.errors import LoadError
from clip_lens_ext.saes.formats.probe import probe, read
from clip_lens_ext.saes.formats.record import Record, need, only, translate

_NAMES = ("model.pre_bias", "model.encoder", "model.latent_bias")
_MORE = ("model.decoder", "model.latents_activation_frequency", "model.activation.log_threshold", "mean_center",
         "scaling_factor", "target_norm")  # fmt: skip
_NAME = re.compile(
    r"(?P<n>\d+)_(?P<d>\d+)_(?P<act>[A-Za-z]+)(?:_(?P<arg>[\d.e-]+))?(?:_[A-Z]*(?:RW|UW))?_(?P<tied>True|False)_(?P<norm>True|False)_"
    r"(?P<cap>[\d.]+)(?:_.*)?"
)
_SETTINGS = ("activation", "normalize", "soft_cap")


def matches(path: Path) -> bool:
    """Whether `path` is a file with the library's tensors."""
    found = probe(path)
    return found is not None and found.has(*_NAMES)


def convert(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check; see `Format.convert`. `cfg_overrides["settings"]` is used instead of the file's name."""
    path = Path(path)
    tensors, plain = read(path)
    overrides = dict(cfg_overrides or {})
    settings = _settings(path, overrides.pop("settings", None))
    bias, enc, b_enc = need(tensors, path, *_NAMES)
    only(tensors, path, *_NAMES, *_MORE)
    dec = tensors.get("model.decoder", enc.T)
    mean = tensors.get("mean_center", plain.get("mean_center"))
    scale = tensors.get("scaling_factor", plain.get("scaling_factor", 1.0))
    record = Record(
        enc, dec, b_enc, bias, subtract_b_dec=True, layer_norm=settings["normalize"], soft_cap=settings["soft_cap"],
        input_mean=mean if isinstance(mean, Tensor) and mean.dim() == 1 else None, input_scale=float(scale),
        metadata={"hook_name": "hook_embedding", "token_scope": "pooled"},
    )  # fmt: skip
    kind, _, k = settings["activation"].partition("_")
    if kind in ("TopKReLU", "TopK"):
        record.activation, record.keep_sign = "topk", kind == "TopK"
        record.k = int(k) if k else None
    elif kind == "JumpReLU":
        (log_threshold,) = need(tensors, path, "model.activation.log_threshold")
        record.activation, record.threshold = "threshold", log_threshold.exp()
    elif kind != "ReLU":
        raise LoadError(
            f"{str(path)!r}: MSAE's activation {kind!r} depends on the other samples of a batch, or is not known; "
            "ReLU, TopK, TopKReLU and JumpReLU are read"
        )
    return translate(record, path, format="msae", device=device, cfg_overrides=overrides)


def _settings(path: Path, given: dict[str, Any] | None) -> dict[str, Any]:
    if given is not None:
        missing = [name for name in _SETTINGS if name not in given]
        if missing:
            raise LoadError(f"settings= for MSAE lacks {', '.join(missing)}")
        return {"activation": str(given["activation"]), "normalize": bool(given["normalize"]),
                "soft_cap": float(given["soft_cap"])}  # fmt: skip
    found = _NAME.fullmatch(path.name.split(".pt")[0])
    if found is None:
        raise LoadError(
            f"MSAE's settings are in the file's name, and {path.name!r} is none of its names: pass "
            'settings={"activation": "TopKReLU_64", "normalize": False, "soft_cap": 30.0} as it was trained'
        )
    with_k = "TopK" in found["act"] and found["arg"] is not None
    activation = f"{found['act']}_{found['arg']}" if with_k else found["act"]
    return {"activation": activation, "normalize": found["norm"] == "True", "soft_cap": float(found["cap"])}
