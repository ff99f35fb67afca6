"""Loop nests over contiguous maps for windows that lie side by side: a map in one piece (global), adaptive bins, strides over MOST_STRIDE.

Lanes run along a row inside one window.  As many windows as there are lanes go together: each has a register of partial results, in
L1 while its rows are read, and at the end all are combined across lanes at once.  A job is a row of outputs, or of inputs, of one plane.
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
    where,
)
from . import ahead
from .number import jitable
from .reduction import arithmetic, arrays, bare, members, tupled
from .sums import cascade, transposed


@specialised
def forward(kind, dtype, saved, saves, lanes):
    """Arguments: x, y, saved; tables: spans of slices, rows and columns, counts of the same; C, OD, OH, OW; x's strides of N, C, D and
    H, and its end; dilated strides of slices and rows; KD, KH, KW; the seed's halves; the reduction's parameters.  y and
    saved are dense."""
    A, P, L, real, parts = arithmetic(kind), len(kind.parameters), lanes, number(dtype), members(kind, number(dtype))
    neutral, begin, step, combine, finish = A.neutral, A.begin, A.step, A.combine, A.finish
    scratch, bare_of, tuple_of, across = arrays(parts, lanes * lanes), bare(parts), tupled(parts), transposed(combine, parts, lanes)

    far, ask = ahead.distance(dtype), ahead.asking(dtype)

    @jitable
    def fetch(x, row, at, length, x_end, fill):
        if at + L <= length:
            return load(x, row + at, L)
        inside = between(at, 1, 0, length, L)
        if row + at + L <= x_end:
            return where(inside, load(x, row + at, L), fill)
        return load_masked(x, row + at, inside, fill)

    @jitable
    def empty(tap):
        """Before any element; ``tap`` is the first to come, which stays chosen where none is above -inf."""
        zero = splat(real(0), L)
        return begin(zero, splat(int32(tap), L), zero, zero)

    @jitable
    def block(start, stop, args):
        x, row, length, x_end, first, fill, p = args
        a = b = c = d = empty(first + start)
        whole = start + (stop - start) // (4 * L) * (4 * L)
        for at in range(start, whole, 4 * L):
            tap = splat(int32(first + at), L) + lane_index(int32, L)
            ask(x, row + at + far, 4 * L)  # 8x64x112x112 global max 1.73 to 1.11 ms, l2 1.69 to 1.10
            a = step(a, load(x, row + at, L), tap, p)
            b = step(b, load(x, row + at + L, L), tap + splat(int32(L), L), p)
            c = step(c, load(x, row + at + 2 * L, L), tap + splat(int32(2 * L), L), p)
            d = step(d, load(x, row + at + 3 * L, L), tap + splat(int32(3 * L), L), p)
        for at in range(whole, stop, L):
            a = step(a, fetch(x, row, at, length, x_end, fill), splat(int32(first + at), L) + lane_index(int32, L), p)
        return combine(combine(a, b), combine(c, d))

    long_row, unit = cascade(block, combine, jitable(lambda args: empty(args[4])), 4 * L)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        spans_d, spans_h, spans_w = pointer(args, 3, int64), pointer(args, 4, int64), pointer(args, 5, int64)
        counts_d, counts_h, counts_w = pointer(args, 6, real), pointer(args, 7, real), pointer(args, 8, real)
        C, OD, OH, OW, stride_n, stride_c, stride_d, stride_h, x_end, step_d, step_h, KD, KH, KW = integers(args, 9, 14)
        p = numbers(args, 25, P, real, L)
        fill, size = neutral(splat(real(0), L)), splat(real(KD * KH * KW), L)
        states, counts = scratch(), stacked(L, real)
        plane, od, oh, ow = start // (OD * OH), start // OH % OD, start % OH, 0
        n, c = plane // C, plane % C
        for out in range(start * OW, stop * OW, L):
            filled, several = 0, min(L, stop * OW - out)
            for i in range(several, L):
                store_each(states, i * L, tuple_of(empty(0)))
            while filled < several:
                # The windows of one row of outputs go through their rows together, so that memory is read in its order.
                run, row_count = min(OW - ow, several - filled), counts_d[od] * counts_h[oh]
                source = n * stride_n + c * stride_c + spans_d[3 * od] * stride_d + spans_h[3 * oh] * stride_h
                row_tap = (spans_d[3 * od + 1] * KH + spans_h[3 * oh + 1]) * KW
                for i in range(run):
                    store_each(states, (filled + i) * L, tuple_of(empty(row_tap + spans_w[3 * (ow + i) + 1])))
                for kd in range(spans_d[3 * od + 1], spans_d[3 * od + 2]):
                    for kh in range(spans_h[3 * oh + 1], spans_h[3 * oh + 2]):
                        line, line_tap = source + kd * step_d + kh * step_h, (kd * KH + kh) * KW
                        for i in range(run):
                            first, at = spans_w[3 * (ow + i) + 1], (filled + i) * L
                            length, row, tap = spans_w[3 * (ow + i) + 2] - first, line + spans_w[3 * (ow + i)] + first, line_tap + first
                            state = bare_of(load_each(states, at, L))
                            if length <= 4 * L:
                                for there in range(0, length, L):
                                    taps = splat(int32(tap + there), L) + lane_index(int32, L)
                                    state = step(state, fetch(x, row, there, length, x_end, fill), taps, p)
                            elif length <= unit:
                                state = combine(state, block(0, length, (x, row, length, x_end, tap, fill, p)))
                            else:
                                state = combine(state, long_row(0, length, (x, row, length, x_end, tap, fill, p)))
                            store_each(states, at, tuple_of(state))
                for i in range(run):
                    counts[filled + i] = row_count * counts_w[ow + i]
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


@specialised
def backward(kind, dtype, saved, lanes, once, past):
    """Arguments: gx, gy, saved, x, y; tables: the windows of each slice and of each row, spans of columns, counts of slices, rows and
    columns; C, D, H, W, OD, OH, OW; x's strides of N, C, D and H; KD, KH, KW; the reduction's parameters.  gx, gy, saved and y are dense;
    x and y are read only by a reduction whose gradient needs them.  ``once``: every element of x lies in exactly one window.
    ``past``: then gx, windows of whole cache lines, is written past the caches."""
    A, P, L, real, residue = arithmetic(kind), len(kind.parameters), lanes, number(dtype), number(saved)
    share, reads_values, reads_saved, put = A.share, A.reads_values, A.reads_saved, store_past if past else store

    def kernel(args, start, stop):
        gx, gy, kept, x, y = (
            pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved), pointer(args, 3, dtype), pointer(args, 4, dtype),
        )  # fmt: skip
        pairs_d, pairs_h, spans_w = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        counts_d, counts_h, counts_w = pointer(args, 8, real), pointer(args, 9, real), pointer(args, 10, real)
        C, D, H, W, OD, OH, OW, stride_n, stride_c, stride_d, stride_h, KD, KH, KW = integers(args, 11, 14)
        p = numbers(args, 25, P, real, L)
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
                                given = share(g, here, v, s, tap, count, size, p)
                                put(gx, target + at, given if once else load(gx, target + at, L) + given)
                            else:
                                tail = between(at, 1, 0, right, L)
                                here = load_masked(x, row + at, tail, zero) if reads_values else zero
                                given = share(g, here, v, s, tap, count, size, p)
                                if not once:
                                    given = given + load_masked(gx, target + at, tail, zero)
                                store_masked(gx, target + at, given, tail)
        if past:
            settle()

    return kernel
