"""Convolution with lanes across output channels: a tile of pixels x channels in registers, one broadcast element of x against registers
of weights.

Measured, one core whose FMA peak is about 235 GFLOP/s (float32, AVX-512), input packed: 3x3 of 64 channels of 56x56 222, 128 of 28x28 239,
256 of 14x14 210, where PyTorch runs at 175 to 180.
"""

from numba import int64

from ..compile import specialised
from ..simd import integers, number, numbers, pointer, pointer_at, prefetch, repeat, splat, unroll, with_phase
from ..tile import add_outer, add_tiles, each, load_several, store_columns, store_tile, tile_of
from . import blocking
from . import panel as panels_of
from .ahead import asking
from .number import compiled, jitable

AHEAD = 8
"""Steps ahead for which weights are asked for, and of one tap x; of several, x for the next channel: both stream from L2.  64 channels,
3x3: 193 GFLOP/s became 198 by weights, 201 by x, 207 by both, all that the FMA units do there; 4 to 16 steps are alike."""


@specialised
def forward(dtype, lanes, pieces, rows, cols, step, pixels, pixel, single, after, in_place, few):
    """Jobs: (band, group, block of cols * lanes output channels).  A tile is ``pieces`` output rows of ``rows`` pixels each, ``step``
    elements apart in the panel.  ``pixels``: the maps are channels_last; else y's pixels are ``pixel`` apart.  ``single``: one tap.
    ``in_place``: one tap reads x where it lies, channels side by side, pixels ``step`` apart.  ``few``: so many channels, dense pixels.

    Arguments: x, packed weights, y, panels, jobs a thread; addresses of lines, outs, taps; sizes, see convolution.py; the activation's
    parameters."""
    real, P, G, C, L, S, height = number(dtype), rows, pieces, cols, lanes, step, pieces * rows
    B, count = C * L, len(after.defaults) if after else 0
    pack = panels_of.packing(dtype, lanes, pixels, 1, few)
    ask = asking(real)
    activates = after is not None
    value = compiled(after.value) if activates else None

    @jitable
    def sources(found, g, args):
        row, all_rows, band_rows, image, rowstep, lines, line, xn = args
        at = min(row + g, all_rows - 1)
        if in_place:
            return with_phase(found, g, at // band_rows * xn + lines[line + at % band_rows])
        return with_phase(found, g, at // band_rows * image + at % band_rows * rowstep)

    @jitable
    def targets(found, g, args):
        row, all_rows, band_rows, outs, out, image, yn = args
        at = min(row + g, all_rows - 1)
        return with_phase(found, g, image + at // band_rows * yn + outs[out + at % band_rows])

    @jitable
    def chain(tile, panel, origins, at, w, wo, taps, channels, T, width):
        for _ in range(channels):
            if single:
                prefetch(panel, origins[0] + at + AHEAD * width)
                ask(w, wo + AHEAD * B, B)
                tile = add_outer(tile, panel, origins, at, S, w, wo, C)
                wo += B
            else:
                for t in range(T):
                    prefetch(panel, origins[0] + at + taps[t] + width)
                    ask(w, wo + AHEAD * B, B)
                    tile = add_outer(tile, panel, origins, at + taps[t], S, w, wo, C)
                    wo += B
            at += width
        return tile

    @jitable
    def accumulated(panel, origins, at, w, wo, taps, IC, T, width):
        together, zeros = max(1, blocking.CHUNK // max(1, T)), tile_of(height, repeat(splat(real(0), L), C))
        biases = tile_of(height, load_several(w, wo, L, C))
        wo += B
        total = chain(biases, panel, origins, at, w, wo, taps, min(IC, together), T, width)
        for c in range(together, IC, together):
            more = min(IC - c, together)
            total = add_tiles(total, chain(zeros, panel, origins, at + c * width, w, wo + c * T * B, taps, more, T, width))
        return total

    if in_place:

        @jitable
        def result(x, panel, source, origins, at, w, wo, taps, IC, T, width):
            return accumulated(x, origins, source + at, w, wo, taps, IC, T, 1)

    else:

        @jitable
        def result(x, panel, source, origins, at, w, wo, taps, IC, T, width):
            return accumulated(panel, origins, at, w, wo, taps, IC, T, width)

    def kernel(args, start, stop):
        x, w, y = pointer(args, 0, dtype), pointer(args, 1, real), pointer(args, 2, dtype)
        panels, grain = integers(args, 3, 2)
        lines, outs, taps = pointer(args, 5, int64), pointer(args, 6, int64), pointer(args, 7, int64)
        N, IC, OC, groups, blocks, T, OD, OH, OW, R, images, bands, KP, Q, RQ = integers(args, 8, 15)
        width, first, W, xn, xc, xw, yn, yc, yw, rowstep, bytes_ = integers(args, 23, 11)
        p = numbers(args, 34, count, real, L)
        panel = pointer_at(panels + start // grain * bytes_, real)
        packed = -1
        for job in range(start, stop):
            block, rest = job % blocks, job // blocks
            g, band = rest % groups, rest // groups
            row0, slab = band % bands * R, band // bands
            od, n = slab % OD, slab // OD * images
            band_rows, band_images = min(R, OH - row0), min(images, N - n)
            source, line = n * xn + g * IC * xc, od * KP * Q + row0
            if packed != rest and not in_place:
                packed = rest
                sizes = lines, IC, KP, RQ, Q, width, first, W, xn, xc, xw, rowstep
                pack(x, panel, source, line, band_images, band_rows + Q - OH, sizes)
            weights, all_rows = (g * blocks + block) * (IC * T + 1) * B, band_images * band_rows
            channel, left = g * OC + block * B, OC - block * B
            for group in range(0, all_rows, G):
                row = max(0, min(group, all_rows - G))
                origins = unroll(sources, G, repeat(row, G), (row, all_rows, band_rows, KP * RQ * rowstep, rowstep, lines, line, xn))
                given = row, all_rows, band_rows, outs, od * OH + row0, n * yn + channel * yc, yn
                results = unroll(targets, G, repeat(row, G), given)
                for column in range(0, OW, P):
                    ow = min(column, OW - P)
                    tile = result(x, panel, source, origins, ow * S, w, weights, taps, IC, T, width)
                    if activates:
                        tile = each(tile, value, p)
                    if pixels:
                        store_tile(tile, C, y, results, ow * yw, yw, height, left)
                    else:
                        store_columns(tile, C, y, results, ow * pixel, yc, pixel, left)

    return kernel
