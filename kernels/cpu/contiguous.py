"""Loop nests over contiguous maps: lanes run along a row; a job is a band of rows of one plane.

A row's taps are whole loads and shuffles (``load_phases``), shared by the taps that read the same elements.  Blocks of outputs whose
taps would leave the row run the same code on bounded loads filled with the reduction's neutral element, so that no edge needs a
scalar loop.  The gradient is gathered, each input element from the windows that hold it: no atomics, no order to depend on.

A row's last block runs over its end into the next rows, which are written after it; only at the end of a job it is masked.  (Without
AVX-512 a masked store of bytes is a branch for each, one of floats 20 cycles on some CPUs.)

Columns of the window may be compile-time constants: ``taps`` (their loop is unrolled), ``stride`` (its phases share loads) and
``dilation``; 0 reads them from the arguments instead.  Rows and slices are always arguments, and tables: see pooling.py.
"""

from numba import int64

from ..compile import specialised
from ..simd import (
    between,
    convert,
    gather_between,
    integers,
    load,
    load_phases,
    load_phases_between,
    number,
    numbers,
    phase,
    pointer,
    repeat,
    scatter_between,
    settle,
    splat,
    stacked,
    store,
    store_masked,
    store_past,
    store_phases,
    store_phases_between,
    store_phases_past,
    unroll,
    where,
    with_phase,
)
from . import ahead
from .number import jitable
from .reduction import arithmetic, draws_of_plane, has_nan, index, looks_for_nan

DRAWN = 1024
"""Outputs whose draws are made together; a multiple of every number of lanes."""


def _over_taps(body, taps):
    """(carry, KW, args) -> carry, through body(carry, kw, args) for every column of the window."""

    @jitable
    def unrolled(carry, KW, args):
        return unroll(body, taps, carry, args)

    @jitable
    def looped(carry, KW, args):
        for kw in range(KW):
            carry = body(carry, kw, args)
        return carry

    return unrolled if taps else looped


def _window(step, tapped, lanes, rows, taps, stride, dilation, bounded):
    """(state, args) -> state, through the windows of one block of outputs: those rows of them that lie inside, or all ``rows``."""
    S = max(stride, 1)

    @jitable
    def phased(state, kw, args):
        x, row, left, W, tap, _, DW, fill, p = args
        offset = kw * (dilation or DW)
        if bounded:
            phases = load_phases_between(x, row, left + offset // S * S, 0, W, S, fill)
        else:
            phases = load_phases(x, row + left + offset // S * S, S, lanes)
        return step(state, phase(phases, offset % S), splat(tapped(tap + kw), lanes), p)

    @jitable
    def gathered(state, kw, args):
        x, row, left, W, tap, SW, DW, fill, p = args
        v = gather_between(x, row, left + kw * DW, SW, 0, W, fill)
        return step(state, v, splat(tapped(tap + kw), lanes), p)

    columns = _over_taps(phased if stride else gathered, taps)

    @jitable
    def row_of(state, kh, args):
        x, origin, tap, step_h, left, W, KW, SW, DW, fill, p = args
        return columns(state, KW, (x, origin + kh * step_h, left, W, tap + kh * KW, SW, DW, fill, p))

    @jitable
    def whole(state, args):
        x, origin, slices, _, step_d, step_h, left, W, KH, KW, SW, DW, fill, p = args
        for kd in range(slices[0], slices[1]):
            state = unroll(row_of, rows, state, (x, origin + kd * step_d, kd * KH * KW, step_h, left, W, KW, SW, DW, fill, p))
        return state

    @jitable
    def inside(state, args):
        x, origin, slices, lines, step_d, step_h, left, W, KH, KW, SW, DW, fill, p = args
        for kd in range(slices[0], slices[1]):
            row = x, origin + kd * step_d, kd * KH * KW, step_h, left, W, KW, SW, DW, fill, p
            for kh in range(lines[0], lines[1]):
                state = row_of(state, kh, row)
        return state

    return whole if rows else inside


@specialised
def forward(kind, dtype, saved, saves, lanes, rows, taps, stride, dilation, past):
    """Arguments: x, y, saved; tables: spans of slices and of rows, the first tap inside of each column, counts of slices, rows and
    columns; C, W, OD, OH, OW; x's strides of N, C, D and H, and its end; dilated strides of slices and rows; KD, KH, KW, SH, SW, DW,
    PW; bands of a plane and rows of a band; the seed's halves; the reduction's parameters.  y and saved are dense.  ``past``: y, whose
    rows are whole cache lines, is written past the caches."""
    A, P, L, real, tapped = arithmetic(kind), len(kind.parameters), lanes, number(dtype), index(dtype, saved)
    neutral, begin, finish, surveys = A.neutral, A.begin, A.finish, A.surveys
    draws, fill_draws, chunk = kind.draws, draws_of_plane(kind, lanes, real), DRAWN if kind.draws else 1 << 62
    draws_room = DRAWN + 8 * lanes if draws else 1
    far, ask = ahead.distance(dtype), ahead.asking(dtype)

    def pooled(rows, bounded, step):
        """Pool one block: -> (value, choice)."""
        window, survey = (_window(step, tapped, lanes, rows, taps, stride, dilation, bounded) for step in (step, A.survey or step))

        @jitable
        def pool(drawn, at, tap, count, size, window_args):
            zero, total = splat(real(0), L), splat(real(0), L)
            u = load(drawn, at, L) if draws else zero
            if surveys:
                total = survey(total, window_args)
            return finish(window(begin(zero, tap, total, u), window_args), count, size, p_of(window_args))

        return pool

    put = store_past if past else store
    p_of = jitable(lambda window_args: window_args[13])
    inside, bounded = pooled(rows, False, A.step), pooled(0, True, A.step)
    looks, holds_nan = looks_for_nan(A, dtype) and taps > 0 and stride == 1, has_nan(dtype, lanes)
    if looks:
        ordered_inside, ordered_bounded = pooled(rows, False, A.ordered), pooled(0, True, A.ordered)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        spans_d, spans_h, first_w = pointer(args, 3, int64), pointer(args, 4, int64), pointer(args, 5, tapped)
        counts_d, counts_h, counts_w = pointer(args, 6, real), pointer(args, 7, real), pointer(args, 8, real)
        C, W, OD, OH, OW, stride_n, stride_c, stride_d, stride_h, x_end, step_d, step_h = integers(args, 9, 12)
        KD, KH, wide, SH, along, spread, PW, bands, band, k0, k1 = integers(args, 21, 11)
        KW, SW, DW = taps or wide, stride or along, dilation or spread
        p = numbers(args, 32, P, real, L)
        fill, size, drawn = neutral(splat(real(0), L)), splat(real(KD * KH * KW), L), stacked(draws_room, real)
        reach, height = (KW - 1) * DW // SW * SW + SW * L, OD * OH
        # Blocks near .. far_end - L have all the columns of their windows inside.
        near, blocks = (PW + SW * L - 1) // (SW * L) * L, (OW + L - 1) // L * L
        ends = (W - 1 - (KW - 1) * DW + PW) // SW + 1
        far_end = (blocks if ends >= OW else ends // L * L) if stride > 0 and W + PW > (KW - 1) * DW else 0
        for job in range(start, stop):
            plane, first_row = job // bands, job % bands * band
            source, last = plane // C * stride_n + plane % C * stride_c, min(height, first_row + band)
            od, oh, y_end = first_row // OH, first_row % OH, (plane * height + last) * OW
            drawn_start = drawn_end = 0
            seen = worst = -1
            for r in range(first_row, last):
                slices, lines = (spans_d[3 * od + 1], spans_d[3 * od + 2]), (spans_h[3 * oh + 1], spans_h[3 * oh + 2])
                out, origin = (plane * height + r) * OW, source + spans_d[3 * od] * stride_d + spans_h[3 * oh] * stride_h
                rows_count, row_taps = splat(real(counts_d[od] * counts_h[oh]), L), splat(tapped((slices[0] * KH + lines[0]) * KW), L)
                below = origin + (slices[1] - 1) * step_d + (lines[1] - 1) * step_h
                for row in range(max(0, lines[1] - SH), lines[1]):
                    ask(x, origin + (slices[1] - 1) * step_d + row * step_h + far, W)
                stops = far_end if out + blocks <= y_end else min(far_end, OW // L * L)
                if lines[1] - lines[0] < rows or below + (stops - L) * SW - PW + reach > x_end:
                    stops = 0
                ordered = False
                if looks:
                    # Rows come in order, each once, where they are not dilated.
                    ordered = slices[1] - slices[0] == 1 and step_h == stride_h
                    if oh == 0 or r == first_row:
                        seen = worst = -1
                    top = origin + slices[0] * step_d
                    for row in range(lines[0], lines[1]):
                        if ordered and top + row * step_h > seen:
                            seen = top + row * step_h
                            if holds_nan(x, seen, W, x_end):
                                worst = seen
                    ordered = ordered and worst < top + lines[0] * step_h
                row_stops, ow = stops, 0
                for first in range(0, OW, chunk):
                    end, stops = min(OW, first + chunk), min(row_stops, first + chunk)
                    if draws and r * OW + end > drawn_end:
                        drawn_end = min(last * OW, r * OW + first + DRAWN)
                        drawn_start = (r * OW + first) // 4 * 4
                        fill_draws(drawn, drawn_start, drawn_end - drawn_start, plane, k0, k1)
                    drawn_at = r * OW - drawn_start
                    while ow < end:
                        if near <= ow < stops:
                            for at in range(ow, stops, L):
                                window = x, origin, slices, lines, step_d, step_h, at * SW - PW, W, KH, KW, SW, DW, fill, p
                                count = rows_count * load(counts_w, at, L)
                                if looks:
                                    if ordered:
                                        value, choice = ordered_inside(drawn, drawn_at + at, row_taps, count, size, window)
                                    else:
                                        value, choice = inside(drawn, drawn_at + at, row_taps, count, size, window)
                                else:
                                    value, choice = inside(drawn, drawn_at + at, row_taps, count, size, window)
                                put(y, out + at, value)
                                if saves:
                                    store(kept, out + at, convert(choice, saved))
                            ow = stops
                        else:
                            window = x, origin, slices, lines, step_d, step_h, ow * SW - PW, W, KH, KW, SW, DW, fill, p
                            count, tap = rows_count * load(counts_w, ow, L), row_taps + load(first_w, ow, L)
                            if looks:
                                if ordered:
                                    value, choice = ordered_bounded(drawn, drawn_at + ow, tap, count, size, window)
                                else:
                                    value, choice = bounded(drawn, drawn_at + ow, tap, count, size, window)
                            else:
                                value, choice = bounded(drawn, drawn_at + ow, tap, count, size, window)
                            if out + ow + L <= y_end:
                                put(y, out + ow, value)
                                if saves:
                                    store(kept, out + ow, convert(choice, saved))
                            else:
                                tail = between(ow, 1, 0, OW, L)
                                store_masked(y, out + ow, value, tail)
                                if saves:
                                    store_masked(kept, out + ow, convert(choice, saved), tail)
                            ow += L
                oh += 1
                if oh == OH:
                    od, oh = od + 1, 0
        if past:
            settle()

    return kernel


def _windows(A, dtype, saved, lanes, taps, stride, dilation, shift, uniform, bounded):
    """(acc, KW, args) -> acc, one Vec a phase of the input columns, plus what the windows of one output row give to them.

    Column q * stride + p + i * stride of lane i in phase p is tap kw of output q + i + (p + padding - kw * dilation) / stride, where that
    is whole: of which phases, is known from shift = padding % stride.  Under a run-time stride acc is the one phase ``only``.
    """
    share, reads_values, reads_saved, L, real = A.share, A.reads_values, A.reads_saved, lanes, number(dtype)

    @jitable
    def fetch(array, out, at, OW, fill):
        if bounded:
            return phase(load_phases_between(array, out, at, 0, OW, 1, fill), 0)
        return load(array, out + at, L)

    @jitable
    def tap_of(acc, kw, args):
        gy, kept, y, columns, x, high, out, q, OW, tap, only, SW, DW, PW, size, p = args
        zero, nothing = splat(real(0), L), splat(saved(0), L)
        if stride > 0:
            slot = (kw * (dilation or DW) - shift) % stride
            at = q + PW // stride + (slot + shift - kw * (dilation or DW)) // stride
        else:
            slot = 0
            at = q + (only + PW - kw * DW) // SW
        if stride > 0 or (only + PW - kw * DW) % SW == 0:
            given = fetch(gy, out, at, OW, zero)
            if not uniform:
                count = high * fetch(columns, 0, at, OW, splat(real(1), L))
                v = fetch(y, out, at, OW, zero) if reads_values else zero
                s = fetch(kept, out, at, OW, nothing) if reads_saved else nothing
                given = share(given, phase(x, slot), v, s, splat(saved(tap + kw), L), count, size, p)
                if bounded:
                    given = where(between(at, 1, 0, OW, L), given, zero)
            acc = with_phase(acc, slot, phase(acc, slot) + given)
        return acc

    return _over_taps(tap_of, taps)


@specialised
def backward(kind, dtype, saved, lanes, taps, stride, dilation, shift, uniform, past):
    """Arguments: gx, gy, saved, x, y; tables: the windows of each slice and of each row, counts of slices, rows and columns; C, D, H,
    W, OD, OH, OW; x's strides of N, C, D and H, and its end; KD, KH, KW, SW, DW, PW; bands of a plane and rows of a band; the end of
    gy; the reduction's parameters.  gx, gy, saved and y are dense; x and y are read only by a reduction whose gradient needs them.
    ``uniform``: it is linear, and all counts are the same.  ``past``: gx, whose rows are whole cache lines, is written past the caches."""
    A, P, L, S, real = arithmetic(kind), len(kind.parameters), lanes, max(stride, 1), number(dtype)
    reads_values, residue = A.reads_values, number(saved)
    inside_windows, bounded_windows = (
        _windows(A, dtype, residue, lanes, taps, stride, dilation, shift, uniform, bounded) for bounded in (False, True)
    )
    far, ask = ahead.distance(dtype), ahead.asking(dtype)
    put = store_phases_past if past else store_phases

    @jitable
    def scaled(acc, i, args):
        count, size, p = args
        zero, nothing = splat(real(0), L), splat(residue(0), L)
        return with_phase(acc, i, A.share(phase(acc, i), zero, zero, nothing, nothing, count, size, p))

    @jitable
    def gathered(inside, only, args):
        """The gradient of one block of columns, from every row of outputs whose windows hold it."""
        (
            gy,
            kept,
            y,
            pairs_d,
            pairs_h,
            counts_d,
            counts_h,
            counts_w,
            x,
            plane,
            near_d,
            near_h,
            q,
            OD,
            OH,
            OW,
            KH,
            KW,
            SW,
            DW,
            PW,
            size,
            p,
        ) = args
        acc = repeat(splat(real(0), L), S)
        for i in range(near_d[0], near_d[1], 2):
            od, kd = pairs_d[i], pairs_d[i + 1]
            for j in range(near_h[0], near_h[1], 2):
                oh, kh = pairs_h[j], pairs_h[j + 1]
                window = (
                    gy, kept, y, counts_w, x, splat(counts_d[od] * counts_h[oh], L), ((plane * OD + od) * OH + oh) * OW, q, OW,
                    (kd * KH + kh) * KW, only, SW, DW, PW, size, p,
                )  # fmt: skip
                if inside:
                    acc = inside_windows(acc, KW, window)
                else:
                    acc = bounded_windows(acc, KW, window)
        if uniform:
            acc = unroll(scaled, S, acc, (splat(counts_d[0] * counts_h[0] * counts_w[0], L), size, p))
        return acc

    def kernel(args, start, stop):
        gx, gy, kept, x, y = (
            pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved), pointer(args, 3, dtype), pointer(args, 4, dtype),
        )  # fmt: skip
        pairs_d, pairs_h = pointer(args, 5, int64), pointer(args, 6, int64)
        counts_d, counts_h, counts_w = pointer(args, 7, real), pointer(args, 8, real), pointer(args, 9, real)
        C, D, H, W, OD, OH, OW, stride_n, stride_c, stride_d, stride_h, x_end = integers(args, 10, 12)
        KD, KH, wide, along, spread, PW, bands, band, y_end = integers(args, 22, 9)
        KW, SW, DW = taps or wide, stride or along, dilation or spread
        p = numbers(args, 31, P, real, L)
        zero, size, height = splat(real(0), L), splat(real(KD * KH * KW), L), D * H
        lowest, highest = PW // SW - ((KW - 1) * DW - PW % SW) // SW, (PW + SW - 1) // SW
        for job in range(start, stop):
            plane, first_row = job // bands, job % bands * band
            source, last = plane // C * stride_n + plane % C * stride_c, min(height, first_row + band)
            x_stop = (plane * height + last) * W
            for r in range(first_row, last):
                slice_, line = r // H, r % H
                near_d, near_h = (pairs_d[slice_], pairs_d[slice_ + 1]), (pairs_h[line], pairs_h[line + 1])
                target, here = (plane * height + r) * W, source + slice_ * stride_d + line * stride_h
                if near_d[0] < near_d[1] and near_h[0] < near_h[1]:
                    below = ((plane * OD + pairs_d[near_d[1] - 2]) * OH + pairs_h[near_h[1] - 2]) * OW
                    if pairs_h[near_h[1] - 1] == 0:
                        ask(gy, below + far, OW)
                else:
                    below = 0
                if reads_values:
                    ask(x, here + far, W)
                for q in range(0, (W + SW - 1) // SW, L):
                    left = q * SW
                    used = min(L, (W - left + SW - 1) // SW)
                    if stride > 0:
                        values = repeat(zero, S)
                        if reads_values:
                            if here + left + SW * L <= x_end:
                                values = load_phases(x, here + left, S, L)
                            else:
                                values = load_phases_between(x, here, left, 0, W, S, zero)
                        window = (
                            gy, kept, y, pairs_d, pairs_h, counts_d, counts_h, counts_w, values, plane, near_d, near_h, q,
                            OD, OH, OW, KH, KW, SW, DW, PW, size, p,
                        )  # fmt: skip
                        inside = q + lowest >= 0 and q + used + highest <= OW and below + q + highest + L <= y_end
                        acc = gathered(True, 0, window) if inside else gathered(False, 0, window)
                        if target + left + SW * L <= x_stop:
                            put(gx, target + left, acc)
                        else:
                            store_phases_between(gx, target, left, 0, W, acc)
                    else:
                        for only in range(min(SW, W - left)):
                            values = repeat(zero, S)
                            if reads_values:
                                values = repeat(gather_between(x, here, left + only, SW, 0, W, zero), S)
                            window = (
                                gy, kept, y, pairs_d, pairs_h, counts_d, counts_h, counts_w, values, plane, near_d, near_h, q,
                                OD, OH, OW, KH, KW, SW, DW, PW, size, p,
                            )  # fmt: skip
                            acc = gathered(False, only, window)
                            scatter_between(gx, target, left + only, SW, 0, W, phase(acc, 0))
        if past:
            settle()

    return kernel
