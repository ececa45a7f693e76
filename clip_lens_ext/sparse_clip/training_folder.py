"""The folder of a training of a Sparse CLIP: its settings, its state, the checkpoints that are kept, the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.result_files import staged
from clip_lens_ext.towers import from_sparse

SETTINGS, STATE, CHECKPOINTS = "training_settings.json", "training_state.pt", "checkpoints"
EMBEDDED = "embedded_pairs"


class TrainingFolder:
    """What a training leaves on disk, so that the same call goes on where it was, or gives what is finished.

    Args:
        path: the folder.
        identity: JSON values by which two trainings are the same.
        whole: whether these are all such values; if not, others in the folder are not looked at.

    Raises:
        InputError: the folder holds another training (it names what differs), or a model that no training made.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], *, whole: bool = True) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir {str(self.path)!r} is a file")
        self._identity = json.loads(json.dumps(dict(identity)))
        settings = self.path / SETTINGS
        if not settings.is_file():
            if (self.path / from_sparse.CONFIG).exists():
                raise InputError(f"output_dir {str(self.path)!r} holds a Sparse CLIP without its training: choose "
                                 "another")  # fmt: skip
            return
        there = json.loads(settings.read_text(encoding="utf-8"))
        names = sorted((there.keys() if whole else set()) | self._identity.keys())
        differ = [name for name in names if there.get(name) != self._identity.get(name)]
        if differ:
            now = self._identity
            shown = "; ".join(f"{name} was {there.get(name)!r} and is now {now.get(name)!r}" for name in differ)
            raise InputError(f"output_dir {str(self.path)!r} holds another training: {shown}; choose another folder, "
                             "or the same settings, model and data")  # fmt: skip

    @property
    def embedded(self) -> Path:
        """The file of the pictures' embeddings, for heads alone; that of the captions' lies beside it."""
        return self.path / EMBEDDED

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return (self.path / SETTINGS).is_file() and (self.path / from_sparse.CONFIG).is_file()

    def begin(self) -> None:
        """Write the settings; the training is on."""
        self.path.mkdir(parents=True, exist_ok=True)
        with staged(self.path / SETTINGS) as part:
            part.write_text(json.dumps(self._identity, indent=1) + "\n", encoding="utf-8")

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write all that is needed to go on; a kill while writing leaves the state before."""
        with staged(self.path / STATE) as part:
            torch.save(dict(state), part)

    def state(self) -> dict[str, Any] | None:
        """The last state, or None.

        Raises:
            LoadError: the file is damaged.
        """
        path = self.path / STATE
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, pickle and zip each have their own
            kind = type(error).__name__
            raise LoadError(f"{path} cannot be read, delete it to begin anew: {kind}: {error}") from error

    def checkpoint(self, step: int) -> Path:
        """The folder of the weights after a step."""
        return self.path / CHECKPOINTS / f"step_{step:08d}"

    def has_checkpoint(self, step: int) -> bool:
        """Whether the weights after a step are there, and whole."""
        return (self.checkpoint(step) / from_sparse.CONFIG).is_file()

    def kept(self) -> list[tuple[int, Path]]:
        """The steps after which the weights are there, ascending."""
        found = sorted((self.path / CHECKPOINTS).glob("step_*"))
        return [(int(path.name.removeprefix("step_")), path) for path in found if (path / from_sparse.CONFIG).is_file()]
