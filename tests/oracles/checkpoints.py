"""Synthetic checkpoints of every SAE family in its exact layout, and each family's forward, restated in float64.

A forward takes rows `[row d]` and gives latents `[row n]` and reconstructions `[row d]`. It shares nothing with the
code under test: not the weights' orientation, not the activation, not a helper.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D, N, K = 6, 11, 3
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Checkpoint:
    """One written checkpoint.

    Attributes:
        path: what the user passes.
        weights: the file with the weights.
        forward: the family's own function.
        format: what it must be detected as.
        keywords: what the user has to add.
        metadata: what the file says of its place.
    """

    path: Path
    weights: Path
    forward: Forward
    format: str
    keywords: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def noise(*shape: int, seed: int = 0, scale: float = 0.6) -> Tensor:
    """Fixed random numbers."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 17 * len(shape) + sum(shape)))


def rows(n: int = 20) -> Tensor:
    """Inputs `[row d]`."""
    return 1.3 * torch.randn(n, D, generator=torch.Generator().manual_seed(99)) + 0.2


def greatest(pre: Tensor, k: int) -> Tensor:
    """Zero everywhere but at the k greatest of each row, whose values stay."""
    out = torch.zeros_like(pre)
    for i, row in enumerate(pre.tolist()):
        for j in sorted(range(len(row)), key=lambda j: -row[j])[:k]:
            out[i, j] = pre[i, j]
    return out


def weights() -> dict[str, Tensor]:
    """Encoder `[d n]`, decoder `[n d]` and their biases."""
    return {
        "W_enc": noise(D, N, seed=1),
        "W_dec": noise(N, D, seed=2),
        "b_enc": noise(N, seed=3),
        "b_dec": noise(D, seed=4),
    }


@contextmanager
def module_of(name: str) -> Iterator[type]:
    """A class that pickles under a name of another library, which need not be there when it is read."""
    path, _, short = name.rpartition(".")
    made = [".".join(path.split(".")[: i + 1]) for i in range(len(path.split(".")))]
    before = {part: sys.modules.get(part) for part in made}
    for part in made:
        sys.modules[part] = types.ModuleType(part)
    cls = type(short, (), {"__module__": path})
    setattr(sys.modules[path], short, cls)
    try:
        yield cls
    finally:
        for part, module in before.items():
            if module is None:
                del sys.modules[part]
            else:
                sys.modules[part] = module


def pickled(name: str, fields: dict[str, Any]) -> Any:
    """A configuration object of another library."""
    with module_of(name) as cls:
        made = cls()
        made.__dict__.update(fields)
        return made


def save_pickled(found: dict[str, Any], path: Path, name: str, fields: dict[str, Any], key: str) -> None:
    with module_of(name) as cls:
        made = cls()
        made.__dict__.update(fields)
        torch.save({key: made, **found}, path)


# ---- one function per layout --------------------------------------------------------------------------------------


def prisma(folder: Path, kind: str = "relu", layer_norm: bool = False, combined: bool = False) -> Checkpoint:
    w = weights()
    fields: dict[str, Any] = {
        "hook_point_layer": 9,
        "layer_subtype": "hook_resid_post",
        "expansion_factor": 64,
        "d_in": D,
        "model_name": "open-clip:laion/some",
        "activation_fn_str": "topk" if kind == "topk" else "relu",
        "activation_fn_kwargs": {"k": K} if kind == "topk" else {},
        "architecture": "gated" if kind == "gated" else "standard",
        "normalize_activations": "layer_norm" if layer_norm else None,
        "cls_token_only": True,
        "use_patches_only": False,
    }
    gate = {"b_gate": noise(N, seed=5), "r_mag": noise(N, seed=6), "b_mag": noise(N, seed=7)} if kind == "gated" else {}
    stored = {**w, **gate}
    path = folder / ("n_images_2600058.pt" if combined else "weights.pt")
    if combined:
        save_pickled({"state_dict": stored}, path, "vit_prisma.sae.config.VisionModelSAERunnerConfig", fields, "cfg")
    else:
        torch.save(stored, path)
        (folder / "config.json").write_text(
            json.dumps({**fields, "_device": "cuda", "dtype": {"__type__": "torch.dtype", "value": "float32"}})
        )

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w64 = {name: value.double() for name, value in stored.items()}
        mean, std = torch.zeros(len(x), 1), torch.ones(len(x), 1)
        u = x.double()
        if layer_norm:
            mean = u.mean(1, keepdim=True)
            std = ((u - mean) ** 2).sum(1, keepdim=True).div(D - 1).sqrt()
            u = (u - mean) / (std + 1e-5)
        pre = (u - w64["b_dec"]) @ w64["W_enc"]
        if kind == "gated":
            on = (pre + w64["b_gate"] > 0).double()
            z = on * (pre * w64["r_mag"].exp() + w64["b_mag"]).clamp(min=0)
        else:
            pre = pre + w64["b_enc"]
            z = greatest(pre, K).clamp(min=0) if kind == "topk" else pre.clamp(min=0)
        return z, (z @ w64["W_dec"] + w64["b_dec"]) * std + mean

    place = {"hook_name": "blocks.9.hook_resid_post", "token_scope": "cls", "model_name": "open-clip:laion/some"}
    return Checkpoint(folder, path, forward, "prisma", metadata=place)


def saev(folder: Path, header: dict[str, Any], subtract: bool, threshold: float | None = None) -> Checkpoint:
    w = weights()
    stored = {**w, **({} if threshold is None else {"activation.threshold": torch.tensor(threshold)})}
    path = folder / "sae.pt"
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        buffer = io.BytesIO()
        torch.save(stored, buffer)
        file.write(buffer.getvalue())
    named = header.get("cls") if header.get("cls") in ("Relu", "TopK", "BatchTopK") else None
    kind = named or header.get("cfg", {}).get("activation", {}).get("cls", "Relu")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w64 = {name: value.double() for name, value in w.items()}
        pre = (x.double() - (w64["b_dec"] if subtract else 0)) @ w64["W_enc"] + w64["b_enc"]
        if kind == "TopK":
            z = greatest(pre, K)
        elif kind == "BatchTopK":
            z = torch.where(pre > max(threshold or 0.0, 0.0), pre, torch.zeros_like(pre))
        else:
            z = pre.clamp(min=0)
        return z, z @ w64["W_dec"] + w64["b_dec"]

    keywords = {"hook_name": "blocks.10.hook_resid_post"}
    return Checkpoint(path, path, forward, "saev", keywords, {"token_scope": "patches"})


def attributing_clip(folder: Path, new_style: bool = False, k: int | None = None) -> Checkpoint:
    g, v = (
        ("parametrizations.weight.original0", "parametrizations.weight.original1")
        if new_style
        else ("weight_g", "weight_v")
    )
    stored = {
        f"encoder.0.{g}": noise(N, 1, seed=1).abs() + 0.5,
        f"encoder.0.{v}": noise(N, D, seed=2),
        "encoder.0.bias": noise(N, seed=3),
        f"decoder.{g}": torch.ones(1, N),
        f"decoder.{v}": noise(D, N, seed=4),
    }
    path = folder / "last.ckpt"
    torch.save({"state_dict": stored, "epoch": 3, "pytorch-lightning_version": "2.2"}, path)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        s = {name: value.double() for name, value in stored.items()}
        z = torch.zeros(len(x), N, dtype=torch.float64)
        for j in range(N):
            row = s[f"encoder.0.{v}"][j]
            z[:, j] = x.double() @ (row * s[f"encoder.0.{g}"][j] / row.norm()) + s["encoder.0.bias"][j]
        z = greatest(z, k or 5)
        out = torch.zeros(len(x), D, dtype=torch.float64)
        for j in range(N):
            column = s[f"decoder.{v}"][:, j]
            out += z[:, j : j + 1] * (column / column.norm() * s[f"decoder.{g}"][0, j])
        return z, out

    return Checkpoint(path, path, forward, "attributing_clip", {"k": k or 5, "hook_name": "blocks.1.hook_resid_post"})


def dictionary_learning(folder: Path, kind: str, for_vlm: bool = False) -> Checkpoint:
    w = weights()
    e, b, d, bias = w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"]
    linear = {"encoder.weight": e.T.contiguous(), "encoder.bias": b, "decoder.weight": d.T.contiguous()}
    threshold = torch.tensor(0.35)
    stored: dict[str, Any] = {
        "AutoEncoder": {**linear, "bias": bias},
        "AutoEncoderNew": {**linear, "decoder.bias": bias},
        "AutoEncoderTopK": {**linear, "b_dec": bias, "k": torch.tensor(K), "threshold": torch.tensor(-1.0)},
        "BatchTopKSAE": {**linear, "b_dec": bias, "k": torch.tensor(K), "threshold": threshold},
        "GatedAutoEncoder": {
            "encoder.weight": e.T.contiguous(),
            "decoder.weight": d.T.contiguous(),
            "decoder_bias": bias,
            "r_mag": noise(N, seed=5),
            "gate_bias": noise(N, seed=6),
            "mag_bias": noise(N, seed=7),
        },
        "JumpReluAutoEncoder": {"W_enc": e, "b_enc": b, "W_dec": d, "b_dec": bias, "threshold": noise(N, seed=8).abs()},
        "MatryoshkaBatchTopKSAE": {
            "W_enc": e,
            "b_enc": b,
            "W_dec": d,
            "b_dec": bias,
            "threshold": threshold,
            "k": torch.tensor(K),
            "group_sizes": torch.tensor([4, 7]),
        },
    }[kind]
    name = "MatroyshkaBatchTopKSAE" if for_vlm and kind.startswith("Matr") else kind
    inner = folder / "post_mlp_residual_11" / "trainer_0" / "checkpoints" if for_vlm else folder
    inner.mkdir(parents=True, exist_ok=True)
    path = inner / ("ae_90.pt" if for_vlm else "ae.pt")
    torch.save(stored, path)
    if for_vlm:
        torch.save({name: value * 0 for name, value in stored.items()}, inner / "ae_5.pt")
    place = inner.parent if for_vlm else folder
    (place / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": name, "lm_name": "some/clip", "k": K}, "buffer": {}})
    )

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x, E, B, Dm, c = x.double(), e.double(), b.double(), d.double(), bias.double()
        if kind == "AutoEncoder":
            z = ((x - c) @ E + B).clamp(min=0)
            return z, z @ torch.stack([row / row.norm() for row in Dm]) + c
        if kind == "AutoEncoderNew":
            z = (x @ E + B).clamp(min=0)
        elif kind == "AutoEncoderTopK":
            z = greatest(((x - c) @ E + B).clamp(min=0), K)
        elif kind == "GatedAutoEncoder":
            pre = (x - c) @ E
            on = (pre + stored["gate_bias"].double() > 0).double()
            z = on * (stored["r_mag"].double().exp() * pre + stored["mag_bias"].double()).clamp(min=0)
        elif kind == "JumpReluAutoEncoder":
            pre = x @ E + B
            z = (pre * (pre > stored["threshold"].double())).clamp(min=0)
        else:
            post = ((x - c) @ E + B).clamp(min=0)
            z = post * (post > float(threshold))
        return z, z @ Dm + c

    metadata = {"model_name": "some/clip"} | ({"hook_name": "blocks.11.hook_resid_post"} if for_vlm else {})
    keywords = {} if for_vlm else {"hook_name": "blocks.3.hook_resid_post"}
    return Checkpoint(inner.parent if for_vlm else folder, path, forward, "dictionary_learning", keywords, metadata)


def msae(
    folder: Path, activation: str = "TopKReLU_3", tied: bool = False, normalize: bool = False, cap: float = 30.0
) -> Checkpoint:
    model = {
        "pre_bias": noise(D, seed=4),
        "encoder": noise(D, N, seed=1),
        "latent_bias": noise(N, seed=3),
        "decoder": noise(N, D, seed=2),
        "latents_activation_frequency": torch.zeros(N),
    }
    if tied:
        del model["decoder"]
    if activation == "JumpReLU":
        model["activation.log_threshold"] = noise(N, seed=8) - 1
    mean, scale = noise(D, seed=9), 2.5
    path = folder / f"{N}_{D}_{activation}_RW_{tied}_{normalize}_{cap}_cc3m_ViT-L_14.pth"
    torch.save({"model": model, "mean_center": mean, "scaling_factor": scale, "target_norm": 1.0}, path)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        m = {name: value.double() for name, value in model.items()}
        u = (x.double() - mean.double()) * scale
        mu, std = torch.zeros(len(x), 1), torch.ones(len(x), 1)
        if normalize:
            mu = u.mean(1, keepdim=True)
            std = ((u - mu) ** 2).sum(1, keepdim=True).div(D - 1).sqrt()
            u = (u - mu) / (std + 1e-5)
        pre = (u - m["pre_bias"]) @ m["encoder"] + m["latent_bias"]
        if activation.startswith("TopK"):
            z = greatest(pre, 3)
            z = z.clamp(min=0) if "ReLU" in activation else z
        elif activation == "JumpReLU":
            z = pre.clamp(min=0) * (pre.clamp(min=0) > m["activation.log_threshold"].exp())
        else:
            z = pre.clamp(min=0)
        z = cap * torch.tanh(z / cap) if cap else z
        out = z @ (m["encoder"].T if tied else m["decoder"]) + m["pre_bias"]
        return z, (out * std + mu) / scale + mean.double()

    return Checkpoint(path, path, forward, "msae", metadata={"hook_name": "hook_embedding", "token_scope": "pooled"})


def dn_cbm(folder: Path) -> Checkpoint:
    w = weights()
    bias = w["b_dec"][None]
    stored = {
        "tied_bias": bias,
        "pre_encoder_bias._bias_reference": bias,
        "encoder._weight": w["W_enc"].T[None].contiguous(),
        "encoder._bias": w["b_enc"][None],
        "decoder._weight": w["W_dec"].T[None].contiguous(),
        "post_decoder_bias._bias_reference": bias,
    }
    path = folder / "sparse_autoencoder_final.pt"
    torch.save(stored, path)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x.double() - w["b_dec"].double()
        z = torch.einsum("bd,nd->bn", centred, stored["encoder._weight"][0].double()) + w["b_enc"].double()
        z = z.clamp(min=0)
        return z, torch.einsum("bn,dn->bd", z, stored["decoder._weight"][0].double()) + w["b_dec"].double()

    return Checkpoint(path, path, forward, "dn_cbm", metadata={"hook_name": "hook_embedding", "token_scope": "pooled"})


def patchsae(folder: Path, key: str = "cfg", zipped: bool = False, as_dict: bool = False) -> Checkpoint:
    w = weights()
    fields = {
        "block_layer": 10,
        "model_name": "openai/clip-vit-base-patch16",
        "expansion_factor": 64,
        "class_token": False,
    }
    path = folder / "clip-vit-base.pt"
    if as_dict:
        torch.save({key: fields, "state_dict": w}, path)
    else:
        save_pickled({"state_dict": w}, path, "sae_training.config.ViTSAERunnerConfig", fields, key)
    if zipped:
        raw, path = path.read_bytes(), folder / "clip-vit-base.pkl.gz"
        with gzip.open(path, "wb") as file:
            file.write(raw)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w64 = {name: value.double() for name, value in w.items()}
        z = ((x.double() - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]).clamp(min=0)
        return z, z @ w64["W_dec"] + w64["b_dec"]

    place = {
        "hook_name": "blocks.10.hook_resid_post",
        "token_scope": "all",
        "model_name": "openai/clip-vit-base-patch16",
    }
    return Checkpoint(path, path, forward, "patchsae", metadata=place)


def clipscope(folder: Path) -> Checkpoint:
    inner = folder / "14_resid"
    inner.mkdir()
    model = {"pre_b": noise(D, seed=4), "enc": noise(D, N, seed=1), "dec": noise(N, D, seed=2)}
    path = inner / "1200013184.pt"
    torch.save({"k": 5, "n_features": N, "d_in": D, "model_state_dict": model}, path)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        m = {name: value.double() for name, value in model.items()}
        z = greatest((x.double() - m["pre_b"]) @ m["enc"], 5)
        return z, z @ m["dec"] + m["pre_b"]

    return Checkpoint(
        path, path, forward, "clipscope", metadata={"hook_name": "blocks.14.hook_resid_post", "token_scope": "all"}
    )


def clip_topk_sae(folder: Path, bias: bool = True) -> Checkpoint:
    w = weights()
    stored = {**w, "feature_counts": torch.zeros(N), "total_samples": torch.tensor(7.0)}
    if not bias:
        del stored["b_dec"]
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"input_dim": D, "hidden_dim": N, "k": 5}))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        z = greatest(x.double() @ w["W_enc"].double() + w["b_enc"].double(), 5)
        unit = torch.stack([row / row.norm() for row in w["W_dec"].double()])
        return z, z @ unit + (w["b_dec"].double() if bias else 0)

    metadata = {"hook_name": "hook_embedding", "token_scope": "pooled"}
    return Checkpoint(folder, folder / "model.safetensors", forward, "clip_topk_sae", metadata=metadata)


def overcomplete(folder: Path, kind: str = "topk", norm: bool = True, multiplier: bool = False) -> Checkpoint:
    stored = {
        "encoder.final_block.0.weight": noise(N, D, seed=1),
        "encoder.final_block.0.bias": noise(N, seed=3),
        "dictionary._weights": noise(N, D, seed=2),
    }
    if norm:
        stored |= {
            "encoder.final_block.1.weight": noise(N, seed=5) + 1,
            "encoder.final_block.1.bias": noise(N, seed=6),
            "encoder.final_block.1.running_mean": noise(N, seed=7),
            "encoder.final_block.1.running_var": noise(N, seed=8).abs() + 0.3,
            "encoder.final_block.1.num_batches_tracked": torch.tensor(4),
        }
    if multiplier:
        stored["dictionary.multiplier"] = torch.tensor(0.4)
    path = folder / "overcomplete.pth"
    torch.save(stored, path)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        s = {name: value.double() for name, value in stored.items()}
        pre = x.double() @ s["encoder.final_block.0.weight"].T + s["encoder.final_block.0.bias"]
        if norm:
            block = "encoder.final_block.1"
            pre = (pre - s[f"{block}.running_mean"]) / (s[f"{block}.running_var"] + 1e-5).sqrt()
            pre = pre * s[f"{block}.weight"] + s[f"{block}.bias"]
        codes = pre.clamp(min=0)
        z = greatest(codes, 4) if kind == "topk" else codes * (codes >= 0.3) if kind == "threshold" else codes
        unit = torch.stack([row / row.norm() for row in s["dictionary._weights"]])
        return z, z @ (unit * (s["dictionary.multiplier"].exp() if multiplier else 1))

    keywords: dict[str, Any] = {
        "topk": {"k": 4},
        "threshold": {"settings": {"threshold": 0.3}},
        "relu": {"settings": {"activation": "relu"}},
    }[kind]
    return Checkpoint(path, path, forward, "overcomplete", {**keywords, "hook_name": "blocks.2.hook_resid_post"})


def sparsify(folder: Path) -> Checkpoint:
    w = weights()
    inner = folder / "layers.7"
    inner.mkdir()
    stored = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file(stored, inner / "sae.safetensors")
    (inner / "cfg.json").write_text(json.dumps({"expansion_factor": 2, "k": K, "activation": "topk", "d_in": D}))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w64 = {name: value.double() for name, value in w.items()}
        z = greatest(((x.double() - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]).clamp(min=0), K)
        return z, z @ w64["W_dec"] + w64["b_dec"]

    return Checkpoint(
        inner, inner / "sae.safetensors", forward, "sparsify", metadata={"hook_name": "blocks.7.hook_resid_post"}
    )


def key_map(folder: Path, transposed: bool = False) -> Checkpoint:
    w = weights()
    stored = {
        "enc": w["W_enc"].T.contiguous() if transposed else w["W_enc"],
        "eb": w["b_enc"],
        "dec": w["W_dec"],
        "db": w["b_dec"],
    }
    path = folder / "my.safetensors"
    save_file(stored, path)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w64 = {name: value.double() for name, value in w.items()}
        z = (x.double() @ w64["W_enc"] + w64["b_enc"]).clamp(min=0)
        return z, z @ w64["W_dec"] + w64["b_dec"]

    settings = {
        "W_enc": "enc",
        "b_enc": "eb",
        "W_dec": "dec",
        "b_dec": "db",
        "activation": "relu",
        "subtract_b_dec": False,
    }
    return Checkpoint(
        path, path, forward, "key_map", {"format": "key_map", "settings": settings, "hook_name": "hook_embedding"}
    )


def activation(kind: str) -> dict[str, Any]:
    """saev's activation in a header of schema 2 and later."""
    return {"cls": kind, "params": {} if kind == "Relu" else {"top_k": K}}


LEGACY = {"d_vit": D, "exp_factor": 2, "seed": 1, "n_reinit_samples": 524288, "l1_coeff": 1e-4}
LAYOUTS: dict[str, Callable[[Path], Checkpoint]] = {
    **{f"prisma {kind}": lambda folder, kind=kind: prisma(folder, kind) for kind in ("relu", "topk", "gated")},
    "prisma layer norm": lambda folder: prisma(folder, "topk", layer_norm=True),
    "prisma combined": lambda folder: prisma(folder, "relu", combined=True),
    "saev without schema": lambda folder: saev(folder, LEGACY, True),
    **{
        f"saev 1A {kind}": lambda folder, kind=kind: saev(
            folder,
            {"schema": 1, "cls": kind, "cfg": {"d_model": D, "exp_factor": 2, "top_k": K}},
            True,
            0.3 if kind == "BatchTopK" else None,
        )
        for kind in ("Relu", "TopK", "BatchTopK")
    },
    "saev 1B": lambda folder: saev(
        folder,
        {
            "schema": 1,
            "cls": "SparseAutoencoderConfig",
            "cfg": {"d_model": D, "d_sae": N, "activation": activation("TopK")},
        },
        False,
    ),
    "saev 1B early": lambda folder: saev(
        folder,
        {
            "schema": 1,
            "cls": "SparseAutoencoderConfig",
            "cfg": {"d_model": D, "n_reinit_samples": 9, "activation": activation("Relu")},
        },
        True,
    ),
    **{
        f"saev {schema} {kind}": lambda folder, schema=schema, kind=kind: saev(
            folder,
            {
                "schema": schema,
                "cfg": {"d_model": D, "d_sae": N, "activation": activation(kind)},
                "commit": "abc",
                "lib": "0.1.0",
            },
            False,
            0.3 if kind == "BatchTopK" else None,
        )
        for schema, kind in [(2, "Relu"), (3, "TopK"), (4, "TopK"), (5, "BatchTopK")]
    },
    "saev 5 BatchTopK untrained threshold": lambda folder: saev(
        folder, {"schema": 5, "cfg": {"d_model": D, "activation": activation("BatchTopK")}}, False, 0.0
    ),
    "attributing-clip": lambda folder: attributing_clip(folder),
    "attributing-clip new spelling": lambda folder: attributing_clip(folder, new_style=True),
    **{
        f"dictionary_learning {kind}": lambda folder, kind=kind: dictionary_learning(folder, kind)
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "GatedAutoEncoder",
            "JumpReluAutoEncoder",
            "MatryoshkaBatchTopKSAE",
        )
    },
    "sae-for-vlm BatchTopK": lambda folder: dictionary_learning(folder, "BatchTopKSAE", for_vlm=True),
    "sae-for-vlm Matroyshka": lambda folder: dictionary_learning(folder, "MatryoshkaBatchTopKSAE", for_vlm=True),
    "msae": lambda folder: msae(folder),
    "msae raw TopK, tied": lambda folder: msae(folder, "TopK_3", tied=True),
    "msae ReLU, normalised, no cap": lambda folder: msae(folder, "ReLU", normalize=True, cap=0.0),
    "msae JumpReLU, low cap": lambda folder: msae(folder, "JumpReLU", cap=1.5),
    "dn-cbm": dn_cbm,
    "patchsae": lambda folder: patchsae(folder),
    "patchsae config, gzip": lambda folder: patchsae(folder, "config", zipped=True),
    "patchsae plain dict": lambda folder: patchsae(folder, as_dict=True),
    "clipscope": clipscope,
    "clip-topk-sae": lambda folder: clip_topk_sae(folder),
    "clip-topk-sae without b_dec": lambda folder: clip_topk_sae(folder, bias=False),
    **{
        f"overcomplete {kind}": lambda folder, kind=kind: overcomplete(folder, kind)
        for kind in ("topk", "threshold", "relu")
    },
    "overcomplete linear, multiplied": lambda folder: overcomplete(folder, norm=False, multiplier=True),
    "sparsify": sparsify,
    "key map": lambda folder: key_map(folder),
    "key map, transposed": lambda folder: key_map(folder, transposed=True),
}
