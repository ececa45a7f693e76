"""Activations on disk: one folder a hook, shards of whole samples, checked against the images on every use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lens_ext.errors import InputError

SHARD_BYTES = 128 << 20
SHARD_SAMPLES = 1024  # where samples are small: what a killed pass loses at most
_INDEX = "activations.json"
_HEADER = "clip_lens_ext.activations"


class ActivationCache:
    """The activations of a sequence of samples at one hook, `[sample token d]`, in shards.

    A shard is written whole or not at all, so that a pass that is killed goes on after its last whole shard. Every
    sample is stored with the hash of what the tower was given, so that a cache of other images is never read.

    Args:
        path: the folder of this hook; made when the first shard is written.
        identity: JSON values by which two caches are of the same activations: model, weights, hook, tokens.

    Raises:
        InputError: the folder holds other activations (it names what differs), or a file of it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        for folder in (self.path, self.path.parent):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"the activation cache {str(folder)!r} is a file, not a folder")
        self._identity = json.loads(json.dumps(dict(identity)))
        self._digests: list[str] = []
        self._shards: list[tuple[Path, int, int]] = []  # file, first sample, one after the last
        self._waiting: list[tuple[Tensor, str]] = []
        self._n_total: int | None = None
        self._per_shard = 0
        if (self.path / _INDEX).is_file():
            self._open()

    @property
    def n_stored(self) -> int:
        """Samples that are on disk or about to be."""
        return len(self._digests)

    @property
    def complete(self) -> bool:
        """Whether a whole pass has been stored."""
        return self._n_total is not None

    def check(self, number: int, pixels: Tensor, name: str) -> None:
        """Compare sample `number` with what was stored under it.

        Raises:
            InputError: it is another picture.
        """
        if self._digests[number] != _digest(pixels):
            raise InputError(
                f"the activation cache {str(self.path)!r} is of other images: sample {number} there is not {name!r} as "
                "it is read now; choose another cache_dir, or remove that one"
            )

    def append(self, rows: Tensor, pixels: Tensor) -> None:
        """Store the next samples: activations `[sample token d]`, and what the tower was given `[sample ...]`."""
        if self.complete:
            raise InputError(
                f"the activation cache {str(self.path)!r} is of {self._n_total} images, and there are more now; choose "
                "another cache_dir, or remove that one"
            )
        size = rows[0].numel() * rows.element_size()
        self._per_shard = min(SHARD_SAMPLES, max(1, SHARD_BYTES // size))
        for row, sample in zip(rows, pixels, strict=True):
            self._waiting.append((row, _digest(sample)))
            self._digests.append(self._waiting[-1][1])
            if len(self._waiting) == self._per_shard:
                self._write()

    def finish(self, n_samples: int) -> None:
        """Say that the pass is over, after `n_samples` samples.

        Raises:
            InputError: the cache holds more than that: it is of other images.
        """
        if n_samples != self.n_stored:
            raise InputError(
                f"the activation cache {str(self.path)!r} is of {self.n_stored} images, and there are {n_samples} now; "
                "choose another cache_dir, or remove that one"
            )
        if self._waiting:
            self._write()
        if not self.complete:
            self._n_total = n_samples
            self._write_index()

    def take(self, samples: Sequence[int]) -> Tensor:
        """The activations `[sample token d]` of some samples, in this order.

        Raises:
            InputError: a shard is damaged or gone.
        """
        wanted = torch.as_tensor(samples, dtype=torch.long)
        out: Tensor | None = None
        for path, first, stop in self._shards:
            places = ((wanted >= first) & (wanted < stop)).nonzero().flatten()
            if len(places) == 0:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    stored = file.get_slice("rows")
                    rows = torch.cat([stored[i : i + 1] for i in (wanted[places] - first).tolist()])
            except (OSError, SafetensorError) as error:
                raise InputError(f"the activation cache lost {str(path)!r}: {error}; remove the folder") from error
            out = rows.new_empty(len(wanted), *rows.shape[1:]) if out is None else out
            out[places] = rows
        assert out is not None
        return out

    def _open(self) -> None:
        try:
            index = json.loads((self.path / _INDEX).read_text(encoding="utf-8"))
            there, n_samples = index["identity"], index["n_samples"]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
            raise InputError(f"{str(self.path / _INDEX)!r} is damaged: remove the activation cache") from error
        differ = [key for key in self._identity if there.get(key) != self._identity[key]]
        if differ:
            shown = "; ".join(f"{key} was {there.get(key)!r} and is now {self._identity[key]!r}" for key in differ)
            raise InputError(f"the activation cache {str(self.path)!r} is of other activations: {shown}; "
                             "choose another cache_dir, or remove that one")  # fmt: skip
        for path in sorted(self.path.glob("shard-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    header = json.loads((file.metadata() or {})[_HEADER])
                    n = file.get_slice("rows").get_shape()[0]
            except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
                raise InputError(f"{str(path)!r} is damaged: {error}; remove the activation cache") from error
            if header["first"] != len(self._digests) or n != len(header["digests"]):
                raise InputError(
                    f"the activation cache {str(self.path)!r} has lost a shard before {path.name}: remove it"
                )
            self._shards.append((path, header["first"], header["first"] + n))
            self._digests += header["digests"]
        if n_samples is not None and n_samples != len(self._digests):
            raise InputError(f"the activation cache {str(self.path)!r} has lost a shard at its end: remove it")
        self._n_total = n_samples

    def _write(self) -> None:
        rows, digests = torch.stack([row for row, _ in self._waiting]), [digest for _, digest in self._waiting]
        if not self._shards:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_index()
        first = len(self._digests) - len(digests)
        path = self.path / f"shard-{len(self._shards):05d}.safetensors"
        staged = path.with_suffix(".part")
        save_file({"rows": rows}, staged, metadata={_HEADER: json.dumps({"first": first, "digests": digests})})
        staged.replace(path)
        self._shards.append((path, first, len(self._digests)))
        self._waiting = []

    def _write_index(self) -> None:
        staged = self.path / f"{_INDEX}.part"
        index = {"identity": self._identity, "n_samples": self._n_total}
        staged.write_text(json.dumps(index, indent=1), encoding="utf-8")
        staged.replace(self.path / _INDEX)


def _digest(pixels: Tensor) -> str:
    """Hash of one sample as the tower gets it."""
    plain = pixels.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
