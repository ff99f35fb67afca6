"""Times of what may stand in one place, for decisions at run time.  The benchmarks have their own (bench/measure.py)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TypeVar

Name = TypeVar("Name")

LEAST, SAMPLE = 5, 2e-4
"""Rounds at least; seconds that the calls of one sample take at least."""


def medians(calls: Mapping[Name, Callable[[], object]], seconds: float) -> dict[Name, float]:
    """Median ms of each, after a call that may compile; in turns, so that a disturbance hits all alike, for about ``seconds``."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(SAMPLE / max(_once(call, 1), 1e-9)))
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    end = perf_counter() + seconds
    while len(next(iter(samples.values()))) < LEAST or perf_counter() < end:
        for name, call in calls.items():
            samples[name].append(_once(call, repeats[name]))
    return {name: statistics.median(found) * 1e3 for name, found in samples.items()}


def _once(call: Callable[[], object], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats
