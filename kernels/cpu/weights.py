"""Weights as the convolution nests read them: for each block of output channels its biases, then chain by chain of input channels (row of
taps, input channel, tap of the row, output channel), so that rows of taps that lie in the padding can be left out at either end."""

import functools

import numpy as np
from numba import int64

from ..compile import specialised
from ..simd import (
    between,
    gather_between,
    integers,
    load_masked,
    number,
    phase,
    pointer,
    splat,
    store,
    store_masked,
    unroll,
)
from ..tile import columns, load_apart_masked
from .number import jitable

SHORT = 4
"""Elements side by side, on average, from which on registers of an output channel's weights are transposed: 512 x 512 x 3 x 3 take 0.31 ms
so and 0.66 by gathers, for the gradient by the input 0.47 and 1.08."""


@functools.lru_cache(maxsize=256)
def order(inputs, along, together, step_i, taps):
    """(for each weight of an output channel, as they lie in memory, where that is and its place among the packed; runs of such that lie
    side by side: first and count), of so many input channels, taps of a row, channels of a chain; ``taps``: where each lies from the
    first."""
    rows = np.array(taps, np.int64).reshape(-1, 1, along)
    chains = [np.arange(c, min(inputs, c + together)) for c in range(0, inputs, together)]
    source = np.concatenate([(rows + chain[:, None] * step_i).ravel() for chain in chains] or [np.zeros(0, np.int64)])
    sorted_by = np.argsort(source, kind="stable")
    source = source[sorted_by]
    found = np.ascontiguousarray(np.stack([source, sorted_by], 1), np.int64)
    starts = np.flatnonzero(np.diff(source, prepend=np.int64(-(1 << 62))) != 1)
    return found, np.stack([starts, np.diff(starts, append=len(source))], 1)


def how(runs, outputs, step_o, lanes):
    """How a register of so many output channels is read best: "load", "columns" of rows of weights, or "gather"."""
    if outputs == 1 or step_o == 1:
        return "load"
    return "columns" if outputs >= lanes and len(runs) and runs[:, 1].mean() >= SHORT else "gather"


@specialised
def pack(dtype, lanes, block, way, biased, scaled):
    """Jobs: (group, block of so many output channels).  Arguments: packed, weights, biases, scales; addresses of ``order``'s tables; output
    channels and blocks a group, weights an output channel, runs; the weights' steps from group to group and output to output.  ``way``:
    as ``how`` says.  ``scaled``: each output channel's weights are multiplied by its scale; biases are added as they are."""
    real, L, B, transposes, loads = number(dtype), lanes, block, way == "columns", way == "load"

    @jitable
    def put(packed, to, k, found):
        if k + L <= B:
            store(packed, to, found)
        else:
            store_masked(packed, to, found, between(k, 1, 0, B, L))

    @jitable
    def keep(found, i, args):
        packed, to, places, first, count, scale = args
        if i < count:
            value = phase(found, i)
            store(packed, to + places[2 * (first + i) + 1] * B, value * scale if scaled else value)
        return found

    def kernel(args, start, stop):
        packed, w = pointer(args, 0, real), pointer(args, 1, dtype)
        biases, scales, weights, runs = pointer(args, 2, dtype), pointer(args, 3, dtype), pointer(args, 4, int64), pointer(args, 5, int64)
        OC, blocks, each, count, step_g, step_o = integers(args, 6, 6)
        zero = splat(real(0), L)
        for job in range(start, stop):
            g, first = job // blocks, job % blocks * B
            low, high, begin = g * OC, g * OC + OC, job * (each + 1) * B
            for k in range(0, B, L):
                to, channel = begin + k, first + k
                bias = gather_between(biases, 0, low + channel, 1, low, high, zero) if biased else zero
                put(packed, to, k, bias)
                scale = gather_between(scales, 0, low + channel, 1, low, high, zero) if scaled else zero
                to += B
                if transposes and channel + L <= OC and k + L <= B:
                    base = g * step_g + channel * step_o
                    for run in range(count):
                        at, end = runs[2 * run], runs[2 * run] + runs[2 * run + 1]
                        for j in range(at, end, L):
                            some = min(L, end - j)
                            rows = load_apart_masked(w, base + weights[2 * j], step_o, L, between(0, 1, 0, some, L), zero)
                            unroll(keep, L, columns(rows), (packed, to, weights, j, some, scale))
                    continue
                for j in range(each):
                    base = g * step_g + weights[2 * j]
                    # Lane i is output channel ``channel + i``; of expanded weights all are one.
                    if loads:
                        found = load_masked(w, base + channel, between(channel, 1, 0, OC, L), zero)
                    else:
                        found = gather_between(w, base, channel * step_o, step_o, 0, max(1, OC * step_o), zero)
                    put(packed, to + weights[2 * j + 1] * B, k, found * scale if scaled else found)

    return kernel
