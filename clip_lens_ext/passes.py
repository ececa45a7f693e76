"""One pass over a data set with a mergeable accumulator: progress, and exact resume after a kill.

An accumulator holds what has been counted or summed so far. A pass writes its state to one file every so many batches,
and whenever it ends, by an interrupt or an error too. The same call then goes on where that file is: the batches
before it are read again, to see that the data are still the same, and not computed again, so the result is the one of
an uninterrupted pass, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.image_files import Skipped
from clip_lens_ext.result_files import read_parts, write_parts

Value = TypeVar("Value", contravariant=True)
_KIND = "pass"


class Batch(Protocol):
    """What a pass needs of a batch, as `clip_lens_ext.data.ImageBatch` has it."""

    @property
    def pixels(self) -> Tensor:
        """The samples, `[sample ...]`."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """One name for each."""
        ...

    @property
    def indexes(self) -> Sequence[int]:
        """The position of each in the data."""
        ...


class Batches(Protocol):
    """Batches in an order that does not change, as `clip_lens_ext.data.image_batches` gives them."""

    @property
    def n_samples(self) -> int | None:
        """Number of samples, where the data say so."""
        ...

    @property
    def skipped(self) -> Sequence[Skipped]:
        """What the pass so far could not read."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Hash of all data, after a whole pass."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...


class Accumulator(Protocol[Value]):
    """What a pass adds up: split, reordered or sharded, the result differs by rounding alone."""

    def update(self, value: Value, /) -> None:
        """Take in what was computed from one batch."""
        ...

    def merge(self, other: Any, /) -> Any:
        """Take in another accumulator of the same kind, and return itself."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that `load_state_dict` needs: tensors and plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Become what another accumulator of the same settings was."""
        ...

    def result(self) -> Any:
        """What has been found so far."""
        ...


@dataclass(frozen=True, eq=False)
class PassReport:
    """What a pass went over.

    Attributes:
        n_samples: samples that were read.
        n_batches: batches.
        n_resumed: those of them that came from the checkpoint and were not computed again.
        skipped: what could not be read.
        fingerprint: of the data, as `ImageBatches.fingerprint`.
    """

    n_samples: int
    n_batches: int
    n_resumed: int
    skipped: tuple[Skipped, ...]
    fingerprint: str | None


def run_pass(
    batches: Batches,
    step: Callable[[Any], Any],
    accumulator: Accumulator[Any],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    settings: Mapping[str, Any] | None = None,
    description: str = "samples",
    unit: str = "image",
    progress: bool = True,
) -> PassReport:
    """Go over all batches once: `accumulator.update(step(batch))` for each.

    Args:
        batches: the data, from `clip_lens_ext.data.image_batches`.
        step: computes what one batch adds.
        accumulator: takes it in; fresh, also when the pass is resumed.
        checkpoint: a file to resume from if it exists, and to write to; None: neither. After the last batch it holds
            the whole pass, so that the same call gives the same result without computing; delete it when done.
        checkpoint_every: batches between two writes. An interrupt or an error writes too.
        settings: JSON values by which two passes are the same pass: model, SAE, method, ...
        description: what the bar says.
        unit: what one sample is called there.
        progress: draw a bar.

    Returns:
        `PassReport`. The result is `accumulator.result()`.

    Raises:
        InputError: the checkpoint is of a pass with other settings, other data or another batch size, or it is no
            checkpoint; or no sample can be read.

    Example:
        >>> import clip_lens_ext as cle
        >>> class Sum:
        ...     total = torch.zeros(3, dtype=torch.float64)
        ...     def update(self, value): self.total = self.total + value
        ...     def merge(self, other): self.update(other.total); return self
        ...     def state_dict(self): return {"total": self.total}
        ...     def load_state_dict(self, state): self.total = state["total"]
        ...     def result(self): return self.total
        >>> batches, found = cle.image_batches(torch.ones(5, 3, 2, 2), batch_size=2), Sum()
        >>> report = run_pass(batches, lambda batch: batch.pixels.double().sum((0, 2, 3)), found, progress=False)
        >>> report.n_samples, report.n_batches, found.result().tolist()
        (5, 3, [20.0, 20.0, 20.0])
    """
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise InputError(f"checkpoint_every must be a positive integer, got {checkpoint_every!r}")
    file = None if checkpoint is None else _Checkpoint(Path(checkpoint), settings or {})
    before = None if file is None else file.read()
    n_resumed = 0 if before is None else before.n_batches
    done = written = _Place(0, "")
    n_batches = n_samples = 0
    chain, whole = "", True
    try:
        with tqdm(total=batches.n_samples, desc=description, unit=unit, disable=not progress) as bar:
            for batch in batches:
                n_batches += 1
                n_samples += len(batch.names)
                chain = "" if file is None else _extended(chain, batch)
                if before is not None and n_batches <= n_resumed:
                    if n_batches == n_resumed:
                        _check_data(file, before, chain)
                        accumulator.load_state_dict(before.state)
                        done = written = _Place(n_resumed, chain)
                else:
                    value = step(batch)
                    whole = False  # an interrupt inside of update leaves a state that is not to be written
                    accumulator.update(value)
                    done = _Place(n_batches, chain)
                    whole = True
                    if file is not None and n_batches % checkpoint_every == 0:
                        file.write(done, accumulator)
                        written = done
                bar.update(len(batch.names))
                if batches.skipped:
                    bar.set_postfix(skipped=len(batches.skipped))
        if n_batches < n_resumed:
            raise InputError(f"{file} is a checkpoint after {n_resumed} batches, and the data have {n_batches}: "
                             "they changed")  # fmt: skip
    finally:
        if file is not None and whole and done.n_batches > written.n_batches:
            file.write(done, accumulator)
    return PassReport(n_samples, n_batches, n_resumed, tuple(batches.skipped), batches.fingerprint)


@dataclass(frozen=True)
class _Place:
    """How far a pass has come, and the hash of the batches up to there."""

    n_batches: int
    chain: str


@dataclass(frozen=True, eq=False)
class _State(_Place):
    state: Mapping[str, Any]


def _extended(chain: str, batch: Batch) -> str:
    """The hash of all batches up to this one."""
    pixels = batch.pixels.detach().cpu().contiguous()
    about = [chain, str(pixels.dtype), list(pixels.shape), list(batch.names), list(batch.indexes)]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(pixels.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_data(file: _Checkpoint | None, before: _State, chain: str) -> None:
    if chain != before.chain:
        raise InputError(f"{file} is the checkpoint of a pass over other data, or in other batches: the first "
                         f"{before.n_batches} batches are not those that it saw")  # fmt: skip


class _Checkpoint:
    """One file of `clip_lens_ext.result_files`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(dict(settings)))
        if path.is_dir():
            raise InputError(f"checkpoint {str(path)!r} is a folder: give the name of a file")

    def __str__(self) -> str:
        return repr(str(self.path))

    def read(self) -> _State | None:
        """The checkpoint, or None where there is no file."""
        if not self.path.exists():
            return None
        try:
            tensors, found, texts = read_parts(self.path, _KIND)
            settings, place = found["settings"], (int(found["n_batches"]), str(found["chain"]))
            state = {**found["state"], **texts, **tensors}
        except (LoadError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self} is no checkpoint of a pass: {type(error).__name__}: {error}") from error
        names = sorted({*settings, *self.settings})
        differ = [name for name in names if settings.get(name) != self.settings.get(name)]
        if differ:
            shown = "; ".join(f"{name} was {settings.get(name)!r} and is now {self.settings.get(name)!r}"
                              for name in differ)  # fmt: skip
            raise InputError(f"{self} is the checkpoint of a pass with other settings: {shown}; give the name of "
                             "another file, or delete it")  # fmt: skip
        return _State(*place, state)

    def write(self, done: _Place, accumulator: Accumulator[Any]) -> None:
        """Replace the file by the present state: a rename, so that a kill leaves the old one or the new one."""
        state = accumulator.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        texts = {name: value for name, value in state.items() if isinstance(value, list)}  # names may be a million
        rest = {name: value for name, value in state.items() if name not in tensors and name not in texts}
        found = {"settings": self.settings, "n_batches": done.n_batches, "chain": done.chain, "state": rest}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_parts(self.path, _KIND, tensors, found, texts)
