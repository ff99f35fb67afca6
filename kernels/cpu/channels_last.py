"""Loop nests over channels_last maps: lanes run over channels; a job is one row of one image.

Every lane of a register stands at the same pixel, so a window's edges are loop bounds, not masks.  Several registers of channels go
through a window together: their chains of steps overlap, and they share the loop.  A pixel's last channels run over into the next pixels,
which are written after it; only at the end of a job they are masked.
"""

from typing import NamedTuple

from numba import int64, uint32

from ..compile import specialised
from ..simd import (
    between,
    convert,
    integers,
    lane_index,
    load,
    load_masked,
    number,
    numbers,
    phase,
    pointer,
    prefetch,
    register_bytes,
    repeat,
    settle,
    splat,
    stacked,
    store,
    store_masked,
    store_past,
    unroll,
    with_phase,
)
from . import ahead
from .number import jitable
from .reduction import arithmetic, draw, draws_of_pixels, index, members

GROUP, WIDE = 4, 16


class WrittenOut(NamedTuple):
    """What of a window is written out: all taps of one that lies inside, of such sizes and strides, of this many registers of channels at
    once, which divide the channels; or, ``together`` 0, the columns of a row, of which there may be none."""

    together: int
    deep: bool
    rows: int
    columns: int
    stride_h: int
    stride_w: int


NOTHING = WrittenOut(0, False, 0, 0, 1, 1)


def group(kind, lanes, channels, within=NOTHING):
    """How many registers of channels go through a window together: WIDE where there are so many channels, and 32 registers for what they
    carry, so that memory is read in longer pieces (8x256x56x56 max 2x2 s2 2.7 to 2.1 ms, 3x3 s2 p1 3.9 to 3.1; of 64 channels three taps
    wide, GROUP 4.6 and one by one 6.8).  Of windows ``within``, written out, so many that none is left; WIDE only
    where they divide the channels."""
    fits = register_bytes() == 64 and not kind.draws and len(members(kind, None)) <= 2
    if fits and channels >= WIDE * lanes and (within == NOTHING or channels % (WIDE * lanes) == 0):
        return WIDE
    if within.together:
        return within.together
    return next((several for several in (GROUP, 2) if channels >= several * lanes), 1)


DRAWN = 2048
"""Channels whose draws at four pixels are made together; of more, each is made alone."""


def _access(lanes, past=False):
    """(fetch, put): a register of channels c, c + 1, ... of the pixel at an offset, all of them if ``whole``, or those below C;
    put past the caches or not."""
    put_whole = store_past if past else store

    @jitable
    def fetch(x, pixel, c, C, whole, fill):
        if whole:
            return load(x, pixel + c, lanes)
        return load_masked(x, pixel + c, between(c, 1, 0, C, lanes), fill)

    @jitable
    def put(y, pixel, c, C, whole, value):
        if whole:
            put_whole(y, pixel + c, value)
        else:
            store_masked(y, pixel + c, value, between(c, 1, 0, C, lanes))

    return fetch, put


def _bounded(step, tapped, lanes, registers, width):
    """(states, args) -> states, one a register, through the taps inside of one window, ``width`` (0: any number of) columns wide."""
    fetch, _ = _access(lanes)

    @jitable
    def stepped(states, i, args):
        x, pixel, c, C, whole, fill, tap, p = args
        return with_phase(states, i, step(phase(states, i), fetch(x, pixel, c + i * lanes, C, whole, fill), tap, p))

    @jitable
    def column(states, kw, args):
        x, row, step, channels, fill, tap, p = args
        return unroll(stepped, registers, states, (x, row + kw * step, *channels, fill, splat(tapped(tap + kw), lanes), p))

    @jitable
    def window(states, args):
        x, origin, steps, slices, lines, columns, channels, KH, KW, fill, p = args
        for kd in range(slices[0], slices[1]):
            for kh in range(lines[0], lines[1]):
                row = x, origin + kd * steps[0] + kh * steps[1], steps[2], channels, fill, (kd * KH + kh) * KW, p
                if width > 0 and columns[1] - columns[0] == width:
                    states = unroll(column, width, states, row)
                else:
                    for kw in range(columns[0], columns[1]):
                        states = column(states, kw, row)
        return states

    return window


def _written_out(step, tapped, lanes, registers, deep, rows, columns):
    """The same of a window whose ``rows`` x ``columns`` are all inside, each with loads of its own: hardware that looks for a pattern in
    what one instruction reads finds one.  ``deep``: of several slices."""

    @jitable
    def stepped(states, i, args):
        x, pixel, tap, p = args
        return with_phase(states, i, step(phase(states, i), load(x, pixel + i * lanes, lanes), tap, p))

    @jitable
    def column(states, kw, args):
        x, row, step, tap, p = args
        return unroll(stepped, registers, states, (x, row + kw * step, splat(tapped(tap + kw), lanes), p))

    @jitable
    def line(states, kh, args):
        x, origin, steps, tap, p = args
        return unroll(column, columns, states, (x, origin + kh * steps[1], steps[2], tap + kh * columns, p))

    @jitable
    def window(states, args):
        x, origin, steps, slices, p = args
        if not deep:
            return unroll(line, rows, states, (x, origin, steps, 0, p))
        for kd in range(slices[0], slices[1]):
            states = unroll(line, rows, states, (x, origin + kd * steps[0], steps, kd * (rows * columns), p))
        return states

    return window


def _asked(dtype, lanes, registers, window):
    """(x, origin, c, step, far): ask for what a window is the first to read of its channels, from c on, that far ahead: of the rows that
    the windows above do not read, as many columns as windows are apart."""
    first, line = max(0, window.rows - window.stride_h), ahead.LINE * 8 // dtype.bitwidth
    ahead_by, lines = window.stride_w, -(-registers * lanes * window.stride_w // line)
    count = (window.rows - first) * lines

    @jitable
    def one(done, i, args):
        x, at, step = args
        prefetch(x, at + (first + i // lines) * step + i % lines * line)
        return done

    @jitable
    def ask(x, origin, c, step, far):
        if far > 0:
            unroll(one, count, 0, (x, origin + c * ahead_by + far, step))

    return ask


def _pooled(kind, dtype, saved, saves, lanes, registers, past, window_of, *constants):
    """Pool one window's channels c .. c + registers * lanes - 1 and store them at ``out``.  Windows written out find their draws made."""
    A, L, real, tapped = arithmetic(kind), lanes, number(dtype), index(dtype, saved)
    begin, finish, drawn, surveys, draws = A.begin, A.finish, draw(kind, lanes), A.surveys, kind.draws
    window, survey = (window_of(step, tapped, lanes, registers, *constants) for step in (A.step, A.survey or A.step))
    draws_made = window_of is _written_out
    (_, put), (_, put_kept) = _access(lanes, past), _access(lanes)

    @jitable
    def begun(states, i, args):
        totals, tap, array, at, position, plane, k0, k1 = args
        zero = u = splat(real(0), L)
        if draws:
            if draws_made or at >= 0:
                u = load(array, at + i * L, L)
            else:
                planes = splat(uint32(plane + i * L), L) + lane_index(uint32, L)
                u = drawn(splat(uint32(position), L), planes, k0, k1, zero)
        return with_phase(states, i, begin(zero, splat(tapped(tap), L), phase(totals, i), u))

    @jitable
    def ended(states, i, args):
        y, kept, out, c, C, whole, count, size, p = args
        value, choice = finish(phase(states, i), count, size, p)
        put(y, out, c + i * L, C, whole, value)
        if saves:
            put_kept(kept, out, c + i * L, C, whole, convert(choice, saved))
        return states

    @jitable
    def pool(y, kept, out, tap, count, size, draws, channels, p, args):
        zero = splat(real(0), L)
        totals = repeat(zero, registers)
        if surveys:
            totals = survey(totals, args)
        states = repeat(begin(zero, splat(tapped(tap), L), zero, zero), registers)
        states = unroll(begun, registers, states, (totals, tap, *draws))
        unroll(ended, registers, window(states, args), (y, kept, out, *channels, splat(count, L), splat(size, L), p))

    return pool


@specialised
def forward(kind, dtype, saved, saves, lanes, group, within, past):
    """Arguments: x, y, saved; tables: spans of slices, rows and columns, counts of the same; C, OD, OH, OW; x's strides of N, D, H and W,
    and its end; dilated strides of slices, rows and columns; KD, KH, KW, SH, SW; the first column of outputs whose windows lie inside from
    side to side, and the end of these; elements to ask ahead, or 0; the seed's halves; the reduction's parameters.  y and saved are dense.
    ``within``: what of windows is written out.  ``past``: y, whose pixels are whole cache lines, is written past the caches.

    Pixels whose windows lie inside go by themselves: us a call, one core (Zen 5), max, without and with, 8x256x56x56 2x2 s2 1,004 and 626,
    3x3 s2 p1 1,211 and 721, 8x64x112x112 852 and 608, 1,139 and 835.
    """
    P, L, real, neutral = len(kind.parameters), lanes, number(dtype), arithmetic(kind).neutral
    ask = ahead.asking(dtype)
    drawing, fill_draws, room = kind.draws, draws_of_pixels(kind, lanes, real), 4 * DRAWN + lanes if kind.draws else 1
    fills, leaves, together = within.together > 0, within.together == 0, max(1, within.together)
    width = within.columns if leaves else 0
    several, one = (_pooled(kind, dtype, saved, saves, lanes, registers, past, _bounded, width) for registers in (group, 1))
    inner = _pooled(kind, dtype, saved, saves, lanes, together, past, _written_out, *within[1:4])
    ask_within, piece, part = _asked(dtype, lanes, together, within), group * lanes, together * lanes

    @jitable
    def draws_at(array, drawn, n, position, C, k0, k1):
        if drawing and C <= DRAWN and (n, position // 4) != drawn:
            fill_draws(array, DRAWN, position, n * C, C, k0, k1)
        return n, position // 4

    @jitable
    def draws_of(array, n, position, c, C, k0, k1):
        return array, position % 4 * DRAWN + c if C <= DRAWN else -1, position, n * C + c, k0, k1

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        spans_d, spans_h, spans_w = pointer(args, 3, int64), pointer(args, 4, int64), pointer(args, 5, int64)
        counts_d, counts_h, counts_w = pointer(args, 6, real), pointer(args, 7, real), pointer(args, 8, real)
        C, OD, OH, OW, stride_n, stride_d, stride_h, stride_w, x_end = integers(args, 9, 9)
        steps = integers(args, 18, 3)
        KD, KH, KW, SH, SW, inside_from, inside_to, far, k0, k1 = integers(args, 21, 10)
        p, fill, size = numbers(args, 31, P, real, L), neutral(splat(real(0), L)), real(KD * KH * KW)
        array, drawn = stacked(room, real), (-1, -1)
        for job in range(start, stop):
            n, r = job // (OD * OH), job % (OD * OH)
            od, oh = r // OH, r % OH
            slices, lines = (spans_d[3 * od + 1], spans_d[3 * od + 2]), (spans_h[3 * oh + 1], spans_h[3 * oh + 2])
            row = n * stride_n + spans_d[3 * od] * stride_d + spans_h[3 * oh] * stride_h
            deepest = (slices[1] - 1) * steps[0]
            lowest = row + deepest + (lines[1] - 1) * steps[1]
            row_count, row_tap = counts_d[od] * counts_h[oh], (slices[0] * KH + lines[0]) * KW
            fresh = max(lines[0], lines[1] - SH) if far > 0 else lines[1]  # of the rows that this row of outputs is the first to read
            inside = fills and lines[1] - lines[0] == KH and not (drawing and C > DRAWN)
            ow = 0
            while ow < OW:
                columns = spans_w[3 * ow + 1], spans_w[3 * ow + 2]
                edge = spans_w[3 * ow] * stride_w
                tap, count = row_tap + columns[0], row_count * counts_w[ow]
                drawn = draws_at(array, drawn, n, r * OW + ow, C, k0, k1)
                if inside and inside_from <= ow < inside_to:
                    end = ow + 1 if drawing else inside_to
                    while ow < end:
                        origin = row + edge
                        for c in range(0, C, part):
                            draws = draws_of(array, n, r * OW + ow, c, C, k0, k1)
                            ask_within(x, origin + deepest, c, steps[1], far)
                            window = x, origin + c, steps, slices, p
                            inner(y, kept, (job * OW + ow) * C, tap, count, size, draws, (c, C, True), p, window)
                        edge += SW * stride_w
                        ow += 1
                    continue
                for kh in range(fresh, lines[1]):
                    ask(x, row + edge + deepest + kh * steps[1] + far, SW * C)
                out, last = (job * OW + ow) * C, lowest + edge + (columns[1] - 1) * steps[2]
                c = 0
                while c + piece <= C:
                    draws, channels = draws_of(array, n, r * OW + ow, c, C, k0, k1), (c, C, True)
                    window = x, row + edge, steps, slices, lines, columns, channels, KH, KW, fill, p
                    several(y, kept, out, tap, count, size, draws, channels, p, window)
                    c += piece
                if leaves:
                    while c < C:
                        whole = c + L <= C or (out + c + L <= (job + 1) * OW * C and last + c + L <= x_end)
                        draws, channels = draws_of(array, n, r * OW + ow, c, C, k0, k1), (c, C, whole)
                        window = x, row + edge, steps, slices, lines, columns, channels, KH, KW, fill, p
                        one(y, kept, out, tap, count, size, draws, channels, p, window)
                        c += L
                ow += 1
        if past:
            settle()

    return kernel


def _gathered(kind, dtype, saved, lanes, registers, uniform, past):
    """The gradient of one pixel's channels c .. c + registers * lanes - 1, from the windows that hold it, stored at ``target``."""
    A, L, real = arithmetic(kind), lanes, number(dtype)
    share, reads_values, reads_saved, residue = A.share, A.reads_values, A.reads_saved, number(saved)
    fetch, put = _access(lanes, past)

    @jitable
    def given(acc, i, args):
        gy, kept, y, here, out, tap, count, size, c, C, whole, p = args
        zero, nothing = splat(real(0), L), splat(residue(0), L)
        at = c + i * L
        if uniform:
            return with_phase(acc, i, phase(acc, i) + fetch(gy, out, at, C, whole, zero))
        v = fetch(y, out, at, C, whole, zero) if reads_values else zero
        k = fetch(kept, out, at, C, whole, nothing) if reads_saved else nothing
        return with_phase(acc, i, phase(acc, i) + share(fetch(gy, out, at, C, whole, zero), phase(here, i), v, k, tap, count, size, p))

    @jitable
    def read(values, i, args):
        x, pixel, c, C, whole = args
        return with_phase(values, i, fetch(x, pixel, c + i * L, C, whole, splat(real(0), L)))

    @jitable
    def written(acc, i, args):
        gx, target, c, C, whole, count, size, p = args
        value = phase(acc, i)
        if uniform:
            zero = splat(real(0), L)
            value = share(value, zero, zero, splat(residue(0), L), splat(residue(0), L), count, size, p)
        put(gx, target, c + i * L, C, whole, value)
        return acc

    @jitable
    def gather(gx, target, pixel, c, whole, args):
        gy, kept, x, y, tables, near_d, near_h, near_w, image, C, OH, OW, KH, KW, size, p = args
        pairs_d, pairs_h, pairs_w, counts_d, counts_h, counts_w = tables
        acc = repeat(splat(real(0), L), registers)
        here = acc
        if reads_values:
            here = unroll(read, registers, here, (x, pixel, c, C, whole))
        for i in range(near_d[0], near_d[1], 2):
            od, kd = pairs_d[i], pairs_d[i + 1]
            for j in range(near_h[0], near_h[1], 2):
                oh, kh = pairs_h[j], pairs_h[j + 1]
                line, line_tap, line_count = image + (od * OH + oh) * OW, (kd * KH + kh) * KW, counts_d[od] * counts_h[oh]
                for k in range(near_w[0], near_w[1], 2):
                    ow, tap = pairs_w[k], splat(residue(line_tap + pairs_w[k + 1]), L)
                    count = splat(line_count * counts_w[ow], L)
                    acc = unroll(given, registers, acc, (gy, kept, y, here, (line + ow) * C, tap, count, size, c, C, whole, p))
        unroll(written, registers, acc, (gx, target, c, C, whole, splat(counts_d[0] * counts_h[0] * counts_w[0], L), size, p))

    return gather


def _gathered_inside(kind, dtype, saved, lanes, registers, uniform, past, window):
    """The gradients of ``window.stride_w`` pixels beside each other, the first of them the first column of a window ``ow``, of channels
    from c on, from windows that are there: each one's gradient is read once for all of these pixels."""
    A, L, R, SW, KW, real = arithmetic(kind), lanes, registers, window.stride_w, window.columns, number(dtype)
    share, reads_values, reads_saved, residue = A.share, A.reads_values, A.reads_saved, number(saved)
    _, put = _access(lanes, past)
    count, windows = R * SW, -(-KW // SW)

    @jitable
    def to_pixel(acc, b, args):
        back, i, g, here, v, k, tap, part, size, p = args
        kw, at = b + back * SW, b * R + i
        if kw >= KW:
            return acc
        if not uniform:
            g = share(g, phase(here, at), v, k, splat(residue(tap + kw), L), part, size, p)
        return with_phase(acc, at, phase(acc, at) + g)

    @jitable
    def from_register(acc, i, args):
        gy, kept, y, here, out, back, tap, part, size, p = args
        g, at = load(gy, out + i * L, L), out + i * L
        v = load(y, at, L) if reads_values else g
        k = load(kept, at, L) if reads_saved else splat(residue(0), L)
        return unroll(to_pixel, SW, acc, (back, i, g, here, v, k, tap, part, size, p))

    @jitable
    def from_window(acc, back, args):
        gy, kept, y, here, out, C, tap, counts_w, ow, line_count, size, p = args
        part = splat(line_count * counts_w[ow - back], L)
        return unroll(from_register, R, acc, (gy, kept, y, here, out - back * C, back, tap, part, size, p))

    @jitable
    def read(values, at, args):
        x, pixel, step = args
        return with_phase(values, at, load(x, pixel + at // R * step + at % R * L, L))

    @jitable
    def written(acc, at, args):
        gx, target, C, part, size, p = args
        value = phase(acc, at)
        if uniform:
            zero, nothing = splat(real(0), L), splat(residue(0), L)
            value = share(value, zero, zero, nothing, nothing, part, size, p)
        put(gx, target + at // R * C, at % R * L, C, True, value)
        return acc

    @jitable
    def gather(gx, target, pixel, step, c, ow, args):
        gy, kept, x, y, tables, near_d, near_h, image, C, OH, OW, KH, size, p = args
        pairs_d, pairs_h, _, counts_d, counts_h, counts_w = tables
        acc = repeat(splat(real(0), L), count)
        here = acc
        if reads_values:
            here = unroll(read, count, here, (x, pixel + c, step))
        for i in range(near_d[0], near_d[1], 2):
            od, kd = pairs_d[i], pairs_d[i + 1]
            for j in range(near_h[0], near_h[1], 2):
                oh, kh = pairs_h[j], pairs_h[j + 1]
                out, tap = (image + (od * OH + oh) * OW + ow) * C + c, (kd * KH + kh) * KW
                given = gy, kept, y, here, out, C, tap, counts_w, ow, counts_d[od] * counts_h[oh], size, p
                acc = unroll(from_window, windows, acc, given)
        part = splat(counts_d[0] * counts_h[0] * counts_w[0], L)
        unroll(written, count, acc, (gx, target + c, C, part, size, p))

    return gather


@specialised
def backward(kind, dtype, saved, lanes, group, uniform, past, within):
    """Arguments: gx, gy, saved, x, y; tables: the windows of each slice, row and column, counts of the same; C, D, H, W, OD, OH, OW; x's
    strides of N, D, H and W, and its end; KD, KH, KW; the end of gy; the first window from whose first column on pixels go together, the
    end of such windows, and that first column; elements to ask ahead, or 0; the reduction's parameters.  gx, gy, saved and y are dense; x
    and y are read only by a reduction whose gradient needs them.  ``uniform``: it is linear, and all counts are the same.  ``past``: gx,
    whose pixels are whole cache lines, is written past the caches.  ``within``: how pixels go together, as many as windows are apart, if
    its channels fill registers; else each by itself.

    us a call, one core (Zen 5), max 3x3 s2 p1, each by itself and together: 8x64x112x112 1,056 and 639, 8x256x56x56 825 and 620,
    32x64x32x32 343 and 257, 8x512x14x14 116 and 85, 64x512x7x7 236 and 163; 2x2 s2 772 and 657, 777 and 665, 283 and 228, 91 and 67."""
    P, L, real = len(kind.parameters), lanes, number(dtype)
    reads_values = arithmetic(kind).reads_values
    several, one = (_gathered(kind, dtype, saved, lanes, registers, uniform, past) for registers in (group, 1))
    together, leaves, SW = max(1, within.together), within.together == 0, within.stride_w
    beside, piece, part = _gathered_inside(kind, dtype, saved, lanes, together, uniform, past, within), group * lanes, together * lanes
    ask = ahead.asking(dtype)

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        x, y = pointer(args, 3, dtype), pointer(args, 4, dtype)
        pairs_d, pairs_h, pairs_w = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        counts_d, counts_h, counts_w = pointer(args, 8, real), pointer(args, 9, real), pointer(args, 10, real)
        tables = pairs_d, pairs_h, pairs_w, counts_d, counts_h, counts_w
        C, D, H, W, OD, OH, OW, stride_n, stride_d, stride_h, stride_w, x_end = integers(args, 11, 12)
        KD, KH, KW, y_end, inside_from, inside_to, pixel_from, far = integers(args, 23, 8)
        p, size = numbers(args, 31, P, real, L), splat(real(KD * KH * KW), L)
        for job in range(start, stop):
            n, r = job // (D * H), job % (D * H)
            slice_, line = r // H, r % H
            near_d, near_h = (pairs_d[slice_], pairs_d[slice_ + 1]), (pairs_h[line], pairs_h[line + 1])
            row, image = n * stride_n + slice_ * stride_d + line * stride_h, n * OD * OH * OW
            w = 0
            while w < W:
                if inside_from < inside_to and w == pixel_from and near_d[0] < near_d[1] and near_h[0] < near_h[1]:
                    last = (image + (pairs_d[near_d[1] - 2] * OH + pairs_h[near_h[1] - 2]) * OW) * C
                    first = far > 0 and pairs_h[near_h[1] - 1] == 0
                    window = gy, kept, x, y, tables, near_d, near_h, image, C, OH, OW, KH, size, p
                    for ow in range(inside_from, inside_to):
                        target, pixel = (job * W + w) * C, row + w * stride_w
                        if first:
                            ask(gy, last + ow * C + far, C)
                        for c in range(0, C, part):
                            if far > 0 and reads_values:
                                for b in range(SW):
                                    ask(x, pixel + b * stride_w + c + far, part)
                            beside(gx, target, pixel, stride_w, c, ow, window)
                        w += SW
                    continue
                near_w = pairs_w[w], pairs_w[w + 1]
                target, pixel, last = (job * W + w) * C, row + w * stride_w, 0
                if near_d[0] < near_d[1] and near_h[0] < near_h[1] and near_w[0] < near_w[1]:
                    last = (image + (pairs_d[near_d[1] - 2] * OH + pairs_h[near_h[1] - 2]) * OW + pairs_w[near_w[1] - 2]) * C
                    if far > 0 and pairs_h[near_h[1] - 1] == 0 and pairs_w[near_w[1] - 1] == 0:
                        ask(gy, last + far, C)
                if far > 0 and reads_values:
                    ask(x, pixel + far, C)
                window = gy, kept, x, y, tables, near_d, near_h, near_w, image, C, OH, OW, KH, KW, size, p
                c = 0
                while c + piece <= C:
                    several(gx, target, pixel, c, True, window)
                    c += piece
                if leaves:
                    while c < C:
                        inside = target + c + L <= (job + 1) * W * C and last + c + L <= y_end
                        whole = c + L <= C or (inside and (not reads_values or pixel + c + L <= x_end))
                        one(gx, target, pixel, c, whole, window)
                        c += L
                w += 1
        if past:
            settle()

    return kernel
