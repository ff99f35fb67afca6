"""Loop nests over contiguous maps that fit the L1 cache: each is copied between margins of padding, and then every window lies inside.

No edge, no mask: a window is its taps, written out.  Narrow rows share a register (``together``): two output rows of 4 columns in one of 8
lanes.  A job is one map.  Rows are written in rising order, each over its end into the next ones, but at the end of a call.
"""

from ..compile import specialised
from ..simd import (
    between,
    convert,
    integers,
    load,
    load_masked,
    load_rows,
    number,
    numbers,
    phase,
    pointer,
    splat,
    stacked,
    store,
    store_rows,
    unroll,
    where,
)
from .number import jitable
from .reduction import arithmetic, draws_of_plane, has_nan, index, looks_for_nan

ROOM = 8192
"""Elements of a map between its margins, at most."""

COPIED = ROOM // 4
"""The same where a map is copied for windows of a larger stride, each element of which is read in fewer windows: on 8x256x56x56, 3x3
s2 p1, the copying nest took 3.1 ms and the contiguous one 2.5; on 40x40 1.6 and 1.7, on 28x28 1.3 and 1.55 (Zen 4)."""


def copied_rows(lanes):
    """Rows of a map in memory, into rows of an array with margins; what lies past a row's end is ``fill``."""
    L = lanes

    @jitable
    def copied(x, source, step, x_end, array, target, stride, H, W, fill):
        tail, rest = W // L * L, between(W // L * L, 1, 0, W, L)
        for h in range(H):
            row, to = source + h * step, target + h * stride
            for at in range(0, tail, L):
                store(array, to + at, load(x, row + at, L))
            if tail < W:
                if row + tail + L <= x_end:
                    store(array, to + tail, where(rest, load(x, row + tail, L), fill))
                else:
                    store(array, to + tail, load_masked(x, row + tail, rest, fill))

    return copied


@specialised
def forward(kind, dtype, saved, saves, lanes, together, KH, KW, stride, direct):
    """Arguments: x, y, saved; tables by blocks of outputs: counts, the first tap inside; C, D, H, W, OH, OW; x's strides of N,
    C, D and H, and its end; SH, PH, PW; rows and row stride between margins; how far a map is read in its place; the seed's
    halves; the reduction's parameters.

    ``direct``: no window reaches padding, and a map is read in its place unless it is one of the last.
    """
    A, P, L, R, taps = arithmetic(kind), len(kind.parameters), lanes * together, together, KH * KW
    real, tapped = number(dtype), index(dtype, saved)
    neutral, begin, finish, surveys = A.neutral, A.begin, A.finish, A.surveys
    draws, fill_draws = kind.draws, draws_of_plane(kind, lanes, real)
    copied, draws_room = copied_rows(lanes), ROOM if draws else 1

    def windows(step):
        @jitable
        def tap_of(state, k, args):
            array, at, stride_h, SH, p = args
            kh, kw = k // KW, k % KW
            phases = load_rows(array, at + kh * stride_h + kw // stride * stride, SH * stride_h, R, stride, lanes)
            return step(state, phase(phases, kw % stride), splat(tapped(k), L), p)

        return jitable(lambda state, args: unroll(tap_of, taps, state, args))

    window, survey, ordered_window = windows(A.step), windows(A.survey or A.step), windows(A.ordered or A.step)
    looks = looks_for_nan(A, dtype) and not direct and stride == 1
    holds_nan = has_nan(real, lanes)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        counts, firsts = pointer(args, 3, real), pointer(args, 4, tapped)
        C, D, H, W, OH, OW, stride_n, stride_c, stride_d, stride_h, x_end = integers(args, 5, 11)
        SH, PH, PW, rows, stride_m, extent, k0, k1 = integers(args, 16, 8)
        p = numbers(args, 24, P, real, L)
        zero, size, short = splat(real(0), L), splat(real(KH * KW), L), splat(real(0), lanes)
        fill = neutral(short)
        margins, drawn = stacked(ROOM, real), stacked(draws_room, real)
        for at in range(0, rows * stride_m, lanes):
            store(margins, at, fill)
        plane, d = start // D, start % D
        n, c = plane // C, plane % C
        ordered = False
        for job in range(start, stop):
            source = n * stride_n + c * stride_c + d * stride_d
            array, corner, stride_a = margins, 0, stride_m
            if direct and source + extent <= x_end:
                array, corner, stride_a = x, source, stride_h
            else:
                copied(x, source, stride_h, x_end, margins, PH * stride_m + PW, stride_m, H, W, fill)
                if looks:
                    ordered = not holds_nan(margins, PH * stride_m, H * stride_m, ROOM)
            if draws:
                fill_draws(drawn, d * OH * OW, OH * OW, plane, k0, k1)
            table = 0
            for first in range(0, OH, R):
                oh = min(first, OH - R)
                for ow in range(0, OW, lanes):
                    at = array, corner + oh * SH * stride_a + ow * stride, stride_a, SH, p
                    total = zero
                    u = zero
                    if draws:
                        u = phase(load_rows(drawn, d * OH * OW % 4 + oh * OW + ow, OW, R, 1, lanes), 0)
                    if surveys:
                        total = survey(total, at)
                    state = begin(zero, load(firsts, table, L), total, u)
                    if looks:
                        state = ordered_window(state, at) if ordered else window(state, at)
                    else:
                        state = window(state, at)
                    value, choice = finish(state, load(counts, table, L), size, p)
                    out = (job * OH + oh) * OW + ow
                    if out + (R - 1) * OW + lanes <= stop * OH * OW:
                        store_rows(y, out, OW, R, (value,))
                        if saves:
                            store_rows(kept, out, OW, R, (convert(choice, saved),))
                    else:
                        spare_y, spare_kept = stacked(L, dtype), stacked(L, saved)
                        store(spare_y, 0, value)
                        if saves:
                            store(spare_kept, 0, convert(choice, saved))
                        for r in range(R):
                            for i in range(OW - ow):
                                y[out + r * OW + i] = spare_y[r * lanes + i]
                                if saves:
                                    kept[out + r * OW + i] = spare_kept[r * lanes + i]
                    table += L
            d += 1
            if d == D:
                d, c, plane = 0, c + 1, plane + 1
                if c == C:
                    c, n = 0, n + 1

    return kernel
