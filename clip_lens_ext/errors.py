"""The errors of the package: one base class, and a child for each way in which a call can be wrong.

Every child is also the builtin that a caller would expect, so `except ValueError` keeps working. A message says
what was asked, what was found, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipLensError(Exception):
    """Base class of every error that this package raises on purpose."""


class InputError(ClipLensError, ValueError):
    """A value that was passed in is wrong: a shape, a dtype, a NaN, an empty list, an unreadable image."""


class LoadError(ClipLensError, ValueError):
    """A model or an SAE could not be loaded whole; nothing half-loaded and nothing random is handed out."""


class UnsupportedModelError(ClipLensError, TypeError):
    """A module of a kind that no tower family reads."""


class HookNameError(ClipLensError, KeyError):
    """A hook name or a filter that matches nothing."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; a sentence with quotes and \n in it would be unreadable.
        return str(self.args[0]) if self.args else ""


def near(word: str, known: Iterable[str], n: int = 3) -> str:
    """The known words nearest to `word`, as the tail of an error message.

    Example:
        >>> near("blocks.1.hook_resid_pots", ["blocks.1.hook_resid_post", "hook_embed"])
        "; did you mean 'blocks.1.hook_resid_post'?"
        >>> near("zzz", ["hook_embed"])
        ''
    """
    matches = difflib.get_close_matches(word, list(known), n=n)
    return f"; did you mean {', '.join(repr(match) for match in matches)}?" if matches else ""
