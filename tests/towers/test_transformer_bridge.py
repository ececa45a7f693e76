"""Why there is no adapter for TransformerLens' `TransformerBridge`: each fault, in the smallest model that shows it.

Every test says what would be right, and is expected to fail. One that passes means that upstream has changed:
docs/decisions/0005-no-transformer-bridge.md has to be read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import tower as oracle
from oracles.models import randomise_
from oracles.zoo import hf_clip, hf_spec
from torch import Tensor
from transformers import CLIPVisionConfig

bridge = pytest.importorskip("transformer_lens.model_bridge.bridge")
parts = pytest.importorskip("transformer_lens.model_bridge.generalized_components")

from transformer_lens.config import TransformerBridgeConfig  # noqa: E402
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory  # noqa: E402
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter  # noqa: E402
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class ClipAdapter(ArchitectureAdapter):
    """Hugging Face's `CLIPVisionModel`, as TransformerLens' own adapters map such blocks."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        norm = {"config": self.cfg, "use_native_layernorm_autograd": True}
        heads = {letter: parts.LinearBridge(name=f"{letter}_proj") for letter in "qkv"}
        heads["o"] = parts.LinearBridge(name="out_proj")
        mlp = {"in": parts.LinearBridge(name="fc1"), "out": parts.LinearBridge(name="fc2")}
        blocks = {
            "ln1": parts.NormalizationBridge(name="layer_norm1", **norm),
            "attn": parts.AttentionBridge(name="self_attn", config=self.cfg, submodules=heads),
            "ln2": parts.NormalizationBridge(name="layer_norm2", **norm),
            "mlp": parts.MLPBridge(name="mlp", submodules=mlp),
        }
        self.component_mapping = {
            "blocks": parts.BlockBridge(name="encoder.layers", submodules=blocks),
            "ln_final": parts.NormalizationBridge(name="post_layernorm", **norm),
        }


def bridged() -> tuple[Any, Any, Tensor]:
    model = randomise_(hf_clip()).eval().vision_model
    cfg = TransformerBridgeConfig(
        d_model=48, d_head=16, n_layers=2, n_ctx=10, n_heads=3, d_vocab=1, d_mlp=120, act_fn="quick_gelu",
        architecture="CLIPVisionModel",
    )  # fmt: skip
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return model, lambda: bridge.TransformerBridge(model, ClipAdapter(cfg), None), x


def scaled(value: Tensor) -> Tensor:
    return value * 0.5


def edited(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pooled vector without and with an edit at a hook, and what the edit should give."""
    model, make, x = bridged()
    expected, _ = oracle.run(hf_spec(model), x, {name: scaled})
    plain = model(pixel_values=x).pooler_output.detach()
    wrapped = make()
    wrapped.hook_dict[name].add_hook(lambda value, hook: scaled(value))
    return plain, wrapped.original_model(pixel_values=x).pooler_output.detach(), expected.float()


def fault(what: str) -> Callable[[Any], Any]:
    return pytest.mark.xfail(strict=True, reason=what)


@fault("determine_architecture_from_hf_config reads a copy of the table that register_adapter does not reach")
def test_a_registered_adapter_is_found_by_the_architecture_s_name() -> None:
    ArchitectureAdapterFactory.register_adapter("CLIPVisionModel", ClipAdapter)
    config = CLIPVisionConfig()
    config.architectures = ["CLIPVisionModel"]
    assert determine_architecture_from_hf_config(config) == "CLIPVisionModel"


@fault("hook_resid_mid is an alias of ln2.hook_in: the skip connection does not see the edit")
def test_an_edit_at_resid_mid_reaches_the_skip_connection() -> None:
    _, found, expected = edited("blocks.0.hook_resid_mid")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hook_attn_scores", "hook_pattern", "hook_result"])
@fault("the native attention runs whole, and the hook fires on nothing that goes on")
def test_an_edit_inside_attention_has_an_effect(name: str) -> None:
    plain, found, _ = edited(f"blocks.0.attn.{name}")
    assert not torch.equal(plain, found)


@fault("the bridge puts its wrappers into the native model")
def test_the_native_model_keeps_its_state_dict() -> None:
    model, make, _ = bridged()
    before = list(model.state_dict())
    make()
    assert list(model.state_dict()) == before


@fault("forward() asks for logits or a loss")
def test_the_bridge_s_own_forward_takes_pictures() -> None:
    _, make, x = bridged()
    assert make()(x) is not None


def test_the_same_edits_on_a_tower_are_right() -> None:
    """The oracle above is no straw man: the hooked tower gives its numbers."""
    from clip_lens_ext.towers import HookedTower

    model, _, x = bridged()
    tower = HookedTower(model)
    for name in ("hook_resid_mid", "attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_result"):
        expected, _ = oracle.run(hf_spec(model), x, {f"blocks.0.{name}": scaled})
        found = tower.run_with_hooks(x, fwd_hooks=[(f"blocks.0.{name}", lambda value, hook: scaled(value))])
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
