"""Depthwise convolution: each channel by its own weights.  Memory is its limit, so x is read where it lies, and no panel is packed.

Of channels_last maps lanes run across channels.  Of contiguous maps pixel_lanes.py does the forward pass; the gradient of the weights is
here, with lanes across pixels.

What is inside a map the nests know from tables along each axis: for each output the first and the end of its taps inside, and for
each tap where it lies from an output's first position, in elements.  x's steps are from output to output.
"""

from numba import int64

from ..compile import specialised
from ..simd import (
    between,
    fused,
    integers,
    load,
    load_masked,
    load_phases_between,
    number,
    numbers,
    phase,
    pointer,
    repeat,
    scatter_between,
    splat,
    stacked,
    store,
    store_masked,
    unroll,
    with_phase,
)
from .number import compiled, jitable


@specialised
def forward(dtype, lanes, pixels, after):
    """Jobs: (map, output row) of channels_last maps.  A tile is ``pixels`` outputs of a row by a register of channels.

    Arguments: x, packed weights, y; addresses of the tables, inside and taps; sizes, see convolution.py; the activation's parameters."""
    real, P, L = number(dtype), pixels, lanes
    activates = after is not None
    value, count = (compiled(after.value), len(after.defaults)) if activates else (None, 0)

    if activates:

        @jitable
        def finished(x, p):
            return value(x, p)

    else:

        @jitable
        def finished(x, p):
            return x

    @jitable
    def add(tile, r, args):
        x, at, step, weight = args
        return with_phase(tile, r, fused(load(x, at + r * step, L), weight, phase(tile, r)))

    @jitable
    def put(tile, r, args):
        y, at, step, p = args
        store(y, at + r * step, finished(phase(tile, r), p))
        return tile

    @jitable
    def several(x, w, y, at, to, taps, spans, sizes, p):
        d0, d1, h0, h1 = spans
        KH, KW, M, xw, yw, mine = sizes
        tile = repeat(load(w, mine, L), P)
        for d in range(d0, d1):
            for h in range(h0, h1):
                row, weights = at + taps[d] + taps[M + h], mine + (1 + (d * KH + h) * KW) * L
                for k in range(KW):
                    tile = unroll(add, P, tile, (x, row + taps[2 * M + k], xw, load(w, weights + k * L, L)))
        unroll(put, P, tile, (y, to, yw, p))

    @jitable
    def one(x, w, y, at, to, taps, spans, k0, k1, sizes, mask, p):
        d0, d1, h0, h1 = spans
        KH, KW, M, _, _, mine = sizes
        total = load(w, mine, L)
        for d in range(d0, d1):
            for h in range(h0, h1):
                row, weights = at + taps[d] + taps[M + h], mine + (1 + (d * KH + h) * KW) * L
                for k in range(k0, k1):
                    here = load_masked(x, row + taps[2 * M + k], mask, splat(real(0), L))
                    total = fused(here, load(w, weights + k * L, L), total)
        store_masked(y, to, finished(total, p), mask)

    def kernel(args, start, stop):
        x, w, y = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, dtype)
        inside, taps = pointer(args, 5, int64), pointer(args, 6, int64)
        C, OD, OH, OW, KH, KW, T, M, left, right, xn, xd, xh, xw, yn, yd, yh, yw = integers(args, 7, 18)
        p = numbers(args, 25, count, real, L)
        for job in range(start, stop):
            n, od, oh = job // (OH * OD), job // OH % OD, job % OH
            spans = inside[2 * od], inside[2 * od + 1], inside[2 * (OD + oh)], inside[2 * (OD + oh) + 1]
            row, result = n * xn + od * xd + oh * xh, n * yn + od * yd + oh * yh
            ow = 0
            while ow < OW:
                at, to, many = row + ow * xw, result + ow * yw, left <= ow and ow + P <= right
                span = 2 * (OD + OH + ow)
                for c in range(0, C, L):
                    sizes = KH, KW, M, xw, yw, c * (T + 1)
                    if many and c + L <= C:
                        several(x, w, y, at + c, to + c, taps, spans, sizes, p)
                    else:
                        mask = between(c, 1, 0, C, L)
                        for i in range(P if many else 1):
                            k0, k1 = inside[span + 2 * i], inside[span + 2 * i + 1]
                            one(x, w, y, at + i * xw + c, to + i * yw + c, taps, spans, k0, k1, sizes, mask, p)
                ow += P if many else 1

    return kernel


@specialised
def weights_of_pixels(dtype, lanes, along):
    """Gradient of the weights, of channels_last maps.  Jobs: registers of channels.  The sums of the ``along`` taps of a row of the kernel
    are in registers together.

    Arguments: x, gy, gw; addresses of the tables, inside and taps, and of where each tap lies in gw; sizes, see convolution.py."""
    real, K, L = number(dtype), along, lanes

    @jitable
    def add(sums, k, args):
        x, row, taps, first, g, k0, k1, mask, zero = args
        if k0 <= k < k1:
            return with_phase(sums, k, fused(load_masked(x, row + taps[first + k], mask, zero), g, phase(sums, k)))
        return sums

    @jitable
    def put(sums, k, args):
        gw, places, first, c, C, step = args
        scatter_between(gw, places[first + k], c * step, step, 0, C * step, phase(sums, k))
        return sums

    def kernel(args, start, stop):
        x, gy, gw = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        inside, taps, places = pointer(args, 3, int64), pointer(args, 4, int64), pointer(args, 5, int64)
        N, C, OD, OH, OW, _, KD, KH, M, xn, _, xd, xh, xw, yn, _, yd, yh, yw, step = integers(args, 6, 20)
        zero = splat(real(0), L)
        for job in range(start, stop):
            c = job * L
            mask = between(c, 1, 0, C, L)
            for d in range(KD):
                for h in range(KH):
                    sums = repeat(zero, K)
                    for slab in range(N * OD * OH):
                        n, od, oh = slab // (OD * OH), slab // OH % OD, slab % OH
                        deep, high = 2 * od, 2 * (OD + oh)
                        if inside[deep] <= d < inside[deep + 1] and inside[high] <= h < inside[high + 1]:
                            row = n * xn + od * xd + oh * xh + taps[d] + taps[M + h] + c
                            result = n * yn + od * yd + oh * yh + c
                            for ow in range(OW):
                                at = 2 * (OD + OH + ow)
                                g = load_masked(gy, result + ow * yw, mask, zero)
                                given = x, row + ow * xw, taps, 2 * M, g, inside[at], inside[at + 1], mask, zero
                                sums = unroll(add, K, sums, given)
                    unroll(put, K, sums, (gw, places, (d * KH + h) * K, c, C, step))

    return kernel


@specialised
def weights_of_planes(dtype, lanes, along, stride):
    """The same of contiguous maps.  Jobs: channels.  Lanes run across the pixels of a row, and are added up at the end, in their order."""
    real, K, L, S = number(dtype), along, lanes, stride

    @jitable
    def add(sums, k, args):
        x, row, at, taps, first, W, g, zero = args
        here = load_phases_between(x, row, at + taps[first + k], 0, W, S, zero)[0]
        return with_phase(sums, k, fused(here, g, phase(sums, k)))

    @jitable
    def put(sums, k, args):
        gw, at, places, first, kept = args
        store(kept, 0, phase(sums, k))
        total = real(0)
        for i in range(L):
            total += kept[i]
        store_masked(gw, at + places[first + k], splat(total, L), between(0, 1, 0, 1, L))
        return sums

    def kernel(args, start, stop):
        x, gy, gw = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        inside, taps, places = pointer(args, 3, int64), pointer(args, 4, int64), pointer(args, 5, int64)
        N, _, OD, OH, OW, W, KD, KH, M, xn, xc, xd, xh, xw, yn, yc, yd, yh, _, step = integers(args, 6, 20)
        zero, kept = splat(real(0), L), stacked(L, real)
        for c in range(start, stop):
            for d in range(KD):
                for h in range(KH):
                    sums = repeat(zero, K)
                    for slab in range(N * OD * OH):
                        n, od, oh = slab // (OD * OH), slab // OH % OD, slab % OH
                        deep, high = 2 * od, 2 * (OD + oh)
                        if inside[deep] <= d < inside[deep + 1] and inside[high] <= h < inside[high + 1]:
                            row = n * xn + c * xc + od * xd + oh * xh + taps[d] + taps[M + h]
                            result = n * yn + c * yc + od * yd + oh * yh
                            for ow in range(0, OW, L):
                                g = load_masked(gy, result + ow, between(ow, 1, 0, OW, L), zero)
                                sums = unroll(add, K, sums, (x, row, ow * xw, taps, 2 * M, W, g, zero))
                    unroll(put, K, sums, (gw, c * step, places, (d * KH + h) * K, kept))

    return kernel
