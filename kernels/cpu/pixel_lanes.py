"""Convolution with lanes across pixels: a tile of channels x pixels in registers, one broadcast weight against registers of x.

For contiguous maps whose rows fill registers: results are stored as they lie, where channel_lanes.py transposes them, and with few output
channels no lane idles.  Measured, one core whose FMA peak is about 215 GFLOP/s (float32, AVX-512): 1x1 of 64 channels of 56x56 to 64, 200,
and to 256, 177, where channel_lanes.py gives 135 and 145, PyTorch 156 and 132.
"""

from ..compile import specialised
from ..simd import number, repeat, splat
from ..tile import add_outer, add_tiles, each, store_tile, tile_of_each
from . import blocking
from . import panel as panels
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
    def work(memory, tables, sizes, place, p):
        x, w, y, panel = memory
        lines, outs, taps = tables
        IC, OC, blocks, T, _, OW, KP, _, RQ, xn, xc, _, yn, yc, _, width, rowstep = sizes
        g, block, n, out, band_rows, maps, source, line = place
        weights, channel = (g * blocks + block) * (IC * T + 1) * R, g * OC + block * R
        for i in range(maps):
            for r in range(band_rows):
                to = (n + i) * yn + channel * yc + outs[out + r]
                for column in range(0, OW, wide):
                    ow = max(0, min(column, OW - wide))
                    if in_place:
                        tile = accumulated(x, source + i * xn + lines[line + r] + ow, w, weights, taps, IC, T, xc)
                    else:
                        tile = accumulated(panel, (i * KP * RQ + r) * rowstep + ow, w, weights, taps, IC, T, width)
                    if activates:
                        tile = each(tile, value, p)
                    store_tile(tile, C, y, (to,), ow * pixel, yc, pixel, OC - block * R, OW)

    return panels.over_bands(dtype, L, count, None if in_place else panels.packing(dtype, lanes, False, stride), work)
