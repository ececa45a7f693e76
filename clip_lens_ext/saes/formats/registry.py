"""The registry of checkpoint families: a name for each, checked when it registers and not when it is first used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from clip_lens_ext.errors import InputError, LoadError, near
from clip_lens_ext.saes.from_hub import HUB, fetch


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


class RegisteredFormat:
    """A family under its name; its `convert` also reads from the hub, as `converter=` of `SAE.from_pretrained`."""

    def __init__(self, name: str, family: Format) -> None:
        self.name, self.matches, self._convert = name, family.matches, family.convert
        self.__doc__ = family.__doc__

    def convert(
        self,
        path: str | Path | None = None,
        device: str = "cpu",
        cfg_overrides: dict[str, Any] | None = None,
        *,
        repo_id: str | None = None,
        folder_name: str = "",
        force_download: bool = False,
    ) -> Any:
        """The configuration and the weights in SAELens' words, as SAELens' two kinds of converter give them.

        Args:
            path: a file or folder, as `SAE.load_from_disk` says it.
            device: where the weights go.
            cfg_overrides: fields of SAELens' config that win.
            repo_id, folder_name, force_download: a repository of the hub and a folder in it, as `SAE.from_pretrained`
                says them.

        Returns:
            `(cfg_dict, state_dict)` of a path, `(cfg_dict, state_dict, None)` of a repository: nobody else's files say
            the sparsity that SAELens asks for.

        Raises:
            LoadError: neither or both are given, or what they lead to is not of this family.
        """
        if (path is None) == (repo_id is None):
            raise LoadError(f"convert() of the SAE format {self.name!r} takes a path, or a repo_id of the hub")
        if path is not None:
            return self._convert(path, device, cfg_overrides)
        found = fetch(f"{HUB}{repo_id}/{folder_name}".rstrip("/."), force_download=force_download)
        return (*self._convert(found, device, cfg_overrides), None)


class FormatRegistry(Mapping[str, RegisteredFormat]):
    """The registered families by name; a name that is not there is an error that lists near names."""

    def __init__(self) -> None:
        self._formats: dict[str, RegisteredFormat] = {}

    def __getitem__(self, name: str) -> RegisteredFormat:
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
        self._formats[name] = RegisteredFormat(name, cast("Format", family))


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
