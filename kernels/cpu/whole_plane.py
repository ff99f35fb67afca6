"""Loop nest of global pooling over contiguous maps whose elements follow each other: lanes run along a plane.

Four chains of steps overlap, of four planes where they are small, so that each has one chain and no rest to speak of, and of one
otherwise.  As many planes as there are lanes are combined across lanes at once.
"""

import math

import numpy as np
from numba import int32

from ..compile import specialised
from ..simd import (
    any_lane,
    between,
    bits_of,
    convert,
    fused,
    integers,
    lane_index,
    load,
    load_masked,
    number,
    numbers,
    phase,
    pointer,
    repeat,
    splat,
    store,
    store_each,
    store_masked,
    unroll,
    where,
    with_phase,
)
from . import ahead
from .number import jitable
from .reduction import arithmetic, arrays, can_carry, carried, looks_for_nan, members, tupled
from .sums import DEPTH, cascade, transposed

TOGETHER = 4

SHORT = 4
"""Blocks of steps that are made one chain: 64 additions each."""

SMALL = 512
"""Elements of a map up to which TOGETHER planes go together: us a call of 4x512x14x14 avg 22, max 36, and plane by plane 24 and 68; of
8x64x32x32 35 and 48, and 35 and 42 (in L2, one core of a Xeon with AVX-512)."""


def _doubting(kind, real, lanes):
    """(begin, step, combine, finish, padding) of a largest or smallest element without its place, as if none were NaN; and beside it 0, or
    NaN where that may not be the one that is asked for.  Not all were finite: x - x times x, a product on ports that maxima leave free, so
    padding is finite.  Or there are zeros of both signs, of which the first is meant: each chain keeps its own first."""
    outermost = math.copysign(float(np.finfo(real.name).max), kind.neutral(np.float64(0)))
    made = carried(kind, real, int32, lanes, False, ordered=True)
    start, step, merge, ended = made.start, made.more, made.merge, made.finish

    @jitable
    def begin(zero, tap, total, u):
        return start(zero, tap)[0], zero

    @jitable
    def stepped(state, x, tap, p):
        return step((state[0],), x, tap, p)[0], fused(x, x - x, state[1])

    @jitable
    def combine(a, b):
        zeros = (a[0] == b[0]) & (bits_of(a[0]) != bits_of(b[0]))
        return merge((a[0],), (b[0],), ())[0], where(zeros, splat(real(math.nan), lanes), a[1] + b[1])

    @jitable
    def finish(state, size, p):
        return ended((state[0],), size, size, p)

    return begin, stepped, combine, finish, jitable(lambda: splat(real(outermost), lanes))


def _planes(begin, step, combine_one, dtype, lanes, together, asks):
    """(elements, args) -> the states of TOGETHER planes, or of one in a tuple; ``args``: x, the chains' origins, what padding is, p.
    ``asks``: for what is read ahead."""
    L, real = lanes, number(dtype)
    far, ask = ahead.distance(dtype), ahead.asking(dtype)
    stride, apart = (L, 0) if together > 1 else (TOGETHER * L, L)

    @jitable
    def begun(count):
        zero = splat(real(0), L)
        return repeat(begin(zero, splat(int32(0), L), zero, zero), count)

    @jitable
    def empty(args):
        return begun(together)

    @jitable
    def folded(states):
        if together > 1:
            return states
        a, b, c, d = states
        return (combine_one(combine_one(a, b), combine_one(c, d)),)

    @jitable
    def combined(states, i, others):
        return with_phase(states, i, combine_one(phase(states, i), phase(others, i)))

    @jitable
    def combine(states, others, args):
        return unroll(combined, together, states, others)

    @jitable
    def stepped(states, i, args):
        x, origins, at, taps, p = args
        source = phase(origins, i) + at
        if asks:
            ask(x, source + far, L)
        return with_phase(states, i, step(phase(states, i), load(x, source, L), taps + splat(int32(i * apart), L), p))

    @jitable
    def block(start, stop, args):
        x, origins, _, p = args
        states = begun(TOGETHER)
        for at in range(start * stride, stop * stride, stride):
            taps = splat(int32(at), L) + lane_index(int32, L)
            states = unroll(stepped, TOGETHER, states, (x, origins, at, taps, p))
        return folded(states)

    @jitable
    def ended(states, i, args):
        x, origins, at, left, taps, fill, p = args
        here = load_masked(x, phase(origins, i) + at, between(i * apart, 1, 0, left, L), fill)
        return with_phase(states, i, step(phase(states, i), here, taps + splat(int32(i * apart), L), p))

    # us, avg and max, with each length known and not: 8x64x112x112 380 and 510, 433 and 447; 8x64x128x128 541 and 689 (Zen 5).  Of few
    # blocks those between them cost more: 8x256x56x56, avg, 390 as one, 510 as three.
    long = cascade(block, combine, empty, 1, twice=True)

    @jitable
    def planes(M, args):
        x, origins, fill, p = args
        steps, left = M // stride, M % stride
        states = block(0, steps, args) if steps <= SHORT * DEPTH else long(0, steps, args)
        if left == 0:
            return states
        rest = x, origins, M - left, left, splat(int32(M - left), L) + lane_index(int32, L), fill, p
        if together > 1:
            return unroll(ended, TOGETHER, states, rest)
        return combine(states, folded(unroll(ended, TOGETHER, begun(TOGETHER), rest)), args)

    return planes


@specialised
def forward(kind, dtype, saved, saves, lanes, together):
    """Jobs: ``together`` planes.  Arguments: x, y, saved; planes, C; x's strides of N and C; elements of a plane; the seed's halves; the
    reduction's parameters."""
    A, P, L, real, parts = arithmetic(kind), len(kind.parameters), lanes, number(dtype), members(kind, number(dtype))
    neutral, finish = A.neutral, A.finish
    quick = not saves and can_carry(kind) and looks_for_nan(A, dtype)

    @jitable
    def placed(origins, i, args):
        plane, planes, C, stride_n, stride_c = args
        here = plane if together == 1 else min(plane + i, planes - 1)
        # No division where images follow each other.
        at = here * stride_c if stride_n == C * stride_c else here // C * stride_n + here % C * stride_c
        return with_phase(origins, i, at + (i * L if together == 1 else 0))

    def pooling(begin, step, combine, parts):
        """(several, x, out, places, M, fill, p) -> the state of planes out .. out + several - 1, one a lane."""
        # us, 8x256x56x56, plane by plane, asking and not: avg 388 and 345, max 470 and 570.
        pool = _planes(begin, step, combine, dtype, lanes, together, together > 1 or kind.selects)
        scratch = arrays(parts, lanes * lanes)
        tuple_of, across = tupled(parts), transposed(combine, parts, lanes)

        @jitable
        def put(states, i, args):
            rows, at = args
            store_each(rows, at + i * L, tuple_of(phase(states, i)))
            return states

        @jitable
        def pooled(several, x, out, places, M, fill, p):
            rows = scratch()
            for i in range(0, several, together):
                origins = unroll(placed, TOGETHER, repeat(out, TOGETHER), (out + i, *places))
                unroll(put, together, pool(M, (x, origins, fill, p)), (rows, i * L))
            return across(rows)

        return pooled

    careful = pooling(A.begin, A.step, A.combine, parts)
    if quick:
        begin, step, combine, finish_quick, padding = _doubting(kind, real, lanes)
        doubting = pooling(begin, step, combine, (real, real))

    @jitable
    def pooled(several, x, out, places, M, fill, size, p):
        if quick:
            state = doubting(several, x, out, places, M, padding(), p)
            if not any_lane(between(0, 1, 0, several, L) & (state[1] != state[1])):
                return finish_quick(state, size, p)
        return finish(careful(several, x, out, places, M, fill, p), size, size, p)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        planes, C, stride_n, stride_c, M = integers(args, 3, 5)
        p = numbers(args, 10, P, real, L)
        fill, size = neutral(splat(real(0), L)), splat(real(M), L)
        end = min(planes, stop * together)
        for out in range(start * together, end, L):
            several = min(L, end - out)
            value, choice = pooled(several, x, out, (planes, C, stride_n, stride_c), M, fill, size, p)
            if several == L:
                store(y, out, value)
                if saves:
                    store(kept, out, convert(choice, saved))
            else:
                inside = between(0, 1, 0, several, L)
                store_masked(y, out, value, inside)
                if saves:
                    store_masked(kept, out, convert(choice, saved), inside)

    return kernel
