"""A whole CLIP tower from the pre-LN transformer formula, in float64, sample by sample and head by head.

Every quantity that TransformerLens names is written down under that name and may be edited before it is used, which
is what a hook in TransformerLens is. Nothing is shared with the code under test, not even a LayerNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

Edits = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass
class Spec:
    """What has to be known of a tower besides its weights."""

    tower: str
    weights: dict[str, Tensor]
    n_heads: int
    n_layers: int
    quick_gelu: bool
    eps: float
    pool: str
    ln_after_pool: bool = False
    causal: bool = False
    patch: tuple[int, int] = (0, 0)
    eos_id: int = -1
    gelu_tanh: bool = False
    prefix: Tensor | None = None
    """Tokens before the patches `[n d_model]`, where `class_embedding` is not the only one."""
    pad_id: int | None = None
    """CoCa's text tower: the id that is masked, through a mask that is one place off (see its `correct_cls_mask`)."""
    before_norm: Callable[[Tensor], Tensor] | None = None
    head: Callable[[Tensor], Tensor] | None = None
    """Pooling by attention: the native head itself, which has no hooks inside."""


def spec_of(model: nn.Module) -> Spec:
    """Read a native open_clip model: its `state_dict` in float64, and the few settings that no weight shows."""
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    block = model.transformer.resblocks[0]
    common = {
        "weights": weights,
        "n_heads": block.attn.num_heads,
        "n_layers": len(model.transformer.resblocks),
        "quick_gelu": isinstance(block.mlp[1], QuickGELU),
        "eps": block.ln_1.eps,
    }
    if isinstance(model, VisionTransformer):
        return Spec(
            "vision",
            **common,
            pool=model.pool_type,
            ln_after_pool=model.final_ln_after_pool,
            patch=tuple(model.patch_size),
        )
    pool, eos = (
        (model.text_pool_type, model.text_eos_id) if isinstance(model, CLIP) else (model.pool_type, model.eos_id)
    )
    return Spec("text", **common, pool=pool, causal=model.attn_mask is not None, eos_id=eos)


class _Run:
    """One forward pass: `see` notes a value under its hook name and gives back what the pass goes on with."""

    def __init__(self, spec: Spec, edits: Edits) -> None:
        self.spec, self.edits, self.values = spec, edits, {}

    def see(self, name: str, value: Tensor) -> Tensor:
        assert name not in self.values, f"{name} twice"
        self.values[name] = value
        return self.edits[name](value) if name in self.edits else value

    def weight(self, name: str) -> Tensor:
        return self.spec.weights[name]

    def layer_norm(self, x: Tensor, hooks: str, native: str) -> Tensor:
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        scale = self.see(f"{hooks}.hook_scale", (variance + self.spec.eps) ** 0.5)
        normalized = self.see(f"{hooks}.hook_normalized", (x - mean) / scale)
        return normalized * self.weight(f"{native}.weight") + self.weight(f"{native}.bias")

    def attention(self, x: Tensor, hooks: str, native: str) -> Tensor:
        batch, n_token, d_model = x.shape
        n_heads = self.spec.n_heads
        d_head = d_model // n_heads
        weight, bias = self.weight(f"{native}.in_proj_weight"), self.weight(f"{native}.in_proj_bias")
        parts = {}
        for index, letter in enumerate("qkv"):
            out = torch.zeros(batch, n_token, n_heads, d_head, dtype=torch.float64)
            for head in range(n_heads):
                rows = slice(index * d_model + head * d_head, index * d_model + (head + 1) * d_head)
                out[:, :, head] = x @ weight[rows].T + bias[rows]
            parts[letter] = self.see(f"{hooks}.hook_{letter}", out)
        scores = torch.zeros(batch, n_heads, n_token, n_token, dtype=torch.float64)
        for sample in range(batch):
            for head in range(n_heads):
                for query in range(n_token):
                    products = parts["k"][sample, :, head] @ parts["q"][sample, query, head]
                    scores[sample, head, query] = products / math.sqrt(d_head)
                    if self.spec.causal:
                        scores[sample, head, query, query + 1 :] = -math.inf
                    for key in self.masked[sample] if self.masked else ():
                        scores[sample, head, query, key] = -math.inf
        scores = self.see(f"{hooks}.hook_attn_scores", scores)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        pattern = self.see(f"{hooks}.hook_pattern", weights / weights.sum(-1, keepdim=True))
        z = torch.zeros(batch, n_token, n_heads, d_head, dtype=torch.float64)
        for sample in range(batch):
            for head in range(n_heads):
                z[sample, :, head] = pattern[sample, head] @ parts["v"][sample, :, head]
        z = self.see(f"{hooks}.hook_z", z)
        result = torch.zeros(batch, n_token, n_heads, d_model, dtype=torch.float64)
        out_weight = self.weight(f"{native}.out_proj.weight")
        for head in range(n_heads):
            result[:, :, head] = z[:, :, head] @ out_weight[:, head * d_head : (head + 1) * d_head].T
        result = self.see(f"{hooks}.hook_result", result)
        out = self.weight(f"{native}.out_proj.bias").expand(batch, n_token, d_model).clone()
        for head in range(n_heads):
            out = out + result[:, :, head]
        return out

    def mlp(self, x: Tensor, hooks: str, native: str) -> Tensor:
        pre = self.see(
            f"{hooks}.hook_pre", x @ self.weight(f"{native}.c_fc.weight").T + self.weight(f"{native}.c_fc.bias")
        )
        gate = 1 / (1 + (-1.702 * pre).exp()) if self.spec.quick_gelu else 0.5 * (1 + torch.erf(pre / math.sqrt(2)))
        if self.spec.gelu_tanh:
            gate = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)))
        post = self.see(f"{hooks}.hook_post", pre * gate)
        return post @ self.weight(f"{native}.c_proj.weight").T + self.weight(f"{native}.c_proj.bias")

    def layer_scale(self, x: Tensor, name: str) -> Tensor:
        return x * self.spec.weights[name] if name in self.spec.weights else x

    def block(self, x: Tensor, layer: int) -> Tensor:
        hooks, native = f"blocks.{layer}", f"transformer.resblocks.{layer}"
        x = self.see(f"{hooks}.hook_resid_pre", x)
        branch = self.see(f"{hooks}.hook_attn_in", x)
        branch = self.attention(
            self.layer_norm(branch, f"{hooks}.ln1", f"{native}.ln_1"), f"{hooks}.attn", f"{native}.attn"
        )
        x = x + self.see(f"{hooks}.hook_attn_out", self.layer_scale(branch, f"{native}.ls_1.gamma"))
        x = self.see(f"{hooks}.hook_resid_mid", x)
        branch = self.see(f"{hooks}.hook_mlp_in", x)
        branch = self.mlp(self.layer_norm(branch, f"{hooks}.ln2", f"{native}.ln_2"), f"{hooks}.mlp", f"{native}.mlp")
        x = x + self.see(f"{hooks}.hook_mlp_out", self.layer_scale(branch, f"{native}.ls_2.gamma"))
        return self.see(f"{hooks}.hook_resid_post", x)

    def embed(self, x: Tensor) -> Tensor:
        if self.spec.tower == "text":
            ends = [self.weight("cls_emb")] if "cls_emb" in self.spec.weights else []
            return torch.stack(
                [torch.stack([self.weight("token_embedding.weight")[int(i)] for i in row] + ends) for row in x]
            )
        high, wide = self.spec.patch
        kernel = self.weight("conv1.weight")
        samples = []
        for picture in x.double():
            tokens = [self.weight("class_embedding")] if self.spec.prefix is None else list(self.spec.prefix)
            for top in range(0, picture.shape[1], high):
                for left in range(0, picture.shape[2], wide):
                    patch = picture[:, top : top + high, left : left + wide]
                    tokens.append((patch * kernel).sum((1, 2, 3)) + self.spec.weights.get("conv1.bias", 0.0))
            samples.append(torch.stack(tokens))
        return torch.stack(samples)

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.spec.head is not None:
            return self.spec.head(x)
        rows = []
        for sample in range(len(x)):
            if self.spec.pool == "avg":
                rows.append(x[sample, 1:].sum(0) / (x.shape[1] - 1))
                continue
            where = {"tok": 0, "first": 0, "last": -1}.get(self.spec.pool)
            if self.spec.pool == "argmax":
                where = max(range(x.shape[1]), key=lambda i: int(tokens[sample, i]))
            elif self.spec.pool == "eos":
                where = [int(i) for i in tokens[sample]].index(self.spec.eos_id)
            rows.append(x[sample, where])
        return torch.stack(rows)

    def project(self, pooled: Tensor) -> Tensor:
        weights = self.spec.weights
        name = "proj" if self.spec.tower == "vision" else "text_projection"
        if f"{name}.weight" in weights:
            return pooled @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
        return pooled @ weights[name] if name in weights else pooled

    def __call__(self, x: Tensor) -> Tensor:
        final = "ln_post" if self.spec.tower == "vision" else "ln_final"
        stream = self.see("hook_embed", self.embed(x))
        self.masked: list[list[int]] = []
        if self.spec.pad_id is not None:
            # One place off: the mask of the ids begins at the second key, and the class token is never masked.
            self.masked = [[i + 1 for i, token in enumerate(row) if int(token) == self.spec.pad_id] for row in x]
        positions = self.weight("positional_embedding")
        missing = torch.zeros(stream.shape[1] - len(positions), stream.shape[2], dtype=torch.float64)
        positions = torch.cat([missing, positions])[None].expand(len(x), -1, -1)
        stream = self.see("hook_full_embed", stream + self.see("hook_pos_embed", positions))
        if "ln_pre.weight" in self.spec.weights:
            stream = self.layer_norm(stream, "ln_pre", "ln_pre")
        for layer in range(self.spec.n_layers):
            stream = self.block(stream, layer)
        if self.spec.before_norm is not None:
            stream = self.spec.before_norm(stream)
        if self.spec.ln_after_pool:
            pooled = self.layer_norm(self.pool(stream, x), "ln_final", final)
        else:
            pooled = self.pool(self.layer_norm(stream, "ln_final", final), x)
        return self.see("hook_embedding", self.project(self.see("hook_pooled", pooled)))


@torch.no_grad()
def run(spec: Spec, x: Tensor, edits: Edits | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The embedding `[batch d_embed]`, and the value at every hook before its edit."""
    one = _Run(spec, edits or {})
    return one(x), one.values


@torch.no_grad()
def logit_lens_map(spec: Spec, rows: Tensor) -> Tensor:
    """Final LayerNorm and projection of residual-stream vectors `[n d_model]`."""
    one = _Run(spec, {})
    return one.project(one.layer_norm(rows.double(), "ln_final", "ln_post" if spec.tower == "vision" else "ln_final"))
