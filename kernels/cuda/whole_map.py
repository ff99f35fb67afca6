"""CUDA kernels of global pooling: a block of threads shares maps, and combines what each has found through shared memory; of small
contiguous maps a warp shares one, and combines through its registers."""

import functools
from typing import Any, NamedTuple

from numba import cuda, int32, types, uint32

from ..arithmetic import bare, members, tupled
from . import vector
from .compile import specialised
from .number import arithmetic, computed, device, quotient_of, read, stored, written
from .windows import PARAMETERS, first_parameters, strided, thread
from .windows import place as place_of

THREADS = 256
"""Of a block: as many share one contiguous map; in channels_last CHANNELS stand side by side, and THREADS // CHANNELS share each."""

CHANNELS = 32
"""A warp's, which read 128 bytes of float32 together."""


WARP = 32
SMALL = 1024
"""Elements up to which a contiguous map is a warp's: a block's threads go through 8 barriers to combine what they found.  An average of
7x7 takes 496 warp instructions of PTX by a block, 97 by a warp, of 32x32 874 and 337."""

CHAIN = 32
"""Elements that a thread takes in one after the other, before it adds what they come to: of long sums much is lost in rounding."""


class _Shelf(NamedTuple):
    """Places in shared memory for the states of a block's threads."""

    make: Any
    """() -> an array for each member"""
    put: Any
    """(arrays, i, state)"""
    get: Any
    """(arrays, i) -> state"""


@functools.cache
def _shelf(parts):
    """Of states with members of these dtypes; as recursions, for each array is of its own type."""
    dtype, one = parts[-1], len(parts) == 1
    make_rest, put_rest, get_rest = (None,) * 3 if one else _shelf(parts[:-1])

    @device
    def make_one():
        return (cuda.shared.array(THREADS, dtype),)

    @device
    def make():
        return (*make_rest(), cuda.shared.array(THREADS, dtype))

    @device
    def put_one(arrays, i, state):
        arrays[0][i] = state[0]

    @device
    def put(arrays, i, state):
        put_rest(arrays[:-1], i, state[:-1])
        arrays[-1][i] = state[-1]

    @device
    def get_one(arrays, i):
        return (arrays[0][i],)

    @device
    def get(arrays, i):
        return (*get_rest(arrays[:-1], i), arrays[-1][i])

    return _Shelf(make_one, put_one, get_one) if one else _Shelf(make, put, get)


@functools.cache
def _ahead(dtype):
    """(x, lanes) -> the x of the thread so many lanes further on in the warp."""
    if dtype.bitwidth == 64 or dtype == types.float32:
        return device(lambda x, lanes: cuda.shfl_down_sync(0xFFFFFFFF, x, lanes))
    return device(lambda x, lanes: dtype(cuda.shfl_down_sync(0xFFFFFFFF, int32(x), lanes)))


def _by_warps(parts, combine, together, apart):
    """(state) -> what all of a warp have found, right in its first lane: each combines its own with those behind it."""

    def member(k):
        ahead = _ahead(parts[k])
        return device(lambda state, lanes: ahead(state[k], lanes))

    others = vector.tupled(len(parts), member)

    def halved(k):
        lanes = WARP >> (k + 1)
        return device(lambda state: combine(state, apart(others(together(state), lanes))))

    return vector.folded(5, halved)


def maps_of_a_block(last, size):
    """How many a block makes, of maps of so many elements."""
    return CHANNELS if last else THREADS // WARP if size <= SMALL else 1


@specialised
def forward(kind, dtype, saved, saves, last, dense, side):
    """``dense``: a map's elements follow each other at the step of W, and need not be found by divisions.  ``side``: maps of a block.

    Arguments: x, y, saved; N * C; C, H and W as divisors; elements of a map; x's strides; the reduction's parameters.
    """
    A, real, keeps = arithmetic(kind), computed(dtype), stored(saved)
    begin, step, combine, finish = A.begin, A.step, A.combine, A.finish
    parts = members(kind, real, int32)
    (arrays_of, put, get), together, apart = _shelf(parts), tupled(len(parts), device), bare(len(parts), device)
    sharing = THREADS // side
    by_warps = side > 1 and not last
    of_warp = _by_warps(parts, combine, together, apart)
    take, write, first_of = read(dtype), written(dtype), first_parameters(len(kind.parameters))
    one = uint32(1)

    def kernel(x, y, kept, maps, C, mC, sC, H, mH, sH, W, mW, sW, size, in_n, in_c, in_d, in_h, in_w, a0, a1, a2, a3, a4, a5):
        me = uint32(cuda.threadIdx.x)
        if by_warps:
            lane, rank = uint32(me // uint32(WARP)), uint32(me % uint32(WARP))
        else:
            lane, rank = uint32(me % uint32(side)), uint32(me // uint32(side))
        map = uint32(uint32(uint32(cuda.blockIdx.x) * uint32(side)) + lane)
        p = first_of(a0, a1, a2, a3, a4, a5)
        zero = real(0)
        state = begin(zero, int32(rank), zero, zero)
        if map < maps:
            n, c = quotient_of(map, C, mC, sC)
            base = uint32(uint32(n * in_n) + uint32(c * in_c))
            at = rank
            while at < size:
                part, end = begin(zero, int32(at), zero, zero), uint32(at + uint32(CHAIN * sharing))
                end = end if end < size else size
                while at < end:
                    if dense:
                        place = uint32(base + uint32(at * in_w))
                    else:
                        q, w = quotient_of(at, W, mW, sW)
                        d, h = quotient_of(q, H, mH, sH)
                        place = strided(base, d, h, w, in_d, in_h, in_w)
                    part = step(part, take(x[place]), int32(at), p)
                    at = uint32(at + uint32(sharing))
                state = combine(state, part)
        if by_warps:
            state = of_warp(state)
        else:
            arrays = arrays_of()
            put(arrays, me, together(state))
            cuda.syncthreads()
            half = uint32(sharing // 2)
            while half > uint32(0):
                if rank < half:
                    state = combine(state, apart(get(arrays, uint32(me + uint32(half * uint32(side))))))
                    put(arrays, me, together(state))
                cuda.syncthreads()
                half = uint32(half >> one)
        if rank == uint32(0) and map < maps:
            value, rest = finish(state, real(size), real(size), p)
            y[map] = write(value)
            if saves:
                kept[map] = keeps(rest)

    number = types.float64 if dtype == "float64" else types.float32
    pointers = map(types.CPointer, (stored(dtype), stored(dtype), keeps))
    return kernel, (*pointers, *(uint32,) * (1 + 9 + 1 + 5), *(number,) * PARAMETERS)


@specialised
def backward(kind, dtype, saved, last):
    """Arguments: gx, gy, saved, x, y; elements of gx; C, D, H and W as divisors; elements of a map; x's strides; the reduction's
    parameters.  A thread an element of the input."""
    A, real = arithmetic(kind), computed(dtype)
    share, reads_values, reads_saved = A.share, A.reads_values, A.reads_saved
    where, take, write, first_of = place_of(last), read(dtype), written(dtype), first_parameters(len(kind.parameters))
    rest_of = int32 if kind.selects else real

    def kernel(
        gx, gy, kept, x, y, total, C, mC, sC, D, mD, sD, H, mH, sH, W, mW, sW, size, in_n, in_c, in_d, in_h, in_w,
        a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        n, c, d, h, w = where(t, (C, mC, sC), (D, mD, sD), (H, mH, sH), (W, mW, sW))
        p = first_of(a0, a1, a2, a3, a4, a5)
        zero, map = real(0), uint32(uint32(n * C) + c)
        value, result = zero, zero
        if reads_values:
            value = take(x[strided(uint32(uint32(n * in_n) + uint32(c * in_c)), d, h, w, in_d, in_h, in_w)])
            result = take(y[map])
        rest = rest_of(kept[map]) if reads_saved else rest_of(0)
        tap = int32(uint32(uint32(uint32(uint32(d * H) + h) * W) + w))
        gx[t] = write(share(take(gy[map]), value, result, rest, tap, real(size), real(size), p))

    number = types.float64 if dtype == "float64" else types.float32
    own = stored(dtype)
    pointers = map(types.CPointer, (own, own, stored(saved or "uint8"), own, own))
    return kernel, (*pointers, *(uint32,) * (1 + 12 + 1 + 5), *(number,) * PARAMETERS)
