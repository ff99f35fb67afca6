"""Loop nests of global pooling, whose window is the map: no geometry, one output a plane.

Four accumulators hide the latency of a step.  Sums cascade: DEPTH steps make a block, DEPTH blocks a larger one, and so on, so that an
element goes through four chains of 16 and one of n / 65536 steps, and the error stays beside that of torch's cascade sum.
"""

from numba import int32

from ..compile import specialised
from ..simd import (
    between,
    convert,
    first_lane,
    lane_index,
    load,
    load_masked,
    numbers,
    pointer,
    splat,
    store,
    store_masked,
    swap_lanes,
)
from .number import jitable
from .reduction import arithmetic

DEPTH, LEVELS = 16, 4


def _cascade(block, combine, empty, unit):
    """(start, stop, args) -> the state of elements start .. stop - 1; ``block`` does it for up to DEPTH * unit of them."""

    def larger(smaller, size):
        @jitable
        def blocks(start, stop, args):
            total = empty()
            for at in range(start, stop, size):
                total = combine(total, smaller(at, min(stop, at + size), args))
            return total

        return blocks

    size = unit
    for _ in range(LEVELS):
        size *= DEPTH
        block = larger(block, size)
    return block


def _across_lanes(combine, lanes):
    """state -> state, each lane of which is all lanes combined."""

    def extended(reduce, distance):
        @jitable
        def more(state):
            state = reduce(state)
            return combine(state, swap_lanes(state, distance))

        return more

    reduce, distance = jitable(lambda state: state), 1
    while distance < lanes:
        reduce, distance = extended(reduce, distance), 2 * distance
    return reduce


@specialised
def forward_contiguous(kind, dtype, saved, saves, lanes):
    """Jobs: planes.  Arguments: x, y, saved; C; x's strides of N and C; rows of a map, their length and stride; the parameters."""
    A, P, L = arithmetic(kind), len(kind.parameters), lanes
    neutral, begin, step, combine, finish = A.neutral, A.begin, A.step, A.combine, A.finish
    across = _across_lanes(combine, lanes)

    @jitable
    def fetch(x, row, at, length, fill):
        if at + L <= length:
            return load(x, row + at, L)
        return load_masked(x, row + at, between(at, 1, 0, length, L), fill)

    @jitable
    def empty():
        zero, origin = splat(dtype(0), L), splat(int32(0), L)
        return begin(zero, origin, zero, zero)

    @jitable
    def block(start, stop, args):
        x, row, length, first, fill, p = args
        a = b = c = d = empty()
        for at in range(start, stop, 4 * L):
            tap = splat(int32(first + at), L) + lane_index(int32, L)
            a = step(a, fetch(x, row, at, length, fill), tap, p)
            b = step(b, fetch(x, row, at + L, length, fill), tap + splat(int32(L), L), p)
            c = step(c, fetch(x, row, at + 2 * L, length, fill), tap + splat(int32(2 * L), L), p)
            d = step(d, fetch(x, row, at + 3 * L, length, fill), tap + splat(int32(3 * L), L), p)
        return combine(combine(a, b), combine(c, d))

    whole_row = _cascade(block, combine, empty, 4 * L)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        C, stride_n, stride_c, rows, length, stride_h = args[3], args[4], args[5], args[6], args[7], args[8]
        p = numbers(args, 9, P, dtype, L)
        fill, count = neutral(splat(dtype(0), L)), splat(dtype(rows * length), L)
        for plane in range(start, stop):
            source, total = plane // C * stride_n + plane % C * stride_c, empty()
            for r in range(rows):
                total = combine(total, whole_row(0, length, (x, source + r * stride_h, length, r * length, fill, p)))
            value, choice = finish(across(total), count, count, p)
            y[plane] = first_lane(value)
            if saves:
                kept[plane] = first_lane(convert(choice, saved))

    return kernel


@specialised
def backward_contiguous(kind, dtype, saved, lanes):
    """Jobs: planes.  Arguments: gx, gy, saved, x, y; C; x's strides of N and C; rows, length, row stride; the parameters."""
    A, P, L = arithmetic(kind), len(kind.parameters), lanes
    share, reads_values, reads_saved = A.share, A.reads_values, A.reads_saved

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        x, y = pointer(args, 3, dtype), pointer(args, 4, dtype)
        C, stride_n, stride_c, rows, length, stride_h = args[5], args[6], args[7], args[8], args[9], args[10]
        p = numbers(args, 11, P, dtype, L)
        zero, nothing = splat(dtype(0), L), splat(saved(0), L)
        count = splat(dtype(rows * length), L)
        for plane in range(start, stop):
            source = plane // C * stride_n + plane % C * stride_c
            g = splat(gy[plane], L)
            v = splat(y[plane], L) if reads_values else zero
            s = splat(kept[plane], L) if reads_saved else nothing
            for r in range(rows):
                row, target = source + r * stride_h, (plane * rows + r) * length
                for at in range(0, length, L):
                    tap = convert(splat(int32(r * length + at), L) + lane_index(int32, L), saved)
                    if at + L <= length:
                        here = load(x, row + at, L) if reads_values else zero
                        store(gx, target + at, share(g, here, v, s, tap, count, count, p))
                    else:
                        tail = between(at, 1, 0, length, L)
                        here = load_masked(x, row + at, tail, zero) if reads_values else zero
                        store_masked(gx, target + at, share(g, here, v, s, tap, count, count, p), tail)

    return kernel


@specialised
def forward_channels_last(kind, dtype, saved, saves, lanes):
    """Jobs: (image, 4 registers of channels).  Arguments: x, y, saved; C, H, W; x's strides of N, H and W; the parameters."""
    A, P, L = arithmetic(kind), len(kind.parameters), lanes
    neutral, begin, step, one_combine, finish = A.neutral, A.begin, A.step, A.combine, A.finish

    @jitable
    def fetch(x, pixel, c, C, fill):
        if c + L <= C:
            return load(x, pixel + c, L)
        return load_masked(x, pixel + c, between(c, 1, 0, C, L), fill)

    @jitable
    def empty():
        zero, origin = splat(dtype(0), L), splat(int32(0), L)
        state = begin(zero, origin, zero, zero)
        return state, state, state, state

    @jitable
    def combine(s, t):
        return one_combine(s[0], t[0]), one_combine(s[1], t[1]), one_combine(s[2], t[2]), one_combine(s[3], t[3])

    @jitable
    def block(start, stop, args):
        x, image, W, stride_h, stride_w, channel, C, fill, p = args
        a, b, c, d = empty()
        for pixel in range(start, stop):
            at, tap = image + pixel // W * stride_h + pixel % W * stride_w, splat(int32(pixel), L)
            a = step(a, fetch(x, at, channel, C, fill), tap, p)
            b = step(b, fetch(x, at, channel + L, C, fill), tap, p)
            c = step(c, fetch(x, at, channel + 2 * L, C, fill), tap, p)
            d = step(d, fetch(x, at, channel + 3 * L, C, fill), tap, p)
        return a, b, c, d

    whole_image = _cascade(block, combine, empty, 1)

    @jitable
    def put(y, kept, image, c, C, state, count, p):
        mask = between(c, 1, 0, C, L)
        value, choice = finish(state, count, count, p)
        store_masked(y, image + c, value, mask)
        if saves:
            store_masked(kept, image + c, convert(choice, saved), mask)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        C, H, W, stride_n, stride_h, stride_w = args[3], args[4], args[5], args[6], args[7], args[8]
        p = numbers(args, 9, P, dtype, L)
        fill, count = neutral(splat(dtype(0), L)), splat(dtype(H * W), L)
        blocks = (C + 4 * L - 1) // (4 * L)
        for job in range(start, stop):
            n, channel = job // blocks, job % blocks * 4 * L
            a, b, c, d = whole_image(0, H * W, (x, n * stride_n, W, stride_h, stride_w, channel, C, fill, p))
            put(y, kept, n * C, channel, C, a, count, p)
            put(y, kept, n * C, channel + L, C, b, count, p)
            put(y, kept, n * C, channel + 2 * L, C, c, count, p)
            put(y, kept, n * C, channel + 3 * L, C, d, count, p)

    return kernel


@specialised
def backward_channels_last(kind, dtype, saved, lanes):
    """Jobs: (image, row).  Arguments: gx, gy, saved, x, y; C, H, W; x's strides of N, H and W; the parameters.  gx is dense."""
    A, P, L = arithmetic(kind), len(kind.parameters), lanes
    share, reads_values, reads_saved = A.share, A.reads_values, A.reads_saved

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        x, y = pointer(args, 3, dtype), pointer(args, 4, dtype)
        C, H, W, stride_n, stride_h, stride_w = args[5], args[6], args[7], args[8], args[9], args[10]
        p = numbers(args, 11, P, dtype, L)
        zero, nothing = splat(dtype(0), L), splat(saved(0), L)
        count = splat(dtype(H * W), L)
        for job in range(start, stop):
            n, h = job // H, job % H
            for w in range(W):
                source, target = n * stride_n + h * stride_h + w * stride_w, (job * W + w) * C
                tap = convert(splat(int32(h * W + w), L), saved)
                for c in range(0, C, L):
                    mask, out = between(c, 1, 0, C, L), n * C + c
                    g = load_masked(gy, out, mask, zero)
                    here = load_masked(x, source + c, mask, zero) if reads_values else zero
                    v = load_masked(y, out, mask, zero) if reads_values else zero
                    s = load_masked(kept, out, mask, nothing) if reads_saved else nothing
                    store_masked(gx, target + c, share(g, here, v, s, tap, count, count, p), mask)

    return kernel
