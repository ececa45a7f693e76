"""One tower of a model that keeps its parts beside those of the other tower, as a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from open_clip.model import CLIP
from torch import Tensor, nn


class TowerView(nn.Module):
    """A view on some submodules and parameters of a model, registered so that `parameters()`, `to()` and
    `requires_grad_()` of the tower mean the tower.

    Values are always read from the model, so that a parameter or a buffer which is replaced there is the one that runs.

    Args:
        model: the whole model.
        modules: names of the submodules that the tower has.
        parameters: names of the parameters that it has beside them.
        buffers: names of the buffers that move with it.
    """

    model: Any  # torch types every attribute of a Module as Tensor | Module

    def __init__(
        self,
        model: nn.Module,
        modules: tuple[str, ...],
        parameters: tuple[str, ...] = (),
        buffers: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self._names = (modules, parameters, buffers)
        self.training = model.training
        self._share()

    def _share(self) -> None:
        """Register what the model has now: `load_state_dict(assign=True)`, for one, puts new Parameters into it."""
        modules, parameters, _ = self._names
        for name in (*modules, *parameters):
            setattr(self, name, getattr(self.model, name))

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As any module's; every walk over modules or parameters begins here."""
        self._share()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, of the weights that the model has now."""
        self._share()
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TowerView:
        self._share()
        super()._apply(fn, recurse)
        _, parameters, buffers = self._names
        for name in parameters:
            if name in self._parameters:  # where torch made a new Parameter, the model must run on that one too
                self.model._parameters[name] = self._parameters[name]
        for name in buffers:
            value = self.model._buffers.get(name)
            if value is not None:
                self.model._buffers[name] = fn(value)
        return self


class FlattenedText(TowerView):
    """The text half of an open_clip `CLIP`, which takes its text tower apart and keeps the parts beside `visual`."""

    def __init__(self, model: CLIP) -> None:
        super().__init__(
            model,
            ("token_embedding", "transformer", "ln_final"),
            ("positional_embedding", "text_projection"),
            ("attn_mask",),
        )

    @property
    def attn_mask(self) -> Tensor | None:
        return self.model.attn_mask

    @property
    def pool_type(self) -> str:
        return self.model.text_pool_type

    @property
    def eos_id(self) -> int | None:
        return getattr(self.model, "text_eos_id", None)

    def forward(self, text: Tensor) -> Tensor:
        """The native forward: `model.encode_text(text)`."""
        return self.model.encode_text(text)


class HuggingFaceVision(TowerView):
    """The vision half of a Hugging Face `CLIPModel` or `SiglipModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, tuple(n for n in ("vision_model", "visual_projection") if hasattr(model, n)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The native forward: `model.get_image_features(pixel_values)`."""
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output


class HuggingFaceText(TowerView):
    """The text half of a Hugging Face `CLIPModel` or `SiglipModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, tuple(n for n in ("text_model", "text_projection") if hasattr(model, n)))

    def forward(self, input_ids: Tensor) -> Tensor:
        """The native forward: `model.get_text_features(input_ids)`."""
        return self.model.get_text_features(input_ids=input_ids).pooler_output
