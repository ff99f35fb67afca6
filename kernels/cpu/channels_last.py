"""Loop nests over channels_last maps: lanes run over channels; a job is one row of one image.

Every lane of a register stands at the same pixel, so a window's edges are loop bounds, not masks; only the last channels are masked.
"""

from numba import int32, uint32

from ..compile import specialised
from ..simd import between, convert, lane_index, load, load_masked, numbers, pointer, splat, store, store_masked
from . import ahead
from .number import jitable
from .reduction import arithmetic, draw


def _access(dtype, lanes, bounded):
    """(fetch, put): a register of channels c, c + 1, ... < C of the pixel at an offset."""

    @jitable
    def fetch(x, pixel, c, C, fill):
        if bounded:
            return load_masked(x, pixel + c, between(c, 1, 0, C, lanes), fill)
        return load(x, pixel + c, lanes)

    @jitable
    def put(y, pixel, c, C, value):
        if bounded:
            store_masked(y, pixel + c, value, between(c, 1, 0, C, lanes))
        else:
            store(y, pixel + c, value)

    return fetch, put


def _window(step, dtype, lanes, bounded):
    """(state, args) -> state, through the taps (first, left) .. (end - 1, right - 1) of one window."""
    fetch, _ = _access(dtype, lanes, bounded)

    @jitable
    def taps(state, args):
        x, origin, stride_h, stride_w, first, end, left, right, c, C, KW, DH, DW, fill, p = args
        for kh in range(first, end):
            for kw in range(left, right):
                v = fetch(x, origin + kh * DH * stride_h + kw * DW * stride_w, c, C, fill)
                state = step(state, v, splat(int32(kh * KW + kw), lanes), p)
        return state

    return taps


def _pooled(kind, dtype, saved, saves, lanes, bounded):
    """Pool one window's channels c .. c + lanes - 1 and store them at ``out``."""
    A, L = arithmetic(kind), lanes
    neutral, begin, finish, drawn, surveys = A.neutral, A.begin, A.finish, draw(kind, lanes), A.surveys
    window, survey = _window(A.step, dtype, lanes, bounded), _window(A.survey or A.step, dtype, lanes, bounded)
    _, put = _access(dtype, lanes, bounded)

    @jitable
    def pool(y, kept, out, tap, count, size, position, plane, k0, k1, args):
        c, C, p = args[8], args[9], args[14]
        zero = splat(dtype(0), L)
        planes = splat(uint32(plane), L) + lane_index(uint32, L)
        u = drawn(splat(uint32(position), L), planes, k0, k1, zero)
        total = zero
        if surveys:
            total = survey(total, args)
        state = window(begin(zero, splat(int32(tap), L), total, u), args)
        value, choice = finish(state, splat(count, L), splat(size, L), p)
        put(y, out, c, C, value)
        if saves:
            put(kept, out, c, C, convert(choice, saved))

    return pool, neutral


@specialised
def forward(kind, dtype, saved, saves, lanes):
    """Arguments: x, y, saved, rows, columns; C, H, W, OH, OW; x's strides of N, H and W; KH, SH, DH, PH, KW, SW, DW, PW; the seed's
    halves; the reduction's parameters.  rows[oh] * columns[ow] is a window's count.  y and saved are dense."""
    P, L = len(kind.parameters), lanes
    far, ask = ahead.distance(dtype), ahead.asking(dtype)
    pool_inside, neutral = _pooled(kind, dtype, saved, saves, lanes, False)
    pool_bounded, _ = _pooled(kind, dtype, saved, saves, lanes, True)

    def kernel(args, start, stop):
        x, y, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        rows, columns = pointer(args, 3, dtype), pointer(args, 4, dtype)
        C, H, W, OH, OW = args[5], args[6], args[7], args[8], args[9]
        stride_n, stride_h, stride_w = args[10], args[11], args[12]
        KH, SH, DH, PH, KW, SW, DW, PW = args[13], args[14], args[15], args[16], args[17], args[18], args[19], args[20]
        k0, k1 = args[21], args[22]
        p, fill = numbers(args, 23, P, dtype, L), neutral(splat(dtype(0), L))
        for job in range(start, stop):
            n, oh = job // OH, job % OH
            top = oh * SH - PH
            first, end = max(0, (DH - 1 - top) // DH), min(KH, (H - top + DH - 1) // DH)
            for ow in range(OW):
                edge = ow * SW - PW
                left, right = max(0, (DW - 1 - edge) // DW), min(KW, (W - edge + DW - 1) // DW)
                origin = n * stride_n + top * stride_h + edge * stride_w
                out, tap, count = (job * OW + ow) * C, first * KW + left, rows[oh] * columns[ow]
                for kh in range(max(0, end - SH), end):  # the rows that this row of outputs is the first to read
                    ask(x, origin + kh * DH * stride_h + far, SW * C)
                for c in range(0, C, L):
                    window = x, origin, stride_h, stride_w, first, end, left, right, c, C, KW, DH, DW, fill, p
                    if c + L <= C:
                        pool_inside(y, kept, out, tap, count, dtype(KH * KW), oh * OW + ow, n * C + c, k0, k1, window)
                    else:
                        pool_bounded(y, kept, out, tap, count, dtype(KH * KW), oh * OW + ow, n * C + c, k0, k1, window)

    return kernel


def _gathered(kind, dtype, saved, lanes, bounded):
    """The gradient of one pixel's channels c .. c + lanes - 1, from the windows (low, near) .. (high, far), stored at ``target``."""
    A, L = arithmetic(kind), lanes
    share, reads_values, reads_saved = A.share, A.reads_values, A.reads_saved
    fetch, put = _access(dtype, lanes, bounded)

    @jitable
    def gather(gx, target, gy, kept, x, y, rows, columns, pixel, image, t, s, low, high, near, far, c, C, OW, KW, SH, SW, DH, DW, size, p):
        zero, nothing = splat(dtype(0), L), splat(saved(0), L)
        acc = zero
        here = fetch(x, pixel, c, C, zero) if reads_values else zero
        for oh in range(low, high + 1):
            row = t - oh * SH
            if DH == 1 or row % DH == 0:
                for ow in range(near, far + 1):
                    column = s - ow * SW
                    if DW == 1 or column % DW == 0:
                        out, tap = (image + oh * OW + ow) * C, row // DH * KW + column // DW
                        v = fetch(y, out, c, C, zero) if reads_values else zero
                        k = fetch(kept, out, c, C, nothing) if reads_saved else nothing
                        count = splat(rows[oh] * columns[ow], L)
                        acc = acc + share(fetch(gy, out, c, C, zero), here, v, k, splat(saved(tap), L), count, splat(size, L), p)
        put(gx, target, c, C, acc)

    return gather


@specialised
def backward(kind, dtype, saved, lanes):
    """Arguments: gx, gy, saved, x, y, rows, columns; C, H, W, OH, OW; x's strides of N, H and W; KH, SH, DH, PH, KW, SW, DW, PW; the
    reduction's parameters.  gx, gy, saved and y are dense; x and y are read only by a reduction whose gradient needs them."""
    P, L = len(kind.parameters), lanes
    gather_inside, gather_bounded = (_gathered(kind, dtype, saved, lanes, bounded) for bounded in (False, True))

    def kernel(args, start, stop):
        gx, gy, kept = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, saved)
        x, y, rows, columns = pointer(args, 3, dtype), pointer(args, 4, dtype), pointer(args, 5, dtype), pointer(args, 6, dtype)
        C, H, W, OH, OW = args[7], args[8], args[9], args[10], args[11]
        stride_n, stride_h, stride_w = args[12], args[13], args[14]
        KH, SH, DH, PH, KW, SW, DW, PW = args[15], args[16], args[17], args[18], args[19], args[20], args[21], args[22]
        p, size = numbers(args, 23, P, dtype, L), dtype(KH * KW)
        for job in range(start, stop):
            n, ih = job // H, job % H
            t = ih + PH
            low, high = max(0, (t - (KH - 1) * DH + SH - 1) // SH), min(OH - 1, t // SH)
            for iw in range(W):
                s = iw + PW
                near, far = max(0, (s - (KW - 1) * DW + SW - 1) // SW), min(OW - 1, s // SW)
                target, pixel, image = (job * W + iw) * C, n * stride_n + ih * stride_h + iw * stride_w, n * OH * OW
                for c in range(0, C, L):
                    if c + L <= C:
                        gather_inside(
                            gx, target, gy, kept, x, y, rows, columns, pixel, image, t, s, low, high, near, far,
                            c, C, OW, KW, SH, SW, DH, DW, size, p,
                        )  # fmt: skip
                    else:
                        gather_bounded(
                            gx, target, gy, kept, x, y, rows, columns, pixel, image, t, s, low, high, near, far,
                            c, C, OW, KW, SH, SW, DH, DW, size, p,
                        )  # fmt: skip

    return kernel
