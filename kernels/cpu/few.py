"""Loop nests over channels_last maps of so few channels that they would leave most lanes empty: of an RGB image, 3 of 16.

A block of pixels is loaded and its channels taken apart in registers (``load_phases``).  Windows: the rows that a band of outputs needs are
taken apart into planes in the cache, pooled there by a nest of contiguous maps, and what comes out is put together again.  Whole maps:
each channel's register goes on by itself.  A job is a band of one image, or an image.
"""

from numba import int32, int64

from ..compile import specialised
from ..simd import (
    address,
    between,
    convert,
    integers,
    lane_index,
    load,
    load_one,
    load_phases,
    load_phases_between,
    number,
    numbers,
    phase,
    pointer,
    repeat,
    splat,
    stacked,
    store,
    store_each,
    store_masked,
    store_phases,
    store_phases_between,
    unroll,
    with_phase,
)
from . import bins
from .number import inlined, jitable
from .reduction import arithmetic, arrays, members, tupled
from .sums import cascade, transposed

MOST = 4
"""Channels."""

ROOM, STEP, SLACK, MOST_ARGUMENTS = 1 << 15, 64, 512, 64
"""Elements of a band's planes; between two of them, where a last block runs over; after the last, where some are read and thrown away; and
arguments of a nest."""


def _banded(nest, constants):
    """(arguments, plane, band, bands of a plane, its rows, the band's first row and end): another nest's worker for a band, inlined."""
    run, by_rows = inlined(nest, *constants), nest in (bins.forward, bins.spread, bins.backward)

    @jitable
    def pool(arguments, plane, b, bands, rows, first, end):
        if by_rows:
            run(arguments, plane * rows + first, plane * rows + end)
        else:
            run(arguments, plane * bands + b, plane * bands + b + 1)

    return pool


def _between(dtype, real, lanes, channels):
    """(apart, together): ``count`` pixels in memory to planes, ``step`` elements from one to the next, and back."""

    @jitable
    def stored(phases, c, args):
        planes, step, at = args
        store(planes, c * step + at, phase(phases, c))
        return phases

    @jitable
    def loaded(phases, c, args):
        planes, step, at = args
        return with_phase(phases, c, load(planes, c * step + at, lanes))

    @jitable
    def apart(x, first, planes, step, count):
        for at in range(0, count, lanes):
            if at + lanes <= count:
                phases = load_phases(x, first + at * channels, channels, lanes)
            else:
                phases = load_phases_between(x, first, at * channels, 0, count * channels, channels, splat(real(0), lanes))
            unroll(stored, channels, phases, (planes, step, at))

    @jitable
    def together(planes, step, y, first, count):
        for at in range(0, count, lanes):
            phases = unroll(loaded, channels, repeat(splat(real(0), lanes), channels), (planes, step, at))
            if at + lanes <= count:
                store_phases(y, first + at * channels, phases)
            else:
                store_phases_between(y, first, at * channels, 0, count * channels, phases)

    return apart, together


@specialised
def forward(dtype, saved, saves, lanes, channels, nest, *constants):
    """Arguments: x, y, saved; a table of each band's first row of x and the end of them; x's stride of N; H, W, OH, OW; bands of an image
    and rows of outputs of a band; elements between planes; how many arguments of ``nest`` follow, all but x, y and
    saved.  That nest sees one image of ``channels`` planes."""
    real, run = number(dtype), _banded(nest, constants)
    apart, together = _between(dtype, real, lanes, channels)
    _, kept_together = _between(saved, saved, lanes, channels)
    width, kept_width = real.bitwidth // 8, saved.bitwidth // 8
    room, kept_room = ROOM + SLACK, ROOM + SLACK if saves else 1

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        needed = pointer(args, 3, int64)
        stride_n, _, W, OH, OW, bands, band, step, count = integers(args, 4, 9)
        maps, outputs, chosen = stacked(room, real), stacked(room, real), stacked(kept_room, saved)
        arguments = stacked(MOST_ARGUMENTS, int64)
        for i in range(count):
            arguments[3 + i] = args[13 + i]
        for job in range(start, stop):
            n, b = job // bands, job % bands
            top, first = needed[2 * b], b * band
            rows = min(band, OH - first)
            apart(x, n * stride_n + top * W * channels, maps, step, (needed[2 * b + 1] - top) * W)
            arguments[0] = address(maps) - top * W * width
            for c in range(channels):
                plane = n * channels + c
                before = (plane * OH + first - c * band) * OW
                arguments[1], arguments[2] = address(outputs) - before * width, address(chosen) - before * kept_width
                run(arguments, plane, b, bands, OH, first, first + rows)
            out = (n * OH + first) * OW * channels
            together(outputs, band * OW, y, out, rows * OW)
            if saves:
                kept_together(chosen, band * OW, kept, out, rows * OW)

    return kernel


@specialised
def backward(kind, dtype, saved, lanes, channels, nest, *constants):
    """Arguments: gx, gy, saved, x, y; a table of each band's first row of outputs and the end of them; x's stride of N; H, W, OH, OW; bands
    of an image and rows of inputs of a band; elements between planes of outputs; how many arguments of ``nest`` follow.
    x and y are read only by a reduction whose gradient needs them."""
    A, real, residue, run = arithmetic(kind), number(dtype), number(saved), _banded(nest, constants)
    reads_values, reads_saved = A.reads_values, A.reads_saved
    apart, together = _between(dtype, real, lanes, channels)
    kept_apart, _ = _between(saved, residue, lanes, channels)
    width, kept_width = real.bitwidth // 8, residue.bitwidth // 8
    room, values_room, kept_room = ROOM + SLACK, ROOM + SLACK if reads_values else 1, ROOM + SLACK if reads_saved else 1

    def kernel(args, start, stop):
        gx, gy, kept, x, y = (
            pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved), pointer(args, 3, dtype), pointer(args, 4, dtype),
        )  # fmt: skip
        needed = pointer(args, 5, int64)
        stride_n, H, W, OH, OW, bands, band, step, count = integers(args, 6, 9)
        gradients, given, chosen = stacked(room, real), stacked(room, real), stacked(kept_room, residue)
        maps, outputs = stacked(values_room, real), stacked(values_room, real)
        arguments = stacked(MOST_ARGUMENTS, int64)
        for i in range(count):
            arguments[5 + i] = args[15 + i]
        for job in range(start, stop):
            n, b = job // bands, job % bands
            top, end, first = needed[2 * b], needed[2 * b + 1], b * band
            rows, out = min(band, H - first), (n * OH + top) * OW * channels
            apart(gy, out, given, step, (end - top) * OW)
            if reads_saved:
                kept_apart(kept, out, chosen, step, (end - top) * OW)
            if reads_values:
                apart(y, out, outputs, step, (end - top) * OW)
                apart(x, n * stride_n + first * W * channels, maps, band * W + STEP, rows * W)
            for c in range(channels):
                plane = n * channels + c
                before, outs = (plane * H + first - c * band) * W, (plane * OH + top) * OW - c * step
                arguments[0], arguments[3] = address(gradients) - before * width, address(maps) - first * W * width
                arguments[1], arguments[4] = address(given) - outs * width, address(outputs) - outs * width
                arguments[2] = address(chosen) - outs * kept_width
                run(arguments, plane, b, bands, H, first, first + rows)
            together(gradients, band * W, gx, (n * H + first) * W * channels, rows * W)

    return kernel


@specialised
def whole_forward(kind, dtype, saved, saves, lanes, channels):
    """Arguments: x, y, saved; pixels; x's stride of N; the seed's halves; the parameters.  Images are dense."""
    A, P, L, real, parts = arithmetic(kind), len(kind.parameters), lanes, number(dtype), members(kind, number(dtype))
    begin, step, one_combine, finish, neutral = A.begin, A.step, A.combine, A.finish, A.neutral
    scratch, tuple_of, across = arrays(parts, lanes * lanes), tupled(parts), transposed(A.combine, parts, lanes)

    @jitable
    def empty(args):
        zero, origin = splat(real(0), L), splat(int32(0), L)
        return repeat(begin(zero, origin, zero, zero), channels)

    @jitable
    def combined(states, c, others):
        return with_phase(states, c, one_combine(phase(states, c), phase(others, c)))

    @jitable
    def combine(states, others, args):
        return unroll(combined, channels, states, others)

    @jitable
    def stepped(states, c, args):
        values, tap, p = args
        return with_phase(states, c, step(phase(states, c), phase(values, c), tap, p))

    @jitable
    def block(start, stop, args):
        x, image, pixels, fill, p = args
        states = empty(args)
        for at in range(start, stop, L):
            if at + L <= pixels:
                values = load_phases(x, image + at * channels, channels, L)
            else:
                values = load_phases_between(x, image, at * channels, 0, pixels * channels, channels, fill)
            states = unroll(stepped, channels, states, (values, splat(int32(at), L) + lane_index(int32, L), p))
        return states

    everything = cascade(block, combine, empty, L)

    @jitable
    def laid(states, c, array):
        store_each(array, c * L, tuple_of(phase(states, c)))
        return states

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        pixels, stride_n = integers(args, 3, 2)
        p, fill, count, array = numbers(args, 7, P, real, L), neutral(splat(real(0), L)), splat(real(pixels), L), scratch()
        for i in range(channels, L):
            store_each(array, i * L, tuple_of(begin(fill, splat(int32(0), L), fill, fill)))
        for job in range(start, stop):
            states = everything(0, pixels, (x, job * stride_n, pixels, fill, p))
            unroll(laid, channels, states, array)
            value, choice = finish(across(array), count, count, p)
            mask = between(0, 1, 0, channels, L)
            store_masked(y, job * channels, value, mask)
            if saves:
                store_masked(kept, job * channels, convert(choice, saved), mask)

    return kernel


@specialised
def whole_backward(kind, dtype, saved, lanes, channels):
    """Jobs: (image, row).  Arguments: gx, gy, saved, x, y; rows, W; x's stride of N; the parameters.  Images are dense."""
    A, P, L, real, residue = arithmetic(kind), len(kind.parameters), lanes, number(dtype), number(saved)
    share, reads_values, reads_saved = A.share, A.reads_values, A.reads_saved

    @jitable
    def given(values, c, args):
        gy, kept, y, out, here, tap, count, p = args
        zero, nothing = splat(real(0), L), splat(residue(0), L)
        g = load_one(gy, out + c, L)
        v = load_one(y, out + c, L) if reads_values else zero
        s = load_one(kept, out + c, L) if reads_saved else nothing
        return with_phase(values, c, share(g, phase(here, c), v, s, tap, count, count, p))

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        x, y = pointer(args, 3, dtype), pointer(args, 4, dtype)
        H, W, stride_n = integers(args, 5, 3)
        p, zero, count = numbers(args, 8, P, real, L), splat(real(0), L), splat(real(H * W), L)
        for job in range(start, stop):
            n, row = job // H, job % H
            source, target = n * stride_n + row * W * channels, job * W * channels
            for w in range(0, W, L):
                here = repeat(zero, channels)
                if reads_values:
                    here = load_phases_between(x, source, w * channels, 0, W * channels, channels, zero)
                tap = convert(splat(int32(row * W + w), L) + lane_index(int32, L), residue)
                values = unroll(given, channels, repeat(zero, channels), (gy, kept, y, n * channels, here, tap, count, p))
                if w + L <= W:
                    store_phases(gx, target + w * channels, values)
                else:
                    store_phases_between(gx, target, w * channels, 0, W * channels, values)

    return kernel
