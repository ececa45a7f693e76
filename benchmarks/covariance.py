"""Streaming covariance against one float32 `X.T @ X` of the same rows: `python -m benchmarks.covariance`."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.timing import machine, milliseconds, ratio, time_in_turns

ROWS, WIDTH, ROUNDS = 50_000, 768, 9
BATCHES = (32, 256, 50_000)
MEAN = 60  # in units of the spread


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
    args = parser.parse_args()
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
        + "\n\nTo reach: <= 1.3, error <= 1e-6."
    )
    print(text)
    if args.rows == ROWS:
        write_section("covariance", text)


if __name__ == "__main__":
    main()
