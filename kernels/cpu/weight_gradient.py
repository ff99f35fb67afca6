"""The gradient of a convolution's weights: a sum over pixels of x times gy, with lanes across output channels.

Of a band of output rows x and gy are packed pixel by pixel, channels side by side.  Then what a pixel of gy meets of a row of x, all taps
along the row of all channels, is one *run* of consecutive numbers, and ``rows`` of them by ``cols`` registers of output channels are a
tile, which takes a pixel a step.  Sums over a band stay in registers; bands are added in memory, in their order.  A job
has some of the output channels, or where weights are few, some of the bands, whose sums are added at last: jobs do not depend on how
many threads there are, and so results do not.
"""

import functools

from numba import int64

from ..compile import specialised
from ..simd import (
    between,
    integers,
    load,
    load_masked,
    number,
    phase,
    pointer,
    pointer_at,
    prefetch,
    repeat,
    splat,
    store,
    store_masked,
    unroll,
    with_phase,
)
from ..tile import add_outer, columns, load_apart, store_apart, tile_of
from . import panel
from .number import jitable

AHEAD = 8
"""Pixels ahead for which x is asked for."""


@jitable
def _keep(found, i, args):
    """The i-th register to y[to + i * step], under a mask unless it is ``whole``; of so many."""
    y, to, step, count, whole, mask = args
    if i < count:
        if whole:
            store(y, to + i * step, phase(found, i))
        else:
            store_masked(y, to + i * step, phase(found, i), mask)
    return found


@functools.cache
def _by_pixel_from_planes(dtype, lanes):
    """(x, at, xc, xw, panel, to, channels, pitch, first, width, W): a row of contiguous maps, pixel by pixel; pitch: a pixel's numbers."""
    real, L = number(dtype), lanes

    @jitable
    def channel(rows, i, args):
        x, at, step, left, mask, zero = args
        return with_phase(rows, i, load_masked(x, at + i * step, mask, zero) if i < left else zero)

    @jitable
    def pack(x, at, xc, xw, panel, to, channels, pitch, first, width, W):
        zero = splat(real(0), L)
        for j in range(0, width, L):
            low, high = max(0, -(first + j)), max(0, min(L, W - first - j))
            mask = between(0, 1, min(low, high), high, L)
            for c in range(0, pitch, L):
                if high - low == L and j + L <= width and c + L <= min(channels, pitch):
                    whole = columns(load_apart(x, at + c * xc + first + j, xc, L))
                    store_apart(panel, to + j * pitch + c, pitch, whole)
                    continue
                found = unroll(channel, L, repeat(zero, L), (x, at + c * xc + first + j, xc, channels - c, mask, zero))
                ends = between(c, 1, 0, pitch, L)
                unroll(_keep, L, columns(found), (panel, to + j * pitch + c, pitch, width - j, c + L <= pitch, ends))

    return pack


@specialised
def backward(dtype, lanes, rows, cols, pixels):
    """Jobs: (slice of the bands, group, chunk of ``per`` blocks of cols * lanes output channels).  ``pixels``: the maps are channels_last.

    Arguments: x, gy, sums, panels, jobs a thread; addresses of the lines of x and of gy, and of the runs' first numbers in a panel;
    sizes, see weight_plans.py."""
    real, R, C, L, B, whole = number(dtype), rows, cols, lanes, cols * lanes, rows * cols
    pack = (panel.row_of_pixels if pixels else _by_pixel_from_planes)(dtype, lanes)

    @jitable
    def put(tile, i, args):
        sums, at, fresh = args
        value = phase(tile, i)
        store(sums, at + i * L, value if fresh else value + load(sums, at + i * L, L))
        return tile

    def kernel(args, start, stop):
        x, gy, sums = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, real)
        panels, grain = integers(args, 3, 2)
        lines, outs, runs = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        N, IC, OC, chunks, blocks, per, OD, OH, OW, band_height, bands = integers(args, 8, 11)
        KP, Q, RQ, width, first, W, S, xn, xc, xw, yn, yc, yw = integers(args, 19, 13)
        rowstep, pitch, gy_panel, bytes_, count, length, tiles, near, slices, groups, x_pitch = integers(args, 32, 11)
        xs = pointer_at(panels + start // grain * bytes_, real)
        gys = pointer_at(panels + start // grain * bytes_ + gy_panel, real)
        zero = splat(real(0), L)
        for job in range(start, stop):
            part, g, chunk = job // (groups * chunks), job // chunks % groups, job % chunks
            block0 = chunk * per
            block1 = min(blocks, block0 + per)
            channel, left = g * OC + block0 * B, min(OC, block1 * B) - block0 * B
            mine = ((part * groups + g) * blocks + block0) * count * tiles * R * B
            begin, end = N * OD * bands * part // slices, N * OD * bands * (part + 1) // slices
            for band in range(begin, end):
                row0, slab = band % bands * band_height, band // bands
                od, n = slab % OD, slab // OD
                band_rows = min(band_height, OH - row0)
                for r in range(band_rows):
                    at = n * yn + channel * yc + outs[od * OH + row0 + r]
                    pack(gy, at, yc, yw, gys, r * OW * pitch, left, pitch, 0, OW, OW)
                for k in range(KP):
                    for q in range(band_rows + Q - OH):
                        line, to = lines[(od * KP + k) * Q + row0 + q], (k * RQ + q) * rowstep
                        if line < 0:
                            for j in range(0, rowstep, L):
                                store(xs, to + j, zero)
                        else:
                            pack(x, n * xn + g * IC * xc + line, xc, xw, xs, to, IC, x_pitch, first, width, W)
                for block in range(block1 - block0):
                    for r0 in range(0, band_rows, near):
                        r1, fresh = min(band_rows, r0 + near), band == begin and r0 == 0
                        for run in range(count):
                            for t in range(tiles):
                                origin = runs[run] + min(t * R, length - R)
                                tile = tile_of(R, repeat(zero, C))
                                for r in range(r0, r1):
                                    at, of_gy = origin + r * rowstep, r * OW * pitch + block * B
                                    for _ in range(OW):
                                        prefetch(xs, at + AHEAD * S * x_pitch)
                                        tile = add_outer(tile, xs, (at,), 0, 1, gys, of_gy, C)
                                        at += S * x_pitch
                                        of_gy += pitch
                                unroll(put, whole, tile, (sums, mine + ((block * count + run) * tiles + t) * R * B, fresh))

    return kernel


@specialised
def ordered(dtype, lanes, block):
    """Jobs: (group, block of output channels).  Arguments: gw, sums; address of where each weight of an output channel, in the order of gw,
    lies among its sums; weights of an output channel, output channels of a group, blocks, sums of a block, slices, sums of a slice."""
    real, L, B = number(dtype), lanes, block

    @jitable
    def total(rows, i, args):
        sums, at, sources, j, slices, apart = args
        first = at + sources[j + i]
        value = load(sums, first, L)
        for s in range(1, slices):
            value = value + load(sums, first + s * apart, L)
        return with_phase(rows, i, value)

    def kernel(args, start, stop):
        gw, sums, sources = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, int64)
        size, OC, blocks, each, slices, apart = integers(args, 3, 6)
        zero = splat(real(0), L)
        for job in range(start, stop):
            first, at = job % blocks * B, job * each
            to = (job // blocks * OC + first) * size
            for j in range(0, size, L):
                mask = between(j, 1, 0, size, L)
                for c in range(0, min(B, OC - first), L):
                    rows = unroll(total, L, repeat(zero, L), (sums, at + c, sources, j, slices, apart))
                    unroll(_keep, L, columns(rows), (gw, to + c * size + j, size, OC - first - c, j + L <= size, mask))

    return kernel
