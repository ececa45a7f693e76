"""Two or more ways of doing one thing, timed in turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def time_in_turns(ways: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of every call, by way: one call of each way a round, in an order that turns with the rounds.

    Args:
        ways: what to call.
        rounds: timed calls of each.
        warm_up: calls of each before, not timed.
    """
    for call in ways.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _synchronize()
            start = time.perf_counter()
            ways[name]()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], way: str, against: str) -> tuple[float, float, float]:
    """Median over the rounds of the ratio of two ways' times in the same round, and its quartiles."""
    ratios = [a / b for a, b in zip(seconds[way], seconds[against], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def milliseconds(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return 1000 * statistics.median(seconds)


def machine() -> str:
    """Where a number was measured, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    n = torch.get_num_threads()
    return f"CPU with {n} thread{'' if n == 1 else 's'}, torch {torch.__version__}"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
