"""How many float32 operations a second the cores can do at most: the other limit of a kernel, beside the copy's."""

from __future__ import annotations

import functools

from fastpool.kernels.cpu.peak import gflops

TRIES = 5
"""Of which the best counts: other work only takes from a peak."""


@functools.cache
def peak(threads: int) -> float:
    """GFLOP/s of so many threads, by a kernel that stays in the registers; measured once in a process."""
    return max(gflops(threads) for _ in range(TRIES))
