"""CUDA kernels of pooling over windows: a thread an output, and, for the gradient, a thread an element of the input.

Threads follow memory: along the width, or the channels of channels_last.  The gradient gathers from the windows that hold an element:
no atomics, the same sum every time.
"""

import functools
import math

from numba import cuda, int32, int64, types, uint32, uint64

from .. import random
from .compile import specialised
from .number import arithmetic, compiled, computed, device, quotient_of, read, stored, written

PARAMETERS = 6
"""Of a reduction and the activation in it, at most: kernels take so many always."""

UNROLLED = 36
"""Taps up to which a window is written out."""

FAR = -1
"""The stride that stands for bins so many, of axes so long, that a position by a size does not fit 32 bits.  The gradient of averages of
others is 832 instructions long (sm_80), with divisions of 64 bits 1,336."""

GATHERED = 9
"""Windows that hold an element up to which those are written out."""


@functools.cache
def first_parameters(count):
    """(all six) -> the tuple of the first ``count``."""
    return device(
        (
            lambda a, b, c, d, e, f: (),
            lambda a, b, c, d, e, f: (a,),
            lambda a, b, c, d, e, f: (a, b),
            lambda a, b, c, d, e, f: (a, b, c),
            lambda a, b, c, d, e, f: (a, b, c, d),
            lambda a, b, c, d, e, f: (a, b, c, d, e),
            lambda a, b, c, d, e, f: (a, b, c, d, e, f),
        )[count]
    )


@functools.cache
def axis_of(K, S, D):
    """(o, size, P, outs) -> (position of tap 0, wrapped; the first tap inside; the end of those) of output o along one axis.

    S = 0 or FAR: bins of adaptive pooling.
    """
    K, step, D, one = uint32(K), uint32(max(S, 0)), uint32(D), uint32(1)

    @device
    def regular(o, size, P, outs):
        at, reach = uint32(o * step), uint32(size + P)
        first = uint32(uint32(uint32(P - at) + uint32(D - one)) // D) if at < P else uint32(0)
        end = uint32(uint32(uint32(reach - at) + uint32(D - one)) // D) if at < reach else uint32(0)
        first = first if first < K else K
        end = end if end < K else K
        return uint32(at - P), first, (end if end > first else first)

    @device
    def bins(o, size, P, outs):
        begin = uint32(uint32(o * size) // outs)
        end = uint32(uint32(uint32(uint32(o + one) * size) + uint32(outs - one)) // outs)
        return begin, uint32(0), uint32(end - begin)

    @device
    def far_bins(o, size, P, outs):
        begin = uint32(uint64(uint64(o) * uint64(size)) // uint64(outs))
        end = uint32(uint64(uint64(uint64(uint64(o) + uint64(1)) * uint64(size)) + uint64(uint64(outs) - uint64(1))) // uint64(outs))
        return begin, uint32(0), uint32(end - begin)

    return far_bins if S == FAR else regular if S else bins


@functools.cache
def _holders(K, S, D):
    """(i, size, P, outs) -> (first, end) of the outputs whose windows may hold position i along one axis."""
    extent, step, one = uint32(D * (K - 1) + 1), uint32(max(S, 0)), uint32(1)

    @device
    def regular(i, size, P, outs):
        at = uint32(i + P)
        first = uint32(uint32(uint32(at - extent) // step) + one) if at >= extent else uint32(0)
        end = uint32(uint32(at // step) + one)
        return first, (end if end < outs else outs)

    @device
    def bins(i, size, P, outs):
        first = uint32(uint32(i * outs) // size)
        last = uint32(uint32(uint32(uint32(i + one) * outs) - one) // size)
        return first, uint32(last + one)

    @device
    def far_bins(i, size, P, outs):
        first = uint32(uint64(uint64(i) * uint64(outs)) // uint64(size))
        last = uint32(uint64(uint64(uint64(uint64(i) + uint64(1)) * uint64(outs)) - uint64(1)) // uint64(size))
        return first, uint32(last + one)

    return far_bins if S == FAR else regular if S else bins


@functools.cache
def _taps(step, neutral, name, kernel_size, dilation, unrolled):
    """(state, x, base, d, h, w, spans, sizes, strides, p) -> the state after a window's taps in rising order."""
    (KD, KH, KW), (DD, DH, DW) = kernel_size, map(uint32, dilation)
    take, real = read(name), computed(name)
    uKH, uKW, one = uint32(KH), uint32(KW), uint32(1)

    @device
    def written_out(state, x, base, d, h, w, spans, sizes, strides, p):
        fill = neutral(real(0))
        for kd in range(KD):
            id = uint32(d + uint32(uint32(kd) * DD))
            for kh in range(KH):
                ih = uint32(h + uint32(uint32(kh) * DH))
                row = uint32(base + uint32(uint32(id * strides[0]) + uint32(ih * strides[1])))
                for kw in range(KW):
                    iw = uint32(w + uint32(uint32(kw) * DW))
                    value = fill
                    # A position before 0 has wrapped to beyond the size.  Only the load depends on it, so that all are asked for at once.
                    if id < sizes[0] and ih < sizes[1] and iw < sizes[2]:
                        value = take(x[uint32(row + uint32(iw * strides[2]))])
                    state = step(state, value, int32((kd * KH + kh) * KW + kw), p)
        return state

    @device
    def looped(state, x, base, d, h, w, spans, sizes, strides, p):
        kd = spans[0]
        while kd < spans[1]:
            id = uint32(d + uint32(kd * DD))
            kh = spans[2]
            while kh < spans[3]:
                ih = uint32(h + uint32(kh * DH))
                row = uint32(base + uint32(uint32(id * strides[0]) + uint32(ih * strides[1])))
                line = uint32(uint32(uint32(kd * uKH) + kh) * uKW)
                kw = spans[4]
                while kw < spans[5]:
                    iw = uint32(w + uint32(kw * DW))
                    value = take(x[uint32(row + uint32(iw * strides[2]))])
                    state = step(state, value, int32(uint32(line + kw)), p)
                    kw = uint32(kw + one)
                kh = uint32(kh + one)
            kd = uint32(kd + one)
        return state

    return written_out if unrolled else looped


@device
def tap(i, start, step, K):
    """Which tap of a window that starts at ``start``, wrapped, is at position i along an axis; K: none is."""
    off = uint32(i - start)
    k = uint32(off // step)
    return k if uint32(k * step) == off and k < K else K


@device
def position(t, D, H, W):
    """(n, d, h, w) of the element t of dense maps of one channel; D, H and W as divisors."""
    q, w = quotient_of(t, W[0], W[1], W[2])
    q, h = quotient_of(q, H[0], H[1], H[2])
    n, d = quotient_of(q, D[0], D[1], D[2])
    return n, d, h, w


@device
def taps_of(tap, H, W):
    """(kd, kh, kw) of a tap's number; taps along H and W as divisors."""
    line, kw = quotient_of(tap, W[0], W[1], W[2])
    kd, kh = quotient_of(line, H[0], H[1], H[2])
    return kd, kh, kw


@functools.cache
def place(last):
    """(t, C, D, H, W as divisors) -> (n, c, d, h, w) of the element t of a dense tensor."""

    @device
    def contiguous(t, C, D, H, W):
        q, d, h, w = position(t, D, H, W)
        n, c = quotient_of(q, C[0], C[1], C[2])
        return n, c, d, h, w

    @device
    def channels_last(t, C, D, H, W):
        q, c = quotient_of(t, C[0], C[1], C[2])
        n, d, h, w = position(q, D, H, W)
        return n, c, d, h, w

    return channels_last if last else contiguous


@functools.cache
def index(last):
    """(n, c, d, h, w, C, D, H, W) -> the element's place in a dense tensor of these sizes."""

    @device
    def contiguous(n, c, d, h, w, C, D, H, W):
        return uint32(uint32(uint32(uint32(uint32(uint32(uint32(uint32(n * C) + c) * D) + d) * H) + h) * W) + w)

    @device
    def channels_last(n, c, d, h, w, C, D, H, W):
        return uint32(uint32(uint32(uint32(uint32(uint32(uint32(uint32(n * D) + d) * H) + h) * W) + w) * C) + c)

    return channels_last if last else contiguous


@device
def strided(base, d, h, w, step_d, step_h, step_w):
    """The place of an element of the map at ``base``."""
    return uint32(base + uint32(uint32(uint32(d * step_d) + uint32(h * step_h)) + uint32(w * step_w)))


@device
def thread():
    """This thread's number in the grid."""
    return uint32(uint32(uint32(cuda.blockIdx.x) * uint32(cuda.blockDim.x)) + uint32(cuda.threadIdx.x))


@functools.cache
def _along(K, S, D, include_pad):
    """(o, size, P, outs) -> how many taps of output o along one axis an average counts."""
    axis = axis_of(K, S, D)

    @device
    def inside(o, size, P, outs):
        _, first, end = axis(o, size, P, outs)
        return uint32(end - first)

    @device
    def padded(o, size, P, outs):
        # Padding is a larger input, with none around it.
        _, first, end = axis(o, uint32(size + uint32(P + P)), uint32(0), outs)
        return uint32(end - first)

    return padded if include_pad else inside


@functools.cache
def count_of(windows, include_pad, divisor, real):
    """(od, oh, ow, sizes, outputs, paddings) -> what an average divides by."""
    along_d, along_h, along_w = (_along(*of, include_pad) for of in windows)

    @device
    def counted(od, oh, ow, sizes, outputs, paddings):
        d = along_d(od, sizes[0], paddings[0], outputs[0])
        h = along_h(oh, sizes[1], paddings[1], outputs[1])
        w = along_w(ow, sizes[2], paddings[2], outputs[2])
        return real(uint32(uint32(d * h) * w))

    @device
    def given(od, oh, ow, sizes, outputs, paddings):
        return real(divisor)

    return given if divisor is not None else counted


def windows_of(kernel_size, stride, dilation):
    return tuple(zip(kernel_size, stride, dilation, strict=True))


@functools.cache
def beginning(kind, kernel_size, stride, dilation, real):
    """(od, oh, ow, plane, sizes, outputs, paddings, k0, k1) -> what an output begins with: its first tap inside, and what it has drawn."""
    along_d, along_h, along_w = (axis_of(*of) for of in windows_of(kernel_size, stride, dilation))
    selects, draws, uniform = kind.selects, kind.draws, compiled(random.uniform)
    _, KH, KW = map(uint32, kernel_size)

    @device
    def begins(od, oh, ow, plane, sizes, outputs, paddings, k0, k1):
        first, u = int32(0), real(0)
        if draws:
            at = uint32(uint32(uint32(uint32(od * outputs[1]) + oh) * outputs[2]) + ow)
            u = uniform(at, plane, k0, k1, real(0))
        if selects:
            _, first_d, _ = along_d(od, sizes[0], paddings[0], outputs[0])
            _, first_h, _ = along_h(oh, sizes[1], paddings[1], outputs[1])
            _, first_w, _ = along_w(ow, sizes[2], paddings[2], outputs[2])
            first = int32(uint32(uint32(uint32(uint32(first_d * KH) + first_h) * KW) + first_w))
        return first, u

    return begins


def signature(pointers, divisors, plain, name):
    number = types.float64 if name == "float64" else types.float32
    return (*map(types.CPointer, pointers), *(uint32,) * (3 * divisors + plain), *(number,) * PARAMETERS)


@specialised
def forward(kind, dtype, saved, saves, last, kernel_size, stride, dilation, include_pad, divisor):
    """Arguments: x, y, saved; outputs; C, OD, OH and OW as divisors; D, H, W; x's strides of N, C, D, H and W; the paddings; the number of
    the first plane; the seed's halves; the reduction's parameters."""
    A, real, keeps = arithmetic(kind), computed(dtype), stored(saved)
    begin, finish, surveys = A.begin, A.finish, A.surveys
    KD, KH, KW = kernel_size
    taps = KD * KH * KW
    unrolled = taps <= UNROLLED and min(stride) > 0
    window = _taps(A.step, A.neutral, dtype, kernel_size, dilation, unrolled)
    survey = _taps(A.survey, A.neutral, dtype, kernel_size, dilation, unrolled) if surveys else None
    along_d, along_h, along_w = (axis_of(*of) for of in windows_of(kernel_size, stride, dilation))
    counts = count_of(windows_of(kernel_size, stride, dilation), include_pad, divisor, real)
    begins = beginning(kind, kernel_size, stride, dilation, real)
    where, first_of, write = place(last), first_parameters(len(kind.parameters)), written(dtype)
    selects = kind.selects

    def kernel(
        x, y, kept, total, C, mC, sC, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW, D, H, W, in_n, in_c, in_d, in_h, in_w, PD, PH, PW,
        plane, k0, k1, a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        n, c, od, oh, ow = where(t, (C, mC, sC), (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW))
        p = first_of(a0, a1, a2, a3, a4, a5)
        d, first_d, end_d = along_d(od, D, PD, OD)
        h, first_h, end_h = along_h(oh, H, PH, OH)
        w, first_w, end_w = along_w(ow, W, PW, OW)
        spans, sizes, strides = (first_d, end_d, first_h, end_h, first_w, end_w), (D, H, W), (in_d, in_h, in_w)
        base = uint32(uint32(n * in_n) + uint32(c * in_c))
        zero = real(0)
        weight = zero
        if surveys:
            weight = survey(weight, x, base, d, h, w, spans, sizes, strides, p)
        first, u = begins(od, oh, ow, uint32(plane + uint32(uint32(n * C) + c)), sizes, (OD, OH, OW), (PD, PH, PW), k0, k1)
        state = window(begin(zero, first, weight, u), x, base, d, h, w, spans, sizes, strides, p)
        count = zero if selects else counts(od, oh, ow, sizes, (OD, OH, OW), (PD, PH, PW))
        value, rest = finish(state, count, real(taps), p)
        y[t] = write(value)
        if saves:
            kept[t] = keeps(rest)

    return kernel, signature((stored(dtype), stored(dtype), keeps), 4, 1 + 3 + 5 + 3 + 3, dtype)


@specialised
def backward(kind, dtype, saved, last, kernel_size, stride, dilation, include_pad, divisor):
    """Arguments: gx, gy, saved, x, y; elements of gx; C, D, H and W as divisors; OD, OH, OW; x's strides; the paddings; the reduction's
    parameters."""
    A, real, (KD, KH, KW), (DD, DH, DW) = arithmetic(kind), computed(dtype), map(uint32, kernel_size), map(uint32, dilation)
    share, selects, reads_values, reads_saved = A.share, kind.selects, A.reads_values, A.reads_saved
    windows = windows_of(kernel_size, stride, dilation)
    along_d, along_h, along_w = (axis_of(*of) for of in windows)
    over_d, over_h, over_w = (_holders(*of) for of in windows)
    counts, where, place_of = count_of(windows, include_pad, divisor, real), place(last), index(last)
    take, write, first_of = read(dtype), written(dtype), first_parameters(len(kind.parameters))
    rest_of = int32 if selects else real
    taps, one = math.prod(kernel_size), uint32(1)
    # So many windows hold an element along each axis, at most.
    most = tuple(-(-(D * (K - 1) + 1) // S) if S > 0 else 0 for K, S, D in windows)
    MD, MH, MW = most
    SD, SH, SW = (uint32(max(S, 0)) for S in stride)

    @device
    def share_of(window, taps_at, element, gy, kept, y, value, sizes, outs, paddings, p):
        """What one window gives to the gradient of an element; nothing if it has no tap there."""
        (od, oh, ow), (kd, kh, kw), (n, c, C), zero = window, taps_at, element, real(0)
        given = zero
        if od < outs[0] and oh < outs[1] and ow < outs[2] and kd < KD and kh < KH and kw < KW:
            o = place_of(n, c, od, oh, ow, C, outs[0], outs[1], outs[2])
            number = int32(uint32(uint32(uint32(uint32(kd * KH) + kh) * KW) + kw))
            rest = rest_of(kept[o]) if reads_saved else rest_of(0)
            result = take(y[o]) if reads_values else zero
            count = zero if selects else counts(od, oh, ow, sizes, outs, paddings)
            given = share(take(gy[o]), value, result, rest, number, count, real(taps), p)
        return given

    @device
    def written_out(at, element, gy, kept, y, value, sizes, outs, paddings, p):
        d, h, w = uint32(at[0] + paddings[0]), uint32(at[1] + paddings[1]), uint32(at[2] + paddings[2])
        last_d, last_h, last_w = uint32(d // SD), uint32(h // SH), uint32(w // SW)
        got = real(0)
        # In rising order, as the CPU adds them; the number of an output before the first has wrapped.
        for i in range(MD):
            od = uint32(last_d - uint32(MD - 1 - i))
            kd = tap(d, uint32(od * SD), DD, KD)
            for j in range(MH):
                oh = uint32(last_h - uint32(MH - 1 - j))
                kh = tap(h, uint32(oh * SH), DH, KH)
                for k in range(MW):
                    ow = uint32(last_w - uint32(MW - 1 - k))
                    kw = tap(w, uint32(ow * SW), DW, KW)
                    got = got + share_of((od, oh, ow), (kd, kh, kw), element, gy, kept, y, value, sizes, outs, paddings, p)
        return got

    @device
    def looped(at, element, gy, kept, y, value, sizes, outs, paddings, p):
        got = real(0)
        od, end_d = over_d(at[0], sizes[0], paddings[0], outs[0])
        while od < end_d:
            start, _, _ = along_d(od, sizes[0], paddings[0], outs[0])
            kd = tap(at[0], start, DD, KD)
            oh, end_h = over_h(at[1], sizes[1], paddings[1], outs[1])
            while oh < end_h:
                start, _, _ = along_h(oh, sizes[1], paddings[1], outs[1])
                kh = tap(at[1], start, DH, KH)
                ow, end_w = over_w(at[2], sizes[2], paddings[2], outs[2])
                while ow < end_w:
                    start, _, _ = along_w(ow, sizes[2], paddings[2], outs[2])
                    kw = tap(at[2], start, DW, KW)
                    got = got + share_of((od, oh, ow), (kd, kh, kw), element, gy, kept, y, value, sizes, outs, paddings, p)
                    ow = uint32(ow + one)
                oh = uint32(oh + one)
            od = uint32(od + one)
        return got

    gathered = written_out if 0 < math.prod(most) <= GATHERED else looped

    def kernel(
        gx, gy, kept, x, y, total, C, mC, sC, D, mD, sD, H, mH, sH, W, mW, sW, OD, OH, OW, in_n, in_c, in_d, in_h, in_w, PD, PH, PW,
        a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        n, c, d, h, w = where(t, (C, mC, sC), (D, mD, sD), (H, mH, sH), (W, mW, sW))
        p, value = first_of(a0, a1, a2, a3, a4, a5), real(0)
        if reads_values:
            value = take(x[strided(uint32(uint32(n * in_n) + uint32(c * in_c)), d, h, w, in_d, in_h, in_w)])
        gx[t] = write(gathered((d, h, w), (n, c, C), gy, kept, y, value, (D, H, W), (OD, OH, OW), (PD, PH, PW), p))

    number = stored(dtype)
    return kernel, signature((number, number, stored(saved or "uint8"), number, number), 4, 1 + 3 + 5 + 3, dtype)


@specialised
def flat_positions(saved, last, kernel_size, stride, dilation):
    """Arguments: flat, saved; outputs; C, OD, OH and OW as divisors; D, H, W; the paddings.  -1 where a window chose nothing."""
    (KD, KH, KW), (DD, DH, DW) = kernel_size, map(uint32, dilation)
    along_d, along_h, along_w = (axis_of(*of) for of in windows_of(kernel_size, stride, dilation))
    where, taps = place(last), KD * KH * KW

    def kernel(flat, kept, total, C, mC, sC, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW, D, H, W, PD, PH, PW):
        t = thread()
        if t >= total:
            return
        _, _, od, oh, ow = where(t, (C, mC, sC), (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW))
        d, _, _ = along_d(od, D, PD, OD)
        h, _, _ = along_h(oh, H, PH, OH)
        w, _, _ = along_w(ow, W, PW, OW)
        tap = uint32(kept[t])
        kw, rest = uint32(tap % uint32(KW)), uint32(tap // uint32(KW))
        kh, kd = uint32(rest % uint32(KH)), uint32(rest // uint32(KH))
        d, h, w = uint32(d + uint32(kd * DD)), uint32(h + uint32(kh * DH)), uint32(w + uint32(kw * DW))
        position = uint32(uint32(uint32(uint32(d * H) + h) * W) + w)
        flat[t] = int64(position) if tap < uint32(taps) else int64(-1)

    return kernel, (types.CPointer(int64), types.CPointer(stored(saved)), *(uint32,) * (1 + 12 + 6))
