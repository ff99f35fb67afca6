"""Loop nests for large windows of stride 1: the time does not depend on the window's area.

Rows first, by doubling: a window of k columns is made from windows of 1, 2, 4, ... columns, log2(k) combinations of shifted rows in
L1.  Then columns by van Herk's and Gil and Werman's two passes (van Herk, "A fast algorithm for local minimum and maximum filters",
1992): rows come in segments as long as the window, and a window is a suffix of one segment and a prefix of the next: three
combinations an output whatever the window's height.  Sums are made likewise, of sums only: nothing is subtracted, so that the error
is that of adding a window up, and NaN and infinity stay in theirs.

In channels_last maps a shift by one column is a shift by one register, and the same code runs; the next row of what is read and written
is asked for, as the hardware does not foresee one line of each pixel (8x256x56x56, 13x13: avg 17.6 to 6.9 ms, max 16 to 6.2).  A
job is one plane, or a register of channels of one image, at one depth; windows are one slice deep.
"""

from numba import int32, int64

from ..arithmetic import gift
from ..compile import specialised
from ..simd import (
    between,
    convert,
    integers,
    lane_index,
    load,
    load_each,
    load_masked,
    load_phases_between,
    number,
    numbers,
    phase,
    pointer,
    prefetch,
    splat,
    store,
    store_each,
    store_masked,
    where,
)
from .number import jitable
from .reduction import arithmetic, arrays, bare, carried

TILE = {False: 128, True: 16}
"""Columns that are worked on together, by channels_last: their segment of MOST rows stays in L2."""

MOST = 64
"""Rows and columns of the largest window."""

LARGEST_MAP = 1 << 15
"""Rows and columns of the largest map: while it is worked out a position is 16 bits of row and 16 of column."""


def _added(parts):
    """``merge`` of plain sums."""
    if len(parts) == 1:
        return jitable(lambda a, b, p: (a[0] + b[0],))
    return jitable(lambda a, b, p: (a[0] + b[0], a[1] + b[1]))


@specialised
def forward(kind, dtype, saved, saves, lanes, channels_last, gradient):
    """Arguments: x, y, saved; counts of slices, rows and columns; C, D, H, W, OH, OW; x's strides of N, C, D, H and W; KH, KW, PH, PW; the
    seed's halves; the reduction's parameters.  y and saved are dense.

    ``gradient``: that of a reduction that ``gives`` is a sum over windows too, of what each output gives.  Arguments: gx, gy, saved, x
    and y; the rest as above, where gy is the map that is read, and counts are those of its rows and columns, readable MOST columns
    before and after; x's strides in the place of the seed.  A linear reduction reads neither saved, x nor y.
    """
    P, L, real, selects = len(kind.parameters), lanes, number(dtype), kind.selects
    A = arithmetic(kind)
    neutral, finish, gives, takes, reads_values, reads_saved = A.neutral, A.finish, A.gives, A.takes, A.reads_values, A.reads_saved
    if gradient:
        parts = gift(kind, real)
        lift, merge = None, _added(parts)
    else:
        made = carried(kind, real, int32, lanes, saves)
        lift, merge, parts = made.lift, made.merge, made.parts
    state_of = bare(parts)
    first, residue = 5 if gradient else 3, number(saved)
    tile, unit = TILE[channels_last], lanes if channels_last else 1
    row_scratch, tile_scratch = arrays(parts, (tile + MOST) * unit + 2 * lanes), arrays(parts, tile * unit + lanes)
    segment_scratch = arrays(parts, MOST * tile * unit + lanes)

    @jitable
    def fetch(x, row, column, W, channel, C, stride_w, fill):
        """The register at a column of the map: of L columns from there, or of L channels."""
        if channels_last:
            if column < 0 or column >= W:
                return fill
            at = row + column * stride_w + channel
            if channel + L <= C:
                return load(x, at, L)
            return load_masked(x, at, between(channel, 1, 0, C, L), fill)
        if column >= 0 and column + L <= W:
            return load(x, row + column, L)
        if column + L <= 0 or column >= W:
            return fill
        return phase(load_phases_between(x, row, column, 0, W, 1, fill), 0)

    @jitable
    def columns_at(column, W):
        """The columns of a register's elements, those in padding moved to the edge: as taps they lose to the first inside."""
        zero, edge = splat(int32(0), L), splat(int32(W - 1), L)
        found = splat(int32(column), L) if channels_last else splat(int32(column), L) + lane_index(int32, L)
        found = where(found < zero, zero, found)
        return where(found > edge, edge, found)

    @jitable
    def one_zero():
        return (splat(real(0), L),)

    @jitable
    def two_zeros():
        return splat(real(0), L), splat(real(0), L)

    nothing = one_zero if len(parts) == 1 else two_zeros

    @jitable
    def windows_of_row(line, found, args):
        """Of one row, the states of ``length`` windows of KW columns, into ``found``."""
        x, row, h, column, length, W, KW, channel, C, stride_h, stride_w, fill, more, p = args
        end = (length + KW - 1) * unit
        for j in range(0, end, L):
            at = column + j // unit
            if channels_last:
                below = row + stride_h + at * stride_w + channel
                prefetch(x, below)
                if gradient and reads_values:
                    prefetch(more[0], below)
            v = fetch(x, row, at, W, channel, C, stride_w, fill)
            if gradient:
                y, kept, counts_h, counts_w, slice_count, size = more
                rest, out = splat(residue(0), L), fill
                if reads_values:
                    out = fetch(y, row, at, W, channel, C, stride_w, fill)
                if reads_saved:
                    rest = fetch(kept, row, at, W, channel, C, stride_w, rest)
                per_column = splat(counts_w[at], L) if channels_last else load(counts_w, at, L)
                store_each(line, j, gives(v, out, rest, splat(slice_count * counts_h[h], L) * per_column, size, p))
            else:
                store_each(line, j, lift(v, columns_at(at, W) + splat(int32(h << 16), L), p))
        width, done = 1, 0
        while True:
            if selects:
                if 2 * width > KW:
                    rest = (KW - width) * unit
                    for j in range(0, length * unit, L):
                        store_each(found, j, merge(load_each(line, j, L), load_each(line, j + rest, L), p))
                    break
            elif KW & width:
                for j in range(0, length * unit, L):
                    part = load_each(line, j + done * unit, L)
                    if done > 0:
                        part = merge(load_each(found, j, L), part, p)
                    store_each(found, j, part)
                done += width
                if done == KW:
                    break
            for j in range(0, end - (2 * width - 1) * unit, L):
                store_each(line, j, merge(load_each(line, j, L), load_each(line, j + width * unit, L), p))
            width *= 2

    def kernel(args, start, stop):
        target_at, source_at = (0, 1) if gradient else (1, 0)
        y, x, kept = pointer(args, target_at, dtype), pointer(args, source_at, dtype), pointer(args, 2, saved)
        counts_d, counts_h, counts_w = pointer(args, first, real), pointer(args, first + 1, real), pointer(args, first + 2, real)
        C, D, H, W, OH, OW, stride_n, stride_c, stride_d, stride_h, stride_w, KH, KW, PH, PW = integers(args, first + 3, 15)
        p = numbers(args, first + (23 if gradient else 20), P, real, L)
        fill, size = neutral(splat(real(0), L)), splat(real(KH * KW), L)
        if gradient:  # x and y are gy and gx here; these are those of the forward
            inputs, outputs = pointer(args, 3, dtype), pointer(args, 4, dtype)
            input_n, input_c, input_d, input_h, input_w = integers(args, first + 18, 5)
            fill = splat(real(0), L)
        line, found, prefix, segment = row_scratch(), tile_scratch(), tile_scratch(), segment_scratch()
        blocks = (C + L - 1) // L
        for job in range(start, stop):
            if channels_last:
                channel, d, n = job % blocks * L, job // blocks % D, job // blocks // D
                source, target, pixel = n * stride_n + d * stride_d, (n * D + d) * OH * OW * C + channel, C
                if gradient:
                    inputs_at, step_w = n * input_n + d * input_d + channel, input_w
            else:
                channel, d, n = job // D % C, job % D, job // D // C
                source, target, pixel = n * stride_n + channel * stride_c + d * stride_d, job * OH * OW, 1
                if gradient:
                    inputs_at, step_w = n * input_n + channel * input_c + d * input_d, 1
            whole, tail = channel + L <= C, between(channel, 1, 0, C, L)
            for begin in range(0, OW, tile):
                length = min(tile, OW - begin)
                for r in range(OH + KH - 1):
                    h, at, oh = r - PH, r % KH, r - KH + 1
                    if at == 0 and r > 0:
                        for i in range(KH - 2, -1, -1):
                            for j in range(i * tile * unit, (i * tile + length) * unit, L):
                                both = merge(load_each(segment, j, L), load_each(segment, j + tile * unit, L), p)
                                store_each(segment, j, both)
                    if 0 <= h < H:
                        row = source + h * stride_h
                        more = (outputs, kept, counts_h, counts_w, counts_d[d], size) if gradient else ()
                        windows_of_row(line, found, (x, row, h, begin - PW, length, W, KW, channel, C, stride_h, stride_w, fill, more, p))
                    elif h <= 0 or h == H:
                        for j in range(0, length * unit, L):
                            if gradient:
                                store_each(found, j, nothing())
                            else:
                                store_each(found, j, lift(fill, columns_at(begin - PW + j // unit, W), p))
                    for j in range(0, length * unit, L):
                        state = load_each(found, j, L)
                        store_each(segment, at * tile * unit + j, state)
                        if at > 0:
                            state = merge(load_each(prefix, j, L), state, p)
                        store_each(prefix, j, state)
                        if channels_last:
                            below = target + ((oh + 1) * OW + begin + j // unit) * pixel
                            prefetch(y, below)
                            if saves:
                                prefetch(kept, below)
                            if gradient and reads_values:
                                prefetch(inputs, inputs_at + (oh + 1) * input_h + (begin + j // unit) * step_w)
                        if oh >= 0:
                            if at < KH - 1:
                                state = merge(load_each(segment, (at + 1) * tile * unit + j, L), state, p)
                            ow = begin + j // unit
                            out = target + (oh * OW + ow) * pixel
                            if not channels_last:
                                whole, tail = ow + L <= OW, between(ow, 1, 0, OW, L)
                            if gradient:
                                here = fill
                                if reads_values:
                                    at_input = inputs_at + oh * input_h + ow * step_w
                                    here = load(inputs, at_input, L) if whole else load_masked(inputs, at_input, tail, fill)
                                value = takes(here, state, p)
                            elif not selects:
                                per_column = splat(counts_w[ow], L) if channels_last else load(counts_w, ow, L)
                                count = splat(counts_d[d] * counts_h[oh], L) * per_column
                                value, rest = finish(state_of(state), count, size, p)
                            if selects:
                                tap = splat(int32(0), L)
                                if saves:
                                    left = splat(int32(ow - PW), L)
                                    if not channels_last:
                                        left = left + lane_index(int32, L)
                                    low = splat(int32(0xFFFF), L)
                                    below = (state[1] >> splat(int32(16), L)) - splat(int32(oh - PH), L)
                                    tap = below * splat(int32(KW), L) + (state[1] & low) - left
                                value, rest = finish((state[0], tap), size, size, p)
                            if saves:
                                choice = convert(rest, saved)
                            if whole:
                                store(y, out, value)
                                if saves:
                                    store(kept, out, choice)
                            else:
                                store_masked(y, out, value, tail)
                                if saves:
                                    store_masked(kept, out, choice, tail)

    return kernel


@specialised
def scatter(dtype, saved, channels_last):
    """The gradient of a selecting pooling whose windows would be too many to gather from: each output's, added where it came from, one
    after the other within a plane, a job, and so always in the same order.

    Arguments: gx, gy, saved, two unused; spans of rows and columns; each tap's offset in the map; C, H, W, OH, OW; the
    number of taps.  All are dense.
    """

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        spans_h, spans_w, offsets = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        C, H, W, OH, OW, taps = integers(args, 8, 6)
        inner = C if channels_last else 1
        for job in range(start, stop):
            plane, out = job * H * W * inner, job * OH * OW * inner
            for i in range(H * W * inner):
                gx[plane + i] = dtype(0)
            for oh in range(OH):
                for ow in range(OW):
                    corner = plane + (spans_h[3 * oh] * W + spans_w[3 * ow]) * inner
                    for c in range(inner):
                        tap = int64(kept[out])
                        if tap < taps:
                            at = corner + offsets[tap] * inner + c
                            gx[at] = gx[at] + gy[out]
                        out += 1

    return kernel
