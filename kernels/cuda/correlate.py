"""CUDA kernels of correlations (correlation.py): a matrix product of weights and of elements that are gathered where they lie.

A block makes a tile, so many outputs of a map by so many channels, and a thread a part of it in its registers.  Step by step, a step
being a tap and some input channels, the block brings elements and weights into shared memory, while the step before is multiplied:
the matrix is never made ("implicit GEMM", Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014).
"""

import functools
from typing import NamedTuple

from numba import cuda, int32, types, uint32

from . import vector
from .compile import specialised
from .number import arithmetic, compiled, computed, device, quotient_of, read, stored, written
from .windows import PARAMETERS, first_parameters, place, position, strided, taps_of, thread

RUN = 4
"""Outputs that a thread has one after the other: 128 bits of float32."""

CHAIN = 32
"""Products that are added up before what they come to is added to the total: of long sums much is lost in rounding."""


class Tile(NamedTuple):
    """Of a block and, of that, of a thread."""

    pixels: int
    channels: int
    rows: int
    """Outputs of a thread, in runs of RUN."""
    columns: int
    """Channels of a thread."""
    depth: int
    """Input channels of a step."""

    @property
    def threads(self):
        return self.pixels // self.rows * (self.channels // self.columns)


@functools.cache
def product(tile, pitches):
    """(sums, left, right, left's begin, right's begin, row, column) -> the sums after a step of shared memory.

    ``pitches``: elements between rows of left and of right."""
    runs, outer, (pitch_a, pitch_b) = tile.rows // RUN, vector.outer, pitches
    apart = tile.pixels // runs

    def make(k):
        lefts = [vector.load(RUN, k * pitch_a + run * apart) for run in range(runs)]
        of_b = vector.load(tile.columns, k * pitch_b)
        first, last = lefts[0], lefts[-1]

        @device
        def one(sums, a, b, from_a, from_b, row, column):
            return outer(sums, first(a, uint32(from_a + row)), of_b(b, uint32(from_b + column)))

        @device
        def two(sums, a, b, from_a, from_b, row, column):
            at = uint32(from_a + row)
            return outer(sums, first(a, at) + last(a, at), of_b(b, uint32(from_b + column)))

        return one if runs == 1 else two

    return vector.folded(tile.depth, make)


@functools.cache
def _decoded(window):
    """(m, D, H, W as divisors) -> (n, od, oh, ow) of output m; of outputs that are pooled together, by a window of (d, h, w), m counts
    all of one before the next."""
    KD, KH, KW = window
    taps, kd, kh, kw = uint32(KD * KH * KW), uint32(KD), uint32(KH), uint32(KW)

    @device
    def by_windows(m, D, H, W):
        tap = uint32(m % taps)
        n, d, h, w = position(uint32(m // taps), D, H, W)
        line = uint32(tap // kw)
        d, h = uint32(uint32(d * kd) + uint32(line // kh)), uint32(uint32(h * kh) + uint32(line % kh))
        return n, d, h, uint32(uint32(w * kw) + uint32(tap % kw))

    return position if window == (1, 1, 1) else by_windows


@functools.cache
def _pooled(kind, taps, tile, divisor, real):
    """(sums, row by row) -> those of the pooled rows, ``taps`` of which make one."""
    A = arithmetic(kind)
    begin, step, finish = A.begin, A.step, A.finish
    columns = tile.columns

    def make(k):
        row, column = divmod(k, columns)

        def tap(i):
            at, i = (row * taps + i) * columns + column, int32(i)
            return device(lambda state, values: step(state, values[at], i, ()))

        through = vector.folded(taps, tap)

        @device
        def one(values):
            zero = real(0)
            value, _ = finish(through(begin(zero, int32(0), zero, zero), values), real(divisor), real(taps), ())
            return value

        return one

    return vector.tupled(tile.rows // taps * columns, make)


@functools.cache
def _put(tile, taps, last, wide):
    """(y, values, row by row, where results begin, index of the first, how many there are, channel of the first, the group's first,
    channels of a group, D, H and W as divisors, y's strides): writes a thread's results.  ``wide``: RUN at once."""
    columns, each = tile.columns, RUN // taps
    runs, apart = tile.rows // RUN, tile.pixels // taps // (tile.rows // RUN)
    several = vector.store(RUN)

    @device
    def place_of(begin, q, D, H, W, strides):
        n, d, h, w = position(q, D, H, W)
        return strided(uint32(begin + uint32(n * strides[0])), d, h, w, strides[2], strides[3], strides[4])

    def along_pixels(k):
        """RUN results of one channel."""
        run, column = divmod(k, columns)
        far, more = uint32(run * apart), uint32(column)
        picked = vector.picked(tuple((run * RUN + u) * columns + column for u in range(RUN)))

        @device
        def put(y, values, begin, first, total, channel, group, channels, D, H, W, strides):
            q, c = uint32(first + far), uint32(channel + more)
            if q < total and c < channels:
                several(y, uint32(place_of(begin, q, D, H, W, strides) + uint32(uint32(group + c) * strides[1])), picked(values))

        return put

    def along_channels(k):
        """All channels of one result."""
        run, u = divmod(k, each)
        far = uint32(run * apart + u)
        picked = vector.picked(tuple(range(k * columns, k * columns + columns)))

        def one(column):
            more = uint32(column)

            @device
            def put(y, found, at, channel, channels, step):
                c = uint32(channel + more)
                if c < channels:
                    y[uint32(at + uint32(c * step))] = found[column]

            return put

        each_alone = vector.repeated(columns, one)

        @device
        def put(y, values, begin, first, total, channel, group, channels, D, H, W, strides):
            q = uint32(first + far)
            if q < total:
                at = uint32(place_of(begin, q, D, H, W, strides) + uint32(group * strides[1]))
                if wide:
                    if channel < channels:
                        several(y, uint32(at + channel), picked(values))
                else:
                    each_alone(y, picked(values), at, channel, channels, strides[1])

        return put

    if wide and not last:
        return vector.repeated(runs * columns, along_pixels)
    return vector.repeated(runs * each, along_channels)


@specialised
def forward(dtype, last, tile, after, kind, window, divisor, wide_in, wide_out, divided):
    """``after``: an ``Activation`` or None.  ``kind``: a reduction over ``window`` of the results, or None and a window of 1.
    ``wide_in``, ``wide_out``: x is read, y written, 128 bits at once.  ``divided``: blocks share a tile's steps, and y is what each part
    of them comes to, as ``computed(dtype)``: ``summed`` does the rest.

    Arguments: x, packed weights, y; results before pooling; D, H and W of y as divisors, tiles of channels and of outputs a group
    likewise; channels of a group of x, rows of weights a tap, channels of a group of y, those of a row of weights; steps; x's sizes;
    x's strides of N, C, D, H and W; the step, the first tap's offset and the distance of taps along each axis; taps along H and W; y's
    strides; groups, steps of a part, results of a part; the activation's parameters."""
    real, take = computed(dtype), read(dtype)
    result = real if divided else stored(dtype)
    narrow = device(lambda x: x) if divided else written(dtype)
    BM, BN, BK, T, taps = tile.pixels, tile.channels, tile.depth, tile.threads, window[0] * window[1] * window[2]
    share_a, share_b = BM * BK // T, BK * BN // T
    # Of channels_last a warp writes 16 outputs of two parts, ``share_a`` rows apart: those are to be 16 banks apart.
    pitch_a = BM + 16 // share_a
    turns = uint32(CHAIN // BK)
    across, of_rows = BM // tile.rows, uint32(RUN)
    size_a, size_b = uint32(BK * pitch_a), uint32(BK * BN)
    both_a, both_b = 2 * BK * pitch_a, 2 * BK * BN
    multiplied, zeros = product(tile, (pitch_a, BN)), vector.filled(tile.rows * tile.columns)
    none, some = vector.filled(share_a), vector.load(share_a)
    gather, converted = vector.gathered(share_a), vector.mapped(device(lambda x, p: take(x)))
    weights_of, keep_b = vector.load(share_b), vector.store(share_b)
    biases_of = vector.load(tile.columns)
    decoded, first_of = _decoded(window), first_parameters(len(after.defaults) if after else 0)
    fill, no_weights = stored(dtype)(0), vector.filled(share_b)
    columns = tile.columns

    if after:
        f = compiled(after.value)
        activated = vector.mapped(device(lambda x, p: f(x, p)))
    else:
        activated = device(lambda values, p: values)
    narrowed = vector.mapped(device(lambda x, p: narrow(x)))
    pooled = _pooled(kind, taps, tile, divisor, real) if kind else None
    put = _put(tile, taps, last, wide_out)

    def kept(e):
        far = vector.store(1, e * pitch_a)  # a constant, which becomes a part of the instruction
        return device(lambda array, at, values: far(array, at, (values[e],)))

    keep_a, one = vector.repeated(share_a, kept), uint32(1)
    added, pools, zero = vector.added, kind is not None, uint32(0)

    @device
    def fetched(x, packed, inside, base, at, sizes, strides, c, channels, step, at_b, left):
        """This thread's elements and weights of a step; zeros outside of the map, behind the last channel and behind the last step."""
        found, weights = none(fill), no_weights(real(0))
        if left > uint32(0):
            if inside and at[0] < sizes[0] and at[1] < sizes[1] and at[2] < sizes[2] and c < channels:
                begin = uint32(uint32(uint32(at[0] * strides[0]) + uint32(at[1] * strides[1])) + uint32(at[2] * strides[2]))
                begin = uint32(uint32(base + begin) + uint32(c * step))
                if wide_in:
                    found = some(x, begin)
                else:
                    found = gather(x, begin, step, uint32(channels - c), fill)
            weights = weights_of(packed, at_b)
        return found, weights

    def kernel(
        x, packed, y, total, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW, CT, mCT, sCT, PT, mPT, sPT, IC, rows, OC, pitch, steps,
        D, H, W, in_n, in_c, in_d, in_h, in_w, SD, SH, SW, FD, FH, FW, DD, DH, DW, KH, KW, y_n, y_c, y_d, y_h, y_w,
        groups, of_part, apart, a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        a, b = cuda.shared.array(both_a, real), cuda.shared.array(both_b, real)
        t = uint32(cuda.threadIdx.x)
        q, channel_tile = quotient_of(uint32(cuda.blockIdx.x), CT, mCT, sCT)
        group, pixel_tile = quotient_of(q, PT, mPT, sPT)
        shift = uint32(0)
        if divided:
            number = uint32(group // groups)
            group, shift = uint32(group - uint32(number * groups)), uint32(number * apart)
        of_d, of_h, of_w = (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW)
        # This thread's part of each step: ``share_a`` channels of one output's element, ``share_b`` weights of a row.
        if last:
            pixel, part = uint32(t // uint32(BK // share_a)), uint32(uint32(t % uint32(BK // share_a)) * uint32(share_a))
        else:
            pixel, part = uint32(t % uint32(BM)), uint32(uint32(t // uint32(BM)) * uint32(share_a))
        m = uint32(uint32(pixel_tile * uint32(BM)) + pixel)
        n, od, oh, ow = decoded(m, of_d, of_h, of_w)
        d0, h0, w0 = uint32(uint32(od * SD) + FD), uint32(uint32(oh * SH) + FH), uint32(uint32(ow * SW) + FW)
        base = uint32(uint32(n * in_n) + uint32(uint32(group * IC) * in_c))
        to_a = uint32(uint32(part * uint32(pitch_a)) + pixel)
        to_b = uint32(t * uint32(share_b))
        begin = uint32(uint32(group * uint32(uint32(steps * uint32(BK)) + one)) * pitch)
        column_of_b, channel = uint32(to_b % uint32(BN)), uint32(channel_tile * uint32(BN))
        at_b = uint32(uint32(begin + uint32(uint32(to_b // uint32(BN)) * pitch)) + uint32(channel + column_of_b))
        next_b = uint32(uint32(BK) * pitch)
        row = uint32(uint32(t % uint32(across)) * of_rows)
        column = uint32(uint32(t // uint32(across)) * uint32(columns))
        id, ih, iw, kh, kw, c, at_c = d0, h0, w0, uint32(0), uint32(0), part, uint32(0)
        sums, totals = zeros(real(0)), zeros(real(0))
        step, end = uint32(0), steps
        if divided:
            step = uint32(number * of_part)
            end = uint32(step + of_part)
            end = end if end < steps else steps
            of_tap = uint32(rows // uint32(BK))
            tap = uint32(step // of_tap)
            at_c = uint32(uint32(step - uint32(tap * of_tap)) * uint32(BK))
            line = uint32(tap // KW)
            kw, kd = uint32(tap - uint32(line * KW)), uint32(line // KH)
            kh, c = uint32(line - uint32(kd * KH)), uint32(c + at_c)
            id, ih, iw = uint32(d0 + uint32(kd * DD)), uint32(h0 + uint32(kh * DH)), uint32(w0 + uint32(kw * DW))
            at_b = uint32(at_b + uint32(step * next_b))
        inside = m < total and steps > uint32(0)
        left = uint32(end - step)
        found, weights = fetched(x, packed, inside, base, (id, ih, iw), (D, H, W), (in_d, in_h, in_w), c, IC, in_c, at_b, left)
        buffer, turn = uint32(0), uint32(0)
        while step < end:
            from_a, from_b = uint32(buffer * size_a), uint32(buffer * size_b)
            keep_a(a, uint32(from_a + to_a), converted(found, zero))
            keep_b(b, uint32(from_b + to_b), weights)
            # The other half is still read by some: they meet here before anybody writes to it.
            cuda.syncthreads()
            step, at_b, c, at_c = uint32(step + one), uint32(at_b + next_b), uint32(c + uint32(BK)), uint32(at_c + uint32(BK))
            if at_c == rows:
                c, at_c, kw, iw = part, uint32(0), uint32(kw + one), uint32(iw + DW)
                if kw == KW:
                    kw, iw, kh, ih = uint32(0), w0, uint32(kh + one), uint32(ih + DH)
                    if kh == KH:
                        kh, ih, id = uint32(0), h0, uint32(id + DD)
            # Asked for now, needed after the products.
            found, weights = fetched(
                x, packed, inside, base, (id, ih, iw), (D, H, W), (in_d, in_h, in_w), c, IC, in_c, at_b, uint32(end - step)
            )
            sums = multiplied(sums, a, b, from_a, from_b, row, column)
            buffer, turn = uint32(one - buffer), uint32(turn + one)
            if turn == turns:
                totals, sums, turn = added(totals, sums), zeros(real(0)), uint32(0)
        totals = added(totals, sums)
        channel = uint32(channel + column)
        if divided:
            values = totals
        else:
            biases = biases_of(packed, uint32(uint32(begin + uint32(uint32(steps * uint32(BK)) * pitch)) + channel))
            values = activated(added(totals, biases), first_of(a0, a1, a2, a3, a4, a5))
        if pools:
            values = pooled(values)
        first = uint32(uint32(uint32(pixel_tile * uint32(BM)) + row) // uint32(taps))
        results, y_strides = uint32(total // uint32(taps)), (y_n, y_c, y_d, y_h, y_w)
        put(y, narrowed(values, zero), shift, first, results, channel, uint32(group * OC), OC, of_d, of_h, of_w, y_strides)

    numbers = 1 + 9 + 6 + 5 + 3 + 5 + 9 + 2 + 5 + 3
    pointers = (types.CPointer(stored(dtype)), types.CPointer(real), types.CPointer(result))
    return kernel, (*pointers, *(uint32,) * numbers, *(real,) * PARAMETERS)


@specialised
def summed(dtype, last, after):
    """y, from what the parts of ``forward``'s steps come to, in their order; biases and the activation last.

    Arguments: y, sums, packed weights; results; parts, results of a part and what is behind it; C, D, H and W of y as divisors, channels
    of a group likewise; a group's packed weights, and those before its biases; y's strides; the activation's parameters."""
    real, narrow = computed(dtype), written(dtype)
    where, first_of = place(last), first_parameters(len(after.defaults) if after else 0)
    f = compiled(after.value) if after else None

    def kernel(
        y, sums, packed, total, parts, apart, C, mC, sC, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW, OC, mOC, sOC, of_group, before,
        y_n, y_c, y_d, y_h, y_w, a0, a1, a2, a3, a4, a5,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        found, at, k = real(0), t, uint32(0)
        while k < parts:
            found += sums[at]
            at, k = uint32(at + apart), uint32(k + uint32(1))
        n, c, od, oh, ow = where(t, (C, mC, sC), (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW))
        group, channel = quotient_of(c, OC, mOC, sOC)
        found += packed[uint32(uint32(uint32(group * of_group) + before) + channel)]
        if f is not None:
            found = f(found, first_of(a0, a1, a2, a3, a4, a5))
        y[uint32(uint32(c * y_c) + strided(uint32(n * y_n), od, oh, ow, y_d, y_h, y_w))] = narrow(found)

    pointers = (types.CPointer(stored(dtype)), types.CPointer(real), types.CPointer(real))
    return kernel, (*pointers, *(uint32,) * (3 + 15 + 2 + 5), *(real,) * PARAMETERS)


@specialised
def pack(dtype, biased, scaled):
    """Weights as ``forward`` reads them: of each group, for each tap so many rows of input channels, each with a column for an output
    channel, then a row of biases; zeros where a row or a column is of no channel.

    Arguments: packed, weights, biases, scales; elements of packed; columns, rows and rows a tap as divisors; taps along H and W likewise;
    channels of a group of x and of y; the weights' steps from group to group, output to output and input to input channel; of the first
    tap, and from tap to tap along each axis."""
    real, take = computed(dtype), read(dtype)

    def kernel(
        packed, w, biases, scales, total, columns, m_columns, s_columns, rows, m_rows, s_rows, each, m_each, s_each,
        KH, mKH, sKH, KW, mKW, sKW, IC, OC, step_g, step_o, step_i, first, step_d, step_h, step_w,
    ):  # fmt: skip
        t = thread()
        if t >= total:
            return
        q, column = quotient_of(t, columns, m_columns, s_columns)
        group, row = quotient_of(q, rows, m_rows, s_rows)
        channel, found = uint32(uint32(group * OC) + column), real(0)
        if column < OC:
            if uint32(row + uint32(1)) == rows:
                if biased:
                    found = take(biases[channel])
            else:
                tap, c = quotient_of(row, each, m_each, s_each)
                if c < IC:
                    kd, kh, kw = taps_of(tap, (KH, mKH, sKH), (KW, mKW, sKW))
                    at = uint32(uint32(first + uint32(kd * step_d)) + uint32(uint32(kh * step_h) + uint32(kw * step_w)))
                    at = uint32(at + uint32(uint32(group * step_g) + uint32(uint32(column * step_o) + uint32(c * step_i))))
                    found = take(w[at])
                    if scaled:
                        found = real(found * take(scales[channel]))
        packed[t] = found

    return kernel, (types.CPointer(real), *(types.CPointer(stored(dtype)),) * 3, *(uint32,) * (1 + 15 + 9))
