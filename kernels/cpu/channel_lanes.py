"""Convolution with lanes across output channels: a tile of pixels x channels in registers, one broadcast element of x against registers
of weights.

Measured, one core whose FMA peak is about 235 GFLOP/s (float32, AVX-512), input packed: 3x3 of 64 channels of 56x56 222, 128 of 28x28 239,
256 of 14x14 210, where PyTorch runs at 175 to 180.
"""

from ..compile import specialised
from ..simd import number, prefetch, repeat, splat, unroll, with_phase
from ..tile import add_outer, add_tiles, each, load_several, store_columns, store_tile, tile_of
from . import blocking
from . import panel as panels
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

    @jitable
    def work(memory, tables, sizes, place, p):
        x, w, y, panel = memory
        lines, outs, taps = tables
        IC, OC, blocks, T, _, OW, KP, _, RQ, xn, _, _, yn, yc, yw, width, rowstep = sizes
        g, block, n, out, band_rows, maps, source, line = place
        weights, all_rows = (g * blocks + block) * (IC * T + 1) * B, maps * band_rows
        channel, left = g * OC + block * B, OC - block * B
        for group in range(0, all_rows, G):
            row = max(0, min(group, all_rows - G))
            origins = unroll(sources, G, repeat(row, G), (row, all_rows, band_rows, KP * RQ * rowstep, rowstep, lines, line, xn))
            results = unroll(targets, G, repeat(row, G), (row, all_rows, band_rows, outs, out, n * yn + channel * yc, yn))
            for column in range(0, OW, P):
                ow = min(column, OW - P)
                if in_place:
                    tile = accumulated(x, origins, source + ow * S, w, weights, taps, IC, T, 1)
                else:
                    tile = accumulated(panel, origins, ow * S, w, weights, taps, IC, T, width)
                if activates:
                    tile = each(tile, value, p)
                if pixels:
                    store_tile(tile, C, y, results, ow * yw, yw, 1, height, left)
                else:
                    store_columns(tile, C, y, results, ow * pixel, yc, pixel, left)

    return panels.over_bands(dtype, L, count, None if in_place else panels.packing(dtype, lanes, pixels, 1, few), work)
