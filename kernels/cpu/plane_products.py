"""The gradient of a 1x1 convolution's weights, of contiguous maps: dot products of the planes of x and of gy, read as they lie.

Lanes run along the planes: a step takes a register of each of ``rows`` output and ``cols`` input channels, and adds to a sum of each pair.
A segment of the planes stays in the caches for all pairs; then the lanes are added up.  What the gradient with lanes across channels
(weight_gradient.py) spends on packing, 16 to 22 cycles a register of planes that are not in the caches, this one does not: one core
(Zen 5), a batch of 8, ms: 64x56x56 to 256 5.9 and 3.9, 16x112x112 to 96 4.7 and 2.1; without asking for the next segment 4.4 and 2.7.
"""

from numba import int64

from ..compile import specialised
from ..simd import between, integers, load, number, phase, pointer, prefetch_to_l2, repeat, splat, store, store_masked, unroll, with_phase
from ..tile import add_dots, totals
from .number import jitable


@specialised
def backward(dtype, lanes, rows, cols, by_inputs):
    """Jobs: (group, ``cols`` input channels where ``by_inputs``, else ``rows`` output channels); those side by side share segments.

    Arguments: x, gy, gw, sums; sizes, see weight_plans.py."""
    real, R, C, L, area = number(dtype), rows, cols, lanes, rows * cols
    groups_of_sums, run = area // lanes, min(cols, lanes)
    outer, inner = (C, R) if by_inputs else (R, C)

    @jitable
    def placed(offsets, i, args):
        first, last, step = args
        return with_phase(offsets, i, min(first + i, last) * step)

    @jitable
    def keep(found, g, args):
        """Of the g-th register of sums."""
        sums, at, fresh, last, gw, to, rows_left, cols_left, step_o = args
        here = phase(found, g)
        if not fresh:
            here = here + load(sums, at + g * L, L)
        if not last:
            store(sums, at + g * L, here)
            return found
        for k in range(L // run):
            r, c = (g * L + k * run) // C, (g * L + k * run) % C
            if r < rows_left:  # of its inputs, lanes from k * run on are those from c on
                store_masked(gw, to + r * step_o + c - k * run, here, between(0, 1, k * run, k * run + min(run, cols_left - c), L))
        return found

    @jitable
    def dots(tile, w, w_rows, w_at, x, x_cols, x_at, first, end, ask_w, ask_x):
        for at in range(first, end - L + 1, L):
            prefetch_to_l2(w, ask_w + at)
            prefetch_to_l2(x, ask_x + at)
            tile = add_dots(tile, w, w_rows, w_at + at, x, x_cols, x_at + at, ())
        rest = (end - first) % L
        if rest > 0:
            inside = between(0, 1, 0, rest, L), splat(real(0), L)
            tile = add_dots(tile, w, w_rows, w_at + end - rest, x, x_cols, x_at + end - rest, inside)
        return tile

    def kernel(args, start, stop):
        x, gy, gw, sums = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), pointer(args, 3, real)
        N, inputs, outputs, length, part, near, xn, xc, yn, yc, step_o = integers(args, 4, 11)
        outer_channels, inner_channels = (inputs, outputs) if by_inputs else (outputs, inputs)
        outer_tiles, inner_tiles = (outer_channels + outer - 1) // outer, (inner_channels + inner - 1) // inner
        parts = (length + part - 1) // part
        segments = N * parts
        job = start
        while job < stop:
            group, t0 = job // outer_tiles, job % outer_tiles
            t1 = min(outer_tiles, t0 + stop - job)
            for segment in range(segments):
                n, first = segment // parts, segment % parts * part
                end, last = min(length, first + part), segment == segments - 1
                # From here to the next segment, whose lines are asked for.
                new_n, new_at = (0, 0) if last else ((segment + 1) // parts - n, (segment + 1) % parts * part - first)
                for u0 in range(0, inner_tiles, near):
                    for t in range(t0, t1):
                        for u in range(u0, min(inner_tiles, u0 + near)):
                            o, i = (u * R, t * C) if by_inputs else (t * R, u * C)
                            ys = unroll(placed, R, repeat(int64(0), R), (group * outputs + o, (group + 1) * outputs - 1, yc))
                            xs = unroll(placed, C, repeat(int64(0), C), (group * inputs + i, (group + 1) * inputs - 1, xc))
                            # One tile after the other asks for one of its rows.
                            turn_y, turn_x = (t - t0, u - u0) if by_inputs else (u - u0, t - t0)
                            ask_y = n * yn + min(group * outputs + o + turn_y % R, (group + 1) * outputs - 1) * yc
                            ask_x = n * xn + min(group * inputs + i + turn_x % C, (group + 1) * inputs - 1) * xc
                            if turn_y < R:
                                ask_y += new_n * yn + new_at
                            if turn_x < C:
                                ask_x += new_n * xn + new_at
                            tile = dots(repeat(splat(real(0), L), area), gy, ys, n * yn, x, xs, n * xn, first, end, ask_y, ask_x)
                            at = ((group * outer_tiles + t) * inner_tiles + u) * area
                            place = gw, (group * outputs + o) * step_o + i, outputs - o, inputs - i, step_o
                            unroll(keep, groups_of_sums, totals(tile), (sums, at, segment == 0, last, *place))
            job += t1 - t0

    return kernel
