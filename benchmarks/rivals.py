"""Attribution against its rivals, in time and peak memory: `python -m benchmarks.rivals`.

The rivals are the textbook way (the SAE inside the graph, autograd to every latent) twice: as it is most often written,
with `backward()` and the parameters as open_clip and SAELens load them, and at its leanest, with `torch.autograd.grad`
to the latents alone and frozen parameters; and captum's `LayerGradientXActivation` and `LayerIntegratedGradients` on
the spliced SAE. All ways of a case give the same numbers, which is checked. Each runs in a process of its own, for its peak memory; the rounds take the ways in turns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from tqdm.auto import tqdm

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.timing import machine

LAST, MIDDLE = "blocks.11.hook_resid_post", "blocks.5.hook_resid_post"
N_NODES = 16
_ENOUGH = 10.0

# case -> (hook, tokens, latents, k, targets, ways: the first is ours, what is to reach against which way)
CASES = {
    "patching, last block, CLS SAE of 30,000, 64 prompts": (LAST, "cls", 30_000, 64, 64, ("patching", "backward", "textbook", "forward"), ">= 10x"),
    "patching, last block, CLS SAE of 30,000, 1,000 prompts": (LAST, "cls", 30_000, 64, 1000, ("patching", "forward"), "<= 1.5 forwards"),
    "patching, middle block, all-token SAE of 49,152, one prompt": (MIDDLE, "all", 49_152, 32, 1, ("patching", "backward", "textbook", "captum gradient"), ">= 1.3x, <= 1/4 of the memory"),
    "integrated gradients, 16 nodes, last block, CLS SAE of 30,000": (LAST, "cls", 30_000, 64, 1, ("integrated", "captum integrated"), ""),
    "integrated gradients, 16 nodes, middle block, all-token SAE of 49,152": (MIDDLE, "all", 49_152, 32, 1, ("integrated", "captum integrated"), ""),
}  # fmt: skip
NAMES = {
    "patching": "`attribution_patching`", "backward": "textbook, `backward()`", "textbook": "textbook, `autograd.grad` to the latents", "forward": "one plain forward",
    "captum gradient": "captum `LayerGradientXActivation`", "integrated": "`integrated_gradients`",
    "captum integrated": "captum `LayerIntegratedGradients`",
}  # fmt: skip


class Case:
    """A tower with random weights, an SAE of the asked size, a picture, and targets."""

    def __init__(self, name: str) -> None:
        hook, tokens, d_sae, k, n_target, *_ = CASES[name]
        torch.manual_seed(0)
        self.tower = cle.HookedTower(open_clip.create_model("ViT-B-32", pretrained=None).eval().visual)
        metadata = SAEMetadata(hook_name=hook, token_scope=tokens, tower="vision")
        self.sae: SAE = TopKSAE(TopKSAEConfig(d_in=768, d_sae=d_sae, k=k, metadata=metadata)).eval()
        with torch.no_grad():
            self.sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn_like(self.sae.W_dec), dim=-1))
            self.sae.W_enc.copy_(self.sae.W_dec.T)
        self.sae.requires_grad_(False)
        self.tower.requires_grad_(False)
        self.x = torch.randn(1, 3, 224, 224)
        self.target = cle.direction_target(torch.randn(n_target, self.tower.cfg.d_embed))

    def forward(self) -> Tensor:
        """One plain forward."""
        with torch.no_grad():
            return self.tower(self.x)

    def patching(self) -> Tensor:
        """Our attribution patching."""
        return self._active(cle.attribution_patching(self.tower, self.x, self.sae, self.target))

    def integrated(self) -> Tensor:
        """Our integrated gradients, from the latents of an empty picture: that is where captum starts."""
        hook = str(self.sae.cfg.metadata.hook_name)
        with torch.no_grad():
            empty = self.tower.run_to(torch.zeros_like(self.x), hook)
            baseline = self.sae.encode(empty[:, :1] if self.sae.cfg.metadata.token_scope == "cls" else empty)
        return self._active(
            cle.integrated_gradients(
                self.tower, self.x, self.sae, self.target, n_steps=N_NODES, baseline=baseline, progress=False
            )
        )

    def textbook(self) -> Tensor:
        """`z * dy/dz` by autograd through the whole tower with the SAE spliced in."""
        kept: dict[str, Tensor] = {}
        hook = f"{self.sae.cfg.metadata.hook_name}.hook_sae_acts_post"

        def keep(activation: Tensor, hook: object) -> None:
            kept["z"] = activation

        with torch.enable_grad(), self.tower.saes(self.sae):
            prediction = self.target(self.tower.run_with_hooks(self.x, fwd_hooks=[(hook, keep)]))
            found = [
                (kept["z"] * torch.autograd.grad(prediction[0, index], kept["z"], retain_graph=True)[0]).sum(dim=1)
                for index in range(len(self.target))
            ]
        return torch.stack(found, dim=1).detach()[0]

    def backward(self) -> Tensor:
        """`z * dy/dz` as most often written: `backward()` for each target, nothing frozen, gradients to everything."""
        kept: dict[str, Tensor] = {}
        hook = f"{self.sae.cfg.metadata.hook_name}.hook_sae_acts_post"

        def keep(activation: Tensor, hook: object) -> None:
            activation.retain_grad()
            kept["z"] = activation

        self.tower.requires_grad_(True)
        self.sae.requires_grad_(True)
        found = []
        with torch.enable_grad(), self.tower.saes(self.sae):
            prediction = self.target(self.tower.run_with_hooks(self.x, fwd_hooks=[(hook, keep)]))
            z = kept["z"]
            for index in range(len(self.target)):
                z.grad = None
                prediction[0, index].backward(retain_graph=True)
                assert z.grad is not None
                found.append((z * z.grad).sum(dim=1).detach())
        self.tower.zero_grad(set_to_none=True)
        self.sae.zero_grad(set_to_none=True)
        return torch.stack(found, dim=1)[0]

    def captum_gradient(self) -> Tensor:
        """captum's activation times gradient, at the SAE's latents."""
        from captum.attr import LayerGradientXActivation

        with self.tower.saes(self.sae):
            method = LayerGradientXActivation(lambda x: self.target(self.tower(x))[:, 0], self.sae.hook_sae_acts_post)
            return method.attribute(self.x).sum(dim=1).detach()

    def captum_integrated(self) -> Tensor:
        """captum's integrated gradients at the SAE's latents; its baseline is an input, an empty picture."""
        from captum.attr import LayerIntegratedGradients

        with self.tower.saes(self.sae):
            method = LayerIntegratedGradients(lambda x: self.target(self.tower(x))[:, 0], self.sae.hook_sae_acts_post)
            found = method.attribute(self.x, n_steps=N_NODES, method="gausslegendre", internal_batch_size=N_NODES)
            return found.sum(dim=1).detach()

    def _active(self, result: cle.Attribution) -> Tensor:
        """As the rivals give it, `[target d_sae]`; dense only where that is small, to keep the memory what it is."""
        return result.dense()[0] if len(self.target) <= 64 else result.value

    def way(self, name: str) -> Callable[[], Tensor]:
        """The method of a way."""
        found: Callable[[], Tensor] = getattr(self, name.replace(" ", "_").replace("-", "_"))
        return found


def one_way(name: str, way: str, out: str, calls: int) -> dict[str, float]:
    """Median seconds of a way, after one call to warm up, and the peak memory in MB that one more call takes.

    A slow way is called less often: no more once `_ENOUGH` seconds are spent.
    """
    case = Case(name)
    call = case.way(way)
    seconds = []
    found = call()
    for _ in range(calls):
        start = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > _ENOUGH:
            break
    torch.save(found, out)
    del found
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed and glibc keeps would hide what a call takes
    Path("/proc/self/clear_refs").write_text("5")  # loading took more than running will: the peak starts anew here
    before = resident("VmRSS")
    call()
    return {"seconds": statistics.median(seconds), "peak": resident("VmHWM") - before}


def resident(which: str) -> float:
    """Memory of this process in MB: what is resident now (VmRSS), or was at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {which}")


def measure(name: str, way: str, out: Path, calls: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rivals", "--case", name, "--way", way, "--out", str(out), "--calls", str(calls)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print, and write the section `rivals` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    for name in ("--case", "--way", "--out"):
        parser.add_argument(name)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_way(args.case, args.way, args.out, args.calls)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm([name for name in CASES if args.only in name], desc="cases"):
            *_, ways, reach = CASES[name]
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way in ways:
                    found[way].append(measure(name, way, Path(folder, f"{way}.pt"), args.calls))
            ours = torch.load(Path(folder, f"{ways[0]}.pt"), weights_only=True)
            for way in ways:
                theirs = torch.load(Path(folder, f"{way}.pt"), weights_only=True)
                if way != "forward":
                    worst = float((ours - theirs).abs().max() / theirs.abs().max())
                    assert worst < 1e-5, f"{name}: {way} differs by {worst:.1e} of the greatest number"
                seconds = statistics.median(one["seconds"] for one in found[way])
                ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(found[way], found[ways[0]], strict=True))
                memory = statistics.median(one["peak"] for one in found[way])
                rows.append([
                    name if way == ways[0] else "", NAMES[way], f"{1000 * seconds:.0f}", f"{ratio:.2f}", f"{memory:.0f}",
                    reach if way == ways[0] else "",
                ])  # fmt: skip
    text = (
        f"`python -m benchmarks.rivals` ({machine()}; ViT-B/32 vision tower and TopK SAEs with random weights, one picture). Every way "
        "in a process of its own, the ways in turns; the ratio is to our way, median of the rounds. Memory: what one more call takes at its peak beyond what the process held before it. All ways of a case "
        "agree to 1e-5 of the greatest number.\n\n"
        + table(["case", "way", "ms", "ratio", "memory, MB", "to reach"], rows)
    )
    print(text)
    write_section("rivals", text)


if __name__ == "__main__":
    main()
