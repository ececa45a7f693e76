"""A pass that was stopped anywhere and resumed gives what an uninterrupted one gives, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from clip_lens_ext.data import ImageBatch, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.passes import PassReport, run_pass


class Mean:
    """A sum whose last bits depend on the order: what is computed twice or left out shows."""

    def __init__(self) -> None:
        self.total, self.n, self.seen = torch.zeros(3), 0, []  # float32 on purpose

    def update(self, value: tuple[Tensor, list[str]]) -> None:
        self.total += value[0]
        self.n += 1
        self.seen += value[1]

    def merge(self, other: Mean) -> Mean:
        self.total, self.n, self.seen = self.total + other.total, self.n + other.n, self.seen + other.seen
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "n": self.n, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.n, self.seen = state["total"].clone(), state["n"], list(state["seen"])

    def result(self) -> Tensor:
        return self.total / self.n


def data(n: int = 11, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def step(batch: ImageBatch) -> tuple[Tensor, list[str]]:
    return batch.pixels.sin().sum((0, 2, 3)) * 1e3, batch.names


def run(found: Mean, pixels: Any = None, **settings: Any) -> PassReport:
    batch_size = settings.pop("batch_size", 2)
    own_step = settings.pop("step", step)
    batches = image_batches(data() if pixels is None else pixels, batch_size=batch_size)
    return run_pass(batches, own_step, found, progress=False, **settings)


class Stops:
    """A step that raises instead of computing a batch, counting from 0."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error, self.n = at, error, 0

    def __call__(self, batch: ImageBatch) -> Any:
        if self.left == 0:
            raise self.error("stopped")
        self.left -= 1
        self.n += 1
        return step(batch)


def whole() -> Mean:
    found = Mean()
    run(found)
    return found


def test_every_batch_once_in_order() -> None:
    found = Mean()
    report = run(found)
    assert (report.n_samples, report.n_batches, report.n_resumed, report.skipped) == (11, 6, 0, ())
    assert found.seen == [str(i) for i in range(11)]
    assert report.fingerprint is not None
    expected = torch.stack([step(batch)[0] for batch in image_batches(data(), batch_size=2)]).double().sum(0)
    assert torch.allclose(found.total.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("every", [1, 2, 4, 50])
def test_resumed_is_uninterrupted(tmp_path: Path, at: int, every: int, error: type[BaseException]) -> None:
    where: dict[str, Any] = {"checkpoint": tmp_path / "deep" / "c", "checkpoint_every": every, "settings": {"a": 1}}
    with pytest.raises(error, match="stopped"):
        run(Mean(), step=Stops(at, error), **where)
    assert (tmp_path / "deep" / "c").exists() == (at > 0)
    found, counting = Mean(), Stops(99, error)
    report = run(found, step=counting, **where)
    assert report.n_resumed == at
    assert counting.n == 6 - at  # nothing is computed again
    assert torch.equal(found.total, whole().total)
    assert (found.n, found.seen) == (6, whole().seen)
    assert report.n_samples == 11
    assert report.fingerprint == run(Mean()).fingerprint
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["c"]


def test_stopped_again_and_again(tmp_path: Path) -> None:
    for at in range(1, 6):
        with pytest.raises(KeyboardInterrupt):
            run(Mean(), step=Stops(1, KeyboardInterrupt), checkpoint=tmp_path / "c")
        report_n = json_header(tmp_path / "c")["n_batches"]
        assert report_n == at
    found = Mean()
    run(found, checkpoint=tmp_path / "c")
    assert torch.equal(found.total, whole().total)


def json_header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["clip_lens_ext.pass"])


def test_a_finished_pass_is_not_computed_again(tmp_path: Path) -> None:
    run(Mean(), checkpoint=tmp_path / "c")
    found, counting = Mean(), Stops(0, RuntimeError)
    report = run(found, step=counting, checkpoint=tmp_path / "c")
    assert report.n_resumed == report.n_batches == 6
    assert torch.equal(found.total, whole().total)


class Fragile(Mean):
    """Dies in the middle of an update, with half of it done."""

    def update(self, value: tuple[Tensor, list[str]]) -> None:
        if self.n == 3:
            self.total += 17
            raise KeyboardInterrupt
        super().update(value)


def test_a_half_done_update_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Fragile(), checkpoint=tmp_path / "c", checkpoint_every=2)
    assert json_header(tmp_path / "c")["n_batches"] == 2
    found = Mean()
    run(found, checkpoint=tmp_path / "c", checkpoint_every=2)
    assert torch.equal(found.total, whole().total)
    with pytest.raises(KeyboardInterrupt):
        run(Fragile(), checkpoint=tmp_path / "d", checkpoint_every=50)
    assert not (tmp_path / "d").exists()


class Unwritable(Mean):
    """Cannot give its state, as where the disk is full."""

    def state_dict(self) -> dict[str, Any]:
        raise OSError("no space left")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Mean(), step=Stops(2, KeyboardInterrupt), checkpoint=tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(OSError, match="no space left"):
        run(Unwritable(), checkpoint=tmp_path / "c", checkpoint_every=1)
    assert (tmp_path / "c").read_bytes() == before


SCRIPT = """
import os, signal, sys, torch
sys.path[:0] = [{tests!r}]
from test_passes import Mean, data, image_batches, run_pass, step
class Killed:
    n = 0
    def __call__(self, batch):
        self.n += 1
        if self.n == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batch)
run_pass(image_batches(data(), batch_size=2), Killed(), Mean(), checkpoint={path!r}, checkpoint_every=3, progress=False)
"""


def test_a_killed_process(tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), path=str(tmp_path / "c"))
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL
    assert json_header(tmp_path / "c")["n_batches"] == 3
    found, counting = Mean(), Stops(99, RuntimeError)
    run(found, step=counting, checkpoint=tmp_path / "c", checkpoint_every=3)
    assert counting.n == 3
    assert torch.equal(found.total, whole().total)


# -- what is refused


def stopped(path: Path, at: int = 3, **settings: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Mean(), step=Stops(at, KeyboardInterrupt), checkpoint=path, **settings)


@pytest.mark.parametrize("fault", ["a pixel", "order", "batch size", "dtype", "fewer"])
def test_other_data(tmp_path: Path, fault: str) -> None:
    stopped(tmp_path / "c")
    before, pixels = (tmp_path / "c").read_bytes(), data()
    settings: dict[str, Any] = {}
    if fault == "a pixel":
        pixels[3, 1, 2, 2] += 1e-6
    elif fault == "order":
        pixels = pixels[[1, 0, *range(2, 11)]]
    elif fault == "batch size":
        settings["batch_size"] = 3
    elif fault == "dtype":
        pixels = pixels.double()
    else:
        pixels = pixels[:4]
    found, counting = Mean(), Stops(99, RuntimeError)
    with pytest.raises(InputError, match=r"other data, or in other batches|and the data have 2: they changed"):
        run(found, pixels, step=counting, checkpoint=tmp_path / "c", **settings)
    assert counting.n == found.n == 0
    assert (tmp_path / "c").read_bytes() == before


def test_data_that_grew_at_the_end_are_seen(tmp_path: Path) -> None:
    """Batches after the checkpoint were not seen yet, so only what was seen can be checked."""
    stopped(tmp_path / "c")
    found = Mean()
    report = run(found, torch.cat([data(), data(2, seed=1)]), checkpoint=tmp_path / "c")
    assert (report.n_samples, report.n_resumed) == (13, 3)
    run(Mean(), checkpoint=tmp_path / "whole")
    with pytest.raises(InputError, match="other data"):  # its last batch was cut short by the end of the data
        run(Mean(), torch.cat([data(), data(2, seed=1)]), checkpoint=tmp_path / "whole")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"a": 2, "b": None}, "a was 1 and is now 2"),
        ({"a": 1}, r"b was \[1, 2\] and is now None"),
        ({"a": 1, "b": (1, 2), "c": "x"}, "c was None and is now 'x'"),
        (None, "a was 1 and is now None"),
    ],
)
def test_other_settings(tmp_path: Path, now: dict[str, Any] | None, message: str) -> None:
    stopped(tmp_path / "c", settings={"a": 1, "b": (1, 2)})
    with pytest.raises(InputError, match=message):
        run(Mean(), checkpoint=tmp_path / "c", settings=now)
    run(Mean(), checkpoint=tmp_path / "c", settings={"b": [1, 2], "a": 1})


@pytest.mark.parametrize("fault", ["folder", "text", "truncated", "another file", "empty"])
def test_what_is_no_checkpoint(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "c"
    stopped(path)
    content = path.read_bytes()
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault == "another file":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"text": b"hello" * 30, "truncated": content[:-3], "empty": b""}[fault])
    with pytest.raises(InputError, match=r"is a folder|is no checkpoint of a pass"):
        run(Mean(), checkpoint=path)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_how_often(tmp_path: Path, every: Any) -> None:
    with pytest.raises(InputError, match="checkpoint_every must be a positive integer"):
        run(Mean(), checkpoint=tmp_path / "c", checkpoint_every=every)


# -- unreadable images, and the bar


def test_unreadable_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(7):
        Image.new("RGB", (4, 4), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"nothing")

    def tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    found, checkpoint = Mean(), tmp_path.parent / f"{tmp_path.name}.c"
    batches = image_batches(tmp_path, preprocess=tensor, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run_pass(batches, Stops(2, KeyboardInterrupt), Mean(), checkpoint=checkpoint)
    capsys.readouterr()
    report = run_pass(batches, step, found, checkpoint=checkpoint, description="looking")
    assert [skip.name for skip in report.skipped] == ["3.png"]
    assert report.n_samples == 6
    assert found.seen == ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png"]
    shown = capsys.readouterr().err
    assert "looking" in shown
    assert "skipped=1" in shown
    run_pass(batches, step, Mean(), progress=False)
    assert capsys.readouterr().err == ""


def test_parts_merge() -> None:
    first, second = Mean(), Mean()
    run(first, data()[:4])
    run(second, data()[4:])
    merged = first.merge(second)
    assert torch.allclose(merged.total, whole().total, rtol=1e-5)
