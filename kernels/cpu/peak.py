"""What the core can multiply and add at most: the floor of everything that is not bound by memory."""

import statistics
import time

import numpy as np
from numba import types

from ..compile import specialised
from ..launch import bits, launch, pack
from ..simd import fused, integers, native_lanes, numbers, phase, pointer, repeat, splat, store, unroll, with_phase
from .blocking import registers
from .number import jitable

ROUNDS = 20000
"""Of all accumulators, a job: about a quarter of a millisecond."""


@specialised
def spinning(dtype, lanes, accumulators):
    """Jobs: ROUNDS multiply-adds of each of ``accumulators`` registers, which depend on themselves alone.  Arguments: a place for a
    register a job, the number of rounds, a number."""
    L, A = lanes, accumulators

    @jitable
    def one(states, i, x):
        return with_phase(states, i, fused(x, x, phase(states, i)))

    @jitable
    def first(total, i, states):
        return total + phase(states, i)

    def kernel(args, start, stop):
        out, (rounds,) = pointer(args, 0, dtype), integers(args, 1, 1)
        x = numbers(args, 2, 1, dtype, L)[0]
        for job in range(start, stop):
            states = repeat(x, A)
            for _ in range(rounds):
                states = unroll(one, A, states, x)
            store(out, job * L, unroll(first, A, splat(dtype(0), L), states))

    return kernel


def gflops(threads=1, dtype=types.float32, samples=15):
    """Multiplications and additions a second, in 1e9, of so many threads: the median of ``samples``."""
    lanes, accumulators = native_lanes(dtype), registers() - 4
    worker = spinning(dtype, lanes, accumulators)
    out = np.empty(threads * lanes, dtype.name)
    args = pack(out.ctypes.data, ROUNDS, bits(1e-3, dtype.name))
    seconds = []
    for _ in range(samples + 1):
        start = time.perf_counter()
        launch(worker, threads, args, threads)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * threads * ROUNDS * accumulators * lanes / statistics.median(seconds[1:])


__all__ = ["gflops", "spinning"]
