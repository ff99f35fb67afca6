"""Loop nest of global pooling over contiguous maps whose elements follow each other: lanes run along a plane.

Four chains of steps overlap, of four planes where they are small, so that each has one chain and no rest to speak of, and of one
otherwise.  As many planes as there are lanes are combined across lanes at once.
"""

from numba import int32

from ..compile import specialised
from ..simd import (
    between,
    convert,
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
    with_phase,
)
from . import ahead
from .number import jitable
from .reduction import arithmetic, arrays, members, tupled
from .sums import DEPTH, cascade, transposed

TOGETHER = 4

SHORT = 4
"""Blocks of steps that are made one chain: 64 additions each."""

SMALL = 512
"""Elements of a map up to which TOGETHER planes go together: us a call of 4x512x14x14 avg 22, max 36, and plane by plane 24 and 68; of
8x64x32x32 35 and 48, and 35 and 42 (in L2, one core of a Xeon with AVX-512)."""


def _planes(A, dtype, lanes, together):
    """(elements, args) -> the states of TOGETHER planes, or of one in a tuple; ``args``: x, the chains' origins, what padding is, p."""
    L, real, begin, step, combine_one = lanes, number(dtype), A.begin, A.step, A.combine
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
    neutral, combine, finish, pool = A.neutral, A.combine, A.finish, _planes(A, dtype, lanes, together)
    scratch, tuple_of, across = arrays(parts, lanes * lanes), tupled(parts), transposed(combine, parts, lanes)

    @jitable
    def placed(origins, i, args):
        plane, planes, C, stride_n, stride_c = args
        here = plane if together == 1 else min(plane + i, planes - 1)
        return with_phase(origins, i, here // C * stride_n + here % C * stride_c + (i * L if together == 1 else 0))

    @jitable
    def put(states, i, args):
        rows, at = args
        store_each(rows, at + i * L, tuple_of(phase(states, i)))
        return states

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        planes, C, stride_n, stride_c, M = integers(args, 3, 5)
        p = numbers(args, 10, P, real, L)
        fill, size, rows = neutral(splat(real(0), L)), splat(real(M), L), scratch()
        end = min(planes, stop * together)
        for out in range(start * together, end, L):
            several = min(L, end - out)
            for i in range(0, several, together):
                origins = unroll(placed, TOGETHER, repeat(out, TOGETHER), (out + i, planes, C, stride_n, stride_c))
                unroll(put, together, pool(M, (x, origins, fill, p)), (rows, i * L))
            value, choice = finish(across(rows), size, size, p)
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
