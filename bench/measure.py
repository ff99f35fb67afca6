"""Times of competitors on a machine that does other things too."""

from __future__ import annotations

import functools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import torch

from .machine import page_faults, settle

SAMPLE = 0.5e-3
"""Seconds: a call quicker than this is repeated within one sample, so that the clock's and the loop's own cost vanish."""

STEADY = 0.01
"""A median is known well enough where its standard error is this part of it."""


PRIMED = 0.02
"""Seconds: a sample of a quicker call comes after some that do not count.  Another competitor ran just before: its threads may still
spin on a core, and its data lie in the caches.  Max pooling 2x2 of 1x3x224x224, 22 us by itself, took 107 us on one thread and 250 on
two right after ONNX Runtime and OpenVINO."""

PRIMING = 5e-3
"""Seconds that those take: memory is slower for some milliseconds after another competitor.  A copy of 8x64x112x112's global L2 norm, 0.94
ms so, took 1.17 in the second call after ONNX Runtime's and OpenVINO's of 70 and 5 ms, and fastpool's 0.95 and 1.02."""

LONG, LONGEST = 0.15, 3.0
"""Seconds of a round: of longer ones three are enough, and of the longest one, as a disturbance is a smaller part of them."""


class Timed(NamedTuple):
    ms: float
    """Median of one call."""
    faults: float
    """Median page faults of one call: memory that came fresh from the system."""


def medians(calls: Mapping[str, Callable[[], object]], budget: float, least: int = 5) -> dict[str, Timed]:
    """Of each competitor.

    They take turns, one sample each a round, so that a disturbance hits all alike: for at least ``least`` rounds (fewer of LONG
    ones), then until every median is steady or ``budget`` seconds are over.  A first round says how many calls make a sample, and
    counts where that is one for everybody; what compiles or grows in its first call must have been called before.
    """
    once = dict.fromkeys(calls, 1)
    first = _round(calls, once)
    repeats = {name: max(1, int(SAMPLE / seconds)) for name, (seconds, _) in first.items()}
    rounds = [first] if repeats == once else []
    seconds = sum(seconds for seconds, _ in first.values())
    least = min(least, 1 if seconds > LONGEST else 3 if seconds > LONG else least)
    end = perf_counter() + budget
    while len(rounds) < least or (perf_counter() < end and not all(_steady([r[name][0] for r in rounds]) for name in calls)):
        rounds.append(_round(calls, repeats))
    middle = lambda name, i: statistics.median(r[name][i] for r in rounds)
    return {name: Timed(middle(name, 0) * 1e3, middle(name, 1)) for name in calls}


def _round(calls: Mapping[str, Callable[[], object]], repeats: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """Seconds and page faults of one call of each, the means of its repeats."""
    found = {}
    for name, call in calls.items():
        settle()
        found[name] = _sample(call, 1)
        if (seconds := found[name][0]) < PRIMED:
            for _ in range(math.ceil(PRIMING / seconds)):
                call()
            found[name] = _sample(call, repeats[name])
    return found


def _sample(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Once more, of settled memory, where some came fresh from the system: the calls that prime leave some too short for an output.

    Not settled always: an output that has moved lies in no cache.  A depthwise convolution of one image of 144x56x56 took 75 us in a
    loop and 75 to 120 in samples after that.
    """
    seconds, faults = _repeated(call, repeats)
    if faults:
        settle()
        seconds, faults = _repeated(call, repeats)
    return seconds, faults


def _repeated(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    faults, start = page_faults(), perf_counter()
    for _ in range(repeats):
        call()
    seconds = perf_counter() - start
    return seconds / repeats, (page_faults() - faults) / repeats


def _steady(samples: Sequence[float]) -> bool:
    """By the quartiles, as if the samples were normal: one disturbed sample changes little."""
    if len(samples) < 3:
        return False
    low, middle, high = statistics.quantiles(samples, method="inclusive")
    return 0.93 * (high - low) / len(samples) ** 0.5 < STEADY * middle


@functools.lru_cache(maxsize=2)
def copying(moved: int, device: torch.device | None = None) -> Callable[[], object]:
    """A copy that moves so many bytes: read one half, write the other; cached where a case of as many bytes is.

    Both are written first: untouched pages would cost faults, and those that are only read are all one page of zeros.
    """
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


@contextmanager
def every_core() -> Iterator[None]:
    """For what is not timed."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
