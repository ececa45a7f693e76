"""Streaming covariance against one float32 `X.T @ X` of the same rows, and what its eigenvectors cost.

`python -m benchmarks.covariance`. Memory is that of processes of their own, which draw their rows batch by batch.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.rivals import resident
from benchmarks.timing import machine, milliseconds, ratio, time_in_turns

ROWS, WIDTH, ROUNDS = 50_000, 768, 9
BATCHES = (32, 256, 50_000)
MEAN = 60  # in units of the spread
MEMORY_ROWS = (10_000, 50_000, 200_000)
WIDTHS, SVD_ROWS, EIGEN_ROUNDS = (512, 768, 1024), 5_000, 3


def memory(n: int) -> float:
    """MB that a process takes at its peak for `n` rows in batches of 256, beyond what it held before."""
    found = cle.StreamingCovariance(WIDTH)
    found.update(torch.randn(256, WIDTH))  # what torch loads at its first product is no state
    del found
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and glibc keeps would hide what the pass takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = resident("VmRSS")
    found = cle.StreamingCovariance(WIDTH)
    for _ in range(n // 256):
        found.update(torch.randn(256, WIDTH))
    found.covariance()
    return resident("VmHWM") - before


def memory_table() -> str:
    found = []
    for n in MEMORY_ROWS:
        run = [sys.executable, "-m", "benchmarks.covariance", "--memory", str(n)]
        found.append([f"{n:,}", f"{float(subprocess.run(run, capture_output=True, text=True, check=True).stdout):.0f}",
                      f"{n * WIDTH * 4 / 2**20:.0f}"])  # fmt: skip
    return table(["rows", "peak, MB", "the rows themselves, MB"], found)


def eigen_table(rounds: int) -> str:
    """Seconds of every way to the eigenvectors of a covariance, and how far its least eigenvalue is off."""
    lines = []
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(0)
        scale = torch.arange(1, width + 1, dtype=torch.float64) ** -1.0
        rows = torch.randn(SVD_ROWS, width, generator=generator, dtype=torch.float64) * scale
        rows = (rows - rows.mean(dim=0)) @ torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        single, matrix = rows.float(), rows.T @ rows / (SVD_ROWS - 1)
        narrow = matrix.float()
        ways = {
            "`eigh`, float64": lambda matrix=matrix: torch.linalg.eigh(matrix)[0],
            "`eigh`, float32": lambda matrix=narrow: torch.linalg.eigh(matrix)[0],
            "`eigvalsh`, float64": lambda matrix=matrix: torch.linalg.eigvalsh(matrix),
            "SVD of the rows, float64": lambda rows=rows: _squares(torch.linalg.svd(rows, full_matrices=False).S),
            "SVD of the rows, float32": lambda rows=single: _squares(torch.linalg.svd(rows, full_matrices=False).S),
        }
        values = {way: call().double() for way, call in ways.items()}
        expected = values["SVD of the rows, float64"]
        seconds = time_in_turns(ways, rounds=rounds, warm_up=0)
        for way in ways:
            off = float((values[way][0] - expected[0]).abs() / expected[0])
            lines.append([f"{width}" if way == next(iter(ways)) else "", way, f"{milliseconds(seconds[way]):.0f}",
                          f"{statistics.median(a / b for a, b in zip(seconds[way], seconds['`eigh`, float64'], strict=True)):.2f}",
                          f"{off:.0e}" if values[way] is not expected else ""])  # fmt: skip
    return table(["d", "way", "median ms", "ratio", "error of the least eigenvalue"], lines)


def _squares(singular: Tensor) -> Tensor:
    return singular.flip(0).square() / (SVD_ROWS - 1)


def streamed(rows: Tensor, batch: int) -> Tensor:
    found = cle.StreamingCovariance(rows.shape[1])
    for part in rows.split(batch):
        found.update(part)
    return found.covariance()


def error(found: Tensor, expected: Tensor) -> float:
    """Greatest error of an entry over the standard deviations of its two coordinates."""
    spread = expected.diagonal().sqrt()
    return float(((found - expected).abs() / torch.outer(spread, spread)).max())


def main() -> None:
    """Measure, print, and, at the full size, write the section `covariance` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--eigen-rounds", type=int, default=EIGEN_ROUNDS)
    parser.add_argument("--memory", type=int)
    args = parser.parse_args()
    if args.memory:
        print(memory(args.memory))
        return
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(args.rows, WIDTH, generator=generator) + MEAN * torch.randn(WIDTH, generator=generator).sign()
    expected = torch.cov(rows.double().T)
    mean = rows.mean(dim=0)
    plain = (rows.T @ rows / args.rows - torch.outer(mean, mean)).double()
    ways = {f"batches of {batch:,}": (lambda batch=batch: streamed(rows, batch)) for batch in BATCHES}
    seconds = time_in_turns({"X.T @ X": lambda: rows.T @ rows, **ways}, rounds=args.rounds, warm_up=1)
    lines = [
        [
            "one float32 `X.T @ X`",
            f"{milliseconds(seconds['X.T @ X']):.0f}",
            "1.00",
            "",
            f"{error(plain, expected):.0e}",
        ]
    ]
    for batch, way in zip(BATCHES, ways, strict=True):
        middle, low, high = ratio(seconds, way, "X.T @ X")
        lines.append([f"`StreamingCovariance`, {way}", f"{milliseconds(seconds[way]):.0f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}",
                      f"{error(streamed(rows, batch), expected):.0e}"])  # fmt: skip
    text = (
        f"`python -m benchmarks.covariance` ({machine()}; {args.rows:,} float32 rows of {WIDTH} numbers whose mean is {MEAN} times their "
        f"spread, {args.rounds} rounds in turns). Error: the greatest of an entry of the covariance, over the standard deviations of its two "
        "coordinates, against two passes in float64; of `X.T @ X` less the squared mean. The state is one float64 `[d d]` and 2048 rows.\n\n"
        + table(["way", "median ms", "ratio", "quartiles", "error"], lines)
        + "\n\nTo reach: <= 1.3, error <= 1e-6, memory O(d^2).\n\nMemory of one pass in batches of 256, at its peak, beyond what the process "
        f"held before; {WIDTH} numbers a row:\n\n"
        + memory_table()
        + f"\n\nEigenvectors of a covariance of {SVD_ROWS:,} rows whose standard deviations fall as 1/i, so that the greatest variance is d^2 times "
        f"the least, against the SVD of the centred rows; {args.eigen_rounds} rounds in turns, ratio to `eigh` in float64, which `split_noise` takes. Error: "
        f"relative, against the SVD in float64.\n\n"
        + eigen_table(args.eigen_rounds)
    )
    print(text)
    if args.rows == ROWS:
        write_section("covariance", text)


if __name__ == "__main__":
    main()
