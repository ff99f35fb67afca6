"""Times of competitors on a machine that does other things too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

SAMPLE = 0.5e-3
"""Seconds: a call quicker than this is repeated within one sample, so that the clock's and the loop's own cost vanish."""


def medians(calls: Mapping[str, Callable[[], object]], budget: float, least: int = 3) -> dict[str, float]:
    """Median ms of one call of each competitor.

    All are called once and then once more before anything counts: the first call may compile, the second says how many calls make a
    sample.  Then they take turns, one sample each a round, so that a disturbance hits all alike: until ``budget`` seconds are over,
    and for at least ``least`` rounds.
    """
    for call in calls.values():
        call()
    repeats = {name: max(1, int(SAMPLE / _seconds(call, 1))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = perf_counter() + budget
    rounds = 0
    while rounds < least or perf_counter() < end:
        for name, call in calls.items():
            samples[name].append(_seconds(call, repeats[name]))
        rounds += 1
    return {name: statistics.median(seconds) * 1e3 for name, seconds in samples.items()}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, the mean of ``repeats``."""
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats
