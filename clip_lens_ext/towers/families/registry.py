"""Which family reads a module, and how a dual encoder comes apart into its two towers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn
from transformers import CLIPModel, Siglip2Model, SiglipModel

from clip_lens_ext.errors import InputError, UnsupportedModelError
from clip_lens_ext.towers.families import headed, hugging_face, listened, open_clip, timm_vit
from clip_lens_ext.towers.families.reading import TowerReading
from clip_lens_ext.towers.families.views import FlattenedText, HuggingFaceText, HuggingFaceVision


class Family(Protocol):
    """A family as `read_tower` calls it: a module, or anything with these three."""

    NAME: str

    def matches(self, native: nn.Module) -> bool:
        """Whether the family reads the module."""

    def read(self, native: nn.Module) -> TowerReading:
        """The module by its parts."""


_FAMILIES: list[Any] = [headed, open_clip, hugging_face, timm_vit, listened]


def families() -> list[str]:
    """Names of the families, in the order in which they are asked.

    Example:
        >>> families()
        ['headed', 'open_clip', 'hugging_face', 'timm', 'residual']
    """
    return [family.NAME for family in _FAMILIES]


def read_tower(native: nn.Module) -> TowerReading:
    """The reading of one tower by the first family that knows it.

    Raises:
        UnsupportedModelError: no family reads this module, or a family says what in it cannot be hooked.
    """
    if isinstance(native, CLIP):
        native = FlattenedText(native)
    for family in _FAMILIES:
        if family.matches(native):
            return family.read(native)
    kind = f"{type(native).__module__}.{type(native).__qualname__}"
    if isinstance(native, CLIPModel | SiglipModel | Siglip2Model | CustomTextCLIP | CoCa | headed.HeadedCLIP):
        raise UnsupportedModelError(f"a {kind} has two towers: take load_clip(model).vision or .text")
    raise UnsupportedModelError(
        f"no tower family reads a {kind}; the families are {', '.join(families())}. docs/towers.md says how to add "
        "one, and clip_lens_ext.towers.register_family makes it known"
    )


def split_model(native: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The vision tower and the text tower of a model; the text tower is None where the model is a vision tower."""
    if isinstance(native, headed.HeadedCLIP):
        return native.visual, native.text
    if isinstance(native, CLIP):
        return native.visual, FlattenedText(native)
    if isinstance(native, CustomTextCLIP | CoCa):
        return native.visual, native.text
    if isinstance(native, CLIPModel | SiglipModel | Siglip2Model):
        return HuggingFaceVision(native), HuggingFaceText(native)
    return native, None


def add_family(name: str, matches: Callable[[nn.Module], bool], read: Callable[[nn.Module], TowerReading]) -> None:
    """Ask one more family, before all others; `register_family` calls it after its trial."""
    if name in families():
        raise InputError(f"a tower family is called {name!r} already")
    _FAMILIES.insert(0, SimpleNamespace(NAME=name, matches=matches, read=read))


def remove_family(name: str) -> None:
    """Take a family out again that `add_family` has put in."""
    found = [family for family in _FAMILIES if name == family.NAME and isinstance(family, SimpleNamespace)]
    if not found:
        raise InputError(f"no registered tower family is called {name!r}")
    _FAMILIES.remove(found[0])
