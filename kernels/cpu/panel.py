"""Panels: what a band of output rows reads of x, in the order it is read.

The rows of x that the band needs, of all channels, with zeros where they are padding, widened to the numbers that are computed with.
A panel is as large as a part of L2, packed once for a band, and read by every block of output channels.  Memory is as (row, channel,
column): the taps of a channel lie in few cache lines, and channels follow each other.

``over_bands`` is what the nests that read panels share: their jobs.
"""

import functools

from numba import int64

from ..simd import (
    between,
    integers,
    load,
    load_masked,
    load_phases_between,
    number,
    numbers,
    phase,
    pointer,
    pointer_at,
    repeat,
    splat,
    store,
    unroll,
    with_phase,
)
from ..tile import columns, load_apart, store_apart
from .number import jitable


@functools.cache
def _from_planes(dtype, lanes):
    """Packs a panel from contiguous maps: channel by channel, as they lie in memory.  width is a multiple of lanes, so that stores are of
    whole cache lines: loads that lie in two cost less."""
    real, L = number(dtype), lanes

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, C, KP, RQ, Q, width, first, W, xn, xc, _, rowstep = sizes
        zero = splat(real(0), L)
        for c in range(C):
            for i in range(images):
                for k in range(KP):
                    to = (i * KP + k) * RQ * rowstep + c * width
                    for q in range(rows):
                        start = lines[line + k * Q + q]
                        if start < 0:
                            for j in range(0, width, L):
                                store(panel, to + j, zero)
                        else:
                            at = source + i * xn + c * xc + start
                            for j in range(0, width, L):
                                if first + j >= 0 and first + j + L <= W:
                                    store(panel, to + j, load(x, at + first + j, L))
                                else:
                                    store(panel, to + j, load_phases_between(x, at, first + j, 0, W, 1, zero)[0])
                        to += rowstep

    return pack


@functools.cache
def _from_pixels(dtype, lanes):
    """Packs a panel from channels_last maps: pixels of so many channels are transposed in registers.  width is a multiple of lanes."""
    real, L = number(dtype), lanes

    @jitable
    def pixel(rows, i, args):
        x, at, column, W, xw, mask, zero = args
        inside = 0 <= column + i < W
        return with_phase(rows, i, load_masked(x, at + (column + i) * xw, mask, zero) if inside else zero)

    @jitable
    def keep(found, i, args):
        panel, target, width, count = args
        if i < count:
            store(panel, target + i * width, phase(found, i))
        return found

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, C, KP, RQ, Q, width, first, W, xn, _, xw, rowstep = sizes
        zero = splat(real(0), L)
        for i in range(images):
            for k in range(KP):
                for q in range(rows):
                    start = lines[line + k * Q + q]
                    target = ((i * KP + k) * RQ + q) * rowstep
                    if start < 0:
                        for j in range(0, C * width, L):
                            store(panel, target + j, zero)
                    else:
                        for j in range(0, width, L):
                            for c in range(0, C, L):
                                at, mask = source + i * xn + start + c, between(c, 1, 0, C, L)
                                if c + L <= C and first + j >= 0 and first + j + L <= W:
                                    whole = columns(load_apart(x, at + (first + j) * xw, xw, L))
                                    store_apart(panel, target + c * width + j, width, whole)
                                    continue
                                found = columns(unroll(pixel, L, repeat(zero, L), (x, at, first + j, W, xw, mask, zero)))
                                unroll(keep, L, found, (panel, target + c * width + j, width, C - c))

    return pack


@functools.cache
def _from_planes_by_phase(dtype, lanes, stride):
    """``_from_planes`` where columns that a stride skips between are side by side: phase p of a row's columns, p, p + stride, ..., from
    p * width / stride on.  A row is a multiple of stride registers."""
    real, L, S = number(dtype), lanes, stride

    @jitable
    def keep(found, p, args):
        panel, to, part = args
        store(panel, to + p * part, phase(found, p))
        return found

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, C, KP, RQ, Q, width, first, W, xn, xc, _, rowstep = sizes
        zero, part = splat(real(0), L), width // S
        for c in range(C):
            for i in range(images):
                for k in range(KP):
                    to = (i * KP + k) * RQ * rowstep + c * width
                    for q in range(rows):
                        start = lines[line + k * Q + q]
                        if start < 0:
                            for j in range(0, width, L):
                                store(panel, to + j, zero)
                        else:
                            at = source + i * xn + c * xc + start
                            for j in range(0, part, L):
                                found = load_phases_between(x, at, first + j * S, 0, W, S, zero)
                                unroll(keep, S, found, (panel, to + j, part))
                        to += rowstep

    return pack


@functools.cache
def _from_few(dtype, lanes, channels):
    """``_from_pixels`` of 2 to 4 channels without a gap between pixels: a register of each is picked from as many."""
    real, L, C = number(dtype), lanes, channels

    @jitable
    def keep(found, c, args):
        panel, to, width = args
        store(panel, to + c * width, phase(found, c))
        return found

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, _, KP, RQ, Q, width, first, W, xn, _, _, rowstep = sizes
        zero = splat(real(0), L)
        for i in range(images):
            for k in range(KP):
                for q in range(rows):
                    start = lines[line + k * Q + q]
                    to = ((i * KP + k) * RQ + q) * rowstep
                    for j in range(0, width, L):
                        if start < 0:
                            found = repeat(zero, C)
                        else:
                            found = load_phases_between(x, source + i * xn + start, (first + j) * C, 0, W * C, C, zero)
                        unroll(keep, C, found, (panel, to + j, width))

    return pack


def packing(dtype, lanes, channels_last, stride=1, few=0):
    """(x, panel, offset of the first channel of the first map, index of the first line, maps, rows, sizes): packs a panel; sizes are
    (lines; channels, planes, rows a plane of the panel and of lines, columns a row, the first one's position, columns of x, x's steps of
    maps, channels and pixels, the panel's of rows).  ``stride``: by phases of that; ``few``: pixels of so many channels are dense."""
    if stride > 1:
        return _from_planes_by_phase(dtype, lanes, stride)
    if few > 1:
        return _from_few(dtype, lanes, few)
    return (_from_pixels if channels_last else _from_planes)(dtype, lanes)


def over_bands(dtype, lanes, parameters, pack, work):
    """The worker of a nest whose jobs are (band, group, block of output channels).  ``pack``: as ``packing`` makes it, or None where x is
    read where it lies; ``work`` does a job, from

    - memory: x, packed weights, y, the panel;
    - tables: lines of x, of y, taps;
    - sizes: channels and output channels of a group, blocks, taps; output rows of a map, outputs of a row; planes, rows of lines and of the
      panel; x's steps of maps, channels and pixels, y's; the panel's of channels and rows;
    - place: group, block, first map and row (of lines of y), rows a map and maps of the band; x's first channel, its first line;
    - the activation's ``parameters``.
    """
    real, L, count, packs = number(dtype), lanes, parameters, pack is not None
    if not packs:

        @jitable
        def pack(x, panel, source, line, images, rows, sizes):
            pass

    def kernel(args, start, stop):
        x, w, y = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, dtype)
        panels, grain = integers(args, 3, 2)
        lines, outs, taps = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        N, IC, OC, groups, blocks, T, OD, OH, OW, R, images, bands, KP, Q, RQ = integers(args, 8, 15)
        width, first, W, xn, xc, xw, yn, yc, yw, rowstep, panel_bytes = integers(args, 23, 11)
        p = numbers(args, 34, count, real, L)
        panel = pointer_at(panels + start // grain * panel_bytes, real)
        sizes = IC, OC, blocks, T, OH, OW, KP, Q, RQ, xn, xc, xw, yn, yc, yw, width, rowstep
        packed = -1
        for job in range(start, stop):
            block, rest = job % blocks, job // blocks
            g, band = rest % groups, rest // groups
            row, slab = band % bands * R, band // bands
            od, n = slab % OD, slab // OD * images
            rows, maps = min(R, OH - row), min(images, N - n)
            source, line = n * xn + g * IC * xc, od * KP * Q + row
            if packs and packed != rest:
                packed = rest
                pack(x, panel, source, line, maps, rows + Q - OH, (lines, IC, KP, RQ, Q, width, first, W, xn, xc, xw, rowstep))
            place = g, block, n, od * OH + row, rows, maps, source, line
            work((x, w, y, panel), (lines, outs, taps), sizes, place, p)

    return kernel
