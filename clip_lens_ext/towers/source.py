"""What a loader hands to `load_clip`: the native model with its own preprocessing and tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from clip_lens_ext.errors import LoadError
from clip_lens_ext.towers.clip import Preprocess, Tokenizer


@dataclass
class Loaded:
    """A native model in evaluation mode.

    Attributes:
        native: the model.
        model_name: goes into results and SAE metadata.
        preprocess: the checkpoint's own, or None where it says nothing.
        tokenizer: the checkpoint's own, or None.
    """

    native: nn.Module
    model_name: str
    preprocess: Preprocess | None = None
    tokenizer: Tokenizer | None = None


class LazyTokenizer:
    """A tokenizer that is made when it is first needed: its files may be missing where only pictures are embedded.

    Args:
        make: makes it.
        of: whose it is, for the message.
    """

    def __init__(self, make: Callable[[], Tokenizer], of: str) -> None:
        self._make, self._of = make, of
        self._made: Tokenizer | None = None

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids `[batch n_ctx]`.

        Raises:
            LoadError: the tokenizer's files are not there.
        """
        if self._made is None:
            try:
                self._made = self._make()
            except Exception as error:  # open_clip, transformers and the hub each have their own
                raise LoadError(
                    f"the tokenizer of {self._of} could not be made: {type(error).__name__}: {error}\nFetch it once "
                    "where there is a network, or pass load_clip(..., tokenizer=...)"
                ) from error
        return self._made(texts)
