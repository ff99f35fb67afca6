"""Panels: what a band of output rows reads of x, in the order it is read.

The rows of x that the band needs, of all channels, with zeros where they are padding, widened to the numbers that are computed with.
A panel is as large as a part of L2, packed once for a band, and read by every block of output channels.  Of contiguous maps memory is as
(row, channel, column): the taps of a channel lie in few cache lines, and channels follow each other; of channels_last maps as (row,
column, channel), as they lie, and so of a map that is one row, whose rows are tiles.

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
    prefetch,
    splat,
    store,
    store_masked,
    unroll,
)
from .ahead import distance
from .number import jitable

PLANES_AHEAD = 2
"""Channels ahead for which a row is asked for: the hardware starts anew at each, as a band's rows of it are a few KB.  3x3 of 128 channels
of 112x112 to 64, ms: 8.2 without, 8.0, 7.8 and 8.1 by 1, 2 and 4 ahead."""

CHANNELS_AHEAD = 4
"""Channels ahead for which a run is asked for: the hardware follows one, not the step to the next."""


@functools.cache
def _ends(lanes):
    """(panel, count, first, rowstep, zero): zeros at the end of each of so many rows.  Tiles read it for lanes that nobody stores; what
    was there before may be subnormal, and a multiply-add of such numbers takes 150 cycles: 5x5 of LeNet-5, 20 times slower."""
    L = lanes

    @jitable
    def clear(panel, count, first, rowstep, zero):
        for row in range(count):
            for j in range(first, rowstep, L):
                store(panel, row * rowstep + j, zero)

    return clear


@functools.cache
def _from_planes(dtype, lanes):
    """Packs a panel from contiguous maps: channel by channel, as they lie in memory.  Where width is a multiple of lanes stores are of
    whole cache lines: loads that lie in two cost less; else a row's last register runs into the next channel, which comes after."""
    real, L, clear = number(dtype), lanes, _ends(lanes)

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, C, KP, RQ, Q, width, first, W, xn, xc, _, rowstep = sizes
        zero = splat(real(0), L)
        clear(panel, images * KP * RQ, C * width, rowstep, zero)
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
                                prefetch(x, at + first + j + PLANES_AHEAD * xc)
                                if first + j >= 0 and first + j + L <= W:
                                    store(panel, to + j, load(x, at + first + j, L))
                                else:
                                    store(panel, to + j, load_phases_between(x, at, first + j, 0, W, 1, zero)[0])
                        to += rowstep

    return pack


@functools.cache
def row_of_pixels(dtype, lanes):
    """(x, at, xc, xw, panel, to, channels, pitch, first, width, W): copies a row of channels_last maps; pitch: a pixel's numbers there."""
    real, L, far = number(dtype), lanes, distance(dtype)

    @jitable
    def pack(x, at, xc, xw, panel, to, channels, pitch, first, width, W):
        zero = splat(real(0), L)
        if xw == pitch == channels:  # pixels follow each other here and there
            left = min(width, max(0, -first))
            right = max(left, min(width, W - first))
            for j in range(0, left * pitch, L):
                store(panel, to + j, zero)
            for j in range(left * pitch, right * pitch - L + 1, L):
                prefetch(x, at + first * xw + j + far)
                store(panel, to + j, load(x, at + first * xw + j, L))
            rest = max(left * pitch, right * pitch - (right - left) * pitch % L)
            for j in range(rest, right * pitch, L):
                mask = between(j, 1, 0, right * pitch, L)
                store_masked(panel, to + j, load_masked(x, at + first * xw + j, mask, zero), mask)
            for j in range(right * pitch, width * pitch, L):
                store_masked(panel, to + j, zero, between(j, 1, 0, width * pitch, L))
            return
        whole = min(channels, pitch) // L * L
        # Zeros behind a pixel's channels.
        some, there = between(whole, 1, 0, channels, L), between(whole, 1, 0, pitch, L)
        for j in range(width):
            pixel, source, inside = to + j * pitch, at + (first + j) * xw, 0 <= first + j < W
            if inside:
                for c in range(0, whole, L):
                    prefetch(x, source + c + far)
                    store(panel, pixel + c, load(x, source + c, L))
                if whole < pitch:
                    store_masked(panel, pixel + whole, load_masked(x, source + whole, some, zero), there)
            for c in range(whole + L if inside else 0, pitch, L):
                store_masked(panel, pixel + c, zero, between(c, 1, 0, pitch, L))

    return pack


@functools.cache
def _from_pixels(dtype, lanes, pitch):
    """Packs a panel from channels_last maps as they lie, so many numbers from pixel to pixel."""
    real, L = number(dtype), lanes
    row = row_of_pixels(dtype, lanes)

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, C, KP, RQ, Q, width, first, W, xn, xc, xw, rowstep = sizes
        zero = splat(real(0), L)
        for i in range(images):
            for k in range(KP):
                for q in range(rows):
                    start = lines[line + k * Q + q]
                    to = ((i * KP + k) * RQ + q) * rowstep
                    if start < 0:
                        for j in range(0, width * pitch, L):
                            store(panel, to + j, zero)
                    else:
                        row(x, source + i * xn + start, xc, xw, panel, to, C, pitch, first, width, W)

    return pack


@functools.cache
def _from_planes_by_phase(dtype, lanes, stride):
    """``_from_planes`` where columns that a stride skips between are side by side: phase p of a row's columns, p, p + stride, ..., from
    p * width / stride on.  A row is a multiple of stride registers."""
    real, L, S, clear = number(dtype), lanes, stride, _ends(lanes)

    @jitable
    def keep(found, p, args):
        panel, to, part = args
        store(panel, to + p * part, phase(found, p))
        return found

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, C, KP, RQ, Q, width, first, W, xn, xc, _, rowstep = sizes
        zero, part = splat(real(0), L), width // S
        clear(panel, images * KP * RQ, C * width, rowstep, zero)
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
def _from_runs(dtype, lanes, pixels):
    """Packs a panel from contiguous maps whose rows are so many pixels that follow each other; the last row overlaps the one before."""
    real, L, P, whole = number(dtype), lanes, pixels, pixels // lanes * lanes

    @jitable
    def run(x, at, ahead, panel, to, rest, zero):
        for j in range(0, whole, L):
            prefetch(x, at + j + ahead)
            store(panel, to + j, load(x, at + j, L))
        if whole < P:
            prefetch(x, at + whole + ahead)
            store(panel, to + whole, load_masked(x, at + whole, rest, zero))

    @jitable
    def pack(x, panel, source, line, images, rows, sizes):
        lines, C, _, RQ, _, width, _, _, xn, xc, _, rowstep = sizes
        zero, rest = splat(real(0), L), between(whole, 1, 0, P, L)
        for i in range(images):
            for c in range(C):
                plane, to = source + i * xn + c * xc, i * RQ * rowstep + c * width
                at = plane + lines[line]
                for q in range(rows - 1):
                    run(x, at + q * P, CHANNELS_AHEAD * xc, panel, to, rest, zero)
                    to += rowstep
                run(x, plane + lines[line + rows - 1], CHANNELS_AHEAD * xc, panel, to, rest, zero)

    return pack


def packing(dtype, lanes, stride=1, pitch=0, runs=0):
    """(x, panel, offset of the first channel of the first map, index of the first line, maps, rows, sizes): packs a panel; sizes are
    (lines; channels, planes, rows a plane of the panel and of lines, columns a row, the first one's position, columns of x, x's steps of
    maps, channels and pixels, the panel's of rows).  ``stride``: by phases of that; ``pitch``: from pixel to pixel, of channels_last maps;
    ``runs``: rows are so many pixels of a map that is one row."""
    if pitch:
        return _from_pixels(dtype, lanes, pitch)
    if runs:
        return _from_runs(dtype, lanes, runs)
    return _from_planes_by_phase(dtype, lanes, stride) if stride > 1 else _from_planes(dtype, lanes)


def over_bands(dtype, lanes, parameters, pack, work, per=1):
    """The worker of a nest whose jobs are (band, group, ``per`` blocks of output channels).  ``pack``: as ``packing`` makes it, or None
    where x is read where it lies; ``work`` does a job, from

    - memory: x, packed weights, y, the panel;
    - tables: lines of x; of y, each with the first and the end of the taps whose rows are not in the padding; the steps of a chain in
      the order of the weights and behind them, where a nest has them, what to ask for; the same of the last chain if it is shorter;
    - sizes: channels and output channels of a group, blocks, taps, channels of a chain; output rows of a map, outputs of a row; planes,
      rows of lines and of the panel; x's steps of maps, channels and pixels, y's; the panel's of channels and rows;
    - place: group, first block, first map and row (of lines of y), rows a map and maps of the band; x's first channel, its first line;
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
        lines, outs, steps = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        N, IC, OC, groups, blocks, T, together, OD, OH, OW, R, images, bands, KP, Q, RQ = integers(args, 8, 16)
        width, first, W, xn, xc, xw, yn, yc, yw, rowstep, panel_bytes = integers(args, 24, 11)
        p = numbers(args, 35, count, real, L)
        panel = pointer_at(panels + start // grain * panel_bytes, real)
        sizes = IC, OC, blocks, T, together, OH, OW, KP, Q, RQ, xn, xc, xw, yn, yc, yw, width, rowstep
        packed, chunks = -1, (blocks + per - 1) // per
        for job in range(start, stop):
            block, rest = job % chunks * per, job // chunks
            g, band = rest % groups, rest // groups
            row, slab = band % bands * R, band // bands
            od, n = slab % OD, slab // OD * images
            rows, maps = min(R, OH - row), min(images, N - n)
            source, line = n * xn + g * IC * xc, od * KP * Q + row
            if packs and packed != rest:
                packed = rest
                pack(x, panel, source, line, maps, rows + Q - OH, (lines, IC, KP, RQ, Q, width, first, W, xn, xc, xw, rowstep))
            place = g, block, n, od * OH + row, rows, maps, source, line
            work((x, w, y, panel), (lines, outs, steps), sizes, place, p)

    return kernel
