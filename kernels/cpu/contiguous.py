"""Loop nests over contiguous maps: lanes run along a row; a job is a band of rows of one plane.

A row's taps are whole loads and shuffles (``load_phases``), shared by the taps that read the same elements.  Blocks of outputs whose
taps would leave the row run the same code on bounded loads filled with the reduction's neutral element, so that no edge needs a
scalar loop.  The gradient is gathered, each input element from the windows that hold it: no atomics, no order to depend on.

Columns of the window may be compile-time constants: ``taps`` (their loop is unrolled), ``stride`` (its phases share loads) and
``dilation``; 0 reads them from the arguments instead.  Rows are always arguments.
"""

from numba import int32, uint32

from ..compile import specialised
from ..simd import (
    between,
    convert,
    gather_between,
    lane_index,
    load,
    load_phases,
    load_phases_between,
    numbers,
    phase,
    pointer,
    repeat,
    scatter_between,
    splat,
    store,
    store_masked,
    store_phases,
    store_phases_between,
    unroll,
    where,
    with_phase,
)
from . import ahead
from .number import jitable
from .reduction import arithmetic, draw


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


def _window(step, lanes, taps, stride, dilation, bounded):
    """(state, args) -> state, through the rows first .. end - 1 of the windows of one block of outputs."""
    S = max(stride, 1)

    @jitable
    def phased(state, kw, args):
        x, row, left, W, tap, _, DW, fill, p = args
        offset = kw * (dilation or DW)
        if bounded:
            phases = load_phases_between(x, row, left + offset // S * S, 0, W, S, fill)
        else:
            phases = load_phases(x, row + left + offset // S * S, S, lanes)
        return step(state, phase(phases, offset % S), splat(int32(tap + kw), lanes), p)

    @jitable
    def gathered(state, kw, args):
        x, row, left, W, tap, SW, DW, fill, p = args
        v = gather_between(x, row, left + kw * DW, SW, 0, W, fill)
        return step(state, v, splat(int32(tap + kw), lanes), p)

    columns = _over_taps(phased if stride else gathered, taps)

    @jitable
    def rows(state, args):
        x, origin, stride_h, first, end, left, W, KW, SW, DH, DW, fill, p = args
        for kh in range(first, end):
            row = origin + kh * DH * stride_h
            state = columns(state, KW, (x, row, left, W, kh * KW, SW, DW, fill, p))
        return state

    return rows


def _left_taps(lanes, taps):
    """(0, KW, (column of tap 0 by lane, DW)) -> how many taps lie left of the row, by lane."""

    @jitable
    def count(found, kw, args):
        column, DW = args
        one, zero = splat(int32(1), lanes), splat(int32(0), lanes)
        return found + where(column + splat(int32(kw * DW), lanes) < zero, one, zero)

    return _over_taps(count, taps)


@specialised
def forward(kind, dtype, saved, saves, lanes, taps, stride, dilation):
    """Arguments: x, y, saved, rows, columns; C, H, W, OH, OW; x's strides of N, C and H; KH, SH, DH, PH, KW, SW, DW, PW; bands of a
    plane and rows of a band; the seed's halves; the reduction's parameters.  rows[oh] * columns[ow] is a window's count.  y and
    saved are dense."""
    A, P, L = arithmetic(kind), len(kind.parameters), lanes
    neutral, begin, finish, drawn, surveys = A.neutral, A.begin, A.finish, draw(kind, lanes), A.surveys
    inside_window, bounded_window = (_window(A.step, lanes, taps, stride, dilation, bounded) for bounded in (False, True))
    inside_survey, bounded_survey = (_window(A.survey or A.step, lanes, taps, stride, dilation, bounded) for bounded in (False, True))
    left_taps = _left_taps(lanes, taps)
    far, ask = ahead.distance(dtype), ahead.asking(dtype)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        rows, columns = pointer(args, 3, dtype), pointer(args, 4, dtype)
        C, H, W, OH, OW = args[5], args[6], args[7], args[8], args[9]
        stride_n, stride_c, stride_h = args[10], args[11], args[12]
        KH, SH, DH, PH = args[13], args[14], args[15], args[16]
        KW, SW, DW, PW = taps or args[17], stride or args[18], dilation or args[19], args[20]
        bands, band, k0, k1 = args[21], args[22], args[23], args[24]
        p = numbers(args, 25, P, dtype, L)
        zero, one = splat(dtype(0), L), splat(dtype(1), L)
        fill, size = neutral(zero), splat(dtype(KH * KW), L)
        reach, rows_ahead = (KW - 1) * DW // SW * SW + SW * L, far // W + 1
        for job in range(start, stop):
            plane, first_row = job // bands, job % bands * band
            source = plane // C * stride_n + plane % C * stride_c
            for oh in range(first_row, min(OH, first_row + band)):
                top = oh * SH - PH
                first = max(0, (DH - 1 - top) // DH)
                end = min(KH, (H - top + DH - 1) // DH)
                out, origin = (plane * OH + oh) * OW, source + top * stride_h
                for row in range(top + rows_ahead, top + rows_ahead + min(SH, KH)):
                    ask(x, source + row * stride_h, W)
                for ow in range(0, OW, L):
                    left, total = ow * SW - PW, zero
                    whole = ow + L <= OW
                    position = splat(uint32(oh * OW + ow), L) + lane_index(uint32, L)
                    u = drawn(position, splat(uint32(plane), L), k0, k1, zero)
                    tap = splat(int32(first * KW), L)
                    window = x, origin, stride_h, first, end, left, W, KW, SW, DH, DW, fill, p
                    if stride > 0 and whole and left >= 0 and left + reach <= W:
                        if surveys:
                            total = inside_survey(total, window)
                        state = inside_window(begin(zero, tap, total, u), window)
                    else:
                        if surveys:
                            total = bounded_survey(total, window)
                        column = lane_index(int32, L) * splat(int32(SW), L) + splat(int32(left), L)
                        tap = left_taps(tap, KW, (column, DW))
                        state = bounded_window(begin(zero, tap, total, u), window)
                    high = splat(rows[oh], L)
                    if whole:
                        value, choice = finish(state, high * load(columns, ow, L), size, p)
                        store(y, out + ow, value)
                        if saves:
                            store(kept, out + ow, convert(choice, saved))
                    else:
                        wide = phase(load_phases_between(columns, 0, ow, 0, OW, 1, one), 0)
                        value, choice = finish(state, high * wide, size, p)
                        tail = between(ow, 1, 0, OW, L)
                        store_masked(y, out + ow, value, tail)
                        if saves:
                            store_masked(kept, out + ow, convert(choice, saved), tail)

    return kernel


def _windows(A, dtype, saved, lanes, taps, stride, dilation, bounded):
    """(acc, KW, args) -> acc, one Vec a phase of the input columns, plus what the windows of one output row give to them.

    q is lane 0's column in strides, so that what tap kw takes from phase kw * DW % SW belongs to output column q - kw * DW // SW.
    Under a run-time stride acc is the one phase ``only``.
    """
    share, reads_values, reads_saved, L = A.share, A.reads_values, A.reads_saved, lanes

    @jitable
    def fetch(array, out, at, OW, fill):
        if bounded:
            return phase(load_phases_between(array, out, at, 0, OW, 1, fill), 0)
        return load(array, out + at, L)

    @jitable
    def tap_of(acc, kw, args):
        gy, kept, y, columns, x, high, out, q, OW, tap, only, SW, DW, size, p = args
        zero, nothing = splat(dtype(0), L), splat(saved(0), L)
        offset = kw * (dilation or DW)
        column, at = offset % (stride or SW), q - offset // (stride or SW)
        if stride > 0 or only == column:
            slot = column if stride > 0 else 0
            g, count = fetch(gy, out, at, OW, zero), high * fetch(columns, 0, at, OW, splat(dtype(1), L))
            v = fetch(y, out, at, OW, zero) if reads_values else zero
            s = fetch(kept, out, at, OW, nothing) if reads_saved else nothing
            given = share(g, phase(x, slot), v, s, splat(saved(tap + kw), L), count, size, p)
            if bounded:
                given = where(between(at, 1, 0, OW, L), given, zero)
            acc = with_phase(acc, slot, phase(acc, slot) + given)
        return acc

    return _over_taps(tap_of, taps)


@specialised
def backward(kind, dtype, saved, lanes, taps, stride, dilation):
    """Arguments: gx, gy, saved, x, y, rows, columns; C, H, W, OH, OW; x's strides of N, C and H; KH, SH, DH, PH, KW, SW, DW, PW; bands
    of a plane and rows of a band; the reduction's parameters.  gx, gy, saved and y are dense; x and y are read only by a
    reduction whose gradient needs them."""
    A, P, L, S = arithmetic(kind), len(kind.parameters), lanes, max(stride, 1)
    reads_values = A.reads_values
    inside_windows, bounded_windows = (_windows(A, dtype, saved, lanes, taps, stride, dilation, bounded) for bounded in (False, True))
    far, ask = ahead.distance(dtype), ahead.asking(dtype)

    @jitable
    def gathered(inside, only, t, low, high, args):
        """The gradient of one block of columns, over the output rows low .. high."""
        gy, kept, y, rows, columns, x, plane, q, OH, OW, KW, SH, SW, DH, DW, size, p = args
        acc = repeat(splat(dtype(0), L), S)
        for oh in range(low, high + 1):
            row = t - oh * SH
            if row % DH == 0:
                window = (
                    gy, kept, y, columns, x, splat(rows[oh], L), (plane * OH + oh) * OW, q, OW, row // DH * KW, only, SW, DW, size, p,
                )  # fmt: skip
                if inside:
                    acc = inside_windows(acc, KW, window)
                else:
                    acc = bounded_windows(acc, KW, window)
        return acc

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        x, y, rows, columns = pointer(args, 3, dtype), pointer(args, 4, dtype), pointer(args, 5, dtype), pointer(args, 6, dtype)
        C, H, W, OH, OW = args[7], args[8], args[9], args[10], args[11]
        stride_n, stride_c, stride_h = args[12], args[13], args[14]
        KH, SH, DH, PH = args[15], args[16], args[17], args[18]
        KW, SW, DW, PW = taps or args[19], stride or args[20], dilation or args[21], args[22]
        bands, band = args[23], args[24]
        p = numbers(args, 25, P, dtype, L)
        zero, size = splat(dtype(0), L), splat(dtype(KH * KW), L)
        reach, rows_ahead = (KW - 1) * DW // SW, far // W + 1
        for job in range(start, stop):
            plane, first_row = job // bands, job % bands * band
            source = plane // C * stride_n + plane % C * stride_c
            for ih in range(first_row, min(H, first_row + band)):
                t = ih + PH
                low, high = max(0, (t - (KH - 1) * DH + SH - 1) // SH), min(OH - 1, t // SH)
                target, here = (plane * H + ih) * W, source + ih * stride_h
                if t % SH == 0:
                    ask(gy, (plane * OH + t // SH + rows_ahead) * OW, OW)
                if reads_values:
                    ask(x, here + rows_ahead * stride_h, W)
                for q in range(PW // SW, (W + PW + SW - 1) // SW, L):
                    left = q * SW - PW
                    if stride > 0:
                        within = left >= 0 and left + SW * L <= W
                        values = repeat(zero, S)
                        if reads_values:
                            values = load_phases_between(x, here, left, 0, W, S, zero)
                        window = gy, kept, y, rows, columns, values, plane, q, OH, OW, KW, SH, SW, DH, DW, size, p
                        acc = gathered(within and q >= reach and q + L <= OW, 0, t, low, high, window)
                        if within:
                            store_phases(gx, target + left, acc)
                        else:
                            store_phases_between(gx, target, left, 0, W, acc)
                    else:
                        for only in range(min(SW, W - left)):
                            values = repeat(zero, S)
                            if reads_values:
                                values = repeat(gather_between(x, here, left + only, SW, 0, W, zero), S)
                            window = gy, kept, y, rows, columns, values, plane, q, OH, OW, KW, SH, SW, DH, DW, size, p
                            acc = gathered(False, only, t, low, high, window)
                            scatter_between(gx, target, left + only, SW, 0, W, phase(acc, 0))

    return kernel
