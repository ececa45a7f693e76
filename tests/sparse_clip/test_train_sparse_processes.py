"""Several processes train what one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.sparse_training import QUICK, N, data, same, sparse

from clip_lens_ext.errors import InputError
from clip_lens_ext.sparse_clip import train_sparse_clip
from clip_lens_ext.sparse_clip.processes import Processes


def test_two_processes_are_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        f"sys.path[:0] = {[str(Path(__file__).parent.parent)]!r}\n"
        "from oracles.sparse_training import QUICK, data, sparse\n"
        "from clip_lens_ext.sparse_clip import train_sparse_clip\n"
        "torch.distributed.init_process_group('gloo')\n"
        "folder, last = Path(sys.argv[1]), int(sys.argv[2]) or None\n"
        "for trained in ('heads', 'all'):\n"
        "    clip, seen = sparse(), []\n"
        "    clip.native.dense.visual.conv1.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))\n"
        "    train_sparse_clip(clip, *data(), **QUICK, l1=0.01, trained=trained, n_accumulated=2, stop_after=last,\n"
        "                      output_dir=folder / trained)\n"
        "    (folder / f'{trained} {last} {torch.distributed.get_rank()}').write_text(str(sum(seen)))\n"
        "free = train_sparse_clip(sparse(), *data(), **QUICK, stop_after=2)\n"
        "try:\n"
        "    train_sparse_clip(sparse(), data()[0], data()[1][1:], **QUICK)\n"
        "except ValueError as error:\n"
        "    (folder / f'refused {torch.distributed.get_rank()}').write_text(str(error))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for last in ("4", "0"):
        ended = subprocess.run([*command, str(script), str(tmp_path), last], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
    # One of them embeds, and none does again.
    embedded = [int((tmp_path / f"heads {last} {rank}").read_text()) for last in (4, None) for rank in (0, 1)]
    assert embedded == [N, 0, 0, 0]
    assert (tmp_path / "refused 0").read_text() == "26 pictures, and captions of 25"
    assert (tmp_path / "refused 1").read_text().endswith("InputError: 26 pictures, and captions of 25")
    kinds: tuple[Any, ...] = ("heads", "all")
    settings = {**QUICK, "l1": 0.01}
    for trained in kinds:
        two = train_sparse_clip(
            sparse(), *data(), **settings, trained=trained, output_dir=tmp_path / trained, stop_after=1
        )
        one = train_sparse_clip(sparse(), *data(), **settings, trained=trained)
        assert two.finished  # read back, and not trained again
        same(one, two, rtol=2e-3, atol=2e-4)  # sums in another order, through Adam


@pytest.mark.parametrize(("device", "message"), [("cpu", "on cpu, and NCCL"), ("cuda:0", "on cuda:0, and NCCL"),
                                                 ("cuda:1", None), ("cuda", None)])  # fmt: skip
def test_nccl_is_of_the_device_of_the_model(device: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_backend", "nccl"), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    if message is None:
        assert Processes.now(torch.device(device)) == Processes(1, 2)
    else:
        with pytest.raises(InputError, match=rf"{message} uses cuda:1, .* torch\.cuda\.set_device\(rank\)"):
            Processes.now(torch.device(device))
