"""Convolution with lanes across pixels: a tile of channels x pixels in registers, one broadcast weight against registers of x.

For contiguous maps whose rows fill registers: results are stored as they lie, where channel_lanes.py transposes them, and with few output
channels no lane idles.  Measured, one core whose FMA peak is about 215 GFLOP/s (float32, AVX-512): 1x1 of 64 channels of 56x56 to 64, 200,
and to 256, 177, where channel_lanes.py gives 135 and 145, PyTorch 156 and 132.
"""

from numba import int64

from ..compile import specialised
from ..simd import integers, number, numbers, phase, pointer, pointer_at, repeat, scatter_between, splat, unroll
from ..tile import add_outer, add_tiles, each, store_tile, tile_of_each
from . import blocking
from . import panel as panels_of
from .number import compiled, jitable


@specialised
def forward(dtype, lanes, rows, cols, stride, in_place, single, after, pixel):
    """Jobs: (band, group, block of ``rows`` output channels).  A tile is ``rows`` channels x ``cols`` registers of pixels of a row.
    ``in_place``: x is read where it lies, as its rows need no padding.  ``single``: one tap.
    ``pixel``: y's pixels are so far apart.

    Arguments: as channel_lanes.forward's; ``stride`` > 1: taps are offsets in a panel by phases."""
    real, R, C, L, wide, whole = number(dtype), rows, cols, lanes, cols * lanes, rows * cols
    activates = after is not None
    value, count = (compiled(after.value), len(after.defaults)) if activates else (None, 0)
    pack = panels_of.packing(dtype, lanes, False, stride)

    @jitable
    def chain(tile, x, at, w, wo, taps, channels, T, width):
        for _ in range(channels):
            if single:
                tile = add_outer(tile, w, (wo,), 0, 1, x, at, C)
                wo += R
            else:
                for t in range(T):
                    tile = add_outer(tile, w, (wo,), 0, 1, x, at + taps[t], C)
                    wo += R
            at += width
        return tile

    @jitable
    def accumulated(x, at, w, wo, taps, IC, T, width):
        together, zeros = max(1, blocking.CHUNK // max(1, T)), repeat(splat(real(0), L), whole)
        total = chain(tile_of_each(w, wo, R, C, L), x, at, w, wo + R, taps, min(IC, together), T, width)
        wo += R
        for c in range(together, IC, together):
            more = min(IC - c, together)
            total = add_tiles(total, chain(zeros, x, at + c * width, w, wo + c * T * R, taps, more, T, width))
        return total

    @jitable
    def put(tile, i, args):
        y, at, yc, height, ow, OW = args
        if i // C < height:
            base = at + i // C * yc
            scatter_between(y, base, (ow + i % C * L) * pixel, pixel, 0, OW * pixel, phase(tile, i))
        return tile

    if pixel == 1:

        @jitable
        def keep(tile, y, at, yc, height, ow, OW):
            store_tile(tile, C, y, (at,), ow, yc, height, OW)

    else:

        @jitable
        def keep(tile, y, at, yc, height, ow, OW):
            unroll(put, whole, tile, (y, at, yc, height, ow, OW))

    if in_place:

        @jitable
        def result(x, at, panel, in_panel, w, wo, taps, IC, T, xc, width):
            return accumulated(x, at, w, wo, taps, IC, T, xc)

    else:

        @jitable
        def result(x, at, panel, in_panel, w, wo, taps, IC, T, xc, width):
            return accumulated(panel, in_panel, w, wo, taps, IC, T, width)

    def kernel(args, start, stop):
        x, w, y = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, dtype)
        panels, grain = integers(args, 3, 2)
        lines, outs, taps = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        N, IC, OC, groups, blocks, T, OD, OH, OW, band_height, images, bands, KP, Q, RQ = integers(args, 8, 15)
        width, first, W, xn, xc, xw, yn, yc, _, rowstep, bytes_ = integers(args, 23, 11)
        p = numbers(args, 34, count, real, L)
        panel = pointer_at(panels + start // grain * bytes_, real)
        packed = -1
        for job in range(start, stop):
            block, rest = job % blocks, job // blocks
            g, band = rest % groups, rest // groups
            row0, slab = band % bands * band_height, band // bands
            od, n = slab % OD, slab // OD * images
            band_rows, band_images = min(band_height, OH - row0), min(images, N - n)
            source, line = n * xn + g * IC * xc, od * KP * Q + row0
            if packed != rest and not in_place:
                packed = rest
                sizes = lines, IC, KP, RQ, Q, width, first, W, xn, xc, xw, rowstep
                pack(x, panel, source, line, band_images, band_rows + Q - OH, sizes)
            weights, channel = (g * blocks + block) * (IC * T + 1) * R, g * OC + block * R
            for i in range(band_images):
                for r in range(band_rows):
                    to = (n + i) * yn + channel * yc + outs[od * OH + row0 + r]
                    for column in range(0, OW, wide):
                        ow = max(0, min(column, OW - wide))
                        at, in_panel = source + i * xn + lines[line + r] + ow, (i * KP * RQ + r) * rowstep + ow
                        tile = result(x, at, panel, in_panel, w, weights, taps, IC, T, xc, width)
                        if activates:
                            tile = each(tile, value, p)
                        keep(tile, y, to, yc, OC - block * R, ow, OW)

    return kernel
