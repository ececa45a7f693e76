"""Training: by its formula, in parts, in two processes, resumed, kept on the way; and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.models import build_clip
from PIL import Image
from torch import Tensor

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.sparse_clip import (
    EmbeddedPairs,
    SparseTraining,
    add_sparse_heads,
    embed_pairs,
    load_sparse_clip,
    train_sparse_clip,
    trainer,
)
from clip_lens_ext.sparse_clip.processes import Processes
from clip_lens_ext.sparse_clip.training_folder import STATE

N, CODE = 26, 48
QUICK: dict[str, Any] = {"batch_size": 8, "n_epochs": 3, "lr": 1e-2, "largest_logit_scale": 16.0, "progress": False}


def tokenizer(texts: list[str]) -> Tensor:
    """Nine token ids of each text, the last one the largest, where open_clip pools."""
    rows = [[(7 * i + ord(c)) % 48 for i, c in enumerate(f"{text:<8}"[:8])] + [49] for text in texts]
    return torch.tensor(rows)


def dense(**settings: Any) -> cle.HookedCLIP:
    return cle.HookedCLIP(build_clip(**settings), tokenizer=tokenizer, model_name="tiny")


def sparse(**settings: Any) -> cle.HookedCLIP:
    return add_sparse_heads(dense(), CODE, seed=4, **settings)


def data() -> tuple[Tensor, list[list[str]]]:
    images = torch.randn(N, 3, 24, 32, generator=torch.Generator().manual_seed(5))
    return images, [[f"picture {i}"] + [f"also {i}"] * (i % 3 == 0) for i in range(N)]


def weights(found: SparseTraining) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.clip.native.state_dict().items()}


def same(one: SparseTraining, other: SparseTraining, **tolerance: float) -> None:
    there = weights(other)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, there[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)
    assert one.history.columns.equals(other.history.columns)
    np.testing.assert_allclose(one.history, other.history, rtol=tolerance.get("rtol", 0) * 10)


def by_the_formula(
    clip: cle.HookedCLIP, pairs: EmbeddedPairs, cap: float, lr: float, n_steps: int, l1: float, n_warmup: int
) -> Any:
    """AdamW as it is published, on the loss as the paper has it; the batches by the order that is documented."""
    native: Any = clip.native
    image, text, log_scale = (
        value.detach().double().clone().requires_grad_()
        for value in (native.image_head.weight, native.text_head.weight, native.logit_scale)
    )
    moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in (image, text, log_scale)]
    losses = []
    per_epoch = len(pairs.images) // 8
    for step in range(n_steps):
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(1_000_003 + epoch)
        order = torch.randperm(len(pairs.images), generator=generator)[8 * place : 8 * place + 8].tolist()
        draws = torch.rand(len(pairs.images), generator=generator, dtype=torch.float64)
        chosen = []
        for i in order:
            own = pairs.entries[pairs.first[i] : pairs.first[i + 1]].tolist()
            chosen.append(own[int(draws[i] * len(own))])
        z, t = (
            (pairs.images[order].double() @ image.T).clamp(min=0),
            (pairs.texts[chosen].double() @ text.T).clamp(min=0),
        )
        logits = log_scale.exp() * (z / z.norm(dim=1, keepdim=True)) @ (t / t.norm(dim=1, keepdim=True)).T
        own = logits.diagonal()
        loss = ((logits.logsumexp(1) - own).mean() + (logits.logsumexp(0) - own).mean()) / 2
        loss = loss + l1 * (z.abs().sum(1).mean() + t.abs().sum(1).mean()) / 2
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, (image, text, log_scale))
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        rate = lr * (step + 1) / n_warmup if step < n_warmup else (
            lr * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))
        )  # fmt: skip
        with torch.no_grad():
            for w, g, (m, v) in zip((image, text, log_scale), gradients, moments, strict=True):
                g = g * min(1.0, 1 / norm)
                if w.ndim == 2:
                    w -= rate * 0.2 * w
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.98).add_(0.02 * g * g)
                w -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.98 ** (step + 1))).sqrt() + 1e-6)
            log_scale.clamp_(0, math.log(cap))
    return image, text, log_scale, losses


@pytest.mark.parametrize(("l1", "warmup", "n_warmup"), [(0.0, 0.05, 0), (0.01, 0.35, 3)])
def test_heads_by_the_formula(l1: float, warmup: float, n_warmup: int) -> None:
    clip = sparse(logit_scale=15.9)
    pairs = embed_pairs(dense(), *data(), progress=False)
    found = train_sparse_clip(clip, pairs, **QUICK, l1=l1, warmup=warmup)
    image, text, log_scale, losses = by_the_formula(clip, pairs, 16.0, 1e-2, 9, l1, n_warmup)
    native: Any = found.clip.native
    # float32 against float64 over nine steps of Adam, which divides by gradients that may be tiny.
    torch.testing.assert_close(native.image_head.weight.double(), image, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(native.text_head.weight.double(), text, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(native.logit_scale.double(), log_scale, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.history.loss, losses, rtol=1e-4)
    assert found.finished
    assert found.history.step.tolist() == list(range(1, 10))


def test_the_cap_holds_and_what_came_in_stays() -> None:
    clip = sparse(logit_scale=5.0)
    before = {name: value.clone() for name, value in clip.native.state_dict().items()}
    found = train_sparse_clip(clip, *data(), **{**QUICK, "n_epochs": 40, "largest_logit_scale": 5.2})
    assert found.history.logit_scale.max() == pytest.approx(5.2, rel=1e-6)
    assert (found.history.logit_scale > 5.199).sum() > 10  # it wanted to go above, and did not
    for name, value in clip.native.state_dict().items():
        assert torch.equal(value, before[name]), name
    changed = {name for name, value in weights(found).items() if not torch.equal(value, before[name])}
    assert changed == {"image_head.weight", "text_head.weight", "logit_scale"}
    assert not found.clip.native.training


@pytest.mark.parametrize("trained", ["heads", "all"])
def test_parts_of_a_batch_are_the_batch(trained: Any) -> None:
    one, parts = (
        train_sparse_clip(sparse(), *data(), **QUICK, trained=trained, n_accumulated=n) for n in (1, 4)
    )  # fmt: skip
    same(one, parts, rtol=2e-3, atol=2e-4)  # sums in another order, through Adam


@pytest.mark.parametrize("trained", ["heads", "all"])
@pytest.mark.parametrize(
    "how", ["stopped", "killed", "killed while the weights change", "killed while a checkpoint is written"]
)
def test_a_training_goes_on_where_it_was(
    trained: Any, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = add_sparse_heads(cle.HookedCLIP(build_clip(), tokenizer=tokenizer), CODE)
    settings = {**QUICK, "trained": trained, "checkpoints": (0.2, 0.5, 1.0)}
    whole = train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "whole")
    if how == "stopped":
        part = train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "parts", stop_after=5)
        assert not part.finished
        assert [one.step for one in part.checkpoints] == [2, 5]
    else:
        from clip_lens_ext.towers import from_sparse

        places: dict[str, tuple[Any, str, int]] = {
            "killed": (trainer, "contrastive_step", 6),
            "killed while the weights change": (torch.optim.AdamW, "step", 6),
            "killed while a checkpoint is written": (from_sparse, "save_file", 2),
        }
        owner, name, last = places[how]
        real, calls = getattr(owner, name), []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if owner is trainer and len(calls) == last:
                raise KeyboardInterrupt
            result = real(*args, **kwargs)
            if len(calls) == last:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, name, interrupted)
        often = {"checkpoint_every": 4} if owner is torch.optim.AdamW else {}
        with pytest.raises(KeyboardInterrupt):
            train_sparse_clip(start, *data(), **settings, **often, output_dir=tmp_path / "parts")
        monkeypatch.undo()
    again = train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "parts")
    same(whole, again)
    assert [(one.step, one.share) for one in again.checkpoints] == [(2, 2 / 9), (5, 5 / 9), (9, 1.0)]
    for one, other in zip(whole.checkpoints, again.checkpoints, strict=True):
        a, b = whole.open(one).native.state_dict(), again.open(other).native.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)
    end = again.open(again.checkpoints[-1]).native.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in weights(again).items())
    written = (tmp_path / "parts" / STATE).stat().st_mtime_ns
    same(train_sparse_clip(start, *data(), **settings, output_dir=tmp_path / "parts"), whole)
    assert (tmp_path / "parts" / STATE).stat().st_mtime_ns == written  # nothing was left to do


def test_pairs_are_embedded_once(tmp_path: Path) -> None:
    seen: list[int] = []
    for last in (4, 7, None):
        clip = sparse()
        native: Any = clip.native
        native.dense.visual.conv1.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        found = train_sparse_clip(clip, *data(), **QUICK, output_dir=tmp_path, stop_after=last)
        assert sum(seen) == N
    assert found.finished
    same(found, train_sparse_clip(sparse(), *data(), **QUICK))


@pytest.mark.parametrize(("trained", "n_workers", "most"), [("heads", 0, 1), ("all", 0, 1), ("all", 1, 3)])
def test_the_order_of_an_epoch_is_drawn_when_it_begins(
    trained: Any, n_workers: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = trainer.order_of
    monkeypatch.setattr(trainer, "order_of", lambda n, seed, epoch: drawn.append(epoch) or real(n, seed, epoch))

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "contrastive_step", stopped)
    settings = {**QUICK, "n_epochs": 50, "batch_size": 26, "trained": trained, "n_workers": n_workers}
    with pytest.raises(KeyboardInterrupt):
        train_sparse_clip(sparse(), *data(), **settings)
    assert drawn == list(range(len(drawn)))
    assert 1 <= len(drawn) <= most  # two batches are read ahead for each worker


@pytest.mark.parametrize("when", ["in the forward pass", "before it"])
def test_running_means_are_those_of_the_step(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Normalised(torch.nn.Module):
        """Batch normalisation of tokens: its means change before any weight does."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls, self.last = torch.nn.BatchNorm1d(48), 0, 0

        def forward(self, tokens: Tensor) -> Tensor:
            self.calls += self.training
            if self.calls == self.last and when == "before it":
                raise KeyboardInterrupt
            tokens = self.norm(tokens.transpose(1, 2)).transpose(1, 2)
            if self.calls == self.last:
                raise KeyboardInterrupt
            return tokens

    native = build_clip()
    native.visual.ln_pre = torch.nn.Sequential(native.visual.ln_pre, Normalised())  # type: ignore[assignment]
    start = add_sparse_heads(cle.HookedCLIP(native.eval(), tokenizer=tokenizer), CODE)
    settings = {**QUICK, "trained": "all", "checkpoint_every": 2}
    whole = train_sparse_clip(start, *data(), **settings)
    means = weights(whole)["dense.visual.ln_pre.1.norm.running_mean"]
    assert float(means.abs().max()) > 0
    norm: Any = start.native.get_submodule("dense.visual.ln_pre.1")
    norm.last = 6
    with pytest.raises(KeyboardInterrupt):
        train_sparse_clip(start, *data(), **settings, output_dir=tmp_path)
    norm.last = 0
    same(whole, train_sparse_clip(start, *data(), **settings, output_dir=tmp_path))


def test_dropout_is_that_of_the_step_and_the_part() -> None:
    native = build_clip()
    native.visual.patch_dropout = torch.nn.Dropout(0.5)  # type: ignore[assignment]
    start = add_sparse_heads(cle.HookedCLIP(native, tokenizer=tokenizer), CODE)
    dropped: list[Tensor] = []
    start.native.get_submodule("dense.visual.patch_dropout").register_forward_hook(
        lambda module, args, output: dropped.append(output == 0)
    )
    train_sparse_clip(start, *data(), **QUICK, trained="all", n_accumulated=2, stop_after=2)
    # Both passes over a part have to be of one function, or the gradient is that of neither.
    assert len(dropped) == 8
    for step in (0, 4):
        first, second, *again = dropped[step : step + 4]
        assert torch.equal(first, again[0])
        assert torch.equal(second, again[1])
        assert not torch.equal(first, second)
    assert not torch.equal(dropped[0], dropped[4])


def test_dropout_is_the_same_when_resumed(tmp_path: Path) -> None:
    native = build_clip()
    native.visual.patch_dropout = torch.nn.Dropout(0.5)  # type: ignore[assignment]
    start = add_sparse_heads(cle.HookedCLIP(native, tokenizer=tokenizer), CODE)
    settings = {**QUICK, "trained": "all"}
    whole = train_sparse_clip(start, *data(), **settings)
    train_sparse_clip(start, *data(), **settings, output_dir=tmp_path, stop_after=4)
    same(whole, train_sparse_clip(start, *data(), **settings, output_dir=tmp_path))
    native.visual.patch_dropout = torch.nn.Identity()  # type: ignore[assignment]
    other = train_sparse_clip(add_sparse_heads(cle.HookedCLIP(native, tokenizer=tokenizer), CODE), *data(), **settings)
    assert not np.allclose(whole.history.loss, other.history.loss, rtol=1e-3)  # it was on


def test_two_processes_are_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}\n"
        "from test_train_sparse import QUICK, data, sparse\n"
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


@pytest.mark.parametrize(("precision", "factor"), [("float32", 1.0), ("bfloat16", 1.0), ("float16", 2.0**16)])
def test_the_loss_is_scaled_for_float16(precision: Any, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes into the loss from behind is the scale; a step of infinite gradients is left out, and halves it."""
    real, factors = trainer.contrastive_step, []

    def recorded(*args: Any, backward: Any, **kwargs: Any) -> Any:
        def watched(loss: Tensor) -> None:
            factors.append(0.0)

            def seen(gradient: Tensor) -> Tensor:
                factors[-1] = float(gradient)
                return gradient * math.inf if len(factors) == infinite else gradient

            loss.register_hook(seen)
            backward(loss)

        return real(*args, backward=watched, **kwargs)

    monkeypatch.setattr(trainer, "contrastive_step", recorded)
    infinite = 0
    train_sparse_clip(sparse(), *data(), **QUICK, precision=precision, stop_after=3)
    assert factors == [factor] * 3
    if precision != "float16":
        return
    infinite, before = 2, []
    for last in (1, 2, 3):
        factors.clear()
        before.append(weights(train_sparse_clip(sparse(), *data(), **QUICK, precision=precision, stop_after=last)))
    assert factors == [factor, factor, factor / 2]
    assert all(torch.equal(value, before[1][name]) for name, value in before[0].items())
    assert not torch.equal(before[1]["image_head.weight"], before[2]["image_head.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("trained", "precision"), [("heads", "float32"), ("all", "float16")])
def test_half_weights_are_not_trained(dtype: str, trained: Any, precision: Any, tmp_path: Path) -> None:
    half = sparse().to(dtype=getattr(torch, dtype))
    asked = {"float32": dtype, "float16": "float16"}[precision]
    with pytest.raises(InputError, match=f"is {dtype}, .* load the model in float32 and pass precision='{asked}'"):
        train_sparse_clip(half, *data(), **QUICK, trained=trained, precision=precision, output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("trained", ["heads", "all"])
def test_half_precision_is_near(precision: Any, trained: Any) -> None:
    one, other = (
        train_sparse_clip(sparse(), *data(), **QUICK, trained=trained, precision=p) for p in ("float32", precision)
    )
    assert (one.history.loss != other.history.loss).any()
    # bfloat16 keeps 8 bits, and the cosines, which are near 1 in an untrained model, are times 14.
    np.testing.assert_allclose(one.history.loss[:3], other.history.loss[:3], rtol=0.05)


def test_ablations_are_sparser() -> None:
    settings = {**QUICK, "n_epochs": 20}
    plain = train_sparse_clip(sparse(), *data(), **settings).history.iloc[-1]
    penalised = train_sparse_clip(sparse(), *data(), **settings, l1=0.1).history.iloc[-1]
    top = train_sparse_clip(sparse(activation="topk", k=5), *data(), **settings).history.iloc[-1]
    assert penalised.l0_image < plain.l0_image
    assert penalised.l0_text < plain.l0_text
    assert max(top.l0_image, top.l0_text) <= 5 < min(plain.l0_image, plain.l0_text)


def test_a_training_that_dies_says_so() -> None:
    with pytest.warns(UserWarning, match="every code of .* is zero: nothing is learnt any more") as said:
        dead = train_sparse_clip(sparse(), *data(), **{**QUICK, "lr": 3e-2, "n_epochs": 20}, l1=1.0)
    assert len(said) == 1
    assert dead.history.iloc[-1].l0_image == dead.history.iloc[-1].l0_text == 0
    assert dead.history.loss.iloc[-1] == pytest.approx(math.log(8))
    first = int((dead.history[["l0_image", "l0_text"]] == 0).any(axis=1).idxmax()) + 1
    assert str(said[0].message).startswith(f"step {first}: ")
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_sparse_clip(sparse(), *data(), **QUICK, l1=0.01)


def files(folder: Path, broken: tuple[int, ...] = ()) -> list[Path]:
    rows = np.random.default_rng(0).integers(0, 255, (N, 24, 32, 3), dtype=np.uint8)
    paths = [folder / f"{number:02}.png" for number in range(N)]
    for number, (path, row) in enumerate(zip(paths, rows, strict=True)):
        Image.fromarray(row).save(path)
        if number in broken:
            path.write_bytes(b"no picture")
    return paths


def preprocess(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("trained", ["heads", "all"])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_broken_pictures_are_left_out_with_their_captions(trained: Any, n_workers: int, tmp_path: Path) -> None:
    if trained == "heads" and n_workers:
        pytest.skip("heads read no pictures")
    paths, captions = files(tmp_path, broken=(3, 9)), data()[1]
    settings = {**QUICK, "trained": trained, "n_workers": n_workers}
    found = train_sparse_clip(sparse(), paths, captions, preprocess=preprocess, **settings)
    assert [Path(skip.name).name for skip in found.skipped] == ["03.png", "09.png"]
    good = [number for number in range(N) if number not in (3, 9)]
    alone = train_sparse_clip(sparse(), [paths[i] for i in good], [captions[i] for i in good], preprocess=preprocess,
                              **settings)  # fmt: skip
    same(found, alone)
    assert alone.skipped == ()


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    train_sparse_clip(sparse(), *data(), **QUICK, output_dir=tmp_path, stop_after=2)
    for other, name in (
        ({"lr": 2e-2}, "lr was 0.01 and is now 0.02"), ({"n_epochs": 4}, "n_epochs"), ({"trained": "all"}, "trained"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"holds another training: .*{name}"):
            train_sparse_clip(sparse(), *data(), **{**QUICK, **other}, output_dir=tmp_path)
    with pytest.raises(InputError, match="begins_sha256"):
        train_sparse_clip(add_sparse_heads(dense(), CODE, seed=5), *data(), **QUICK, output_dir=tmp_path)
    images, captions = data()
    with pytest.raises(InputError, match="the checkpoint of a pass over other data"):
        train_sparse_clip(sparse(), -images, captions, **QUICK, output_dir=tmp_path)
    pairs = embed_pairs(dense(), -images, captions, progress=False)
    with pytest.raises(InputError, match="data_sha256"):
        train_sparse_clip(sparse(), pairs, **QUICK, output_dir=tmp_path)
    (tmp_path / STATE).write_bytes(b"half of it")
    with pytest.raises(LoadError, match="cannot be read"):
        train_sparse_clip(sparse(), *data(), **QUICK, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": "towers"}, "trained is one of heads, all"), ({"precision": "half"}, "precision is one of"),
        ({"batch_size": 1}, "batch_size is an integer, 2"),
        ({"batch_size": 64}, "a batch of 64 pairs, and there are 26"),
        ({"n_accumulated": 3}, "does not divide"), ({"lr": 0.0}, "lr is a number above 0"),
        ({"lr": math.nan}, "lr is a number above 0"), ({"n_epochs": 0}, "n_epochs"), ({"warmup": 1.0}, "warmup"),
        ({"l1": -1.0}, "l1"), ({"largest_logit_scale": 4.6}, "begins with a factor of 14.29"),
        ({"largest_logit_scale": 0.5}, "not its logarithm"), ({"largest_logit_scale": 101.0}, "not its logarithm"),
        ({"checkpoints": (0.5, 0.1)}, "ascending shares"), ({"checkpoints": (0.0, 0.1)}, "ascending shares"),
        ({"seed": -1}, "seed"), ({"stop_after": 0}, "stop_after"), ({"clip_gradient": 0.0}, "clip_gradient"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train_sparse_clip(sparse(), *data(), **{**QUICK, **settings}, output_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_is_refused() -> None:
    images, captions = data()
    with pytest.raises(InputError, match="has no sparse heads"):
        train_sparse_clip(dense(), images, captions, **QUICK)
    for trained in ("heads", "all"):
        with pytest.raises(InputError, match="26 pictures, and captions of 25"):
            train_sparse_clip(sparse(), images, captions[:25], **QUICK, trained=trained)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pictures need captions"):
        train_sparse_clip(sparse(), images, **QUICK)
    with pytest.raises(InputError, match="picture 2 has no caption"):
        train_sparse_clip(sparse(), images, [*captions[:2], [], *captions[3:]], **QUICK)
    pairs = embed_pairs(dense(), images, captions, progress=False)
    with pytest.raises(InputError, match="train heads alone"):
        train_sparse_clip(sparse(), pairs, **QUICK, trained="all")
    with pytest.raises(InputError, match="are of another model"):
        train_sparse_clip(add_sparse_heads(dense(seed=1), CODE), pairs, **QUICK)
    with pytest.raises(InputError, match="have 19 numbers"):
        train_sparse_clip(sparse(), EmbeddedPairs.from_vectors(torch.randn(30, 19), torch.randn(30, 20)), **QUICK)
    with pytest.raises(InputError, match="NaN or infinite"):
        train_sparse_clip(sparse(), pairs, **{**QUICK, "lr": 1e30, "clip_gradient": None})


def test_embedded_pairs_are_those_of_the_towers(tmp_path: Path) -> None:
    images, captions = data()
    clip = dense()
    found = embed_pairs(clip, images, captions, batch_size=4, checkpoint=tmp_path / "rows", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(found.images, clip.vision(images), rtol=1e-5, atol=1e-5)
        for picture, own in enumerate(captions):
            said = found.entries[found.first[picture] : found.first[picture + 1]].tolist()
            assert [found.captions[number] for number in said] == own
            torch.testing.assert_close(found.texts[said], clip.embed_texts(own), rtol=1e-5, atol=1e-5)
    again = embed_pairs(clip, images, captions, batch_size=4, checkpoint=tmp_path / "rows", progress=False)
    assert again.sha256() == found.sha256()
    found.save(tmp_path / "pairs.safetensors")
    assert EmbeddedPairs.load(tmp_path / "pairs.safetensors").sha256() == found.sha256()
    with pytest.raises(InputError, match=r"other settings|of a pass"):
        embed_pairs(dense(seed=1), images, captions, batch_size=4, checkpoint=tmp_path / "rows", progress=False)


def test_a_planted_sparse_clip_is_sparse_and_still_knows_its_classes() -> None:
    world, clip = cle.PlantedWorld(0), cle.planted_clip()
    batch, test = world.sample(800, seed=0), world.sample(300, seed=1, split="test")
    start = add_sparse_heads(clip, 512, logit_scale=10.0)
    found = train_sparse_clip(start, cle.planted.normalise(batch.images), batch.captions, batch_size=200, n_epochs=25,
                              lr=3e-3, largest_logit_scale=30.0, progress=False)  # fmt: skip
    pictures, prompts = cle.planted.normalise(test.images), world.prompts()
    with torch.no_grad():
        accuracy = {
            name: float((model.similarity(pictures, prompts).argmax(1) == test.labels).float().mean())
            for name, model in (("dense", clip), ("untrained", start), ("sparse", found.clip))
        }
        l0 = float((found.clip.embed_images(pictures) > 0).float().sum(1).mean())
    assert accuracy["sparse"] > accuracy["dense"] - 0.15, accuracy
    assert accuracy["sparse"] > accuracy["untrained"] + 0.2, accuracy
    assert l0 < 0.4 * 512
    first, last = found.history.iloc[0], found.history.iloc[-1]
    assert last.l0_image < 0.8 * first.l0_image


def test_load_sparse_clip_finds_the_right_dense_model(tmp_path: Path) -> None:
    found = train_sparse_clip(sparse(), *data(), **QUICK, output_dir=tmp_path)
    again = load_sparse_clip(tmp_path, dense())
    x = data()[0][:3]
    with torch.no_grad():
        assert torch.equal(again.vision(x), found.clip.vision(x))
    other_name = cle.HookedCLIP(build_clip(), tokenizer=tokenizer, model_name="the same from another folder")
    with torch.no_grad():
        assert torch.equal(load_sparse_clip(tmp_path, other_name).vision(x), again.vision(x))
    with pytest.raises(LoadError, match="has other weights"):
        load_sparse_clip(tmp_path, dense(seed=1))
    with pytest.raises(LoadError, match=r"'tiny' under the heads .* pass dense="):
        load_sparse_clip(tmp_path)
    with pytest.raises(LoadError, match=r"load_sparse_clip"):
        cle.load_clip(tmp_path)
    with pytest.raises(LoadError, match="holds no Sparse CLIP"):
        load_sparse_clip(tmp_path / "checkpoints", dense())
