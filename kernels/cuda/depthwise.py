"""CUDA kernels of correlations that read one channel each: a thread an output, and sums of a block's threads for the weights' gradient."""

import math

from numba import cuda, types, uint32

from . import vector
from .compile import specialised
from .number import compiled, computed, device, quotient_of, read, stored, written
from .whole_map import CHANNELS
from .windows import PARAMETERS, first_parameters, place, position, strided, thread

UNROLLED = 49
"""Taps up to which a kernel is written out."""

SUMMED = 25
"""Those of a gradient of the weights, which are so many sums of a thread."""

THREADS = 256


@specialised
def forward(dtype, last, after, kernel_size):
    """Arguments: x, packed weights (correlate.py's, of one group), y; outputs; C, D, H and W of y as divisors, channels of y for one of x
    likewise; x's sizes and strides; the step, the first tap's offset and the distance of taps along each axis; y's strides; the
    activation's parameters."""
    (KD, KH, KW), real, take, narrow = kernel_size, computed(dtype), read(dtype), written(dtype)
    where, first_of = place(last), first_parameters(len(after.defaults) if after else 0)
    f = compiled(after.value) if after else None
    behind = uint32(math.prod(kernel_size))

    def kernel(
        x, packed, y, total, C, mC, sC, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW, each, m_each, s_each,
        D, H, W, in_n, in_c, in_d, in_h, in_w, SD, SH, SW, FD, FH, FW, DD, DH, DW, y_n, y_c, y_d, y_h, y_w, a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        n, c, od, oh, ow = where(t, (C, mC, sC), (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW))
        source, _ = quotient_of(c, each, m_each, s_each)
        base = uint32(uint32(n * in_n) + uint32(source * in_c))
        d, h, w = uint32(uint32(od * SD) + FD), uint32(uint32(oh * SH) + FH), uint32(uint32(ow * SW) + FW)
        total_of = real(0)
        for kd in range(KD):
            id = uint32(d + uint32(uint32(kd) * DD))
            for kh in range(KH):
                ih = uint32(h + uint32(uint32(kh) * DH))
                row = uint32(base + uint32(uint32(id * in_d) + uint32(ih * in_h)))
                for kw in range(KW):
                    iw, value = uint32(w + uint32(uint32(kw) * DW)), real(0)
                    # A position before 0 has wrapped to beyond the size.
                    if id < D and ih < H and iw < W:
                        value = take(x[uint32(row + uint32(iw * in_w))])
                    total_of += value * packed[uint32(uint32(uint32((kd * KH + kh) * KW + kw) * C) + c)]
        total_of += packed[uint32(uint32(behind * C) + c)]
        if f is not None:
            total_of = f(total_of, first_of(a0, a1, a2, a3, a4, a5))
        y[uint32(uint32(c * y_c) + strided(uint32(n * y_n), od, oh, ow, y_d, y_h, y_w))] = narrow(total_of)

    pointers = (types.CPointer(stored(dtype)), types.CPointer(real), types.CPointer(stored(dtype)))
    return kernel, (*pointers, *(uint32,) * (1 + 15 + 8 + 9 + 5), *(real,) * PARAMETERS)


@specialised
def weights(dtype, last, kernel_size):
    """What a part of the outputs gives to each channel's weights: a block a channel, or CHANNELS of channels_last, of a part.

    Arguments: sums, x, gy; blocks of channels as divisor; C; outputs of a channel, and of a part; D, H and W of gy as divisors, channels
    of y for one of x likewise; x's sizes and strides; steps, first offsets and distances of taps; gy's strides."""
    (_, KH, KW), real, take = kernel_size, computed(dtype), read(dtype)
    taps, side = math.prod(kernel_size), CHANNELS if last else 1
    sharing = THREADS // side
    zeros, one = vector.filled(taps), uint32(1)

    def product_of(k):
        kd, kh, kw = uint32(k // (KH * KW)), uint32(k // KW % KH), uint32(k % KW)

        @device
        def product(sums, x, g, base, at, sizes, strides, apart):
            id, ih, iw = uint32(at[0] + uint32(kd * apart[0])), uint32(at[1] + uint32(kh * apart[1])), uint32(at[2] + uint32(kw * apart[2]))
            value = real(0)
            if id < sizes[0] and ih < sizes[1] and iw < sizes[2]:
                value = take(x[strided(base, id, ih, iw, strides[0], strides[1], strides[2])])
            return sums[k] + value * g

        return product

    products = vector.tupled(taps, product_of)

    def put_of(k):
        more = uint32(k)

        @device
        def put(sums, to, own, array, me, rank):
            """The sum of all that share a channel, by halves, in an order that is always the same."""
            array[me] = own[k]
            cuda.syncthreads()
            half = uint32(sharing // 2)
            while half > uint32(0):
                if rank < half:
                    array[me] = array[me] + array[uint32(me + uint32(half * uint32(side)))]
                cuda.syncthreads()
                half = uint32(half >> one)
            if rank == uint32(0) and to != uint32(0xFFFFFFFF):
                sums[uint32(to + more)] = array[me]
            cuda.syncthreads()

        return put

    put = vector.repeated(taps, put_of)

    def kernel(
        sums, x, gy, blocks, m_blocks, s_blocks, C, outputs, part, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW, each, m_each, s_each,
        D, H, W, in_n, in_c, in_d, in_h, in_w, SD, SH, SW, FD, FH, FW, DD, DH, DW, y_n, y_c, y_d, y_h, y_w,
    ):  # fmt: skip
        array = cuda.shared.array(THREADS, real)
        me = uint32(cuda.threadIdx.x)
        lane, rank = uint32(me % uint32(side)), uint32(me // uint32(side))
        slice, block = quotient_of(uint32(cuda.blockIdx.x), blocks, m_blocks, s_blocks)
        c = uint32(uint32(block * uint32(side)) + lane)
        source, _ = quotient_of(c, each, m_each, s_each)
        found, to = zeros(real(0)), uint32(0xFFFFFFFF)
        if c < C:
            to = uint32(uint32(uint32(slice * C) + c) * uint32(taps))
            t, end = uint32(uint32(slice * part) + rank), uint32(uint32(slice * part) + part)
            end = end if end < outputs else outputs
            while t < end:
                n, od, oh, ow = position(t, (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW))
                g = take(gy[uint32(uint32(c * y_c) + strided(uint32(n * y_n), od, oh, ow, y_d, y_h, y_w))])
                at = uint32(uint32(od * SD) + FD), uint32(uint32(oh * SH) + FH), uint32(uint32(ow * SW) + FW)
                base = uint32(uint32(n * in_n) + uint32(source * in_c))
                found = products(found, x, g, base, at, (D, H, W), (in_d, in_h, in_w), (DD, DH, DW))
                t = uint32(t + uint32(sharing))
        put(sums, to, found, array, me, rank)

    pointers = (types.CPointer(real), types.CPointer(stored(dtype)), types.CPointer(stored(dtype)))
    return kernel, (*pointers, *(uint32,) * (3 + 3 + 12 + 8 + 9 + 5))
