"""CUDA kernels of pooling where memory can be read 4 elements at once: a thread makes several outputs, side by side.

Of contiguous maps these are as many as 4 elements of a row step over, of channels_last 4 channels.  What a thread finds out about a
window, and each address, serves all of them: max 3x3 s1 takes a third of the instructions of windows.py's kernel, which does the rest.
"""

import functools
import math

from numba import int32, uint32

from ..arithmetic import gift
from . import vector
from .compile import specialised
from .number import arithmetic, computed, device, read, stored, written
from .windows import (
    UNROLLED,
    axis_of,
    beginning,
    count_of,
    first_parameters,
    index,
    place,
    signature,
    strided,
    tap,
    thread,
    windows_of,
)

QUAD = 4
"""Elements of a load."""

HELD = 25
"""Windows that hold an element up to which their gradients are gathered so: of 5x5 with stride 1 as many."""


def lanes(last, stride):
    """Outputs of a thread: none, if a step along the width is not a part of a load."""
    return QUAD if last else QUAD // stride if stride and QUAD % stride == 0 else 0


def fits(kernel_size, stride, last):
    """Whether a window is written out, and read so."""
    return kernel_size[0] * kernel_size[1] * kernel_size[2] <= UNROLLED and min(stride) > 0 and lanes(last, stride[2]) > 1


@functools.cache
def _pieces(positions, unit):
    """Positions, from that of a thread's first load on, as loads of ``unit``: (position, elements); of those of which one element is of
    use, that alone."""
    units = {}
    for position in sorted(set(positions)):
        units.setdefault(position // unit * unit, []).append(position)
    return tuple((first, unit) if len(of) > 1 else (of[0], 1) for first, of in units.items())


@functools.cache
def _loaded(positions, convert, unit):
    """(x, place of the row's position 0, this thread's first position, the row's length, step, inside, fill) -> the elements at these
    positions of a row, from the thread's first on, each as ``convert`` has it; ``fill`` where they are outside of the row, or all if not
    ``inside``.  A thread's first position is a multiple of ``unit``, the elements of a load."""
    pieces, known = _pieces(positions, unit), {}
    for first, count in pieces:
        known |= {first + i: len(known) + i for i in range(count)}
    picked, whole = vector.picked(tuple(known[position] for position in positions)), _joined(pieces, convert)
    return device(lambda *args: picked(whole(*args)))


@functools.cache
def _joined(pieces, convert):
    """Those of loads one after the other: (position, elements) each."""
    (first, count), converted = pieces[-1], vector.mapped(convert)
    far, none, some = uint32(first % 2**32), vector.filled(count), vector.load(count)

    @device
    def piece(x, row, at, length, step, inside, fill):
        position, found = uint32(at + far), none(fill)
        # A position before 0 has wrapped to beyond the length.
        if inside and position < length:
            found = converted(some(x, uint32(row + uint32(position * step))), position)
        return found

    if len(pieces) == 1:
        return piece
    before = _joined(pieces[:-1], convert)
    return device(lambda *args: before(*args) + piece(*args))


@functools.cache
def _of_dtype(name):
    """(what lies in memory, anything) -> the number."""
    take = read(name)
    return device(lambda x, p: take(x))


@functools.cache
def _row(name, last, K, S, D, P):
    """``_loaded``'s of a kernel's row: for each tap and each output of a thread the element, tap by tap."""
    if last:
        # A load a tap, of which every lane is another channel.
        return _joined(tuple((k * D, QUAD) for k in range(K)), _of_dtype(name))
    return _loaded(tuple(lane * S + k * D - P for k in range(K) for lane in range(lanes(last, S))), _of_dtype(name), QUAD)


@functools.cache
def _first_place(last, many):
    """(t, C, D, H, W as divisors, C or W counted by ``many``) -> (n, c, d, h, w) of the first of a thread's elements; C; W."""
    where, several = place(last), uint32(many)

    @device
    def along_width(t, C, D, H, W):
        n, c, d, h, w = where(t, C, D, H, W)
        return n, c, d, h, uint32(w * several), C[0], uint32(W[0] * several)

    @device
    def along_channels(t, C, D, H, W):
        n, c, d, h, w = where(t, C, D, H, W)
        return n, uint32(c * several), d, h, w, uint32(C[0] * several), W[0]

    return along_channels if last else along_width


@functools.cache
def _taps(step, neutral, name, last, kernel_size, stride, dilation, padding):
    """(states, x, base, d, h, w, sizes, strides, p) -> the states after a window's taps in rising order; w: of this thread's first load."""
    (KD, KH, KW), (DD, DH, _), many = kernel_size, map(uint32, dilation), lanes(last, stride)
    row_of, real = _row(name, last, KW, stride, dilation[2], padding), computed(name)
    stepped = vector.mapped(device(lambda state, value, p: step(state, value, p[0], p[1])), 2)

    def along(kw):
        of_tap, tap = vector.picked(tuple(range(kw * many, kw * many + many))), int32(kw)
        return device(lambda states, values, first, p: stepped(states, of_tap(values), (int32(first + tap), p)))

    every = vector.folded(KW, along)

    @device
    def taps(states, x, base, d, h, w, sizes, strides, p):
        for kd in range(KD):
            id = uint32(d + uint32(uint32(kd) * DD))
            for kh in range(KH):
                ih = uint32(h + uint32(uint32(kh) * DH))
                row = uint32(base + uint32(uint32(id * strides[0]) + uint32(ih * strides[1])))
                values = row_of(x, row, w, sizes[2], strides[2], id < sizes[0] and ih < sizes[1], neutral(real(0)))
                states = every(states, values, int32((kd * KH + kh) * KW), p)
        return states

    return taps


@specialised
def forward(kind, dtype, saved, saves, last, kernel_size, stride, dilation, padding, include_pad, divisor):
    """``padding``: along the width.

    Arguments: as those of windows.py's, but outputs are counted, and divided by, in a thread's: groups of channels of channels_last, of
    columns otherwise."""
    A, real, keeps = arithmetic(kind), computed(dtype), stored(saved)
    begin, finish, surveys, selects = A.begin, A.finish, A.surveys, kind.selects
    taps, many = math.prod(kernel_size), lanes(last, stride[2])
    shape = dtype, last, kernel_size, stride[2], dilation, padding
    window = _taps(A.step, A.neutral, *shape)
    survey = _taps(A.survey, A.neutral, *shape) if surveys else None
    along_d, along_h, along_w = (axis_of(*of) for of in windows_of(kernel_size, stride, dilation))
    counts = count_of(windows_of(kernel_size, stride, dilation), include_pad, divisor, real)
    begins = beginning(kind, kernel_size, stride, dilation, real)
    where, first_of, write = _first_place(last, many), first_parameters(len(kind.parameters)), written(dtype)
    put, keep, zeros = vector.store(many), vector.store(many), vector.filled(many)
    values_of = vector.mapped(device(lambda state, count, p: write(finish(state, count, real(taps), p)[0])), 2)
    rests_of = vector.mapped(device(lambda state, count, p: keeps(finish(state, count, real(taps), p)[1])), 2)
    begun = vector.mapped(device(lambda of, weight, p: begin(real(0), of[0], weight, of[1])), 2)
    several = uint32(many)

    def lane_of(k):
        """Output k of a thread: another column, or another channel of channels_last."""
        right, further = uint32(0 if last else k), uint32(k if last else 0)
        return device(lambda od, oh, ow, plane, *more: begins(od, oh, uint32(ow + right), uint32(plane + further), *more))

    def count_of_lane(k):
        right = uint32(0 if last else k)
        return device(lambda od, oh, ow, *more: real(0) if selects else counts(od, oh, uint32(ow + right), *more))

    lanes_of, counts_of = vector.tupled(many, lane_of), vector.tupled(many, count_of_lane)

    def kernel(
        x, y, kept, total, C, mC, sC, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW, D, H, W, in_n, in_c, in_d, in_h, in_w, PD, PH, PW,
        plane, k0, k1, a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        n, c, od, oh, ow, channels, columns = where(t, (C, mC, sC), (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW))
        p = first_of(a0, a1, a2, a3, a4, a5)
        sizes, strides, outputs, paddings = (D, H, W), (in_d, in_h, in_w), (OD, OH, columns), (PD, PH, PW)
        d, _, _ = along_d(od, D, PD, OD)
        h, _, _ = along_h(oh, H, PH, OH)
        w, _, _ = along_w(ow, W, PW, columns)
        if not last:
            w = uint32(w + PW)
        base = uint32(uint32(n * in_n) + uint32(c * in_c))
        weights = zeros(real(0))
        if surveys:
            weights = survey(weights, x, base, d, h, w, sizes, strides, p)
        of = lanes_of(od, oh, ow, uint32(plane + uint32(uint32(n * channels) + c)), sizes, outputs, paddings, k0, k1)
        states = window(begun(of, weights, p), x, base, d, h, w, sizes, strides, p)
        found = counts_of(od, oh, ow, sizes, outputs, paddings)
        put(y, uint32(t * several), values_of(states, found, p))
        if saves:
            keep(kept, uint32(t * several), rests_of(states, found, p))

    return kernel, signature((stored(dtype), stored(dtype), keeps), 4, 1 + 3 + 5 + 3 + 3, dtype)


def gathers(kind, kernel_size, stride, dilation, last):
    """Whether ``backward`` does it."""
    around = [-(-(D * (K - 1) + 1) // S) for K, S, D in windows_of(kernel_size, stride, dilation)] if 0 not in stride else [math.inf]
    return fits(kernel_size, stride, last) and math.prod(around) <= HELD and bool(kind.selects or kind.gives)


@specialised
def backward(kind, dtype, saved, last, kernel_size, stride, dilation, padding, include_pad, divisor):
    """QUAD elements of the gradient by a thread, each the sum of what its windows give, in rising order.  ``padding``: along the width.

    Arguments: as those of windows.py's, but elements are counted, and divided by, in a thread's."""
    A, real = arithmetic(kind), computed(dtype)
    share, gives, takes, selects = A.share, A.gives, A.takes, kind.selects
    reads_values, reads_saved = A.reads_values and not selects, A.reads_saved
    windows = windows_of(kernel_size, stride, dilation)
    (KD, KH, KW), (DD, DH, DW), (SD, SH, SW) = (map(uint32, of) for of in (kernel_size, dilation, stride))
    counts, where, place_of = count_of(windows, include_pad, divisor, real), _first_place(last, QUAD), index(last)
    take, write, first_of = _of_dtype(dtype), written(dtype), first_parameters(len(kind.parameters))
    MD, MH, MW = (-(-(D * (K - 1) + 1) // S) for K, S, D in windows)
    taps, parts = math.prod(kernel_size), 1 if selects else len(gift(kind, real))
    rest_real = int32 if selects else real
    rest_of = device(lambda x, p: rest_real(x))
    load, put, zeros = vector.load(QUAD), vector.store(QUAD), vector.filled(QUAD)
    numbers, rests = vector.mapped(take), vector.mapped(rest_of)
    none, quad = vector.filled(parts), uint32(QUAD)

    added = vector.added

    @device
    def selected(got, gy, y, rest, p):
        return (got[0] + share(gy, real(0), real(0), rest, p[0], real(0), real(taps), p[2]),)

    @device
    def summed(got, gy, y, rest, p):
        return added(got, gives(gy, y, rest, p[1], real(taps), p[2]))

    plus = selected if selects else summed
    of_lanes = vector.mapped(plus, 4)
    ended = vector.mapped(device(lambda got, x, p: write(got[0] if selects else takes(x, got, p))), 2)

    @device
    def counted(window, sizes, outs, paddings):
        return real(0) if selects else counts(window[0], window[1], window[2], sizes, outs, paddings)

    # Of channels_last a window has one tap for all lanes.

    @device
    def along_channels(got, at, element, gy, kept, y, line, rows, sizes, outs, paddings, inside, p):
        w = uint32(at + paddings[2])
        newest = uint32(w // SW)
        for k in range(MW):
            ow = uint32(newest - uint32(MW - 1 - k))
            kw = tap(w, uint32(ow * SW), DW, KW)
            if inside and ow < outs[2] and kw < KW:
                o = place_of(element[0], element[1], rows[0], rows[1], ow, element[2], outs[0], outs[1], outs[2])
                count, results, others = counted((rows[0], rows[1], ow), sizes, outs, paddings), zeros(real(0)), zeros(rest_real(0))
                if reads_values:
                    results = numbers(load(y, o), o)
                if reads_saved:
                    others = rests(load(kept, o), o)
                got = of_lanes(got, numbers(load(gy, o), o), results, others, (int32(uint32(line + kw)), count, p))
        return got

    # Of contiguous maps lane i has tap i + padding - o * stride of output o, a constant, both from the thread's first on.

    K, S, D = kernel_size[2], stride[2], dilation[2]
    held = tuple(range(-(-(padding - D * (K - 1)) // S), (QUAD - 1 + padding) // S + 1))
    many = lanes(last, S)
    gys, kepts = _loaded(held, take, many), _loaded(held, rest_of, many)
    absent = vector.filled(len(held))

    def count_at(q):
        far = uint32(held[q] % 2**32)

        @device
        def count(rows, first, sizes, outs, paddings):
            ow = uint32(first + far)
            return counted((rows[0], rows[1], ow), sizes, outs, paddings) if ow < outs[2] else real(1)

        return count

    counts_of = vector.tupled(len(held), count_at)

    def lane_of(i):
        reach = [(q, (i + padding - o * S) // D) for q, o in enumerate(held) if (i + padding - o * S) % D == 0]
        reach = [(q, k) for q, k in reach if 0 <= k < K]

        def window_of(j):
            (q, k), far = reach[j], uint32(held[reach[j][0]] % 2**32)

            @device
            def window(got, of_gy, of_y, of_kept, of_count, first, outs, line, p):
                if uint32(first + far) < outs[2]:
                    got = plus(got, of_gy[q], of_y[q], of_kept[q], (int32(uint32(line + uint32(k))), of_count[q], p))
                return got

            return window

        if not reach:
            return device(lambda got, *args: got[i])
        every = vector.folded(len(reach), window_of)
        return device(lambda got, *args: every(got[i], *args))

    each_lane = vector.tupled(QUAD, lane_of)

    @device
    def along_width(got, at, element, gy, kept, y, line, rows, sizes, outs, paddings, inside, p):
        if inside:
            first, columns = uint32(at // SW), outs[2]
            row = place_of(element[0], element[1], rows[0], rows[1], uint32(0), element[2], outs[0], outs[1], columns)
            found, results, others = gys(gy, row, first, columns, uint32(1), True, real(0)), absent(real(0)), absent(rest_real(0))
            if reads_values:
                results = gys(y, row, first, columns, uint32(1), True, real(0))
            if reads_saved:
                others = kepts(kept, row, first, columns, uint32(1), True, rest_real(0))
            got = each_lane(got, found, results, others, counts_of(rows, first, sizes, outs, paddings), first, outs, line, p)
        return got

    along = along_channels if last else along_width

    def kernel(
        gx, gy, kept, x, y, total, C, mC, sC, D, mD, sD, H, mH, sH, W, mW, sW, OD, OH, OW, in_n, in_c, in_d, in_h, in_w, PD, PH, PW,
        a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        n, c, id, ih, iw, channels, columns = where(t, (C, mC, sC), (D, mD, sD), (H, mH, sH), (W, mW, sW))
        p, sizes, outs, paddings = first_of(a0, a1, a2, a3, a4, a5), (D, H, columns), (OD, OH, OW), (PD, PH, PW)
        d, h = uint32(id + PD), uint32(ih + PH)
        last_d, last_h = uint32(d // SD), uint32(h // SH)
        got = zeros(none(real(0)))
        # In rising order, as the CPU adds them; the number of an output before the first has wrapped.
        for i in range(MD):
            od = uint32(last_d - uint32(MD - 1 - i))
            kd = tap(d, uint32(od * SD), DD, KD)
            for j in range(MH):
                oh = uint32(last_h - uint32(MH - 1 - j))
                kh = tap(h, uint32(oh * SH), DH, KH)
                line, inside = uint32(uint32(uint32(kd * KH) + kh) * KW), od < OD and oh < OH and kd < KD and kh < KH
                got = along(got, iw, (n, c, channels), gy, kept, y, line, (od, oh), sizes, outs, paddings, inside, p)
        values = zeros(real(0))
        if reads_values:
            values = numbers(load(x, strided(uint32(uint32(n * in_n) + uint32(c * in_c)), id, ih, iw, in_d, in_h, in_w)), t)
        put(gx, uint32(t * quad), ended(got, values, p))

    number = stored(dtype)
    return kernel, signature((number, number, stored(saved or "uint8"), number, number), 4, 1 + 3 + 5 + 3, dtype)
