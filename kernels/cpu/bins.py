"""Loop nests over contiguous maps for windows that lie side by side: a map in one piece (global), adaptive bins, strides over MOST_STRIDE.

Lanes run along a row.  The rows of a row of windows become one row of partial results, in L1; of it each window takes its columns as one
register, and as many windows as there are lanes are combined across lanes at once.  A job is a row of outputs, or of inputs, of one plane.
"""

from numba import int32, int64

from ..compile import specialised
from ..simd import (
    between,
    convert,
    integers,
    lane_index,
    load,
    load_each,
    load_masked,
    load_one,
    number,
    numbers,
    pointer,
    settle,
    splat,
    stacked,
    store,
    store_each,
    store_masked,
    store_past,
    unroll,
    where,
    where_each,
)
from . import ahead
from .number import jitable
from .reduction import arithmetic, arrays, bare, members, tupled
from .sums import transposed

CHUNK = 1024
"""Columns whose states are in L1 while the rows of their windows are read.  8x256x56x56 to 7x7, ms: max 0.98, avg 0.74; with each window's
states in L1 and its rows read window by window, lanes that lie outside masked, 6.9 and 6.5 (PyTorch 8.4 and 2.2; one core, Zen 5)."""

ROWS = 4
"""Rows that go into a register of states at once; 8 are as quick."""


@specialised
def forward(kind, dtype, saved, saves, lanes):
    """Arguments: x, y, saved; tables: spans of slices, rows and columns, counts of the same; C, OD, OH, OW; x's strides of N, C, D and
    H, and its end; dilated strides of slices and rows; KD, KH, KW; the seed's halves; the reduction's parameters.  y and
    saved are dense."""
    A, P, L, real, parts = arithmetic(kind), len(kind.parameters), lanes, number(dtype), members(kind, number(dtype))
    neutral, begin, step, combine, finish = A.neutral, A.begin, A.step, A.combine, A.finish
    scratch, bare_of, tuple_of, across = arrays(parts, lanes * lanes), bare(parts), tupled(parts), transposed(combine, parts, lanes)
    chunk = arrays(parts, CHUNK + lanes)

    far, ask, counts_taps = ahead.distance(dtype), ahead.asking(dtype), kind.selects

    @jitable
    def empty(tap):
        """Before any element; ``tap`` is the first to come, which stays chosen where none is above -inf."""
        zero = splat(real(0), L)
        return begin(zero, splat(int32(tap), L), zero, zero)

    def reducing(rows):
        """(columns, count, fresh, args): ``rows`` rows of the input into what is known of its columns, or what first is."""

        @jitable
        def add(state, i, args):
            x, at, apart, taps, KW, _, _, p = args
            ask(x, at + i * apart + far, L)
            return step(state, load(x, at + i * apart, L), taps + splat(int32(i * KW), L), p)

        @jitable
        def add_last(state, i, args):
            x, at, apart, taps, KW, x_end, fill, p = args
            here = at + i * apart
            return step(state, load_masked(x, here, between(here, 1, here, x_end, L), fill), taps + splat(int32(i * KW), L), p)

        @jitable
        def reduce(columns, count, fresh, args):
            x, line, apart, tap, KW, x_end, fill, p = args
            zero = splat(real(0), L)
            for at in range(0, count, L):
                taps = splat(int32(tap + at), L) + lane_index(int32, L)
                state = begin(zero, taps, zero, zero) if fresh else bare_of(load_each(columns, at, L))
                here = x, line + at, apart, taps, KW, x_end, fill, p
                last = line + at + (rows - 1) * apart + L > x_end
                state = unroll(add_last, rows, state, here) if last else unroll(add, rows, state, here)
                store_each(columns, at, tuple_of(state))

        return reduce

    @jitable
    def taken(columns, first, end, empty):
        """What a window takes of the columns."""
        if end - first <= L:
            return where_each(between(0, 1, 0, max(0, end - first), L), load_each(columns, first, L), empty)
        state = empty
        for at in range(first, end, L):
            both = tuple_of(combine(bare_of(state), bare_of(load_each(columns, at, L))))
            state = where_each(between(at, 1, at, end, L), both, state)
        return state

    one_row, rows_together = reducing(1), reducing(ROWS)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        spans_d, spans_h, spans_w = pointer(args, 3, int64), pointer(args, 4, int64), pointer(args, 5, int64)
        counts_d, counts_h, counts_w = pointer(args, 6, real), pointer(args, 7, real), pointer(args, 8, real)
        C, OD, OH, OW, stride_n, stride_c, stride_d, stride_h, x_end, step_d, step_h, KD, KH, KW = integers(args, 9, 14)
        p = numbers(args, 25, P, real, L)
        fill, size = neutral(splat(real(0), L)), splat(real(KD * KH * KW), L)
        states, columns, counts, origins = scratch(), chunk(), stacked(L, real), stacked(L, int32)
        plane, od, oh, ow = start // (OD * OH), start // OH % OD, start % OH, 0
        n, c = plane // C, plane % C
        # Where more columns lie between windows than in them, each goes by itself.
        together = 1 if OW > 1 and spans_w[3] - spans_w[0] > 2 * KW else OW
        for out in range(start * OW, stop * OW, L):
            filled, several = 0, min(L, stop * OW - out)
            for i in range(several, L):
                store_each(states, i * L, tuple_of(empty(0)))
                counts[i] = real(1)  # or these lanes would divide integers by what lies on the stack
            while filled < several:
                # The windows of one row of outputs go through their rows together, so that memory is read in its order.
                run, row_count = min(OW - ow, several - filled, together), counts_d[od] * counts_h[oh]
                source = n * stride_n + c * stride_c + spans_d[3 * od] * stride_d + spans_h[3 * oh] * stride_h
                d0, d1, h0, h1 = spans_d[3 * od + 1], spans_d[3 * od + 2], spans_h[3 * oh + 1], spans_h[3 * oh + 2]
                low = spans_w[3 * ow] + spans_w[3 * ow + 1]
                high = spans_w[3 * (ow + run) - 3] + spans_w[3 * (ow + run) - 1] if d0 < d1 and h0 < h1 else low
                for left in range(low, max(high, low + 1), CHUNK):
                    count, fresh = min(CHUNK, high - left), True
                    for kd in range(d0, d1):
                        kh = h0
                        while kh < h1:
                            line, tap = source + kd * step_d + kh * step_h + left, (kd * KH + kh) * KW + left - low
                            given = x, line, step_h, tap, KW, x_end, fill, p
                            if kh + ROWS <= h1:
                                rows_together(columns, count, fresh, given)
                                kh += ROWS
                            else:
                                one_row(columns, count, fresh, given)
                                kh += 1
                            fresh = False
                    for i in range(run):
                        span, place = 3 * (ow + i), filled + i
                        origin = spans_w[span] - low
                        end = min(count, spans_w[span] + spans_w[span + 2] - left)
                        first = min(max(0, spans_w[span] + spans_w[span + 1] - left), max(0, end))
                        state = taken(columns, first, end, tuple_of(empty((d0 * KH + h0) * KW + origin + spans_w[span + 1])))
                        if left > low:
                            state = tuple_of(combine(bare_of(load_each(states, place * L, L)), bare_of(state)))
                        else:
                            counts[place], origins[place] = row_count * counts_w[ow + i], int32(origin)
                        store_each(states, place * L, state)
                filled, ow = filled + run, ow + run
                if ow == OW:
                    ow, oh = 0, oh + 1
                    if oh == OH:
                        oh, od = 0, od + 1
                        if od == OD:
                            od, c = 0, c + 1
                            if c == C:
                                c, n = 0, n + 1
            value, choice = finish(across(states), load(counts, 0, L), size, p)
            if counts_taps:  # from the window's own origin; below 0 is none
                choice = where(choice < splat(int32(0), L), choice, choice - load(origins, 0, L))
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


def _gradients_arguments(dtype, saved, lanes, count):
    """(args) -> what ``backward`` lists: five arrays, three tables, three of counts, sizes, the reduction's ``count`` parameters."""
    real = number(dtype)

    @jitable
    def given(args):
        arrays = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved), pointer(args, 3, dtype), pointer(args, 4, dtype)
        tables = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        counts = pointer(args, 8, real), pointer(args, 9, real), pointer(args, 10, real)
        return arrays, tables, counts, integers(args, 11, 14), numbers(args, 25, count, real, lanes)

    return given


@specialised
def spread(kind, dtype, saved, lanes):
    """The gradient where every element of x lies in exactly one window and rows are of up to CHUNK elements: what a row of windows gives
    is spread over its columns, in L1, for all of its rows.  8x256x56x56 to 7x7, forward and this: max 11.4 ms became 2.3.

    Jobs and arguments: as backward's."""
    A, L, real, residue = arithmetic(kind), lanes, number(dtype), number(saved)
    given = _gradients_arguments(dtype, saved, lanes, len(kind.parameters))
    share, reads_values, reads_saved, room = A.share, A.reads_values, A.reads_saved, CHUNK + lanes

    def kernel(args, start, stop):
        (gx, gy, kept, x, y), (pairs_d, pairs_h, spans_w), (counts_d, counts_h, counts_w), sizes, p = given(args)
        C, D, H, W, OD, OH, OW, stride_n, stride_c, stride_d, stride_h, KD, KH, KW = sizes
        zero, nothing, size = splat(real(0), L), splat(residue(0), L), splat(real(KD * KH * KW), L)
        taps, counts, gradients = stacked(room, int32), stacked(room, real), stacked(room, real)
        values, chosen = stacked(room, real), stacked(room, residue)
        # A window's last register runs over its end, into what the next one is about to write.
        for ow in range(OW):
            first, count = spans_w[3 * ow], splat(counts_w[ow], L)
            for at in range(first + spans_w[3 * ow + 1], first + spans_w[3 * ow + 2], L):
                store(taps, at, splat(int32(at - first), L) + lane_index(int32, L))
                store(counts, at, count)
        before = -1
        for job in range(start, stop):
            plane, r = job // (D * H), job % (D * H)
            slice_, line = r // H, r % H
            d, h = pairs_d[slice_], pairs_h[line]
            od, oh = pairs_d[d], pairs_h[h]
            outputs = (plane * OD + od) * OH + oh
            if outputs != before:
                before = outputs
                for ow in range(OW):
                    first, out = spans_w[3 * ow], outputs * OW + ow
                    for at in range(first + spans_w[3 * ow + 1], first + spans_w[3 * ow + 2], L):
                        store(gradients, at, load_one(gy, out, L))
                        if reads_values:
                            store(values, at, load_one(y, out, L))
                        if reads_saved:
                            store(chosen, at, load_one(kept, out, L))
            row = plane // C * stride_n + plane % C * stride_c + slice_ * stride_d + line * stride_h
            tap, rows = splat(int32((pairs_d[d + 1] * KH + pairs_h[h + 1]) * KW), L), splat(counts_d[od] * counts_h[oh], L)
            for at in range(0, W, L):
                whole, inside = at + L <= W, between(at, 1, 0, W, L)
                v, s = (load(values, at, L) if reads_values else zero), (load(chosen, at, L) if reads_saved else nothing)
                here = zero
                if reads_values:
                    here = load(x, row + at, L) if whole else load_masked(x, row + at, inside, zero)
                tap_here = convert(tap + load(taps, at, L), residue)
                found = share(load(gradients, at, L), here, v, s, tap_here, rows * load(counts, at, L), size, p)
                if whole:
                    store(gx, job * W + at, found)
                else:
                    store_masked(gx, job * W + at, found, inside)

    return kernel


@specialised
def backward(kind, dtype, saved, lanes, once, past):
    """Arguments: gx, gy, saved, x, y; tables: the windows of each slice and of each row, spans of columns, counts of slices, rows and
    columns; C, D, H, W, OD, OH, OW; x's strides of N, C, D and H; KD, KH, KW; the reduction's parameters.  gx, gy, saved and y are dense;
    x and y are read only by a reduction whose gradient needs them.  ``once``: every element of x lies in exactly one window.
    ``past``: then gx, windows of whole cache lines, is written past the caches."""
    A, L, real, residue = arithmetic(kind), lanes, number(dtype), number(saved)
    given = _gradients_arguments(dtype, saved, lanes, len(kind.parameters))
    share, reads_values, reads_saved, put = A.share, A.reads_values, A.reads_saved, store_past if past else store

    def kernel(args, start, stop):
        (gx, gy, kept, x, y), (pairs_d, pairs_h, spans_w), (counts_d, counts_h, counts_w), sizes, p = given(args)
        C, D, H, W, OD, OH, OW, stride_n, stride_c, stride_d, stride_h, KD, KH, KW = sizes
        zero, nothing, size = splat(real(0), L), splat(residue(0), L), splat(real(KD * KH * KW), L)
        for job in range(start, stop):
            plane, r = job // (D * H), job % (D * H)
            slice_, line = r // H, r % H
            row, target = plane // C * stride_n + plane % C * stride_c + slice_ * stride_d + line * stride_h, job * W
            if not once:
                for at in range(0, W, L):
                    if at + L <= W:
                        store(gx, target + at, zero)
                    else:
                        store_masked(gx, target + at, zero, between(at, 1, 0, W, L))
            for i in range(pairs_d[slice_], pairs_d[slice_ + 1], 2):
                for j in range(pairs_h[line], pairs_h[line + 1], 2):
                    od, oh = pairs_d[i], pairs_h[j]
                    base = (pairs_d[i + 1] * KH + pairs_h[j + 1]) * KW
                    for ow in range(OW):
                        out, first = ((plane * OD + od) * OH + oh) * OW + ow, spans_w[3 * ow]
                        left, right = first + spans_w[3 * ow + 1], first + spans_w[3 * ow + 2]
                        g, count = load_one(gy, out, L), splat(counts_d[od] * counts_h[oh] * counts_w[ow], L)
                        v = load_one(y, out, L) if reads_values else zero
                        s = load_one(kept, out, L) if reads_saved else nothing
                        for at in range(left, right, L):
                            tap = convert(splat(int32(base + at - first), L) + lane_index(int32, L), residue)
                            if at + L <= right:
                                here = load(x, row + at, L) if reads_values else zero
                                part = share(g, here, v, s, tap, count, size, p)
                                put(gx, target + at, part if once else load(gx, target + at, L) + part)
                            else:
                                tail = between(at, 1, 0, right, L)
                                here = load_masked(x, row + at, tail, zero) if reads_values else zero
                                part = share(g, here, v, s, tap, count, size, p)
                                if not once:
                                    part = part + load_masked(gx, target + at, tail, zero)
                                store_masked(gx, target + at, part, tail)
        if past:
            settle()

    return kernel
