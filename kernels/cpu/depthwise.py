"""Depthwise convolution: each channel by its own weights.  Memory is its limit.

Of channels_last maps lanes run across channels, of contiguous ones across pixels.

What is inside a map ``weights_of_planes`` knows from tables along each axis: for each output the first and the end of its taps inside,
and for each tap where it lies from an output's first position, in elements.  x's steps are there from output to output.
"""

from numba import int64

from ..compile import specialised
from ..simd import (
    between,
    fused,
    integers,
    load,
    load_masked,
    load_one,
    load_phases_between,
    number,
    numbers,
    phase,
    pointer,
    prefetch,
    prefetch_to_write,
    repeat,
    scatter_between,
    splat,
    store,
    store_masked,
    store_phases,
    store_phases_between,
    total,
    unroll,
    with_phase,
)
from ..tile import add_pixel_products, add_pixels, add_products, add_scaled, add_tile, add_window, each, load_apart_masked, store_tile
from . import ahead, panel
from .number import compiled, jitable

PIXELS_AHEAD = 64
"""Pixels of channels_last maps ahead for which gradients by the weights ask: a job reads one line of each, which the hardware does not
follow.  us, a batch of 8, without, by 16, 32 and 64 ahead: 3x3 of 32x112x112 2,270, 1,330, 1,020 and 900; of 144x56x56 3,200, 1,800, 1,410
and 990; of 192x28x28, which L2 and L3 hold, 310 to 320."""


def _masking(real, lanes, leaves):
    """(c, C) -> add_pixels's ``masking`` of the channels from c on, of C, where some are left over that fill no register."""
    if leaves:

        @jitable
        def masking(c, C):
            return between(c, 1, 0, C, lanes), splat(real(0), lanes)

    else:

        @jitable
        def masking(c, C):
            return ()

    return masking


def _one_of(makers, k=0):
    """(tile, ends, result, args) -> what the first of ``makers``, from the k-th on, whose end lies behind the tile makes of the others."""
    made = makers[k]
    if k == len(makers) - 1:

        @jitable
        def found(tile, ends, result, args):
            return made(result, args)

        return found
    others = _one_of(makers, k + 1)

    @jitable
    def found(tile, ends, result, args):
        if tile < ends[k]:
            return made(result, args)
        return others(tile, ends, result, args)

    return found


@specialised
def forward(dtype, lanes, pixels, step, spread, shapes, sides, leaves, after):
    """Channels_last maps, a convolution or its gradient by the input: a tile is ``pixels`` positions along a row by a register of channels.
    ``step``: of x, rows and columns from position to position; ``spread``: the rows and columns of y that a position makes, one or two,
    each by a correlation of its own.  ``shapes``: of these, of rows and of columns (taps, from a position's to the first, from tap to tap).
    ``sides``: of a row's tiles, as far as they differ, from the first on, (whether a tile's last column of y is one too many, of each
    correlation the columns of x, first and end, that are in the map).  ``leaves``: whether channels fill no register.

    Jobs: (map, slice, row of positions).  Arguments: x, packed weights, correlation by correlation and within each from the first tap to
    the last, y; sizes, see depthwise_plans.py; of each of ``sides`` the end of its tiles; the activation's parameters.  ``far``, a size,
    says how far behind a row's first element to ask for what the next row reads anew, or 0 (us, a batch of 8, so and not: 3x3 of
    32x112x112 640 and 960), and ``soon`` how far ahead to ask for what is written, or 0."""
    real, P, L = number(dtype), pixels, lanes
    (down, across), (tall, wide) = step, spread
    doubles_down, doubles, ask, part = tall > 1, wide > 1, ahead.asking(dtype), pixels * down * across
    masking = _masking(real, lanes, leaves)
    activates = after is not None
    value, count = (compiled(after.value), len(after.defaults)) if activates else (None, 0)

    @jitable
    def put(tile, r, args):
        y, at, apart, soon, given, p = args
        if soon > 0:
            prefetch_to_write(y, at + r * apart + soon)
        found = phase(tile, r)
        if activates:
            found = value(found, p)
        if leaves:
            store_masked(y, at + r * apart, found, given[0])
        else:
            store(y, at + r * apart, found)
        return tile

    def correlation(of, kept, drops):
        """Of one tile and register of channels."""
        (high, low_h, apart_h), (along, low_w, apart_w) = shapes[of]
        before, results = sum(h * w for (h, *_), (w, *_) in shapes[:of]), P - drops  # taps of a slice

        @jitable
        def made(x, w, y, at, to, mine, row, depth, strides, given, p):
            d, D, KD, apart_d, H, xd, xh, xw, yw, soon = *depth, *strides
            tile, at, row = repeat(load(w, mine, L), P), at + low_h * xh + low_w * xw, row + low_h
            for i in range(KD):
                if 0 <= d + i * apart_d < D:
                    # LLVM writes this loop out.  From a first to an end it does not: us, a batch of 8, 192x28x28 235 for 195.
                    for h in range(high):
                        if 0 <= row + h * apart_h < H:
                            here = at + i * apart_d * xd + h * apart_h * xh
                            weights = mine + (1 + KD * before + (i * high + h) * along) * L
                            tile = add_pixels(tile, x, here, xw, w, weights, along, across, apart_w, kept, given)
            unroll(put, results, tile, (y, to, wide * yw, soon, given, p))

        return made

    def tile_of(drops, kept):
        """All that a tile makes, of all channels."""
        # The same ones where there is one row or column.
        evens, odds = (correlation(b, kept[b], drops and b == wide - 1) for b in (0, wide - 1))
        below, last = (correlation(b, kept[b], drops and b == len(shapes) - 1) for b in (len(shapes) - wide, len(shapes) - 1))

        @jitable
        def made(result, args):
            x, w, y, at, to, row, depth, rows, C, T, yh, far, strides, p = args
            yw = strides[4]
            for c in range(0, C, L):
                given, mine = masking(c, C), c * (T + 1)
                if far >= 0:
                    ask(x, far + c * part, L * part)
                evens(x, w, y, at + c, to + c, mine, row, depth, strides, given, p)
                if doubles:
                    odds(x, w, y, at + c, to + yw + c, mine, row, depth, strides, given, p)
                if doubles_down and rows > 1:
                    below(x, w, y, at + c, to + yh + c, mine, row, depth, strides, given, p)
                    if doubles:
                        last(x, w, y, at + c, to + yh + yw + c, mine, row, depth, strides, given, p)
            return result

        return made

    several, all_of = len(sides), _one_of([tile_of(*side) for side in sides])

    def kernel(args, start, stop):
        x, w, y = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, dtype)
        C, T, OD, D, KD, low_d, step_d, apart_d, H, positions, OH, OW = integers(args, 5, 12)
        xn, xd, xh, xw, yn, yd, yh, yw, far, soon = integers(args, 17, 10)
        ends, p = integers(args, 27, several), numbers(args, 27 + several, count, real, L)
        strides, new = (H, xd, xh, xw, yw, soon), xh * down // OW
        for job in range(start, stop):
            n, od, t = job // (positions * OD), job // positions % OD, job % positions
            d, rows = od * step_d + low_d, min(tall, OH - t * tall)
            source, result = n * xn + d * xd + t * down * xh, n * yn + od * yd + t * tall * yh
            for tile in range(ends[several - 1]):
                ow = min(tile * P, OW - P)  # the last overlaps the one before
                at, to, asked = source + ow * across * xw, result + ow * wide * yw, source + far + ow * new if far > 0 else -1
                depth = d, D, KD, apart_d
                all_of(tile, ends, 0, (x, w, y, at, to, t * down, depth, rows, C, T, yh, asked, strides, p))

    return kernel


@specialised
def forward_rows(dtype, lanes, rows, high, along, down, across, after):
    """The same of contiguous maps, with lanes across pixels, of kernels one slice deep whose taps lie side by side: a tile is ``rows``
    output rows by a register of pixels, the kernel ``high`` x ``along`` with steps of ``down`` x ``across``.  x is read as it lies: us, one
    core (Zen 5), so, through a panel, and PyTorch's in its better layout: 3x3 of 32x112x112 59, 130, 95; 144x56x56 84, 170, 105; 960x7x7
    30, 69, 43; with steps of 2 96x112x112 114, 240, 115.

    Jobs: (channel, slice, band of output rows).  Arguments: x, packed weights, their taps from the first to the last, y; sizes, see
    convolution.py; the activation's parameters."""
    real, G, L, taps, steps = number(dtype), rows, lanes, high * along, (down, across)
    far, ask = ahead.distance(dtype), ahead.asking(dtype)
    reads, wide = (rows - 1) * down + high, lanes * across + (along - 1) // across * across
    activates = after is not None
    value, count = (compiled(after.value), len(after.defaults)) if activates else (None, 0)

    @jitable
    def read(weights, k, args):
        w, at = args
        return with_phase(weights, k, load_one(w, at + k, L))

    def kernel(args, start, stop):
        x, w, y = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, dtype)
        C, D, OH, OW, H, W, bands, R, low_h, low_w, x_end, xn, xc, xd, xh, yn, yc, yd, yh = integers(args, 5, 19)
        p = numbers(args, 24, count, real, L)
        for job in range(start, stop):
            plane, first = job // bands, job % bands * R
            channel, d = plane // D, plane % D
            n, c = channel // C, channel % C
            source, result, mine = n * xn + c * xc + d * xd, n * yn + c * yc + d * yd, c * (taps + 1)
            biases, weights = repeat(load_one(w, mine, L), G), unroll(read, taps, repeat(load_one(w, mine, L), taps), (w, mine + 1))
            end = min(OH, first + R)
            for group in range(first, end, G):
                row = max(first, min(group, end - G))
                top = row * down + low_h
                for column in range(0, OW, L):
                    ow = max(0, min(column, OW - L))
                    left = ow * across + low_w
                    at = source + top * xh + left
                    for r in range(G * down):
                        ask(x, at + r * xh + far, L * across)
                    within = left >= 0 and left + (L - 1) * across + along <= W and at + (reads - 1) * xh + wide <= x_end
                    if within and top >= 0 and top + reads <= H:
                        tile = add_window(biases, x, at, xh, weights, along, steps, ())
                    else:
                        tile = add_window(biases, x, at, xh, weights, along, steps, (top, H, left, W))
                    if activates:
                        tile = each(tile, value, p)
                    store_tile(tile, 1, y, (result + row * yh + ow,), 0, yh, 1, end - row, OW)

    return kernel


@specialised
def spread_rows(dtype, lanes, rows, down, shapes):
    """Gradient by the input of contiguous maps where the kernel moves by ``down``, 1 or 2, x 2: rows of gx follow each other ``down`` at a
    time and each is two correlations of gy at step 1, whose registers are interleaved and stored as rows lie.  ``shapes``: of each of
    these, in the order of the first elements they make, (rows of taps, taps of a row, where the first lies from gy's row and column).

    Jobs: (channel, slice, band of ``rows`` rows of gy and those it makes).  Arguments: gy, packed weights, correlation by correlation and
    within each from the first tap to the last, gx; sizes, see depthwise_plans.py, the last of which says how far ahead to ask for gx, or 0
    (us, a batch of 8, so and not: 3x3 with steps of 2 of 144x56x56 606 and 1,304, of 96x112x112 2,290 and 3,060; four correlations
    through panels, which scattered their results, 5,770 of 144x56x56)."""
    real, G, L, step = number(dtype), rows, lanes, (1, 1)
    ask = ahead.asking(dtype, to_write=True)

    def correlation(of):
        """(gy, w, mine, plane, yh, t, u, OH, OW): rows t .. of one of them, columns u .."""
        high, along, low_h, low_w = shapes[of]
        taps, start = high * along, 1 + sum(h * w for h, w, *_ in shapes[:of])

        if taps == 0:  # a step longer than the kernel

            @jitable
            def made(gy, w, mine, plane, yh, t, u, OH, OW):
                return repeat(load_one(w, mine, L), G)

            return made

        @jitable
        def read(weights, k, args):
            w, at = args
            return with_phase(weights, k, load_one(w, at + k, L))

        @jitable
        def made(gy, w, mine, plane, yh, t, u, OH, OW):
            zero = splat(real(0), L)
            weights, tile = unroll(read, taps, repeat(zero, taps), (w, mine + start)), repeat(load_one(w, mine, L), G)
            top, left = t + low_h, u + low_w
            at = plane + top * yh + left
            if left >= 0 and left + L + along - 1 <= OW and top >= 0 and top + G + high - 1 <= OH:
                return add_window(tile, gy, at, yh, weights, along, step, ())
            return add_window(tile, gy, at, yh, weights, along, step, (top, OH, left, OW))

        return made

    @jitable
    def put(tile, r, args):
        gx, to, gh, i, u, H, W, other = args
        if i + r * down < H:
            place, both = to + (i + r * down) * gh, (phase(tile, r), phase(other, r))
            if 2 * (u + L) <= W:
                store_phases(gx, place + 2 * u, both)
            else:
                store_phases_between(gx, place, 2 * u, 0, W, both)
        return tile

    def line(a):
        """(gy, w, gx, ...): the a-th of ``down`` rows that follow each other, for G rows of gy."""
        evens, odds = correlation(2 * a), correlation(2 * a + 1)

        @jitable
        def made(gy, w, gx, mine, plane, to, yh, gh, t, u, OH, OW, H, W):
            tile, other = evens(gy, w, mine, plane, yh, t, u, OH, OW), odds(gy, w, mine, plane, yh, t, u, OH, OW)
            unroll(put, G, tile, (gx, to, gh, down * t + a, u, H, W, other))

        return made

    above, below = line(0), line(down - 1)

    def kernel(args, start, stop):
        gy, w, gx = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, dtype)
        C, D, T, OH, OW, H, W, bands, R, yn, yc, yd, yh, gn, gc, gd, gh, far = integers(args, 5, 18)
        most, wide = (H + down - 1) // down, (W + 1) // 2
        for job in range(start, stop):
            slice, first = job // bands, job % bands * R
            channel, d = slice // D, slice % D
            n, c = channel // C, channel % C
            plane, to, mine = n * yn + c * yc + d * yd, n * gn + c * gc + d * gd, c * (T + 1)
            end = min(most, first + R)
            for group in range(first, end, G):
                t = max(first, min(group, end - G))
                for column in range(0, wide, L):
                    u = max(0, min(column, wide - L))
                    for r in range(G * down if far > 0 else 0):
                        ask(gx, to + (down * t + r) * gh + 2 * u + far, 2 * L)
                    above(gy, w, gx, mine, plane, to, yh, gh, t, u, OH, OW, H, W)
                    if down > 1:
                        below(gy, w, gx, mine, plane, to, yh, gh, t, u, OH, OW, H, W)

    return kernel


@specialised
def forward_planes(dtype, lanes, rows, cols, stride, after, pixel):
    """The same of contiguous maps, with lanes across pixels: a tile is ``rows`` output rows by ``cols`` registers of pixels of each.

    Jobs and arguments: as pixel_lanes.forward's, whose blocks are of one output channel."""
    G, C, L, wide, whole = rows, cols, lanes, cols * lanes, rows * cols
    activates = after is not None
    value, count = (compiled(after.value), len(after.defaults)) if activates else (None, 0)

    @jitable
    def work(memory, tables, sizes, place, p):
        _, w, y, mine = memory
        _, outs, taps = tables
        _, _, _, T, _, OH, OW, _, _, _, _, _, _, yn, yc, _, _, rowstep = sizes
        c, _, n, out, rows, _, _, _ = place
        weights, yh = c * (T + 1), outs[3] - outs[0] if OH > 1 else 0
        for group in range(0, rows, G):
            row = max(0, min(group, rows - G))
            to = n * yn + c * yc + outs[3 * (out + row)]
            for column in range(0, OW, wide):
                ow = max(0, min(column, OW - wide))
                tile = repeat(load_one(w, weights, L), whole)
                for t in range(T):
                    tile = add_scaled(tile, mine, row * rowstep + ow + taps[t], rowstep, load_one(w, weights + 1 + t, L), C)
                if activates:
                    tile = each(tile, value, p)
                store_tile(tile, C, y, (to,), ow * pixel, yh, pixel, rows - row, OW)

    return panel.over_bands(dtype, L, count, panel.packing(dtype, lanes, stride), work)


@specialised
def weights_of_pixels(dtype, lanes, high, along, step, apart, sides, leaves):
    """Gradient of the weights, of channels_last maps: a tile is pixels of a row of gy.  ``step``: of x, rows and columns from output to
    output; ``apart``: of x, rows and columns from tap to tap; ``sides``: of a row's tiles, as far as they differ, from the first on,
    (pixels, the columns of x, first and end, that are in the map).  ``leaves``: whether channels fill no register.

    Jobs: registers of channels.  The sums of ``high`` rows of ``along`` taps of the kernel are in registers together; each output row's
    are added to those of the others, as one sum of 100,000 products rounds too much.  (us, a batch of 8, pixel by pixel and so: 192x28x28
    310 and 200, 960x7x7 152 and 103.)
    Arguments: x, gy, gw; the address of where each tap lies in gw; sizes, see depthwise_plans.py; of each of ``sides`` the end of its
    tiles."""
    real, K, L, (down, across), (apart_h, apart_w) = number(dtype), along, lanes, step, apart
    several, sums_together, masking, wide = len(sides), high * along, _masking(real, lanes, leaves), sides[0][0]
    new_h, new_w = min(down, high), min(across, along)

    @jitable
    def given(found, r, args):
        gy, at, apart, masks = args
        prefetch(gy, at + (r + PIXELS_AHEAD) * apart)
        if leaves:
            return with_phase(found, r, load_masked(gy, at + r * apart, *masks))
        return with_phase(found, r, load(gy, at + r * apart, L))

    @jitable
    def ask(done, i, args):
        x, at, xh, xw = args
        r, h, w = i // (new_h * new_w), i // new_w % new_h, i % new_w
        column = (r + PIXELS_AHEAD) * across + (K - 1) * apart_w - w
        prefetch(x, at + ((high - 1) * apart_h - h) * xh + column * xw)
        return done

    def tile_of(count, kept):
        asked = count * new_h * new_w

        @jitable
        def made(sums, args):
            x, gy, at, to, xh, xw, yw, top, H, masks = args
            unroll(ask, asked, 0, (x, at, xh, xw))
            gys = unroll(given, count, repeat(splat(real(0), L), count), (gy, to, yw, masks))
            return add_pixel_products(sums, x, at, apart_h * xh, xw, gys, K, across, apart_w, kept, top, apart_h, H, masks)

        return made

    all_of = _one_of([tile_of(*side) for side in sides])

    @jitable
    def put(sums, t, args):
        gw, places, first, c, C, step = args
        scatter_between(gw, places[first + t], c * step, step, 0, C * step, phase(sums, t))
        return sums

    def kernel(args, start, stop):
        x, gy, gw, places = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), pointer(args, 3, int64)
        N, C, OD, D, KD, low_d, step_d, apart_d, OH, H, KH, low_h, low_w, weights = integers(args, 4, 14)
        xn, xd, xh, xw, yn, yd, yh, yw = integers(args, 18, 8)
        ends, zeros = integers(args, 26, several), repeat(splat(real(0), L), sums_together)
        for job in range(start, stop):
            c = job * L
            masks = masking(c, C)
            for k in range(KD * (KH // high)):
                d, h = k // (KH // high), k % (KH // high) * high
                totals = zeros
                for line in range(N * OD * OH):
                    n, od, oh = line // (OD * OH), line // OH % OD, line % OH
                    depth, top = od * step_d + low_d + d * apart_d, oh * down + low_h + h * apart_h
                    if 0 <= depth < D and top < H and top + high * apart_h > 0:
                        row, result = n * xn + depth * xd + top * xh + low_w * xw + c, n * yn + od * yd + oh * yh + c
                        sums = zeros
                        for tile in range(ends[several - 1]):
                            at, to = row + tile * wide * across * xw, result + tile * wide * yw
                            sums = all_of(tile, ends, sums, (x, gy, at, to, xh, xw, yw, top, H, masks))
                        totals = add_tile(totals, sums)
                unroll(put, sums_together, totals, (gw, places, (d * KH + h) * K, c, C, weights))

    return kernel


@specialised
def weights_of_rows(dtype, lanes, rows, high, along, down, across):
    """The same of contiguous maps, of kernels ``high`` x ``along`` as ``forward_rows`` has them; ``rows`` divides the output rows.  Jobs:
    channels.  Lanes run across the pixels of a row, and are added up at the end; a row of x is loaded once for ``rows`` rows of gy (us, a
    batch of 8, so and by ``weights_of_planes``: 3x3 of 144x56x56 945 and 5,850, with steps of 2 510 and 4,100, of 960x7x7 173 and 626).

    Arguments: x, gy, gw; the address of where each tap lies in gw; sizes, see depthwise_plans.py."""
    real, G, K, L, taps, steps = number(dtype), rows, along, lanes, high * along, (down, across)
    far, ask, reads = ahead.distance(dtype), ahead.asking(dtype), (rows - 1) * down + high
    wide = lanes * across + (along - 1) // across * across

    @jitable
    def put(sums, t, args):
        gw, at, places = args
        store_masked(gw, at + places[t], splat(total(phase(sums, t)), L), between(0, 1, 0, 1, L))
        return sums

    def kernel(args, start, stop):
        x, gy, gw, places = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), pointer(args, 3, int64)
        N, D, OH, OW, H, W, low_h, low_w, x_end, xn, xc, xd, xh, yn, yc, yd, yh, step = integers(args, 4, 18)
        zero = splat(real(0), L)
        for c in range(start, stop):
            totals = repeat(zero, taps)
            for slab in range(N * D):
                n, d, sums = slab // D, slab % D, repeat(zero, taps)
                source, result = n * xn + c * xc + d * xd, n * yn + c * yc + d * yd
                for row in range(0, OH, G):
                    top = row * down + low_h
                    for ow in range(0, OW, L):
                        left, to = ow * across + low_w, result + row * yh + ow
                        at = source + top * xh + left
                        for r in range(G * down):
                            ask(x, at + r * xh + far, L * across)
                        for r in range(G):
                            ask(gy, to + r * yh + far, L)
                        given = load_apart_masked(gy, to, yh, G, between(ow, 1, 0, OW, L), zero)
                        within = left >= 0 and left + (L - 1) * across + K <= W and ow + L <= OW and at + (reads - 1) * xh + wide <= x_end
                        if within and top >= 0 and top + reads <= H:
                            sums = add_products(sums, x, at, xh, given, K, steps, ())
                        else:
                            sums = add_products(sums, x, at, xh, given, K, steps, (top, H, left, W, OW - ow))
                totals = add_tile(totals, sums)
            unroll(put, taps, totals, (gw, c * step, places))

    return kernel


@specialised
def weights_of_planes(dtype, lanes, high, along, stride):
    """The same of contiguous maps.  Jobs: channels.  Lanes run across the pixels of a row, and are added up at the end."""
    real, K, L, S, sums_together = number(dtype), along, lanes, stride, high * along

    @jitable
    def add(sums, t, args):
        x, row, at, taps, M, h, h0, h1, W, g, zero = args
        if h0 <= h + t // K < h1:
            here = load_phases_between(x, row + taps[M + h + t // K], at + taps[2 * M + t % K], 0, W, S, zero)[0]
            return with_phase(sums, t, fused(here, g, phase(sums, t)))
        return sums

    @jitable
    def put(sums, t, args):
        gw, at, places, first = args
        store_masked(gw, at + places[first + t], splat(total(phase(sums, t)), L), between(0, 1, 0, 1, L))
        return sums

    def kernel(args, start, stop):
        x, gy, gw = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        inside, taps, places = pointer(args, 3, int64), pointer(args, 4, int64), pointer(args, 5, int64)
        N, _, OD, OH, OW, W, KD, KH, M, xn, xc, xd, xh, xw, yn, yc, yd, yh, _, step = integers(args, 6, 20)
        zero = splat(real(0), L)
        for c in range(start, stop):
            for d in range(KD):
                for h in range(0, KH, high):
                    sums = repeat(zero, sums_together)
                    for slab in range(N * OD * OH):
                        n, od, oh = slab // (OD * OH), slab // OH % OD, slab % OH
                        deep, tall = 2 * od, 2 * (OD + oh)
                        h0, h1 = inside[tall], inside[tall + 1]
                        if inside[deep] <= d < inside[deep + 1] and h < h1 and h0 < h + high:
                            row = n * xn + c * xc + od * xd + oh * xh + taps[d]
                            result = n * yn + c * yc + od * yd + oh * yh
                            for ow in range(0, OW, L):
                                g = load_masked(gy, result + ow, between(ow, 1, 0, OW, L), zero)
                                sums = unroll(add, sums_together, sums, (x, row, ow * xw, taps, M, h, h0, h1, W, g, zero))
                    unroll(put, sums_together, sums, (gw, c * step, places, (d * KH + h) * K))

    return kernel
