"""The folder of a training run: its settings, its latest checkpoint, and at the end the SAE itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE, SAETrainer
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from clip_lens_ext.errors import InputError

SETTINGS_FILENAME = "training_settings.json"
_CHECKPOINT = "checkpoint-"
_PART = ".train_sae-part-"


class RunFolder:
    """What a run leaves on disk, so that the same call resumes it where its last checkpoint was.

    Every step on disk is a rename, so that a run that is killed leaves a whole checkpoint or none.

    Args:
        path: the folder; made if it is missing.
        settings: JSON values by which two runs are the same run.

    Raises:
        InputError: the folder holds a run with other settings (it names what differs), or an SAE of somebody else.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir {str(self.path)!r} is a file")
        self._file = self.path / SETTINGS_FILENAME
        self._settings: dict[str, Any] = {}
        foreign = any((self.path / name).exists() for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME))
        if foreign and not self._file.is_file():
            raise InputError(f"output_dir {str(self.path)!r} holds an SAE that train_sae did not make: choose another")
        self.settle(settings)

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Add settings, which must be those of the run that the folder holds, if it holds one."""
        settings = json.loads(json.dumps(settings))
        there = json.loads(self._file.read_text()) if self._file.is_file() else {}
        differ = [name for name in settings if name in there and there[name] != settings[name]]
        if differ:
            shown = "; ".join(f"{name} was {there[name]!r} and is now {settings[name]!r}" for name in differ)
            raise InputError(f"output_dir {str(self.path)!r} holds a run with other settings: {shown}; choose another")
        self._settings.update(settings)

    def begin(self) -> None:
        """Write the settings; the run is on."""
        self.path.mkdir(parents=True, exist_ok=True)
        for part in self.path.glob(f"{_PART}*"):  # what a killed process was writing
            shutil.rmtree(part)
        staged = self.path / f"{SETTINGS_FILENAME}.part"
        staged.write_text(json.dumps(self._settings, indent=1))
        staged.replace(self._file)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end and its SAE is there."""
        # cfg.json is the last file that `finish` puts in its place.
        return self._file.is_file() and (self.path / SAE_CFG_FILENAME).is_file()

    def resume(self, trainer: SAETrainer[Any, Any]) -> bool:
        """Put the latest checkpoint, weights and all state, into a new trainer; False where there is none."""
        latest = max(self._checkpoints(), default=None)
        if latest is None:
            return False
        trainer.sae.load_weights_from_checkpoint(latest[1])
        trainer.load_trainer_state(latest[1])
        return True

    def checkpoint(self, trainer: SAETrainer[Any, Any]) -> None:
        """Save weights and all state of a trainer, between two steps; the checkpoint before it is removed."""
        older = self._checkpoints()
        with tempfile.TemporaryDirectory(dir=self.path, prefix=_PART) as staged:
            trainer.save_checkpoint("now", base_path=staged)
            Path(staged, "now").replace(self.path / f"{_CHECKPOINT}{trainer.n_training_steps}")
        for _, path in older:
            shutil.rmtree(path)

    def finish(self, sae: SAE[Any]) -> None:
        """Save the finished SAE in SAELens' layout and remove the checkpoints."""
        with tempfile.TemporaryDirectory(dir=self.path, prefix=_PART) as staged:
            sae.save_model(staged)
            for name in (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME):
                Path(staged, name).replace(self.path / name)
        for _, path in self._checkpoints():
            shutil.rmtree(path)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = [(path.name.removeprefix(_CHECKPOINT), path) for path in self.path.glob(f"{_CHECKPOINT}*")]
        return [(int(step), path) for step, path in found if step.isdecimal()]
