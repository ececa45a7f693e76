"""The registry of checkpoint families: a name for each, checked when it registers and not when it is first used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from clip_lens_ext.errors import InputError, LoadError, near


class Format(Protocol):
    """What a family of checkpoints must be able to do; a module with these two functions is one."""

    def matches(self, path: Path) -> bool:
        """Whether this family wrote what lies at `path`; cheap, and never an error."""
        ...

    def convert(
        self, path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration and the weights in SAELens' words; also a `converter=` of `SAE.load_from_disk`."""
        ...


class FormatRegistry(Mapping[str, Format]):
    """The registered families by name; a name that is not there is an error that lists near names."""

    def __init__(self) -> None:
        self._formats: dict[str, Format] = {}

    def __getitem__(self, name: str) -> Format:
        if name not in self._formats:
            known = ", ".join(map(repr, self._formats))
            raise LoadError(f"no SAE format is called {name!r}: known are {known}{near(str(name), self._formats)}")
        return self._formats[name]

    def __contains__(self, name: object) -> bool:
        return name in self._formats

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def detect(self, path: Path) -> str | None:
        """The name of the family that wrote what lies at `path`; None where none knows it.

        Raises:
            LoadError: several families know it.
        """
        names = [name for name, family in self._formats.items() if family.matches(path)]
        if len(names) > 1:
            raise LoadError(f"{str(path)!r} could be any of the SAE formats {', '.join(names)}: pass format=")
        return names[0] if names else None

    def register(self, name: str, family: object) -> None:
        """Add a family; see `register_format`."""
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"an SAE format needs a name like 'sae_lens', not {name!r}")
        if name in self._formats:
            raise InputError(f"the SAE format {name!r} is registered already")
        for function, arguments in (("matches", ("path",)), ("convert", ("path", "cpu", None))):
            call = getattr(family, function, None)
            if not callable(call):
                raise InputError(f"the SAE format {name!r} has no function {function}()")
            try:
                signature = inspect.signature(call)
                signature.bind(*arguments)
                if function == "convert":
                    signature.bind("path", "cpu", cfg_overrides=None)  # as SAE.load_from_disk calls it
            except TypeError as error:
                takes = "(path)" if function == "matches" else "(path, device, cfg_overrides)"
                raise InputError(f"{function}() of the SAE format {name!r} must take {takes}: {error}") from error
        self._formats[name] = cast("Format", family)


formats = FormatRegistry()


def register_format(name: str, family: object) -> None:
    """Register a family of SAE checkpoints, so that `load_sae` finds it and `format=name` selects it.

    Args:
        name: what the family is called; an identifier that is not taken.
        family: a module or object with `matches(path) -> bool` and `convert(path, device, cfg_overrides) ->
            (cfg_dict, state_dict)`, both in the words of SAELens.

    Raises:
        InputError: the name is taken or not an identifier, or a function is missing or takes other arguments.

    Example:
        >>> from clip_lens_ext.saes.formats import formats, register_format
        >>> "sae_lens" in formats
        True
        >>> register_format("sae_lens", object())
        Traceback (most recent call last):
        clip_lens_ext.errors.InputError: the SAE format 'sae_lens' is registered already
    """
    formats.register(name, family)
