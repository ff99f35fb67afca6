"""CUDA kernels of the gradient by a convolution's weights: a product of gy and of gathered elements, summed over the outputs.

A block makes a tile of (output channel) x (tap, input channel) over a part of the outputs; the parts are then added in order, so the
sum is the same every time.
"""

from numba import cuda, types, uint32

from . import vector
from .compile import specialised
from .correlate import CHAIN, RUN, product
from .number import computed, device, quotient_of, read, stored, written
from .windows import position, strided, taps_of, thread


@specialised
def partial(dtype, last, tile):
    """``tile``: of correlate.py's; pixels are output channels here, channels (tap, input channel).

    Arguments: sums, x, gy; tiles of output channels, of columns, and groups as divisors; columns; outputs, and those of a part; D, H and W
    of gy as divisors; channels of a group of x as divisor, taps along H and W likewise, channels of a group of y; x's sizes and strides;
    steps, first offsets and distances of taps; gy's strides."""
    real, take = computed(dtype), read(dtype)
    BM, BN, BK, T = tile.pixels, tile.channels, tile.depth, tile.threads
    # Of contiguous maps a warp writes 8 rows of 4, of channels_last 2 of 16 where a block has 128 threads: each meets another bank.
    pitch_a, pitch_b = (size + (16 if last else 4) for size in (BM, BN))
    across, turns, one = BM // tile.rows, uint32(CHAIN // BK), uint32(1)
    of_a, of_b = BM * BK // T, BN * BK // T
    apart = T // BK  # rows that the block's threads bring at once
    size_a, size_b = uint32(BK * pitch_a), uint32(BK * pitch_b)
    both_a, both_b = 2 * BK * pitch_a, 2 * BK * pitch_b
    multiplied, zeros, added = product(tile, (pitch_a, pitch_b)), vector.filled(tile.rows * tile.columns), vector.added

    def gradient_of(i):
        more = uint32(i * apart)

        @device
        def gradient(gy, at, row, channels, step, inside):
            found, m = real(0), uint32(row + more)
            if inside and m < channels:
                found = take(gy[uint32(at + uint32(m * step))])
            return found

        return gradient

    def place_of(i):
        more = uint32(i * apart)

        @device
        def place(column, columns, IC, KH, KW, in_c, distances):
            """How far a column's elements are from an output's first position, along D, H and W, and where its channel begins."""
            tap, c = quotient_of(uint32(column + more), IC[0], IC[1], IC[2])
            kd, kh, kw = taps_of(tap, KH, KW)
            there = uint32(column + more) < columns
            # A column that there is not is outside of every map.
            d = uint32(kd * distances[0]) if there else uint32(0x80000000)
            return d, uint32(kh * distances[1]), uint32(kw * distances[2]), uint32(c * in_c)

        return place

    def element_of(i):
        @device
        def element(x, places, base, d, h, w, sizes, strides, inside):
            of_d, of_h, of_w, channel = places[i]
            id, ih, iw, found = uint32(d + of_d), uint32(h + of_h), uint32(w + of_w), real(0)
            if inside and id < sizes[0] and ih < sizes[1] and iw < sizes[2]:
                found = take(x[strided(uint32(base + channel), id, ih, iw, strides[0], strides[1], strides[2])])
            return found

        return element

    def kept(pitch):
        def one_of(i):
            more = uint32(i * apart)

            @device
            def keep(array, begin, kk, row, values):
                array[uint32(uint32(begin + uint32(kk * uint32(pitch))) + uint32(row + more))] = values[i]

            return keep

        return one_of

    gradients, elements = vector.tupled(of_a, gradient_of), vector.tupled(of_b, element_of)
    places_of = vector.tupled(of_b, place_of)
    keep_a, keep_b = vector.repeated(of_a, kept(pitch_a)), vector.repeated(of_b, kept(pitch_b))
    runs = tile.rows // RUN
    far = BM // runs

    def put_of(k):
        more = uint32(k)

        @device
        def put(sums, values, at, column, columns):
            n = uint32(column + more)
            if n < columns:
                sums[uint32(at + n)] = values[k]

        return put

    across_columns = vector.repeated(tile.columns, put_of)

    def put_row_of(k):
        down, of_row = uint32(k // RUN * far + k % RUN), vector.picked(tuple(range(k * tile.columns, (k + 1) * tile.columns)))

        @device
        def put(sums, values, begin, first, rows, column, columns):
            m = uint32(first + down)
            if m < rows:
                across_columns(sums, of_row(values), uint32(begin + uint32(m * columns)), column, columns)

        return put

    put = vector.repeated(tile.rows, put_row_of)

    @device
    def fetched(x, gy, t, end, divisors, base_x, base_y, steps, firsts, sizes, strides, y_strides, row, OC, places):
        """A step's part of this thread: of output t so many channels of gy, and so many of the elements that its window reads."""
        inside = t < end
        n, od, oh, ow = position(t, divisors[0], divisors[1], divisors[2])
        at = strided(uint32(base_y + uint32(n * y_strides[0])), od, oh, ow, y_strides[2], y_strides[3], y_strides[4])
        got = gradients(gy, at, row, OC, y_strides[1], inside)
        d, h = uint32(uint32(od * steps[0]) + firsts[0]), uint32(uint32(oh * steps[1]) + firsts[1])
        w, base = uint32(uint32(ow * steps[2]) + firsts[2]), uint32(base_x + uint32(n * strides[0]))
        return got, elements(x, places, base, d, h, w, sizes, (strides[2], strides[3], strides[4]), inside)

    def kernel(
        sums, x, gy, MT, mMT, sMT, NT, mNT, sNT, G, mG, sG, columns, outputs, part, OD, mOD, sOD, OH, mOH, sOH, OW, mOW, sOW,
        IC, mIC, sIC, KH, mKH, sKH, KW, mKW, sKW, OC, D, H, W, in_n, in_c, in_d, in_h, in_w,
        SD, SH, SW, FD, FH, FW, DD, DH, DW, y_n, y_c, y_d, y_h, y_w,
    ):  # fmt: skip
        a, b = cuda.shared.array(both_a, real), cuda.shared.array(both_b, real)
        t = uint32(cuda.threadIdx.x)
        q, row_tile = quotient_of(uint32(cuda.blockIdx.x), MT, mMT, sMT)
        q, column_tile = quotient_of(q, NT, mNT, sNT)
        slice, group = quotient_of(q, G, mG, sG)
        # A warp follows memory: BK outputs, or channels of channels_last.
        if last:
            kk, r = uint32(t // uint32(apart)), uint32(t % uint32(apart))
        else:
            kk, r = uint32(t % uint32(BK)), uint32(t // uint32(BK))
        first_row, first_column = uint32(row_tile * uint32(BM)), uint32(column_tile * uint32(BN))
        divisors = (OD, mOD, sOD), (OH, mOH, sOH), (OW, mOW, sOW)
        steps, firsts, sizes = (SD, SH, SW), (FD, FH, FW), (D, H, W)
        strides, y_strides = (in_n, in_c, in_d, in_h, in_w), (y_n, y_c, y_d, y_h, y_w)
        base_x, base_y = uint32(uint32(group * IC) * in_c), uint32(uint32(group * OC) * y_c)
        places = places_of(uint32(first_column + r), columns, (IC, mIC, sIC), (KH, mKH, sKH), (KW, mKW, sKW), in_c, (DD, DH, DW))
        at = uint32(uint32(slice * part) + kk)
        end = uint32(uint32(slice * part) + part)
        end = end if end < outputs else outputs
        row, column = uint32(uint32(t % uint32(across)) * uint32(RUN)), uint32(uint32(t // uint32(across)) * uint32(tile.columns))
        total, totals, turn, buffer = zeros(real(0)), zeros(real(0)), uint32(0), uint32(0)
        got, found = fetched(
            x, gy, at, end, divisors, base_x, base_y, steps, firsts, sizes, strides, y_strides, uint32(first_row + r), OC, places
        )
        begin = uint32(slice * part)
        while begin < end:
            from_a, from_b = uint32(buffer * size_a), uint32(buffer * size_b)
            keep_a(a, from_a, kk, r, got)
            keep_b(b, from_b, kk, r, found)
            cuda.syncthreads()
            begin, at = uint32(begin + uint32(BK)), uint32(at + uint32(BK))
            got, found = fetched(
                x, gy, at, end, divisors, base_x, base_y, steps, firsts, sizes, strides, y_strides, uint32(first_row + r), OC, places
            )
            total = multiplied(total, a, b, from_a, from_b, row, column)
            buffer, turn = uint32(one - buffer), uint32(turn + one)
            if turn == turns:
                totals, total, turn = added(totals, total), zeros(real(0)), uint32(0)
        begin = uint32(uint32(uint32(uint32(slice * G) + group) * OC) * columns)
        put(sums, added(totals, total), begin, uint32(first_row + row), OC, uint32(first_column + column), columns)

    pointers = (types.CPointer(real), types.CPointer(stored(dtype)), types.CPointer(stored(dtype)))
    return kernel, (*pointers, *(uint32,) * (9 + 3 + 9 + 9 + 1 + 3 + 5 + 9 + 5))


@specialised
def ordered(dtype):
    """gw as it lies, from the sums of all parts, in their order.

    Arguments: gw, sums; weights; parts; columns (tap, input channel) as divisor, channels of x a group likewise, taps along H and W
    likewise; gw's strides of output and input channel and of each axis."""
    real, narrow = computed(dtype), written(dtype)

    def kernel(gw, sums, total, parts, columns, m_columns, s_columns, IC, mIC, sIC, KH, mKH, sKH, KW, mKW, sKW, w_o, w_i, w_d, w_h, w_w):
        t = thread()
        if t >= total:
            return
        found, at, k = real(0), t, uint32(0)
        while k < parts:
            found += sums[at]
            at, k = uint32(at + total), uint32(k + uint32(1))
        o, column = quotient_of(t, columns, m_columns, s_columns)
        tap, c = quotient_of(column, IC, mIC, sIC)
        kd, kh, kw = taps_of(tap, (KH, mKH, sKH), (KW, mKW, sKW))
        gw[strided(uint32(uint32(o * w_o) + uint32(c * w_i)), kd, kh, kw, w_d, w_h, w_w)] = narrow(found)

    return kernel, (types.CPointer(stored(dtype)), types.CPointer(real), *(uint32,) * (2 + 12 + 5))
